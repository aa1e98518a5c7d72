r"""Our dense decoder against the same decoder from other exporters, all on one ONNX Runtime.

    python -m benchmarks.peers prepare                      # here: checkpoints and our bundles
    PEERS/bin/python -m benchmarks.peers build genai        # where that peer is installed
    PEERS/bin/python -m benchmarks.peers build mobius mobius-standard mobius-static
    OPTIMUM/bin/python -m benchmarks.peers build optimum
    python -m benchmarks.peers time                         # here: what was built, in rounds

In 4 bits, beside onnxruntime-genai's int4 and llama.cpp's Q4_0, and our own in floats:

    python -m benchmarks.peers prepare --int4
    PEERS/bin/python -m benchmarks.peers build genai-int4
    LLAMA/bin/python -m benchmarks.peers build llama-q4_0
    python -m benchmarks.peers time --int4 --threads 2

The decoder is Qwen2-0.5B's with a vocabulary of 8,192 and random weights, fp32: peers get it as
`Qwen2ForCausalLM`, we as the decoder of a LLaVA. All are fed the same tokens; embeddings of
the middle ones stand for visual tokens where a graph of ours wants some. Before anything is timed,
all must give the same logits. A second group feeds peers the average number of tokens that our
pruned bundle has in its layers: the floor that pruning inside the decoder can reach.

In 4 bits every peer rounds in its own way, so logits are compared with those of floats, and may be
apart. All quantise the head too; peers' blocks have 32 inputs, ours 128 or 32. llama.cpp runs by
its own code, in the environment that built its file, with a cache of float16 and embeddings in
Q4_0; it and genai read 640 tokens of text.

Every graph has a process of its own, and processes take turns. Equal graphs were seen to decode at
speeds 10% apart for as long as they were open, within one process and across several, so all are
opened anew a few times, in another order each time. `again` is our dense bundle a second time: what
it differs by is noise. All together hold some 13 GB.

Peers' pins differ from ours, so they are installed apart:

    PEERS    pip install mobius-onnx==0.1.0 onnxruntime-genai==0.18.0 onnxruntime==1.31.1
    OPTIMUM  pip install "optimum-onnx[onnxruntime]==0.1.0" onnxruntime==1.31.1
    LLAMA    CMAKE_ARGS=-DLLAVA_BUILD=OFF pip install llama-cpp-python==0.3.36 gguf==0.19.0 \
                 safetensors    # compiles for minutes: g++, cmake
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.peers.build import build
from benchmarks.peers.job import PEERS


def main() -> None:
    parser = argparse.ArgumentParser(description="Time our dense decoder against other exporters'.")
    steps = parser.add_subparsers(dest="step", required=True)
    for name in ("prepare", "build", "time"):
        step = steps.add_parser(name)
        step.add_argument("--work", type=Path, default=Path("out/peers"))
        if name != "build":
            step.add_argument("--cr", type=float, default=4)
            step.add_argument("--int4", action="store_true", help="weights of 4 bits")
        if name == "build":
            step.add_argument("peers", nargs="+", choices=PEERS)
        if name == "time":
            step.add_argument("--peers", nargs="+", choices=PEERS, help="all that were built")
            step.add_argument("--opens", type=int, default=4, help="times that all are opened anew")
            step.add_argument("--rounds", type=int, default=3, help="each time")
            step.add_argument("--new-tokens", type=int, default=16)
            step.add_argument("--threads", type=int)
            step.add_argument("--json", type=Path, help="also write every round here")
            step.add_argument("--no-pruned", dest="pruned", action="store_false")
    args = parser.parse_args()
    # Each step imports what its environment has.
    if args.step == "prepare":
        from benchmarks.peers.prepare import prepare

        prepare(args.work, args.cr, int4=args.int4)
    elif args.step == "build":
        for peer in args.peers:
            build(args.work, peer)
    else:
        from benchmarks.peers.timing import time_all

        time_all(args.work, args)


if __name__ == "__main__":
    main()
