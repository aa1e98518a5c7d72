"""Ask bundles on another machine than the one that exported them, such as a GPU lent for minutes.

    python -m benchmarks.scenes576.on_device pack BUNDLES PACKED
    python -m benchmarks.scenes576.on_device ask PACKED CHECKPOINT QUESTIONS RESULTS
    python -m benchmarks.scenes576.on_device table PACKED RESULTS OUT

`pack` copies bundles without their weights, a few megabytes in all. `ask` writes the weights again
from the checkpoint, checks them against the manifest's hash, and asks every bundle, a block of
questions at a time: whenever it is stopped, all bundles have been asked about as much. The same
command goes on where it was. `table` puts the results of the blocks that every bundle has together.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from edgeprune import policies
from edgeprune.bundle import MANIFEST, sha256
from edgeprune.compare.answers import EvalRequest, EvalResult
from edgeprune.compare.questions import Questions
from edgeprune.compare.results import Comparison, Result
from edgeprune.errors import EdgepruneError
from edgeprune.graph_contract import WEIGHTS
from edgeprune.graphs import GRAPHS
from edgeprune.intervals import difference

BLOCK = 100
"""Questions in a block."""


def pack(bundles: Path, packed: Path) -> None:
    """Copy each bundle but for its weights."""
    for bundle in sorted(path.parent for path in bundles.glob(f"*/{MANIFEST}")):
        if not (packed / bundle.name).exists():
            shutil.copytree(
                bundle, packed / bundle.name, ignore=shutil.ignore_patterns(WEIGHTS, ".*")
            )


def fill(bundle: Path, checkpoint: Path, pool: Path) -> None:
    """Write the weights of a bundle, or link those of another one whose hash is the same."""
    digest = _manifest(bundle)["files"][WEIGHTS]["sha256"]
    whole = pool / digest
    if not whole.exists():
        draft = whole.with_suffix(".draft")
        _write(bundle, checkpoint, draft)
        if sha256(draft) != digest:
            raise SystemExit(f"{bundle}: {checkpoint} gives other weights than were exported")
        draft.rename(whole)
    if not (bundle / WEIGHTS).exists():
        os.link(whole, bundle / WEIGHTS)


def _write(bundle: Path, checkpoint: Path, draft: Path) -> None:
    """Every tensor of all graphs at its place, in float32."""
    import onnx
    import torch

    from edgeprune.models import open_model
    from edgeprune.models._layers import compute_buffers
    from edgeprune.policies import make
    from edgeprune.spec import Plan, PruneSpec

    adapter = open_model(str(checkpoint))
    policy, plan = make(PruneSpec("none")), Plan(adapter.shape.visual_tokens, adapter.shape.layers)
    with draft.open("wb") as stream:
        stream.truncate(_manifest(bundle)["files"][WEIGHTS]["bytes"])
        makers = adapter.vision, adapter.vision, adapter.decoder
        for graph, make_module in zip(GRAPHS, makers, strict=True):
            with torch.device("meta"):
                module = make_module(policy, plan)
            compute_buffers(module, torch.float32)
            sources, tables = adapter.sources(module), dict(module.named_buffers())
            stored = onnx.load(bundle / graph, load_external_data=False).graph.initializer
            for tensor in stored:
                where = {entry.key: entry.value for entry in tensor.external_data}
                if "offset" not in where:
                    continue
                stream.seek(int(where["offset"]))
                if tensor.name in sources:
                    value = adapter.reader.read(sources[tensor.name], torch.float32)
                else:
                    value = tables[tensor.name]
                stream.write(value.contiguous().numpy().tobytes())


def _manifest(bundle: Path) -> dict[str, Any]:
    """As it stands in the file: without its weights a bundle cannot be opened."""
    found: dict[str, Any] = json.loads((bundle / MANIFEST).read_text())
    return found


@dataclass(frozen=True)
class Task:
    """A block of questions to one bundle."""

    bundle: Path
    block: int
    result: Path


def ask(
    packed: Path,
    questions: Path,
    results: Path,
    backend: str,
    blocks: int,
    processes: int,
    seconds: float,
) -> None:
    """Every bundle, block by block; nothing starts after so many seconds."""
    results.mkdir(parents=True, exist_ok=True)
    bundles = sorted(path.parent for path in packed.glob(f"*/{MANIFEST}"))
    tasks = [
        Task(bundle, block, results / f"{bundle.name}.{block}.json")
        for block in range(blocks)
        for bundle in bundles
    ]
    todo = [task for task in tasks if not task.result.is_file()]
    work = partial(_ask, questions=questions, backend=backend, end=time.time() + seconds)
    with get_context("spawn").Pool(processes) as pool:
        for said in pool.imap_unordered(work, todo, chunksize=1):
            print(said, flush=True)


def _ask(task: Task, questions: Path, backend: str, end: float) -> str:
    if time.time() > end:
        return f"{task.result.stem}: no time left"
    begin = time.perf_counter()
    try:
        found = EvalRequest(_block(questions, task.block), backend, 6).ask(task.bundle)
    except EdgepruneError as error:
        return f"{task.result.stem}: {error}"
    draft = task.result.with_suffix(".draft")
    draft.write_text(json.dumps(asdict(found)))
    draft.rename(task.result)
    return f"{task.result.stem}: {found.marks.count('1')} in {time.perf_counter() - begin:.1f} s"


def _block(questions: Path, block: int) -> Questions:
    """Some questions as a file of their own."""
    lines = (questions / "questions.jsonl").read_text().splitlines()
    file = questions / f"block{block}-{os.getpid()}.jsonl"
    file.write_text("\n".join(lines[block * BLOCK : (block + 1) * BLOCK]) + "\n")
    found = Questions(None, file, questions / "images")
    len(found)  # it is read now
    file.unlink()
    return found


def table(packed: Path, results: Path, out: Path) -> str:
    """Write accuracy of all bundles on the blocks that all have; paired differences, as text."""
    names = sorted(path.parent.name for path in packed.glob(f"*/{MANIFEST}"))
    asked = {name: set(_blocks(results, name)) for name in names}
    common = sorted(set.intersection(*asked.values()))
    merged = {name: _merged(results, name, common) for name in names}
    cells = tuple(_result(_manifest(packed / name), name, found) for name, found in merged.items())
    setup = {"questions": len(common) * BLOCK, "model": "scenes576", "backend": "ort-cuda"}
    comparison = Comparison({**setup, "machine": None}, cells)
    out.mkdir(parents=True, exist_ok=True)
    (out / "compare.json").write_text(comparison.to_json())
    (out / "compare.csv").write_text(comparison.to_csv())
    marks = {name: found.marks for name, found in merged.items()}
    pairs = "\n".join(_pairs(marks))
    (out / "compare.md").write_text(
        f"{comparison.to_markdown()}\nPaired differences to the best of the same ratio, in points"
        f" (95%):\n\n{pairs}\n"
    )
    return pairs


def _blocks(results: Path, name: str) -> Iterator[int]:
    for file in results.glob(f"{name}.*.json"):
        if file.name.removeprefix(name + ".").removesuffix(".json").isdigit():
            yield int(file.name.split(".")[-2])


def _merged(results: Path, name: str, blocks: Sequence[int]) -> EvalResult:
    parts = [
        EvalResult(**json.loads((results / f"{name}.{block}.json").read_text())) for block in blocks
    ]
    right, asked = Counter[str](), Counter[str]()
    for part in parts:
        right.update(part.right)
        asked.update(part.asked)
    said = [answer for part in parts for answer in part.said]
    marks = "".join(part.marks for part in parts)
    first = parts[0]
    return EvalResult(dict(right), dict(asked), said, marks, first.text_tokens, first.kv_bytes)


def _result(manifest: dict[str, Any], name: str, found: EvalResult) -> Result:
    prune = manifest["prune"]
    changed = " ".join(f"{key}={value}" for key, value in prune["options"].items())
    method = f"{prune['method']} {changed}".strip()
    ratio = name.rpartition("-cr")[2].partition("-")[0]
    return Result(
        method,
        float(ratio),
        prune["cr_reached"],
        tuple(prune["counts"]),
        found.right,
        found.asked,
        kv_bytes=found.kv_bytes,
        stands_in=policies.load(prune["method"]).stands_in,
    )


def _pairs(marks: dict[str, str]) -> Iterator[str]:
    """Each bundle beside the best one of its ratio."""
    for name in sorted(marks):
        ratio = name.rpartition("-cr")[2]
        same = {other: m for other, m in marks.items() if other.rpartition("-cr")[2] == ratio}
        best = max(same, key=lambda other: same[other].count("1"))
        found, half = difference(marks[name], marks[best])
        yield f"- {name} to {best}: {100 * found:+.1f} ± {100 * half:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("pack")
    one.add_argument("bundles", type=Path)
    one.add_argument("packed", type=Path)
    two = commands.add_parser("ask")
    two.add_argument("packed", type=Path)
    two.add_argument("checkpoint", type=Path)
    two.add_argument("questions", type=Path)
    two.add_argument("results", type=Path)
    two.add_argument("--backend", default="ort-cuda")
    two.add_argument("--blocks", type=int, default=8)
    two.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    two.add_argument("--seconds", type=float, default=1e9, help="start nothing after so many")
    three = commands.add_parser("table")
    three.add_argument("packed", type=Path)
    three.add_argument("results", type=Path)
    three.add_argument("out", type=Path)
    args = parser.parse_args()
    if args.command == "pack":
        args.packed.mkdir(parents=True, exist_ok=True)
        pack(args.bundles, args.packed)
    elif args.command == "table":
        print(table(args.packed, args.results, args.out))
    else:
        pool = args.packed / ".weights"
        pool.mkdir(exist_ok=True)
        for path in sorted(args.packed.glob(f"*/{MANIFEST}")):
            fill(path.parent, args.checkpoint, pool)
        ask(
            args.packed,
            args.questions,
            args.results,
            args.backend,
            args.blocks,
            args.processes,
            args.seconds,
        )


if __name__ == "__main__":
    main()
