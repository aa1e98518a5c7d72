"""`bench` on several backends: what is measured, what agrees, and what cannot run here."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edgeprune.bench import agreement, bench, power
from edgeprune.bench.agreement import Answer, compare, pack, unpack
from edgeprune.bench.bench import Absent, BenchResult, RoundSeconds, Row
from edgeprune.bench.figure import figure
from edgeprune.bench.table import HEADS, table
from edgeprune.bench.worker import BenchWorker
from edgeprune.cli import main
from edgeprune.drawing import png
from edgeprune.runtime import gpu
from tests.conftest import Refused
from tests.fake_gpu import COMPUTE, VERSION, FakeGpu, pretend

TWO_ROUNDS = ["--rounds", "2", "--warmup", "0", "--new-tokens", "2"]


def test_backends_that_are_not_here_are_listed(
    tiny_jetpack7: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = ["--json", str(tmp_path / "bench.json"), "--figure", str(tmp_path / "bench.png")]
    assert (
        main(
            ["bench", str(tiny_jetpack7), *TWO_ROUNDS, "--backends", "ort-cpu,trt,trt-rtx", *files]
        )
        == 0
    )
    out = capsys.readouterr().out.splitlines()
    assert out[0].split()[:2] == ["bundle", "backend"]
    assert out[1].split()[:2] == ["tiny", "ort-cpu"]
    assert [line.split(":")[1].strip() for line in out[2:]] == ["tiny on trt", "tiny on trt-rtx"]
    record = json.loads((tmp_path / "bench.json").read_text())
    assert [row["backend"] for row in record["rows"]] == ["ort-cpu"]
    assert [len(times) for times in record["rows"][0]["rounds"].values()] == [2, 2, 2]
    assert record["rows"][0]["peak_bytes"] > 10**6
    assert all(one["why"] for one in record["absent"])
    with Image.open(tmp_path / "bench.png") as image:
        assert image.width == 1200
        assert len(np.unique(np.asarray(image.convert("L")))) > 4


def test_one_backend_that_is_not_here_is_an_error(tiny_jetpack7: Path, refused: Refused) -> None:
    line = refused("bench", tiny_jetpack7, *TWO_ROUNDS, "--backends", "trt")
    assert "TensorRT" in line
    assert "no backend 'tpu'" in refused(
        "bench", tiny_jetpack7, *TWO_ROUNDS, "--backends", "ort-cpu,tpu"
    )


def test_a_bundle_says_the_same_on_two_backends(
    tiny_jetpack7: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounds and the comparison, with a GPU of numpy arrays."""
    bundle = Path(shutil.copytree(tiny_jetpack7, tmp_path / "tiny"))
    pretend(bundle)
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__=VERSION))
    monkeypatch.setattr(gpu, "connect", lambda kind: FakeGpu(COMPUTE))
    monkeypatch.setattr(power, "find", lambda gpu: Steady() if gpu else None)
    ours, theirs = (BenchWorker(bundle, name, 16, 6, None) for name in ("trt", "ort-cpu"))
    found = compare("tiny", "trt", ours.answer(), "ort-cpu", theirs.answer())
    assert (found.same_tokens, found.same_kept) == (found.tokens, found.kept) == (6, found.kept)
    assert found.kept > 0
    assert found.logits == 0
    assert ours.engine.backend.build_seconds == 3.0  # one for each graph
    assert theirs.engine.backend.build_seconds is None
    timed = ours.time_round()
    assert (timed["watts"], timed["peak_bytes"]) == (7.5, 0)
    assert len(timed["seconds"]) == 3 and min(timed["seconds"]) > 0
    assert theirs.time_round()["watts"] is None
    assert theirs.time_round()["peak_bytes"] > 10**6


class Steady:
    """A meter whose needle stands still."""

    source = "steady"

    def watts(self) -> float:
        return 7.5

    def used_bytes(self) -> int:
        return 1000


def test_what_differs_is_counted() -> None:
    logits = np.array([1.0, -3.0, 0.5], np.float32)
    np.testing.assert_array_equal(unpack(pack(logits)), logits)
    one = Answer([5, 6, 7, 8], [[0, 1, 2], [1]], pack(logits))
    other = Answer([5, 6, 9, 8], [[0, 2, 3], [1]], pack(logits + np.float32(0.25)))
    found = compare("b", "trt", one, "ort-cpu", other)
    assert (found.tokens, found.same_tokens, found.kept, found.same_kept) == (4, 2, 4, 3)
    assert (found.logits, found.largest) == (0.25, 2.75)
    assert "2 of 4 greedy tokens, 3 of 4 kept tokens, logits within 2.5e-01 of" in found.line()
    assert agreement.compare("b", "trt", one, "ort-cpu", one).same_tokens == 4


def row(name: str, backend: str, speed: float, **changes: Any) -> Row:
    """A bundle that takes 10, 100 and 5 ms on a machine of speed 1; the round after twice that."""
    times = [tuple(n * ms / 1e3 / speed for n in (1, 2)) for ms in (10, 100, 5)]
    usual: dict[str, Any] = {
        "load_seconds": 1.5,
        "build_seconds": None,
        "kv_bytes": 2_000_000,
        "peak_bytes": None,
        "joules": None,
        "meter": "",
        "encoder_operations": 90,
        "prefill_operations": 400,
        "decode_operations": 10,
    }
    stored = ("int4:block=128:head=int4:vision=float:embedding=float", 5_000_000)
    return Row(
        name, backend, "utp", 2.0, "dense", "fp16", *stored, RoundSeconds(*times), **usual | changes
    )


def test_the_table_and_the_figure() -> None:
    """Ratios are to the first bundle on the same backend."""
    rows = (
        row("dense", "ort-cpu", 1),
        row("pruned", "ort-cpu", 2, prefill_operations=100, encoder_operations=60, predicted=75.0),
        row("dense", "trt", 10, build_seconds=61.0, peak_bytes=5 * 10**6, joules=(1.0, 3.0)),
    )
    absent = (Absent("pruned", "trt", "no engines; build them"),)
    one = Answer([1], [[0]], pack(np.ones(1, np.float32)))
    agreed = compare("dense", "trt", one, "ort-cpu", one)
    result = BenchResult(rows, absent, (agreed,), {"text_tokens": 16, "new_tokens": 4}, {})
    lines = table(result).splitlines()
    found = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in lines[1:4]]
    pruned, engine = (dict(zip(HEADS, cells, strict=True)) for cells in found[1:])
    assert (pruned["prefill x"], pruned["limit x"], pruned["reached"]) == ("2.00", "4.00", "50%")
    vision = pruned["vision x"], pruned["vision limit x"], pruned["TTFT x"]
    assert vision == ("2.00", "1.50", "2.00")
    assert pruned["weights"] == "int4 5.0 MB"
    assert (pruned["TTFT ms"], pruned["tok/s"], pruned["peak MB"]) == ("82.50", "266.7", "-")
    assert (engine["prefill x"], engine["build s"], engine["J"]) == ("1.00", "61.0", "2.00")
    assert "dense on trt against ort-cpu: 1 of 1 greedy tokens" in lines[5]
    assert lines[4] == "pruned: 75.00 ms predicted by its profile, 82.50 ms reached (+10.0%)"
    assert lines[6] == "not run: pruned on trt: no engines; build them"
    image = np.asarray(png.render(figure(result)))
    assert image.shape[1] == 1200
    taller = np.asarray(
        png.render(figure(BenchResult(rows, (), (), {"text_tokens": 16, "new_tokens": 4}, {})))
    )
    assert image.shape[0] - taller.shape[0] == 44, "what could not run has a line of its own"


def hwmon(root: Path, chip: str, rails: dict[str, tuple[int, int]], number: int = 0) -> None:
    """Files as the kernel shows them: a label, millivolts, milliamperes for each channel."""
    folder = root / "sys" / "class" / "hwmon" / f"hwmon{number}"
    folder.mkdir(parents=True)
    (folder / "name").write_text(chip + "\n")
    for channel, (label, (volts, amperes)) in enumerate(rails.items(), start=1):
        (folder / f"in{channel}_label").write_text(label + "\n")
        (folder / f"in{channel}_input").write_text(f"{volts}\n")
        (folder / f"curr{channel}_input").write_text(f"{amperes}\n")


def test_a_jetson_orin_nano_tells_its_power(tmp_path: Path) -> None:
    """VDD_IN feeds the others, so they are not added."""
    rails = {"VDD_IN": (5000, 1500), "VDD_CPU_GPU_CV": (5000, 600), "VDD_SOC": (5000, 400)}
    hwmon(tmp_path, "ina3221", rails)
    hwmon(tmp_path, "pwmfan", {"VDD_IN": (1, 1)}, number=1)
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 8000 kB\nMemAvailable: 3000 kB\n")
    meter = power.find(True, tmp_path)
    assert meter is not None
    assert meter.watts() == pytest.approx(7.5)
    assert meter.used_bytes() == 5000 * 1024
    assert meter.source == "INA3221 (VDD_IN)"


def test_a_jetson_agx_orin_tells_its_power(tmp_path: Path) -> None:
    """Three rails side by side; a channel that is not connected has no power."""
    rails = {"VDD_GPU_SOC": (8000, 1000), "VDD_CPU_CV": (8000, 500), "VIN_SYS_5V0": (5000, 800)}
    hwmon(tmp_path, "ina3221", rails)
    hwmon(tmp_path, "ina3221", {"NC": (9, 9), "VDDQ_VDD2_1V8AO": (5000, 200)}, number=1)
    meter = power.find(False, tmp_path)
    assert meter is not None
    assert meter.watts() == pytest.approx(8 + 4 + 4 + 1)


def test_a_machine_that_tells_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert power.find(False, tmp_path) is None
    monkeypatch.setattr(power, "nvml", lambda: None)
    assert power.find(True, tmp_path) is None

    def missing(name: str) -> Any:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.undo()
    assert power.nvml(missing) is None


class Card:
    """NVML of a card that draws 123.4 W and holds 3 GB; or one whose power cannot be asked."""

    def __init__(self, power_code: int = 0) -> None:
        self.power_code = power_code

    def nvmlInit_v2(self) -> int:  # noqa: N802
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index: int, card: Any) -> int:  # noqa: N802
        card._obj.value = 77
        return index

    def nvmlDeviceGetPowerUsage(self, card: ctypes.c_void_p, found: Any) -> int:  # noqa: N802
        assert card.value == 77
        found._obj.value = 123_400
        return self.power_code

    def nvmlDeviceGetMemoryInfo(self, card: ctypes.c_void_p, found: Any) -> int:  # noqa: N802
        found._obj.used = 3 * 10**9
        return 0


def test_an_rtx_card_tells_its_power() -> None:
    meter = power.nvml(lambda name: Card())
    assert meter is not None
    assert (meter.watts(), meter.used_bytes()) == (123.4, 3 * 10**9)
    assert power.nvml(lambda name: Card(power_code=3)) is None


def test_samples_are_of_one_block() -> None:
    class Rising(Steady):
        def __init__(self) -> None:
            self.asked = 0

        def watts(self) -> float:
            self.asked += 1
            return float(self.asked)

        def used_bytes(self) -> int:
            return 1000 + self.asked

    meter = Rising()
    sampler = power.Sampler(meter, period=1e-4)
    for _ in range(2):
        before = meter.asked
        with sampler:
            while meter.asked < before + 3:
                pass
        assert before + 1 <= sampler.watts() <= meter.asked
    assert sampler.most_bytes == meter.asked


def test_memory_of_other_programs_is_not_counted() -> None:
    """Bundles of one bench lie on the card together; each is told what it holds itself."""

    class Card(Steady):
        used = 100

        def used_bytes(self) -> int:
            return self.used

    card = Card()
    one, other = power.Sampler(card), power.Sampler(card)
    with one:
        card.used += 10
    with other:
        card.used += 50
    with one:  # its caches grow
        card.used += 3
    with other:
        pass
    assert (one.most_bytes, other.most_bytes) == (13, 50)


def test_a_sensor_that_does_not_answer_is_passed_over(tmp_path: Path) -> None:
    class Moody(Steady):
        def __init__(self, answers: int) -> None:
            self.asked, self.answers = 0, answers

        def watts(self) -> float:
            self.asked += 1
            if self.asked % 2 and self.asked < 2 * self.answers:
                return 7.5
            raise OSError(19, "No such device")

    for answers, wanted in ((0, None), (2, 7.5)):
        meter = Moody(answers)
        with power.Sampler(meter, period=1e-4) as sampler:
            while meter.asked < 6 and sampler._thread.is_alive():
                pass
        assert sampler.watts() == wanted


def test_a_board_whose_sensor_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(rail: power.Rail) -> float:
        raise OSError(5, "Input/output error")

    hwmon(tmp_path, "ina3221", {"VDD_IN": (5000, 1500)})
    monkeypatch.setattr(power.Rail, "watts", broken)
    assert power.find(False, tmp_path) is None


def test_ctrl_c_is_for_the_parent_alone(tiny_bundle: Path) -> None:
    """A terminal sends it to a whole session; the parent ends its children."""
    with bench._WorkerProcess(
        tiny_bundle, "ort-cpu", bench.BenchRequest((tiny_bundle,))
    ) as process:
        assert os.getsid(process.process.pid) == process.process.pid
    assert process.process.returncode is not None
