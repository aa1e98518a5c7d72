"""`bench --duration`: rounds for so long, and what a machine says of itself meanwhile."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgeprune.bench import sustained
from edgeprune.bench.bench import BenchResult
from edgeprune.bench.conditions import Conditions, Observer, power_mode
from edgeprune.bench.power import nvml
from edgeprune.bench.sustained import HEADS, Sustained
from edgeprune.cli import main
from tests.conftest import Refused
from tests.test_bench import Card, row


def written(root: Path, files: dict[str, object]) -> Path:
    """A root of these files."""
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{content}\n")
    return root


CPU = "sys/devices/system/cpu"


def test_rounds_go_on_for_the_time_that_was_asked(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "load.json"
    options = ["--duration", "0.6", "--warmup", "1", "--new-tokens", "2", "--json", str(file)]
    assert main(["bench", str(tiny_bundle), *options]) == 0
    told = capsys.readouterr()
    result = BenchResult.from_json(file.read_text())
    assert result.sustained is not None and result.request["duration"] == 0.6
    seconds = result.sustained.seconds
    assert seconds[-1] >= 0.6 and all(s < 0.6 for s in seconds[:-1])
    assert len(seconds) == len(result.rows[0].rounds.prefill) > 2
    assert "power" in result.machine
    assert sum(line.startswith("0-") for line in told.out.splitlines()) >= 1
    assert "in the last part the first token took" in told.out
    assert f"of {len(seconds)} rounds" in told.err
    changed = json.loads(file.read_text())
    changed["sustained"]["seconds"].pop()
    with pytest.raises(ValueError, match="lack a time"):
        BenchResult.from_json(json.dumps(changed))
    changed["sustained"]["conditions"].pop()
    with pytest.raises(ValueError, match="differ in number"):
        BenchResult.from_json(json.dumps(changed))


def test_what_is_no_duration_is_refused(tiny_bundle: Path, refused: Refused) -> None:
    assert "--duration is a number of seconds" in refused("bench", tiny_bundle, "--duration", "0")
    assert "--duration is a number of seconds" in refused("bench", tiny_bundle, "--duration", "nan")


def test_the_table_shows_what_heat_costs() -> None:
    """Two rounds, the second half as fast: in the last part all takes twice as long."""
    cool, hot = Conditions(41.0, 2000, 1300), Conditions(88.5, 1000, 650, ("CPU thermal",))
    load = Sustained((1.0, 3.0), (cool, hot))
    request = {"text_tokens": 16, "new_tokens": 4}
    result = BenchResult((row("a", "trt", 1, joules=(1.3, 5.2)),), (), (), request, {}, load)
    lines = sustained.table(result).splitlines()
    cells = [[c.strip() for c in line.split("  ") if c.strip()] for line in lines[1:3]]
    first, last = (dict(zip(HEADS, found, strict=True)) for found in cells)
    assert (first["seconds"], last["seconds"]) == ("0-1", "1-3")
    assert (first["requests/min"], last["requests/min"]) == ("461.5", "230.8")  # of 0.13, 0.26 s
    assert (first["W"], last["W"], last["C"], last["GPU MHz"]) == ("10.0", "20.0", "88", "650")
    assert (first["slowed"], last["slowed"]) == ("0%", "100%")
    assert "the first token took 2.00 times and a step of decode 2.00 times" in lines[3]
    assert lines[4] == "slowed down in 50% of the rounds: CPU thermal"


def test_parts_are_equal_in_time() -> None:
    quiet = Conditions(None, None, None)
    load = Sustained((1.0, 2.0, 2.5, 9.0, 10.0), (quiet,) * 5)
    assert load.parts() == [range(1), range(1, 3), range(3, 5)]
    assert Sustained((0.0,), (quiet,)).parts() == [range(1)]


def test_a_machine_tells_heat_clocks_and_what_slows_it(tmp_path: Path) -> None:
    files: dict[str, object] = {
        "sys/class/thermal/thermal_zone0/temp": 41_500,
        "sys/class/thermal/thermal_zone1/temp": 63_000,
        "sys/class/thermal/thermal_zone2/temp": "",  # a sensor that is off
        f"{CPU}/cpu0/cpufreq/scaling_cur_freq": 1_000_000,
        f"{CPU}/cpu1/cpufreq/scaling_cur_freq": 2_000_000,
        f"{CPU}/cpu0/cpufreq/scaling_governor": "schedutil",
        f"{CPU}/cpu0/thermal_throttle/core_throttle_count": 7,
        "sys/class/devfreq/17000000.gpu/cur_freq": 918_000_000,
        "sys/class/devfreq/17000000.dla/cur_freq": 1,
    }
    observer = Observer(gpu=False, root=written(tmp_path, files))
    assert observer.look() == Conditions(63.0, 1500.0, 918.0)
    written(tmp_path, {f"{CPU}/cpu0/thermal_throttle/core_throttle_count": 8})
    assert observer.look().slowed == ("CPU thermal",)
    assert observer.look().slowed == (), "it was slowed down once"
    assert power_mode(tmp_path) == "schedutil"
    assert power_mode(written(tmp_path, {"var/lib/nvpmodel/status": "pmode:0002"})) == "pmode:0002"


class Hot(Card):
    """A card of 84 degrees that lowers its clock for it; or whose driver cannot say so."""

    def __init__(self, code: int = 0) -> None:
        super().__init__()
        self.code = code

    def nvmlDeviceGetTemperature(self, card: Any, sensor: int, found: Any) -> int:  # noqa: N802
        assert sensor == 0
        found._obj.value = 84
        return 0

    def nvmlDeviceGetClockInfo(self, card: Any, clock: int, found: Any) -> int:  # noqa: N802
        assert clock == 1  # of the multiprocessors
        found._obj.value = 1410
        return self.code

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, card: Any, found: Any) -> int:  # noqa: N802
        found._obj.value = 0x1 | 0x4 | 0x20  # idle too, which is nobody's fault
        return self.code


def test_a_card_tells_heat_clocks_and_what_slows_it(tmp_path: Path) -> None:
    observer = Observer(gpu=True, root=tmp_path, card=nvml(lambda name: Hot()))
    wanted = Conditions(84.0, None, 1410.0, ("power cap", "thermal (software)"))
    assert observer.look() == wanted
    deaf = Observer(gpu=True, root=tmp_path, card=nvml(lambda name: Hot(code=3)))
    assert deaf.look() == Conditions(84.0, None, None)
    old = Observer(gpu=True, root=tmp_path, card=nvml(lambda name: Card()))
    assert old.look() == Conditions(None, None, None), "an old driver lacks these calls"
