"""What ONNX Runtime runs in a prefill and a decode step: nodes by provider, copies between them.

    python -m benchmarks.gpu.launches BUNDLE --device cuda

Prints one line of JSON. A node that the GPU has no kernel for runs on the CPU, and each crossing
costs a copy and a wait; in a graph for a GPU both counts should be near zero.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from edgeprune.bench.worker import PREFIX
from edgeprune.bundle import Bundle
from edgeprune.runtime.backends._ort import OrtBackend
from edgeprune.runtime.engine import Engine

TEXT = 64
CALLS = ("vision", "prefill", "decode")


def count(path: Path, device: str) -> dict[str, Any]:
    """For each call: nodes, those on the CPU by operator, copies, and milliseconds by operator."""
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder) / "profile"
        bundle = Bundle.open(path, verify=False)
        engine = Engine(bundle, OrtBackend(bundle, device, profile=prefix), tile_memory_mb=0)
        _run(engine)
        engine.close()
        files = sorted(Path(folder).iterdir())
        runs = [run for file in files for run in _runs(json.loads(file.read_text()))]
    # Each call is made twice, and the first of a kind compiles and allocates.
    tiles = bundle.manifest.encoder.tiles
    image = *runs[tiles : 2 * tiles], runs[2 * tiles + 1]  # every tile, and what joins them
    vision = [event for run in image for event in run]
    kinds = {"vision": vision, "prefill": runs[-2], "decode": runs[-1]}
    return {"bundle": path.name, **{name: _counts(events) for name, events in kinds.items()}}


def _run(engine: Engine) -> None:
    """Vision twice; then prefill and a step, twice."""
    image, rng = engine.manifest.image, np.random.default_rng(0)
    pixels = rng.standard_normal(image.shape, np.float32)
    ids = rng.integers(3, engine.manifest.decoder.vocabulary, (1, TEXT))
    encoded = [engine.encode_pixels(pixels) for _ in range(2)][-1]
    for _ in range(2):
        sequence = engine.sequence()
        sequence.read(ids[:, PREFIX:], ids[:, :PREFIX], encoded, logits=False)
        sequence.read(ids[:, :1], logits=False)
        sequence.close()


def _runs(events: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The kernels of each call of one graph, in order of time."""
    ordered = sorted(events, key=lambda event: int(event.get("ts", 0)))
    spans = [
        (int(event["ts"]), int(event["ts"]) + int(event["dur"]))
        for event in ordered
        if event.get("cat") == "Session" and event["name"] == "model_run"
    ]
    kernels = [
        event
        for event in ordered
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")
    ]
    return [[k for k in kernels if start <= int(k["ts"]) < end] for start, end in spans]


def _counts(kernels: list[dict[str, Any]]) -> dict[str, Any]:
    on_cpu, took = Counter[str](), Counter[str]()
    for kernel in kernels:
        args = kernel["args"]
        took[args["op_name"]] += int(kernel["dur"])
        if args["provider"] == "CPUExecutionProvider" and not args["op_name"].startswith("Memcpy"):
            on_cpu[args["op_name"]] += 1
    copies = sum(k["args"]["op_name"].startswith("Memcpy") for k in kernels)
    return {
        "nodes": len(kernels),
        "on_cpu": dict(on_cpu.most_common()),
        "copies": copies,
        "milliseconds": {name: us / 1e3 for name, us in took.most_common(12)},
        "operators": dict(Counter(k["args"]["op_name"] for k in kernels).most_common()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Count what ONNX Runtime runs.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    args = parser.parse_args()
    print(json.dumps(count(args.bundle, args.device)))


if __name__ == "__main__":
    main()
