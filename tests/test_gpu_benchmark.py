"""benchmarks.gpu, as far as it goes without a GPU."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

from benchmarks.gpu import random_weights, report
from benchmarks.gpu.cells import cells, tiny
from benchmarks.gpu.prepare import prepare
from benchmarks.gpu.steps import Request, run
from edgeprune.graph_contract import GRAPHS, WEIGHTS
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
