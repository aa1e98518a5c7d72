"""A calibration that is killed goes on at the last finished layer, and ends with the same bits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from edgeprune.calib.collect import Run, collect
from edgeprune.calib.resuming import STATE, WorkFolder, beside
from edgeprune.calib.samples import Sample
from edgeprune.calib.schedule import Evidence
from edgeprune.cli import main
from edgeprune.models import Adapter, open_model
from edgeprune.models._activations import Activations
from edgeprune.models._processor import random_prompt
from edgeprune.policies import make
from edgeprune.spec import PruneSpec
from tests.essence import essence
from tests.test_every_family import PRUNED, Case, Opened

UTP = make(PruneSpec("utp", 4))
FAMILIES = list({case.family: case for case in PRUNED}.values())
ALWAYS = ("llava_next", "qwen3_vl", "gemma3", "lfm2_vl")


class StoppedError(Exception):
    pass


def samples(adapter: Adapter, count: int = 2) -> list[Sample]:
    size = adapter.pixels, adapter.shape.vocabulary
    return [Sample(str(seed), random_prompt(*size, seed)) for seed in range(count)]


def same(found: Evidence, wanted: Evidence) -> None:
    """Bit for bit."""
    assert found.sha256() == wanted.sha256()
    assert found.attention.dtype == wanted.attention.dtype == np.float32


def stopped(adapter: Adapter, work: WorkFolder, layers: int, bound: int = 1 << 30) -> None:
    """Calibrate, and stop within the layer behind so many finished ones."""
    last = 2 * (adapter.encoder.blocks + layers) + 1

    def report(done: int, total: int) -> None:
        if done == last:
            raise StoppedError

    with pytest.raises(StoppedError):
        collect(adapter, UTP, samples(adapter), report, Activations(bound), work)


@pytest.mark.parametrize("case", essence(FAMILIES, ALWAYS))
def test_every_family_goes_on(case: Case, tmp_path: Path) -> None:
    """Whatever lies between two of its layers is read back as it was."""
    adapter, told = Opened(case, tmp_path / "tiny", layers=3).adapter, list[str]()
    work = WorkFolder(tmp_path / "work", "key", Run, told.append)
    wanted = collect(adapter, UTP, samples(adapter))
    stopped(adapter, work, 2, bound=0)
    ticks = list[int]()
    found = collect(adapter, UTP, [], lambda done, total: ticks.append(done), work=work)
    same(found, wanted)
    assert ticks == [2 * (adapter.encoder.blocks + 2) + n for n in (1, 2)]  # of layer 3 alone
    assert told == [f"{work.folder}: the calibration goes on behind 2 finished layers"]
    work.remove()
    assert not work.folder.exists()


def test_what_is_damaged_or_of_another_is_told_and_not_used(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    adapter, told = open_model(str(tiny_checkpoint)), list[str]()
    folder = tmp_path / "work"
    wanted = collect(adapter, UTP, samples(adapter))
    other, work = (WorkFolder(folder, key, Run, told.append) for key in ("other", "mine"))
    stopped(adapter, other, 1)
    state = json.loads((folder / STATE).read_bytes())
    (data,) = folder.glob("layers-*.bin")
    same(collect(adapter, UTP, samples(adapter), work=work), wanted)
    assert told.pop() == f"{folder} is of another calibration: this one begins anew"
    assert not data.exists() and len(list(folder.iterdir())) == 2

    def flipped(content: bytes) -> bytes:
        return content[:-5] + bytes([content[-5] ^ 1]) + content[-4:]

    for damage in (flipped, lambda content: content[:-4], lambda content: b""):
        work.remove()
        stopped(adapter, work, 1)
        (data,) = folder.glob("layers-*.bin")
        data.write_bytes(damage(data.read_bytes()))
        same(collect(adapter, UTP, samples(adapter), work=work), wanted)
        assert (
            told.pop() == f"{folder} is damaged (its checksum is another): the calibration"
            " begins anew"
        )
    for text in (
        "",
        "[]",
        '{"format": 1}',
        json.dumps(state | {"key": "mine", "data": "gone.bin"}),
    ):
        (folder / STATE).write_text(text)
        same(collect(adapter, UTP, samples(adapter), work=work), wanted)
        assert "is damaged" in told.pop() and not told


def test_a_disk_without_room_is_told_once_and_stops_nothing(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, told = open_model(str(tiny_checkpoint)), list[str]()
    wanted = collect(adapter, UTP, samples(adapter))
    work = WorkFolder(tmp_path / "work", "key", Run, told.append)
    work.make_room(1 << 60)
    same(collect(adapter, UTP, samples(adapter), work=work), wanted)
    assert "needs 1152921504.6 GB of disk, " in told[0] and not work.folder.exists()
    assert told.pop().endswith(": a calibration that is killed from here on begins anew")
    blocked = tmp_path / "file"
    blocked.write_text("mine")
    work = WorkFolder(blocked, "key", Run, told.append)
    same(collect(adapter, UTP, samples(adapter), work=work), wanted)
    assert len(told) == 1 and f"{blocked} cannot be written" in told[0]
    work.remove()
    assert blocked.read_text() == "mine"
    WorkFolder(tmp_path / "large", "key", Run, told.append).make_room(2 * 10**9)
    assert told[-1] == f"{tmp_path / 'large'} needs 2.0 GB of disk until the calibration ends"


@pytest.mark.slow
def test_a_killed_command_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """SIGKILL, as the kernel does for want of memory; on the demo."""
    output = tmp_path / "schedule.json"
    options = ["calibrate", "--cr", "4", "--samples", "10", "-o", str(output)]
    environment = {**os.environ, "EDGEPRUNE_CACHE": str(tmp_path / "killed")}
    with subprocess.Popen([sys.executable, "-m", "edgeprune", *options], env=environment) as child:
        state = tmp_path / "schedule.json.work" / STATE
        while not (state.is_file() and json.loads(state.read_bytes())["layers"] >= 3):
            assert child.poll() is None, "it ended before it could be killed"
            time.sleep(0.005)
        child.send_signal(signal.SIGKILL)
    assert child.returncode == -signal.SIGKILL and not output.exists()
    capfd.readouterr()
    monkeypatch.setenv("EDGEPRUNE_CACHE", str(tmp_path / "killed"))
    assert main(options) == 0
    assert "schedule.json.work: the calibration goes on behind " in capfd.readouterr().err
    assert not state.parent.exists()
    resumed = json.loads(output.read_text())
    monkeypatch.setenv("EDGEPRUNE_CACHE", str(tmp_path / "whole"))
    assert main(options) == 0
    assert "goes on" not in capfd.readouterr().err
    whole = json.loads(output.read_text())
    assert beside(Path(os.devnull)) is None
    for schedule in (resumed, whole):
        del schedule["seconds"]
    assert resumed == whole
    files = [next((tmp_path / name).glob("*.npz")) for name in ("killed", "whole")]
    assert files[0].name == files[1].name
    assert files[0].read_bytes() == files[1].read_bytes()
