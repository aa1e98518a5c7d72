"""Hostile inputs end in an answer or in one line; their judge sees every way of going wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz import report
from tests.fuzz.case import names, shares
from tests.fuzz.judge import Judge, Verdict
from tests.fuzz.seeds import prepare

TRAPS = {
    "dies": "the process died with exit code -11",
    "sleeps": "more than 1 s",
    "memory": "more than 2,000,000,000 bytes of memory",
    "raises": "a traceback: KeyError: 'a bug'",
    "starts": "started subprocess.Popen",
    "opens": "opened ",
    "taken": "took what has to be refused",
    "two lines": "no single line on stderr",
    "no line": "no single line on stderr",
    "escape": "control characters on stderr",
    "code": "exit code 1",
}


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("fuzz") / "seeds").folder


def run(seeds: Path, inputs: int, kinds: list[str], workers: int = 1) -> list[Verdict]:
    counts = shares(inputs)
    asked = [(kind, number) for kind in kinds for number in range(counts[kind])]
    return Judge(seeds, seed=1).run(asked, workers, lambda verdict: None)


def test_every_way_of_going_wrong_is_seen(tmp_path: Path) -> None:
    for trap, wrong in {**TRAPS, "right": "", "limit": ""}.items():
        (tmp_path / "trap").write_text(trap)
        judge = Judge(tmp_path, seed=0, seconds=1 if trap == "sleeps" else 10)
        (verdict,) = judge.run([("_traps", 0)], tell=lambda verdict: None)
        assert verdict.wrong.startswith(wrong) and bool(verdict.wrong) == bool(wrong), trap


@pytest.fixture(scope="module")
def verdicts(seeds: Path) -> list[Verdict]:
    return run(seeds, 100, names())


@pytest.mark.parametrize("kind", names())
def test_hostile_inputs_end_in_an_answer_or_in_one_line(kind: str, verdicts: list[Verdict]) -> None:
    own = [verdict for verdict in verdicts if verdict.kind == kind]
    assert own and not report.wrongs(own)
    assert sum(verdict.made.well_formed for verdict in own) * 2 >= len(own)


@pytest.mark.slow
def test_thousands_of_them(seeds: Path) -> None:
    verdicts = run(seeds, 5000, names(), workers=2)
    assert len(verdicts) > 4900
    assert not report.wrongs(verdicts)
    print(report.table(verdicts))
