"""benchmarks.gpu, as far as it goes without a GPU."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from benchmarks.gpu import figure, install, random_weights, report
from benchmarks.gpu.cells import cells, tiny
from benchmarks.gpu.prepare import prepare
from benchmarks.gpu.steps import DECODE_TOKENS, Request, run
from edgeprune.bundle import Bundle
from edgeprune.errors import BundleError, SpecError
from edgeprune.graph_contract import WEIGHTS
from edgeprune.graphs import GRAPHS
from edgeprune.runtime.build import BuildRequest, size_ranges
from edgeprune.runtime.engine import Engine


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dense and a pruned bundle of a dry run, without weights."""
    folder = tmp_path_factory.mktemp("prepared")
    prepare(tiny()[:2], folder)
    return folder


@pytest.fixture
def bundles(prepared: Path, tmp_path: Path) -> list[Path]:
    shutil.copytree(prepared, tmp_path / "bundles")
    return [tmp_path / "bundles" / cell.name for cell in tiny()[:2]]


def test_names_of_cells_are_their_own() -> None:
    names = [cell.name for cell in (*cells(), *tiny())]
    assert len({*names}) == len(names)


def test_weights_are_random_but_for_norms_and_tables(bundles: list[Path]) -> None:
    bundle = bundles[0]
    assert not (bundle / WEIGHTS).exists()
    random_weights.fill(bundle)
    found = {}
    for graph in GRAPHS:
        for tensor in onnx.load(bundle / graph).graph.initializer:
            found[tensor.name] = onnx.numpy_helper.to_array(tensor)
    assert np.all(found["layers.0.attention_norm.weight"] == 1)
    table = next(value for name, value in found.items() if name.endswith("cos"))
    assert np.all(table[0] == 1), "the cosine at position 0"
    weight = found["layers.3.mlp.down.weight"].astype(np.float32)
    assert weight.std() == pytest.approx(weight.shape[0] ** -0.5, rel=0.05)
    others = [value for name, value in found.items() if name.endswith("mlp.down.weight")]
    assert len({value.tobytes() for value in others}) == len(others), "no two are alike"


def test_equal_weights_are_one_file(bundles: list[Path]) -> None:
    for bundle in bundles:
        random_weights.fill(bundle)
    assert (bundles[0] / WEIGHTS).samefile(bundles[1] / WEIGHTS)


def test_filled_bundles_run(bundles: list[Path]) -> None:
    for bundle in bundles:
        random_weights.fill(bundle)
        engine = Engine.open(bundle, verify=False)
        image = engine.encode_pixels(np.ones(engine.manifest.image.shape, np.float32))
        output = engine.sequence().read(np.array([[5, 6, 7]]), image=image)
        assert output.logits is not None
        assert np.isfinite(output.logits).all()
        assert output.logits.std() > 0.01


def test_a_run_goes_on_and_tells_what_failed(bundles: list[Path], tmp_path: Path) -> None:
    """A backend that is not there leaves its reason; a step that is done is not done again."""
    request = Request(
        tuple(tiny()[:2]),
        bundles[0].parent,
        tmp_path / "results",
        ("ort-cpu", "trt"),
        rounds=2,
        new_tokens=2,
        eager=False,
        tests=False,
    )
    run(request)
    told = report.table(request.results)
    assert told.count("| ort-cpu |") == 2
    assert "bench-tiny-144-cuda-trt: BackendError" in told
    times = {file: file.stat().st_mtime_ns for file in request.results.iterdir()}
    run(request)
    assert {file: file.stat().st_mtime_ns for file in request.results.iterdir()} == times


def test_engines_are_built_of_weights_that_were_made_on_the_spot(bundles: list[Path]) -> None:
    for bundle in bundles:
        random_weights.fill(bundle)
    with pytest.raises(BundleError, match="altered"):
        Bundle.open(bundles[1], verify=True)
    random_weights.seal(bundles[1])
    assert Bundle.open(bundles[1], verify=True)


def test_the_decode_profile_is_as_wide_as_asked_for(bundles: list[Path]) -> None:
    random_weights.fill(bundles[0])
    bundle = Bundle.open(bundles[0], verify=False)
    for tokens in DECODE_TOKENS:
        request = BuildRequest(bundles[0], "trt-rtx", decode_tokens=tokens)
        assert size_ranges(bundle, request, {})["decode"]["text"] == (1, 1, tokens)
    with pytest.raises(SpecError, match="at least 1 token"):
        BuildRequest(bundles[0], "trt-rtx", decode_tokens=0)


def test_ranges_and_bars_are_those_of_the_files(tmp_path: Path) -> None:
    name, rounds = tiny()[0].name, {"vision": [0.01], "prefill": [0.02], "decode": [0.001]}
    row = {"name": name, "backend": "ort-cpu", "rounds": rounds}
    eager = {"cell": name, "vision": 0.03, "prefill": 0.04, "decode": 0.005}
    built = [{"tokens": 128, "bytes": 2_000_000, "rounds": rounds}]
    built.append({"tokens": 1, "bytes": 4_000_000, "why": "no GPU"})
    files = {
        "bench-a": {"rows": [row]},
        "eager-a": {"cells": [eager]},
        "machine": {"gpu": None},
    }
    for stem, content in files.items():
        (tmp_path / f"{stem}.json").write_text(json.dumps(content))
    bars = list(figure.read(tmp_path))
    assert [bar.label for bar in bars] == ["dense, ort-cpu", "dense, eager torch"]
    assert [round(sum(bar.parts)) for bar in bars] == [10 + 20 + 32, 30 + 40 + 160]
    assert figure.figure(tmp_path).height > 100
    ranges = {"cell": name, "backend": "trt", "ranges": built}
    (tmp_path / "bench-a.json").unlink()
    (tmp_path / "eager-a.json").unlink()
    (tmp_path / "ranges-a.json").write_text(json.dumps(ranges))
    told = [line.split("|")[3:-1] for line in report.table(tmp_path).splitlines() if "trt" in line]
    assert [[cell.strip() for cell in line] for line in told] == [
        ["128", "2.0", "1.00 (1.00-1.00)"],
        ["1", "4.0", "-"],
    ]


def test_a_device_needs_no_torch() -> None:
    code = "import sys, benchmarks.gpu.main; print({'torch', 'onnx'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_wheels_are_installed_without_an_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The environment is made, edgeprune installed into it, and the same command run there."""
    arguments = ["run", "b", "r", "--wheels", str(tmp_path), "--backends", "ort-cuda", "trt-rtx"]
    assert install.asked(arguments) == tmp_path
    assert install.asked(["run", "b", "r"]) is None
    with pytest.raises(SystemExit, match="holds no wheels; fill it"):
        install.again(tmp_path, arguments)
    (tmp_path / "numpy-2.0-py3-none-any.whl").touch()
    ran: list[list[str]] = []

    def pretend(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        ran.append(command)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pretend)
    assert install.again(tmp_path, arguments) == 0
    made, installed, again = ran
    assert made[1:3] == ["-m", "venv"]
    assert (
        installed[0] == again[0] == str(tmp_path / "environment" / "bin" / made[0].split("/")[-1])
    )
    assert installed[-1].endswith("[gpu,trt-rtx]") and "--no-index" in installed
    assert again[1:] == ["-m", "benchmarks.gpu", "run", "b", "r", *arguments[5:]]
    assert install.extras(["--dry"]) == ["cpu"]


def test_what_cannot_be_installed_is_said_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "long\nERROR: No match for numpy\nmore")

    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(SystemExit, match="pip download failed: ERROR: No match for numpy"):
        install.download(tmp_path, ["gpu"], "3.12", "manylinux_2_28_x86_64")
    listed = install.requirements(["gpu"])
    assert any(line.startswith("onnxruntime-gpu") for line in listed)
    with pytest.raises(SystemExit, match="no extra 'gpus'"):
        install.requirements(["gpus"])
