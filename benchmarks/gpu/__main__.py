import sys

from benchmarks.gpu import install

if folder := install.asked(sys.argv[1:]):  # before anything is imported that may not be there
    sys.exit(install.again(folder, sys.argv[1:]))

from benchmarks.gpu.main import main

main()
