"""Everybody in turn: first the full prompt, then ours pruned beside the average one."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.peers.entry import Entry
from benchmarks.peers.job import CLOSE, PEERS, TEXT, VISUAL, Job
from benchmarks.peers.lanes import Lane
from benchmarks.peers.report import summary, table


def check(heat: Sequence[Entry]) -> None:
    """A lap of each that does not count; all that run the whole decoder must answer the same."""
    laps = [(entry, entry.lane.lap(entry.job)) for entry in heat]
    whole = [(entry, found.logits) for entry, found in laps if not entry.pruned]
    for entry, logits in whole:
        pairs = zip(whole[0][1], logits, strict=True)
        entry.difference = max(float(abs(a - b).max() / abs(a).max()) for a, b in pairs)
        if not entry.difference < CLOSE:
            sys.exit(f"{entry.name} differs by {entry.difference:.1e}: that is no race")


def heats(work: Path, names: Sequence[str], request: argparse.Namespace) -> list[list[Entry]]:
    """Everybody on the full prompt; ours pruned against everybody on the average one."""
    vocabulary = json.loads((work / "text" / "config.json").read_text())["vocab_size"]
    rng = np.random.default_rng(0)
    ids = rng.integers(3, vocabulary, (1, TEXT + VISUAL))
    following = rng.integers(3, vocabulary, request.new_tokens)
    average = TEXT + round(VISUAL / request.cr)
    full, short = Job(ids, following), Job(ids[:, :average], following)
    threads = request.threads
    dense, again = (Lane(work / "dense", None, threads) for _ in range(2))
    peers = {name: Lane(work / name, PEERS[name], threads) for name in names}
    found = []
    for job in (full, short):
        entries = [Entry("edgeprune none", dense, job), Entry("again", again, job)]
        found.append([*entries, *(Entry(n, lane, job, peer=True) for n, lane in peers.items())])
    if not request.pruned:
        return found[:1]
    lane = Lane(work / f"utp-cr{request.cr:g}", None, threads)
    found[1].insert(0, Entry(f"edgeprune utp CR {request.cr:g}", lane, full, pruned=True))
    return found


def race(work: Path, request: argparse.Namespace) -> None:
    """Time everything that was built, in turn; tables."""
    names = [n for n in request.peers or PEERS if (work / n / "model.onnx").is_file()]
    if not names:
        sys.exit(f"there is no peer's model below {work}: build one first")
    lines = heats(work, names, request)
    entries = [entry for heat in lines for entry in heat]
    order = np.random.default_rng(0)  # nobody is always opened first or runs after the same one
    for opening in range(request.opens):
        _open(list({entry.lane for entry in entries}), lines, order)
        for number in range(request.laps):
            for turn in order.permutation(len(entries)):
                entries[turn].run()
            done = opening * request.laps + number + 1
            print(f"lap {done} of {request.opens * request.laps}", file=sys.stderr, flush=True)
        for lane in {entry.lane for entry in entries}:
            lane.close()
    for heat in lines:
        print(table(heat), end="\n\n")
    if request.json:
        request.json.write_text(json.dumps(summary(lines, request), indent=1) + "\n")


def _open(lanes: list[Lane], lines: list[list[Entry]], order: np.random.Generator) -> None:
    """A process for each lane, and its first lap."""
    lanes.sort(key=lambda lane: str(lane.arguments))  # sets have no order, `again` is its equal
    for turn in order.permutation(len(lanes)):
        lanes[turn].open()
    for heat in lines:
        check(heat)
