"""What choosing tokens costs inside the graph: each method beside a twin that chooses nothing.

    python -m benchmarks.selection_cost 12x1024 --cr 4 --json benchmarks/results/selection_cost.json

The twin has the same plan and takes the first tokens of each stage, whatever they hold. Both are
exported, timed in turn, and deleted; a method that was measured is not measured again. The cost is
what vision and prefill take longer than the twin's in each round, as a share of the twin's prefill.
Where it is more than it should be, both are profiled, and the nodes are named that take longer.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.schedules import planned
from benchmarks.shapes import SHAPES, write
from edgeprune import policies
from edgeprune.bundle import Bundle
from edgeprune.compare.bundles import code
from edgeprune.compare.store import Store, key_of
from edgeprune.compare.timing import TimingRequest
from edgeprune.errors import SpecError
from edgeprune.export.exporter import ExportRequest, export
from edgeprune.files import write_whole
from edgeprune.graphs import GRAPHS
from edgeprune.models import open_model
from edgeprune.models._processor import Processor
from edgeprune.policies import Policy
from edgeprune.policies._policy import Selection
from edgeprune.policies._signals import InputSignals, LayerSignals, VisionSignals
from edgeprune.spec import Plan, PruneSpec, Stage

GREEDY = {"cdpruner", "dart", "divprune", "trimtokenator", "vispruner"}
"""Methods that choose token after token: they may cost 10% of prefill, the others 5%."""
TEXT = 64
SLOWEST = 8
"""Kinds of nodes that a profile names."""


@dataclass(frozen=True)
class First(Policy):
    """The first tokens of each stage: no score, no sorting."""

    def vision(self, signals: VisionSignals, stage: Stage) -> Selection:
        return Selection(torch.arange(stage.survivors))

    def input(self, signals: InputSignals, stage: Stage, live: Stage) -> Selection:
        return Selection(torch.arange(live.survivors))

    def layer(self, signals: LayerSignals, stage: Stage, live: Stage) -> Selection:
        return Selection(torch.arange(live.survivors))


@dataclass(frozen=True)
class Cost:
    """A method beside its twin; times are medians of rounds in ms."""

    method: str
    counts: tuple[int, ...]
    vision: float
    vision_twin: float
    prefill: float
    prefill_twin: float
    share: float  # of the twin's prefill, median over rounds
    low: float  # 10% and 90% of rounds
    high: float
    allowed: float
    profile: tuple[tuple[str, float], ...] = ()  # nodes and ms more than the twin, where too much

    @property
    def too_much(self) -> bool:
        return self.share > self.allowed


def measure(name: str, checkpoint: str, cr: float, work: Path, timing: TimingRequest) -> Cost:
    """Export a method and its twin, time them, profile them where need be, delete them."""
    spec, adapter = PruneSpec(name, cr), open_model(checkpoint)
    policy = policies.make(spec)
    plan = planned(policy, adapter.shape, cr)
    pair = {"twin": First(), name: policy}
    paths = {title: work / title for title in pair}
    try:
        for title, chosen in pair.items():
            request = ExportRequest(title, spec, plan, paths[title], no_parity="for timing alone")
            export(request, adapter, chosen, Processor(adapter), ())
        rounds = timing.run(list(paths.values()), TEXT)["rounds"]
        cost = _cost(name, plan, rounds[name], rounds["twin"])
        if cost.too_much:
            cost = Cost(**{**asdict(cost), "profile": compared(paths[name], paths["twin"])})
    finally:
        for path in paths.values():
            shutil.rmtree(path, ignore_errors=True)
    return cost


def _cost(
    name: str, plan: Plan, rounds: dict[str, list[float]], twin: dict[str, list[float]]
) -> Cost:
    ours, theirs = (np.array(one["vision"]) + np.array(one["prefill"]) for one in (rounds, twin))
    shares = (ours - theirs) / np.array(twin["prefill"])
    low, middle, high = (float(end) for end in np.quantile(shares, [0.1, 0.5, 0.9]))
    return Cost(
        method=name,
        counts=plan.counts,
        vision=statistics.median(rounds["vision"]),
        vision_twin=statistics.median(twin["vision"]),
        prefill=statistics.median(rounds["prefill"]),
        prefill_twin=statistics.median(twin["prefill"]),
        share=middle,
        low=low,
        high=high,
        allowed=0.10 if name in GREEDY else 0.05,
    )


def compared(path: Path, twin: Path) -> tuple[tuple[str, float], ...]:
    """The nodes of selection that take longer than in the twin, in ms of a call, worst first."""
    more = profile(path)
    more.subtract(profile(twin))
    return tuple((name, round(ms, 3)) for name, ms in more.most_common(SLOWEST) if ms > 0)


def profile(path: Path, runs: int = 6) -> Counter[str]:
    """Milliseconds of a call in each kind of node that selection may own, as ONNX Runtime has it.

    In the decoder they are named `.../prune/...`; before it they stand in no module, as do a few
    others, which the twin has too.
    """
    found: Counter[str] = Counter()
    for graph in (file.removesuffix(".onnx") for file in GRAPHS):
        events = _events(path, graph, runs)
        warm = min(e["ts"] + e["dur"] for e in events if e["name"] == "model_run")
        for event in events:
            node = event["name"].removesuffix("_kernel_time")
            selects = "prune" in node if graph == "decoder" else "/" not in node
            if node != event["name"] and selects and event["ts"] > warm:
                found[f"{graph} {_kind(node)}"] += event["dur"] / 1e3 / (runs - 1)
    return found


def _kind(node: str) -> str:
    """`layers.7/prune/topk.2` and its like in other layers as one: `prune/topk`."""
    return "/".join(part.split(".")[0] for part in node.split("/")[-2:])


def _events(path: Path, graph: str, runs: int) -> list[dict[str, Any]]:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4  # without bound buffers the cache is copied: meant here
    options.enable_profiling = True
    options.profile_file_prefix = str(path / graph)
    session = ort.InferenceSession(path / f"{graph}.onnx", options, ["CPUExecutionProvider"])
    feeds = _feeds(path, session)
    for _ in range(runs):
        session.run(None, feeds)
    events: list[dict[str, Any]] = json.loads(Path(session.end_profiling()).read_text())
    return events


def _feeds(path: Path, session: Any) -> dict[str, np.ndarray]:
    """Noise for a prefill; every cache has room for what enters its layer."""
    prune, rng = Bundle.open(path, verify=False).manifest.prune, np.random.default_rng(0)
    sizes = {"prefix": 5, "text": TEXT - 5, "visual": prune.encoded}
    sizes |= {f"capacity.{i}": count + TEXT for i, count in enumerate(prune.counts)}
    feeds = {}
    for wanted in session.get_inputs():
        shape = [sizes[size] if isinstance(size, str) else size for size in wanted.shape]
        if wanted.type == "tensor(int64)":
            ids = rng.integers(3, 60, shape)
            feeds[wanted.name] = ids if wanted.name.endswith("_ids") else np.zeros_like(ids)
        else:
            feeds[wanted.name] = rng.standard_normal(shape, np.float32)
    return feeds


def markdown(costs: list[Cost]) -> str:
    lines = ["| method | vision ms, twin | prefill ms, twin | cost (p10 to p90) | allowed |"]
    lines.append("|" + " --- |" * 5)
    for c in sorted(costs, key=lambda cost: cost.share):
        share = f"{100 * c.share:.1f}% ({100 * c.low:.1f} to {100 * c.high:.1f})"
        lines.append(
            f"| {c.method} | {c.vision:.1f}, {c.vision_twin:.1f} | {c.prefill:.1f},"
            f" {c.prefill_twin:.1f} | {share} | {100 * c.allowed:.0f}% |"
        )
    for c in costs:
        if c.too_much:
            named = ", ".join(f"{node} {ms:.2f} ms" for node, ms in c.profile)
            lines.append(
                f"\n{c.method} costs more than it should. Longer than in its twin: {named}"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="The cost of selection inside the graph.")
    parser.add_argument("shape", choices=["demo", *SHAPES])
    parser.add_argument("--methods", default="all")
    parser.add_argument("--cr", type=float, default=4)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--work", type=Path, default=Path("out/selection"))
    parser.add_argument("--json", type=Path, help="also write every cost here")
    args = parser.parse_args()
    checkpoint = "demo" if args.shape == "demo" else str(args.work / args.shape)
    if args.shape != "demo" and not (args.work / args.shape / "config.json").is_file():
        write(SHAPES[args.shape], args.work / args.shape)
    names = policies.names() if args.methods == "all" else args.methods.split(",")
    store, costs = Store(args.work / "costs"), []
    timing = TimingRequest(rounds=args.rounds, new_tokens=1)
    for name in (name for name in names if name != "none"):
        key = key_of(args.shape, name, args.cr, asdict(timing), code())
        stored = store.read(f"{args.shape}-{name}-cr{args.cr:g}", key)
        if stored is None:
            try:
                cost = measure(name, checkpoint, args.cr, args.work / "bundles", timing)
            except SpecError as error:
                print(f"{name}: {error}")
                continue
            store.write(f"{args.shape}-{name}-cr{args.cr:g}", key, asdict(cost))
            stored = asdict(cost)
        costs.append(Cost(**stored))
        print(markdown(costs[-1:]), flush=True)
    print(f"\n{markdown(costs)}")
    if args.json:
        content = {"shape": args.shape, "cr": args.cr, "rounds": args.rounds, "text": TEXT}
        content["costs"] = [asdict(cost) for cost in costs]
        write_whole(args.json, (json.dumps(content, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
