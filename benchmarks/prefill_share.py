"""Where a prefill's multiplications are, by counting: the decoder's share, and what pruning saves.

    python -m benchmarks.prefill_share                 # every published size
    python -m benchmarks.prefill_share gemma3-4b

Products and attention of vision graph and decoder for one image and 40 tokens of text, without
running anything. The best gain is what a quarter of V in every decoder layer would give; nothing
is dropped in the encoder.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.published import PUBLISHED
from edgeprune.cost import prefill_operations
from edgeprune.models import Adapter
from edgeprune.models._layers import compute_buffers

TEXT, CR = 40, 4


def encoding_operations(adapter: Adapter) -> int:
    """Operations of the vision graph for one prompt's images, nothing dropped."""
    vision, _ = adapter.empty_modules()
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        compute_buffers(vision, torch.float32)
        vision(torch.zeros(adapter.pixels))
    return int(counter.get_total_flops())


def row(name: str) -> str:
    """One line of the table: model, V, the decoder's share, the best gain at CR."""
    with tempfile.TemporaryDirectory() as folder:
        adapter = PUBLISHED[name].open(PUBLISHED[name].write(Path(folder)))
        shape, encoding = adapter.shape, encoding_operations(adapter)
    tokens = shape.visual_tokens
    full, pruned = (
        prefill_operations(shape, [count] * shape.layers, TEXT) for count in (tokens, tokens // CR)
    )
    share, gain = full / (full + encoding), (full + encoding) / (pruned + encoding)
    return f"| {name} | {tokens:,} | {share:.0%} | {gain:.2f} x |"


def main() -> None:
    parser = argparse.ArgumentParser(description="The decoder's share of a prefill, by counting.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(PUBLISHED))
    args = parser.parse_args()
    print(f"| model | V | decoder's share of prefill | best gain at CR {CR} |")
    print("| --- | ---: | ---: | ---: |")
    for name in args.names or PUBLISHED:
        print(row(name), flush=True)


if __name__ == "__main__":
    main()
