"""Dialects: other operators, the same numbers; and only operators that their targets have."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from edgeprune.bundle import Bundle
from edgeprune.export.check import check_model
from edgeprune.runtime.backend import Ids, Output
from edgeprune.runtime.engine import Engine
from tests.frozen import frozen
from tests.graphs import NEVER, sized_by_data

NEWER = {"Attention", "RotaryEmbedding", "RMSNormalization", "TensorScatter"}
CALLS = [(3, 9, True), *[(0, 1, False)] * 66, (0, 7, False), *[(0, 1, False)] * 3]
"""Prefix and text tokens, with an image or not: steps enough for a cache to grow often."""


@pytest.fixture(scope="module", params=[pytest.param("none", marks=pytest.mark.slow), "utp"])
def demo_pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[Path]:
    """The demo's bundles of one method: `modern`, and the same frozen for `jetpack6` in fp32."""
    ours = request.getfixturevalue({"none": "demo_dense", "utp": "demo_utp"}[request.param])
    prune, folder = Bundle.open(ours).manifest.prune, tmp_path_factory.mktemp("pair")
    theirs = frozen(folder / "b", prune.method, prune.cr, target="jetpack6", counts=prune.counts)
    return [ours, theirs]


@pytest.fixture(scope="module")
def tiny_modern(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """UTP on the tiny checkpoint, whose query heads share keys, in the dialect `modern`."""
    folder = tmp_path_factory.mktemp("pair") / "cuda"
    return frozen(folder, "utp", 2, model=tiny_checkpoint, target="cuda")


@pytest.fixture(scope="module", params=["jetpack7", "jetpack6"])
def tiny_pair(
    request: pytest.FixtureRequest,
    tiny_checkpoint: Path,
    tiny_modern: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> list[Path]:
    """The same, and in another dialect."""
    folder = tmp_path_factory.mktemp("pair") / request.param
    return [
        tiny_modern,
        frozen(folder, "utp", 2, model=tiny_checkpoint, target=request.param),
    ]


def dialogue(bundle: Path) -> list[Output]:
    """A prefill, decode steps, a second turn and decode steps again, of tokens drawn by a seed."""
    engine, rng, found = Engine.open(bundle), np.random.default_rng(0), []
    sequence, record = engine.sequence(), engine.manifest.image
    image = engine.encode_pixels(rng.standard_normal(record.shape, np.float32))
    for prefix, text, seen in CALLS:
        ids: Ids = rng.integers(3, engine.manifest.decoder.vocabulary, (1, prefix + text))
        shown = image if seen else None
        found.append(sequence.read(ids[:, prefix:], ids[:, :prefix], shown))
    return found


def assert_same(pair: list[Path]) -> None:
    ours, theirs = map(dialogue, pair)
    heard = set[float]()
    for wanted, found in zip(ours, theirs, strict=True):
        assert wanted.logits is not None and found.logits is not None
        heard.add(float(wanted.logits[5]))
        scale = max(1.0, float(np.abs(wanted.logits).max()))
        assert np.abs(wanted.logits - found.logits).max() / scale < 1e-4
        assert [kept.tolist() for kept in wanted.kept] == [kept.tolist() for kept in found.kept]
    assert len(heard) == len(CALLS), "no call is idle"


def test_the_demo_says_the_same_in_plain_operators(demo_pair: list[Path]) -> None:
    assert_same(demo_pair)


def test_grouped_queries_say_the_same_in_every_dialect(tiny_pair: list[Path]) -> None:
    assert_same(tiny_pair)


def test_a_dialect_has_only_operators_of_its_target(tiny_pair: list[Path]) -> None:
    manifest = Bundle.open(tiny_pair[1]).manifest
    models = [
        onnx.load(tiny_pair[1] / f"{n}.onnx", load_external_data=False)
        for n in ("vision", "join", "decoder")
    ]
    used = {node.op_type for model in models for node in model.graph.node}
    attention = [node for node in models[-1].graph.node if node.op_type == "Attention"]
    assert not used & NEVER
    assert not any(sized_by_data(model.graph) for model in models)
    if manifest.dialect == "jetpack6":
        assert (manifest.decoder.cache, manifest.opset) == ("grow", 18)
        assert not used & NEWER
        firsts = [v.first for m in models for v in check_model(m) if v.target.engine == "trt"]
        assert set(firsts) == {(10, 0)}, "nothing that TensorRT 10.0 does not have"
    else:
        assert (manifest.decoder.cache, manifest.opset) == ("in-place", 24)
        assert used >= NEWER
        assert all(len(node.input) == 4 and not node.attribute for node in attention)


def test_sizes_say_how_a_cache_is_kept(tiny_pair: list[Path]) -> None:
    for bundle in tiny_pair:
        graph = onnx.load(bundle / "decoder.onnx", load_external_data=False).graph
        ends = {
            v.name: v.type.tensor_type.shape.dim[2].dim_param
            for v in (*graph.input, *graph.output)
            if "_key" in v.name
        }
        for layer in range(3):
            before, after = ends[f"past_key.{layer}"], ends[f"present_key.{layer}"]
            if Bundle.open(bundle).manifest.decoder.cache == "grow":
                assert (before, after) == (f"past.{layer}", f"present.{layer}")
            else:
                assert before == after == f"capacity.{layer}"
