"""Products whose inputs are rounded with scales that samples say: int8 and float8, for TensorRT."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from safetensors.torch import load_file, save_file

from edgeprune.bundle import Bundle
from edgeprune.calib import smoothing
from edgeprune.calib.activations import Moments
from edgeprune.calib.awq import Group
from edgeprune.cli import main
from edgeprune.errors import ExportError
from edgeprune.export import weighing
from edgeprune.generation import Sampling
from edgeprune.lowering import resolve
from edgeprune.models._reference import Reference
from edgeprune.models._rounded_inputs import round_inputs, scale_of
from edgeprune.runtime.session import Session
from tests.conftest import Refused, instruct_records
from tests.frozen import frozen
from tests.test_awq import POLICY, grouped, opened

IMAGE = np.random.default_rng(0).integers(0, 255, (56, 56, 3), np.uint8)
KINDS = {"int8": TensorProto.INT8, "fp8": TensorProto.FLOAT8E4M3FN}
Bundles = Callable[[str, str], Path]
PRODUCTS = 3 * 7
TENSORS = 3 * 4  # what queries, keys and values read, what gate and up read, and two more


def command(model: Path, instruct: Path, output: Path, target: str, weights: str) -> list[str]:
    options = ["--model", model, "--method", "none", "--parity", 2, "--target", target]
    options += ["--samples-file", instruct, "--weights", weights, "-o", output]
    return [*map(str, ["export", *options])]


@pytest.fixture(scope="module")
def bundles(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundles:
    """Bundles by target and weights, made when they are first asked for."""
    folder, made = tmp_path_factory.mktemp("calibrated"), dict[tuple[str, str], Path]()
    samples = instruct_records(folder)

    def bundle(target: str, weights: str) -> Path:
        if (target, weights) not in made:
            output = made[target, weights] = folder / f"{len(made)}"
            assert main(command(tiny_checkpoint, samples, output, target, weights)) == 0
        return made[target, weights]

    return bundle


@pytest.mark.parametrize(
    ("target", "weights"),
    [
        ("rtx", "int8:activations=on:vision=on"),
        ("jetpack7", "fp8"),
        pytest.param("jetpack6", "int8:activations=on", marks=pytest.mark.slow),
    ],
)
def test_inputs_are_rounded_as_the_eager_model_rounds_them(
    target: str, weights: str, bundles: Bundles
) -> None:
    bundle, kind = bundles(target, weights), weights.partition(":")[0]
    record = Bundle.open(bundle).manifest.weights
    assert record is not None and record.rounded and record.running and record.distance
    assert record.tensors[kind] >= PRODUCTS + 1
    assert record.running.logits == pytest.approx(record.rounded.logits, rel=0.3)
    graph = onnx.load(bundle / "decoder.onnx").graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    rounding = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    assert len(rounding) == TENSORS
    for node in rounding:
        scale, zero = (tensors[name] for name in node.input[1:])
        assert zero.data_type == KINDS[kind] and not scale.dims
        assert scale.data_type == TensorProto.FLOAT16 and numpy_helper.to_array(scale) > 0
    codes = [tensors[n.input[0]] for n in graph.node
             if n.op_type == "DequantizeLinear" and n.input[0] in tensors]  # fmt: skip
    assert len(codes) == PRODUCTS + 1 and {t.data_type for t in codes} == {KINDS[kind]}
    with Session.open(bundle) as session:
        assert session.ask(IMAGE, "What is it?", Sampling(max_new_tokens=2)).text is not None


def test_another_scale_of_inputs_is_found(
    tiny_checkpoint: Path, instruct: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Parity is right, since it does not round; the graph as it runs is too far away."""
    graphs = weighing.Graphs

    def spoiled(folder: Path, *rest: object, exact: bool = True, wide: bool = False) -> object:
        model = onnx.load(folder / "decoder.onnx", load_external_data=False)
        for tensor in (t for t in model.graph.initializer if t.name.endswith("inputs/scale")):
            data = numpy_helper.to_array(tensor, str(folder))
            tensor.CopyFrom(numpy_helper.from_array(data / data.dtype.type(6), tensor.name))
        onnx.save(model, folder / "decoder.onnx")
        return graphs(folder, *rest, exact=exact, wide=wide)  # type: ignore[arg-type]

    monkeypatch.setattr(weighing, "Graphs", spoiled)
    output = tmp_path / "bundle"
    weights = "int8:activations=on"
    assert main(command(tiny_checkpoint, instruct, output, "rtx", weights)) == 2
    assert not output.exists()
    assert "than the eager model in activations of int8" in capfd.readouterr().err


def test_samples_are_needed(tiny_checkpoint: Path, tmp_path: Path, refused: Refused) -> None:
    usual = ["export", "--model", tiny_checkpoint, "--method", "none", "--weights"]
    said = refused(*usual, "fp8", "--target", "rtx")
    assert "--weights fp8:activations=on measures on samples" in said
    assert "or export with smooth=off" in refused(*usual, "int8:activations=on")
    with pytest.raises(ExportError, match="no calibration sample says how large the inputs of"):
        frozen(tmp_path / "b", "none", model=tiny_checkpoint, target="rtx", weights="fp8")


def test_products_that_see_other_tokens_share_the_scales_of_the_largest() -> None:
    """As experts of text and of images do behind one norm."""
    largest = {"text": [1.0, 4.0], "image": [9.0, 1.0]}
    moments = {name: Moments(largest=torch.tensor(values)) for name, values in largest.items()}
    reader = SimpleNamespace(floats=lambda source: [(slice(None), torch.ones(2, 3))])
    adapter: Any = SimpleNamespace(reader=reader)
    sources: Any = dict.fromkeys(largest)
    first, second = smoothing._scales(Group(tuple(largest), ("norm",)), adapter, sources, moments)
    assert float(first / second) == pytest.approx(1.5)


def test_smoothing_leaves_the_float_model_and_makes_rounding_cheap(tmp_path: Path) -> None:
    """Some channels of its norms are 100 times as large as the others."""
    folder = grouped().save(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    for name in (name for name in tensors if "language_model" in name and "norm" in name):
        tensors[name][::16] *= 100
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    adapter, plan, prompts = opened(folder)
    wanted = [Reference.build(adapter, POLICY, plan).prefill(p).logits for p in prompts]
    lost = dict[tuple[bool, bool], float]()
    for smooth in (False, True):
        format = resolve("rtx", "fp32", "int8:activations=on").weights
        plain = adapter.with_weights(format, torch.float32)
        how = {"smooth": smooth, "calibrated": True}
        tuning = smoothing.tune(plain, POLICY, plan, prompts, **how)
        tuned = adapter.with_weights(format, torch.float32, tuning)
        assert tuned.weights is not None
        for rounded in (False, True):
            model = Reference.build(tuned, POLICY, plan)
            if rounded:
                round_inputs(tuned.weights, model.vision, model.decoder)
            found = [model.prefill(p).logits for p in prompts]
            pairs = zip(found, wanted, strict=True)
            lost[smooth, rounded] = sum(float((a - b).square().sum()) for a, b in pairs)
    assert lost[True, True] < 0.1 * lost[False, True]
    assert lost[True, False] < 2 * lost[False, False], "the float model is as it was"


def test_a_scale_is_that_of_the_graphs_dtype() -> None:
    assert float(scale_of(127.0, torch.float16, is_float8=False)) == 1
    assert float(scale_of(448.0, torch.float16, is_float8=True)) == 1
    assert float(scale_of(0.0, torch.float16, is_float8=False)) == 1, "nothing went in"
    found = scale_of(1.0, torch.float16, is_float8=False)
    assert float(found) == float(np.float16(1 / 127))


BUILD = ("build", "--backend", "trt-rtx", "--text-capacity", 64)


def test_float8_is_not_built_for_a_gpu_without_it(bundles: Bundles, refused: Refused) -> None:
    if sys.platform != "linux":
        pytest.importorskip("tensorrt_rtx")
    said = refused(*BUILD, bundles("jetpack7", "fp8"), "--compute", "SM86")
    assert "float8, which GPUs have from compute capability 8.9 on; this is for SM86" in said


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["int8:activations=on:vision=on", "fp8"])
def test_tensorrt_rtx_compiles_what_is_rounded(bundles: Bundles, weights: str) -> None:
    bundle = bundles("rtx", weights)
    assert main([*map(str, [*BUILD, bundle, "--compute", "SM89"])]) == 0
