"""Work on a Ray cluster: results, failures, dead workers, and that files are those of one machine.

A module with Ray's interface runs jobs in this process.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from edgeprune import policies
from edgeprune.calib.calibrate import CalibrationRequest, calibrate, evidence_key
from edgeprune.calib.spread import Spread, ranges
from edgeprune.cli import main
from edgeprune.cluster import Cluster
from edgeprune.compare.answers import EvalRequest
from edgeprune.compare.cells import Cell
from edgeprune.compare.comparing import CompareRequest, compare
from edgeprune.compare.questions import Questions
from edgeprune.errors import BackendError, ScheduleError, SpecError
from edgeprune.models import open_model
from edgeprune.models._processor import Processor
from edgeprune.recipe import Recipe
from edgeprune.spec import PruneSpec
from tests.conftest import Refused

HERE = Path.cwd()


class DeadError(Exception):
    """As ray.exceptions.RayError."""


class Deadly:
    """A job that ends its worker."""


class FakeRay(ModuleType):
    """What edgeprune uses of Ray 2.60; a task runs when it is waited for."""

    def __init__(self) -> None:
        super().__init__("ray")
        self.exceptions = SimpleNamespace(RayError=DeadError)
        self.connected, self.most, self.asked = False, 0, dict[str, Any]()

    def init(self, address: str, **_: Any) -> None:
        if address == "nowhere":
            raise ConnectionError("could not\nfind any running Ray instance")
        self.connected = True

    def shutdown(self) -> None:
        self.connected = False

    def remote(self, function: Callable[..., Any]) -> Any:
        def options(**asked: Any) -> Any:
            self.asked = asked
            return SimpleNamespace(remote=lambda *given: (function, given))

        return SimpleNamespace(options=options)

    def wait(self, running: list[Any]) -> tuple[list[Any], list[Any]]:
        assert self.connected
        self.most = max(self.most, len(running))
        return running[-1:], running[:-1]

    def get(self, task: tuple[Callable[..., Any], tuple[Any, ...]]) -> Any:
        function, given = task
        if isinstance(given[1], Deadly):
            raise DeadError("the worker died")
        return function(*given)


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeRay]:
    fake = FakeRay()
    monkeypatch.setitem(sys.modules, "ray", fake)
    yield fake
    assert not fake.connected


def work(job: Any) -> int:
    if job == 3:
        raise SpecError("three is\nrefused")
    if job == 4:
        raise ZeroDivisionError("four")
    return 10 * int(job)


def test_every_job_ends_with_its_result_or_why_there_is_none(ray: FakeRay) -> None:
    dead = Deadly()
    found = {job: (result, why) for job, result, why in Cluster("auto").each([1, 3, 4, dead], work)}
    assert found[1] == (10, "")
    assert found[3] == (None, "three is refused")
    assert found[4] == (None, "ZeroDivisionError: four")
    assert found[dead][0] is None and "in 2 tries (DeadError: the worker died)" in found[dead][1]
    assert (ray.most, ray.asked) == (4, {"num_cpus": 1, "num_gpus": 0, "max_retries": 1})


def test_no_more_jobs_than_asked_for_run_at_once(ray: FakeRay) -> None:
    assert len(list(Cluster("auto", 2).each(range(5, 12), work, gpus=1))) == 7
    assert (ray.most, ray.asked["num_gpus"]) == (2, 1)


def test_who_leaves_early_leaves_the_cluster(ray: FakeRay) -> None:
    jobs = Cluster("auto").each([1, 2], work)
    next(jobs)
    assert ray.connected
    jobs.close()  # type: ignore[attr-defined]


def test_a_cluster_that_is_not_there_is_told_in_one_line(ray: FakeRay, refused: Refused) -> None:
    with pytest.raises(BackendError, match="no Ray cluster answers at nowhere"):
        list(Cluster("nowhere").each([1], work))
    with pytest.raises(SpecError, match="--ray is the address"):
        Cluster("")
    options = ("--rounds", "0", "--ray", "nowhere", "-o")
    assert "ray start --head" in refused("compare", "--cr", "2", *options, HERE / "out/nothing")


@pytest.fixture
def tiny_request(tmp_path: Path, tiny_checkpoint: Path, instruct: Path) -> Any:
    def made(folder: str, cluster: Cluster | None) -> CompareRequest:
        return CompareRequest(
            folder=tmp_path / folder,
            cells=(Cell("divprune", 2.0), Cell("fastv", 8.0)),
            recipe=Recipe(PruneSpec("none"), model=str(tiny_checkpoint), parity=0),
            evaluation=EvalRequest(Questions(4), max_new_tokens=2),
            timing=None,
            cluster=cluster,
        )

    return made


def test_compare_gives_the_same_files(ray: FakeRay, tiny_request: Any) -> None:
    here, there = tiny_request("here", None), tiny_request("there", Cluster("auto"))
    assert compare(there) == compare(here)
    files = {file.name: file.read_bytes() for file in here.store.folder.iterdir()}
    assert {file.name: file.read_bytes() for file in there.store.folder.iterdir()} == files
    assert len(files) == 3, "one ratio is out of reach, which is kept too"
    assert not (there.folder / "bundles").exists()


def test_a_worker_with_other_code_fails_its_cells(
    ray: FakeRay, tiny_request: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = tiny_request("there", Cluster("auto"))
    monkeypatch.setattr("edgeprune.compare.comparing._cell_files", lambda sent, cell: {})
    told: list[str] = []
    assert len(compare(request, tell=told.append).failed) == len(request.cells)
    assert all("another edgeprune" in line for line in told)
    with pytest.raises(SpecError, match="--keep-bundles"):
        CompareRequest(request.folder, (), request.recipe, cluster=Cluster("a"), keep_bundles=True)


def test_parts_of_the_samples_give_the_same_schedule(ray: FakeRay, tmp_path: Path) -> None:
    spec, adapter = PruneSpec("utp", 4.0), open_model("demo")
    policy, processor = policies.make(spec), Processor(adapter)
    requests = [CalibrationRequest(4.0, 5, cache=tmp_path / name) for name in ("here", "there")]
    alone = calibrate(requests[0], adapter, policy, processor)
    spread = Spread(Cluster("auto", 3), requests[1], spec, "demo")
    found = calibrate(requests[1], adapter, policy, processor, measure=spread.measure)
    assert replace(found, seconds=alone.seconds) == alone
    (cached,) = (tmp_path / "there").glob("*.npz")
    with np.load(cached) as data:
        assert data["attention"].shape[0] == 5


def test_a_part_that_was_not_measured_is_an_error(
    ray: FakeRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    spread = Spread(Cluster("auto", 2), CalibrationRequest(4.0, 5), PruneSpec("utp", 4.0), "absent")
    with pytest.raises(ScheduleError, match=r"samples \d to \d were not measured: .*absent"):
        spread.measure()


def test_parts_are_read_with_the_tokenizer_that_was_named(ray: FakeRay, tmp_path: Path) -> None:
    request, other = CalibrationRequest(4.0, 5), tmp_path / "none"
    spread = Spread(Cluster("auto", 2), request, PruneSpec("utp", 4.0), "demo", tokenizer=other)
    with pytest.raises(ScheduleError, match="--tokenizer is a folder with a tokenizer"):
        spread.measure()
    policy = policies.make(PruneSpec("utp", 4.0))
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    here, there = (open_model("demo", tokenizer=tmp_path / name) for name in ("here", "there"))
    key = evidence_key(request, here, policy)
    assert evidence_key(request, there, policy) == key
    (tmp_path / "there" / "tokenizer.model").write_bytes(b"another")
    assert evidence_key(request, there, policy) != key


def test_every_sample_is_in_one_part() -> None:
    for total in range(1, 12):
        for parts in range(1, 6):
            found = ranges(total, parts)
            assert [n for part in found for n in part] == list(range(total))
            assert max(map(len, found)) - min(map(len, found)) <= 1


def test_the_command_calibrates_on_a_cluster(
    ray: FakeRay,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("EDGEPRUNE_CACHE", str(tmp_path / "cache"))  # nothing is known yet
    base = ["calibrate", "--cr", "4", "--samples", "3", "-o", str(tmp_path / "s.json")]
    assert main([*base, "--ray", "auto", "--jobs", "2"]) == 0
    assert ray.most == 2
    assert len(capsys.readouterr().out.split()) == 12


def test_jobs_without_a_cluster_are_refused(refused: Refused) -> None:
    assert "--jobs is for --ray" in refused("calibrate", "--cr", "4", "--jobs", "2", "-o", "s.json")
