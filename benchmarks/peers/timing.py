"""All graphs in turn: first the full prompt, then ours pruned beside the average one."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.peers.build import built
from benchmarks.peers.entry import Entry
from benchmarks.peers.job import CLOSE, INT4, NEAR, OURS, PEERS, TEXT, VISUAL, Array, Job
from benchmarks.peers.processes import GraphProcess, process_of
from benchmarks.peers.report import summary, table


def check(group: Sequence[Entry]) -> None:
    """One round that does not count. Graphs that are not pruned must give the same logits, those in
    4 bits, which round differently, logits near those of floats."""
    times = [(entry, entry.process.time_round(entry.job)) for entry in group]
    whole = [(entry, one.logits) for entry, one in times if not entry.pruned]
    exact = next((logits for entry, logits in whole if not entry.int4), whole[0][1])
    for entry, logits in whole:
        pairs = zip(exact, logits, strict=True)
        entry.difference = max(_apart(a, b, int4=entry.int4) for a, b in pairs)
        if not entry.difference < (NEAR if entry.int4 else CLOSE):
            sys.exit(f"{entry.name} differs by {entry.difference:.1e}: times cannot be compared")


def _apart(wanted: Array, found: Array, *, int4: bool) -> float:
    """How far logits are from others: of the largest, or in 4 bits in standard deviations."""
    if int4:
        return float(np.sqrt(np.square(wanted - found).mean()) / wanted.std())
    return float(abs(wanted - found).max() / abs(wanted).max())


def groups(work: Path, names: Sequence[str], request: argparse.Namespace) -> list[list[Entry]]:
    """All graphs on the full prompt; then our pruned one on it beside all others on fewer tokens.

    They get the average number that the pruned graph's layers hold.
    """
    vocabulary = json.loads((work / "text" / "config.json").read_text())["vocab_size"]
    rng = np.random.default_rng(0)
    ids = rng.integers(3, vocabulary, (1, TEXT + VISUAL))
    following = rng.integers(3, vocabulary, request.new_tokens)
    average = TEXT + round(VISUAL / request.cr)
    full, short = Job(ids, following), Job(ids[:, :average], following)
    threads = request.threads
    if request.int4:
        return [_int4(work, names, full, threads)]
    dense, again = (GraphProcess(work / "dense", None, threads) for _ in range(2))
    peers = {n: process_of(n, work / n, PEERS[n], threads) for n in names}
    found = []
    for job in (full, short):
        entries = [Entry("edgeprune none", dense, job), Entry("again", again, job)]
        found.append([*entries, *(Entry(n, one, job, peer=True) for n, one in peers.items())])
    if not request.pruned:
        return found[:1]
    pruned = GraphProcess(work / f"utp-cr{request.cr:g}", None, threads)
    found[1].insert(0, Entry(f"edgeprune utp CR {request.cr:g}", pruned, full, pruned=True))
    return found


def _int4(work: Path, names: Sequence[str], job: Job, threads: int | None) -> list[Entry]:
    """Our decoder in 4 bits, the first form twice, peers' in 4 bits, and ours in floats."""

    def entry(name: str, folder: str, *, int4: bool = True) -> Entry:
        return Entry(name, GraphProcess(work / folder, None, threads), job, int4=int4)

    ours = [entry(f"edgeprune {weights}", folder) for folder, weights in OURS.items()]
    ours.insert(1, entry("again", next(iter(OURS))))
    peers = ((name, process_of(name, work / name, PEERS[name], threads)) for name in names)
    theirs = [Entry(name, one, job, peer=True, int4=True) for name, one in peers]
    return [*ours, *theirs, entry("edgeprune float", "dense", int4=False)]


def time_all(work: Path, request: argparse.Namespace) -> None:
    """Time everything that was built, in turn; tables."""
    wanted = [name for name in request.peers or PEERS if (name in INT4) == request.int4]
    names = [name for name in wanted if built(work, name)]
    if not names:
        sys.exit(f"there is no peer's model below {work}: build one first")
    compared = groups(work, names, request)
    entries = [entry for group in compared for entry in group]
    order = np.random.default_rng(0)  # no process is always opened first or runs after the same one
    for opening in range(request.opens):
        _open(list({entry.process for entry in entries}), compared, order)
        for number in range(request.rounds):
            for turn in order.permutation(len(entries)):
                entries[turn].run()
            done = opening * request.rounds + number + 1
            print(f"round {done} of {request.opens * request.rounds}", file=sys.stderr, flush=True)
        for process in {entry.process for entry in entries}:
            process.close()
    for group in compared:
        print(table(group), end="\n\n")
    if request.json:
        request.json.write_text(json.dumps(summary(compared, request), indent=1) + "\n")


def _open(
    processes: list[GraphProcess], compared: list[list[Entry]], order: np.random.Generator
) -> None:
    """Start each process, and check its first round."""
    processes.sort(key=lambda one: str(one.arguments))  # sets have no order, `again` is its equal
    for turn in order.permutation(len(processes)):
        processes[turn].open()
    for group in compared:
        check(group)
