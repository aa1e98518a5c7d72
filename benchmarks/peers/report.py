"""Tables of times, and everything in JSON."""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from benchmarks.peers.entry import Entry
from benchmarks.peers.job import SHAPE
from edgeprune.tables import plain, spread


def summary(groups: Sequence[Sequence[Entry]], request: argparse.Namespace) -> dict[str, Any]:
    """The setting and every round."""
    return {
        "shape": SHAPE,
        "opens": request.opens,
        "rounds": request.rounds,
        "new_tokens": request.new_tokens,
        "threads": request.threads,
        "onnxruntime": ort.__version__,
        "processor": f"{_processor()}, {os.cpu_count()} threads",
        "groups": [[_row(entry, group[0]) for entry in group] for group in groups],
    }


def _row(entry: Entry, first: Entry) -> dict[str, Any]:
    return {
        "name": entry.name,
        "tokens": entry.job.tokens,
        "prefill_ms": [round(1e3 * s, 2) for s in entry.prefill],
        "decode_ms": [round(1e3 * s, 3) for s in entry.decode],
        "ours_over_it_prefill": round(_quantile(_ratios(first.prefill, entry.prefill), 0.5), 4),
        "ours_over_it_decode": round(_quantile(_ratios(first.decode, entry.decode), 0.5), 4),
        "logit_difference": None if entry.pruned else entry.difference,
    }


def table(group: Sequence[Entry]) -> str:
    """Medians and p10-p90; ratios of the first row to the others, taken round by round."""
    first = group[0]
    lines = [["", "tokens", "prefill ms", "first / it", "decode ms", "first / it", "logits"]]
    for entry in group:
        lines.append(
            [
                entry.name,
                str(entry.job.tokens),
                spread([1e3 * s for s in entry.prefill], ".1f"),
                spread(_ratios(first.prefill, entry.prefill), ".3f"),
                spread([1e3 * s for s in entry.decode], ".2f"),
                spread(_ratios(first.decode, entry.decode), ".3f"),
                "pruned" if entry.pruned else f"{entry.difference:.0e}",
            ]
        )
    return "\n".join([plain(lines, left=0), _verdict(group, "prefill"), _verdict(group, "decode")])


def _verdict(group: Sequence[Entry], phase: str) -> str:
    seconds: dict[str, list[float]] = {entry.name: getattr(entry, phase) for entry in group}
    peers = [entry.name for entry in group if entry.peer]
    best = min(peers, key=lambda name: _quantile(seconds[name], 0.5))
    ratio = _quantile(_ratios(seconds[group[0].name], seconds[best]), 0.5)
    return f"{phase}: {group[0].name} takes {ratio:.3f} of the best peer's time ({best})"


def _ratios(first: Sequence[float], other: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(first, other, strict=True)]


def _quantile(numbers: Sequence[float], at: float) -> float:
    return float(np.quantile(numbers, at))


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"
