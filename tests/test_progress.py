"""The bar of long work: how much is done, and how long the rest takes."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from edgeprune.bundle import Bundle
from edgeprune.cli import main
from edgeprune.export import parity
from edgeprune.export.dialogue import Graphs
from edgeprune.models import open_model
from edgeprune.models._eager import Eager
from edgeprune.models._processor import random_prompt
from edgeprune.policies import make
from edgeprune.progress import Bar
from edgeprune.spec import PruneSpec


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    """Time that passes when a test says so."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_the_time_left_is_that_of_the_speed_so_far() -> None:
    stream, clock = Terminal(), Clock()
    bar = Bar(stream, clock=clock)

    def line(step: str, done: int, after: float) -> str:
        clock.now += after
        bar(step, done, 40)
        return stream.getvalue().rpartition("\r")[2].strip()

    assert line("calibrate", 20, 5) == "calibrate                  [############............] 20/40"
    assert line("calibrate", 22, 1).endswith("] 22/40")  # too soon to say
    assert line("calibrate", 24, 7).endswith("] 24/40, 0:32 left")  # 4 in 8 seconds, 20 before
    assert line("calibrate", 25, 1000).endswith("] 25/40, 50:24 left")
    assert line("calibrate", 26, 9000).endswith("] 26/40, 6:29:12 left")
    assert line("calibrate", 40, 1).endswith("] 40/40")
    assert line("parity", 1, 60).endswith("] 1/40")  # another step has a clock of its own
    assert line("parity", 3, 60).endswith("] 3/40, 18:30 left")
    bar.clear()
    assert stream.getvalue().endswith("\r")


def test_nothing_is_drawn_where_nobody_watches() -> None:
    stream = io.StringIO()
    Bar(stream)("calibrate", 1, 2)
    assert stream.getvalue() == ""


def told(step: str, stream: Terminal) -> list[str]:
    lines = (line.strip() for line in stream.getvalue().split("\r"))
    return [line for line in lines if line.startswith(step)]


def test_calibration_says_how_long_it_takes(
    tiny_checkpoint: Path, instruct: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a terminal, at a clock that goes a second each time it is asked."""
    stream, ticks = Terminal(), iter(range(10**6))
    monkeypatch.setattr(Bar.__init__, "__defaults__", (None, 24, lambda: float(next(ticks))))
    monkeypatch.setenv("EDGEPRUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "stderr", stream)
    options = ["--model", str(tiny_checkpoint), "--cr", "2", "--samples-file", str(instruct)]
    assert main(["calibrate", *options, "--samples", "3", "-o", str(tmp_path / "s.json")]) == 0
    lines = told("calibrate in", stream)
    assert lines[1].endswith("] 2/12") and lines[2].endswith("] 3/12, 0:09 left")
    assert lines[-1].endswith("] 12/12")


def test_parity_tells_of_both_engines(tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    """So that its time left counts the graph's windows too."""
    adapter, policy = open_model(str(tiny_checkpoint)), make(PruneSpec("none"))
    manifest, ticks = Bundle.open(tiny_bundle, verify=False).manifest, list[tuple[int, int]]()
    eager = Eager(adapter, policy, manifest.prune.plan)
    prompt = random_prompt(adapter.pixels, adapter.shape.vocabulary, 0)
    graphs = Graphs(tiny_bundle, manifest.graphs, eager)
    parity.check(graphs, eager, [prompt], lambda done, total: ticks.append((done, total)))
    assert {total for _, total in ticks} == {2 * eager.stages}
    done = [done for done, _ in ticks]
    assert done == sorted(set(done)) and done[-1] == 2 * eager.stages
