from benchmarks.gpu.main import main

main()
