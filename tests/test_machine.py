"""`check` of a machine, over faked files and drivers; and the memory that a model needs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from edgeprune.cli import main
from edgeprune.cost import kv_bytes
from edgeprune.memory_estimate import KINDS, SYSTEM, estimate
from edgeprune.models import open_model
from edgeprune.runtime import machine
from edgeprune.runtime.machine import Gpu, Machine
from tests.conftest import Refused

ORIN = Gpu("Orin", "sm_87", 8 * 10**9, "12.6")
CARD = Gpu("NVIDIA GeForce RTX 4090", "sm_89", 24 * 10**9, "13.0")
RELEASE = "# R36 (release), REVISION: 4.3, GCID: 1, BOARD: generic, EABI: aarch64, DATE: today\n"

Fake = Callable[..., Machine]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Fake:
    """A machine with a GPU or none, packages, providers, and files below `tmp_path`."""

    def make(gpu: Gpu | None = None, packages: str = "", providers: str = "", release: str = ""):
        have = set(packages.split())
        monkeypatch.setattr(machine, "gpu", lambda: gpu)
        monkeypatch.setattr(machine, "_version", lambda names: "1.0" if have & {*names} else "")
        monkeypatch.setattr(machine, "_providers", lambda: tuple(providers.split()))
        for name, text in (
            ("proc/meminfo", "MemTotal: 7812500 kB\n"),
            ("etc/nv_tegra_release", release),
        ):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(text)
        return machine.describe(tmp_path)

    return make


def can(found: Machine) -> dict[str, str]:
    """What is possible (an empty reason) and why the rest is not."""
    abilities = list(found.abilities())
    assert all(ability.possible == (not ability.why) for ability in abilities)
    return {ability.what: ability.why for ability in abilities}


def test_a_jetson_with_jetpack(fake: Fake) -> None:
    found = fake(ORIN, "tensorrt cuda-python onnxruntime", "CPUExecutionProvider", RELEASE)
    assert found.jetpack == "JetPack 6.2, Jetson Linux 36.4.3"
    assert found.bytes == 8_000_000_000
    able = can(found)
    assert able["build with trt"] == able["run on trt"] == able["run on ort-cpu"] == ""
    assert "pip install '.[export]'" in able["export"]
    assert "a Jetson runs trt" in able["run on trt-rtx"]
    assert able["run on ort-cuda"]


def test_a_jetson_without_cuda_python_is_told_what_to_install(fake: Fake) -> None:
    able = can(fake(ORIN, "tensorrt", release=RELEASE))
    assert able["build with trt"] == ""
    assert "JetPack 6: pip install 'cuda-python>=12.6,<13'" in able["run on trt"]


def test_a_release_that_is_not_known_is_named(fake: Fake) -> None:
    release = RELEASE.replace("R36", "R99")
    assert fake(ORIN, release=release).jetpack == "Jetson Linux 99.4.3"
    assert fake(ORIN, release="nonsense").jetpack == "no Jetson"


def test_an_rtx_pc(fake: Fake) -> None:
    packages = "tensorrt-rtx cuda-bindings onnxruntime-gpu"
    able = can(fake(CARD, packages, "CUDAExecutionProvider CPUExecutionProvider"))
    assert [what for what, why in able.items() if why] == [
        "export",
        "build with trt",
        "run on trt",
    ]
    assert "pip install '.[trt]'" in able["run on trt"]


def test_a_machine_without_a_gpu_builds_and_does_not_run(fake: Fake) -> None:
    packages = "tensorrt-rtx tensorrt cuda-python onnxruntime torch onnx"
    able = can(fake(None, packages, "CPUExecutionProvider"))
    assert able["build with trt-rtx"] == able["export"] == able["run on ort-cpu"] == ""
    for what in ("build with trt", "run on trt", "run on trt-rtx", "run on ort-cuda"):
        assert able[what] == "no NVIDIA GPU, or no driver for it"


def test_an_empty_machine(fake: Fake) -> None:
    assert all(can(fake()).values())


def test_the_report_of_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check"]) == 0
    out = capsys.readouterr().out
    assert "run on ort-cpu      yes" in out
    assert main(["check", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["versions"]["onnxruntime"]
    assert {a["what"] for a in record["abilities"]} >= {
        "export",
        "run on trt",
        "build with trt-rtx",
    }


def test_the_memory_of_the_demo(capsys: pytest.CaptureFixture[str]) -> None:
    """Weights, caches and activations, counted here in another way."""
    assert main(["check", "--model", "demo", "--memory", "--cr", "4", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    adapter = open_model("demo")
    shape, elements = adapter.shape, adapter.checkpoint.num_parameters()
    rows = {(b["target"], b["dtype"], b["format"]): b for b in record["estimates"]}
    assert tuple(rows) == KINDS
    half = rows["jetpack7", "fp16", "float"]
    assert half["weights"] == 2 * elements
    width, mlp, vocabulary = shape.width, shape.mlp_width, shape.vocabulary
    products = 12 * (4 * width**2 + 3 * width * mlp) + width * vocabulary
    scales = 12 * (4 * width**2 // 64 + 2 * width // 64 * mlp + mlp // 32 * width)
    scales += width // 64 * vocabulary
    four = products // 2 + 2 * scales + 2 * (elements - products)
    assert rows["jetpack7", "fp16", "int4"]["weights"] == four
    tokens = shape.visual_tokens // 4 + 512
    assert half["caches"] == [4 * shape.kv_heads * shape.head_size * tokens] * shape.layers
    assert half["caches"][0] == kv_bytes(shape, [shape.visual_tokens // 4], 512, 2)
    residual, mlp = 2 * shape.width * tokens, 3 * shape.mlp_width * tokens
    assert half["activations"] == 2 * (residual + mlp)
    plain = rows["jetpack6", "fp16", "float"]
    assert plain["caches"] == [2 * size for size in half["caches"]], "one grows into the other"
    assert plain["activations"] >= 2 * shape.attention_heads * tokens**2
    assert half["total"] == half["weights"] + sum(half["caches"]) + half["activations"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["bundle", "--memory", "--model", "demo"], "--memory asks about --model"),
        (["bundle", "--cr", "4"], "--cr and --text-capacity are for --memory"),
        (["--text-capacity", "512"], "--cr and --text-capacity are for --memory"),
        (["--memory", "--model", "demo", "--text-capacity", "0"], "at least 1 token; got 0"),
        (["--memory", "--model", "demo", "--cr", "0"], "a number of at least 1; got 0"),
        (["--memory"], "give --model and --memory together"),
    ],
)
def test_options_that_do_not_go_together(options: list[str], says: str, refused: Refused) -> None:
    assert says in refused("check", *options)


def test_what_fits_a_device() -> None:
    shape = open_model("demo").shape
    found = estimate(shape, 2 * 10**9, [10] * shape.layers, 10, ("jetpack7", "fp16", "float"))
    assert found.fits(found.total + SYSTEM)
    assert not found.fits(found.total + SYSTEM - 1)
