"""Products whose inputs are rounded to 8 bits: the graph computes what the eager model does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto

from edgeprune.bundle import Bundle
from edgeprune.cli import main
from edgeprune.errors import SpecError
from edgeprune.export import weighing
from edgeprune.generation import Sampling
from edgeprune.lowering import resolve
from edgeprune.models import open_model
from edgeprune.models._quantised import QuantizedWeight, fitted
from edgeprune.models._rounded_inputs import by_token
from edgeprune.models._rounding import TORCH
from edgeprune.runtime.session import Session

IMAGE = np.random.default_rng(0).integers(0, 255, (56, 56, 3), np.uint8)
WEIGHTS = "int8:activations=on:smooth=off:vision=on"


def exported(model: Path, output: Path, target: str = "cpu", weights: str = WEIGHTS) -> Path:
    options = ["--model", model, "--method", "none", "--parity", 2, "--target", target]
    assert main([*map(str, ["export", *options, "--weights", weights, "-o", output])]) == 0
    return output


@pytest.fixture(scope="module")
def bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tiny_checkpoint, tmp_path_factory.mktemp("rounded") / "cpu")


def test_a_bundle_of_integers_runs_and_tells_its_distance(bundle: Path) -> None:
    with Session.open(bundle) as session:
        assert session.ask(IMAGE, "What is it?", Sampling(max_new_tokens=2)).text is not None
    record = Bundle.open(bundle).manifest.weights
    assert record is not None and record.rounded and record.running and record.distance
    assert record.rounded.logits > record.distance.logits > 0
    assert record.running.logits == pytest.approx(record.rounded.logits, rel=0.3)


@pytest.mark.parametrize("rows", [1, 7])
def test_a_product_is_what_the_eager_model_computes(
    bundle: Path, tiny_checkpoint: Path, rows: int
) -> None:
    """One layer's first products cut out of the graph, their input one token far above others."""
    model = onnx.load(bundle / "decoder.onnx")
    (query,) = (n for n in model.graph.node if "layers.1.attention.query.weight" in n.input)
    source = next(n for n in model.graph.node if n.output[0] == query.input[0])
    units = next(n for n in model.graph.node if n.output[0] == source.input[0])
    made = next(n for n in model.graph.node if query.output[0] in n.input)
    cut = onnx.utils.Extractor(model).extract_model([units.input[0]], [made.output[0]])
    engine = ort.InferenceSession(cut.SerializeToString(), providers=["CPUExecutionProvider"])
    x = torch.randn(1, rows, 64, generator=torch.Generator().manual_seed(rows))
    x[0, 0] *= 100
    (found,) = engine.run(None, {units.input[0]: x.numpy()})
    adapter = open_model(str(tiny_checkpoint))
    lowering = resolve("cpu", weights=WEIGHTS)
    stored = adapter.with_weights(lowering.weights, TORCH["fp32"], largest=64)
    (name,) = (n for n in query.input if n.endswith("weight"))
    weight = stored.reader.read(stored.sources(stored.empty_modules()[1])[name], torch.float32)
    wanted = by_token(x) @ weight
    np.testing.assert_allclose(found, wanted.numpy(), rtol=0, atol=1e-5 * float(wanted.abs().max()))
    exact = x @ weight
    off = (wanted - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert 1e-4 < float(off.max()) < 0.03, "small tokens keep their digits beside a large one"


def test_codes_leave_room_for_sums_of_16_bits(bundle: Path) -> None:
    """x86 without VNNI adds two products of an input, 255 at most, and a weight in 16 bits."""
    model = onnx.load(bundle / "decoder.onnx")
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    integers = [n for n in model.graph.node if n.op_type == "MatMulIntegerToFloat"]
    assert len(integers) == 21  # 3 layers of 7; the head is read for one token
    for node in integers:
        codes = onnx.numpy_helper.to_array(tensors[node.input[1]])
        assert codes.dtype == np.int8 and np.abs(codes.astype(int)).max() == 64
    inputs = {node.input[0] for node in integers}
    assert len(inputs) == 3 * 4, "queries, keys and values read one rounded tensor, gate and up too"
    assert sum(n.op_type == "MatMulIntegerToFloat" for n in vision(bundle)) > 0


def vision(bundle: Path) -> list[onnx.NodeProto]:
    return list(onnx.load(bundle / "vision.onnx", load_external_data=False).graph.node)


def test_codes_of_a_checkpoint_that_are_larger_are_not_kept() -> None:
    codes = torch.tensor([[100], [-64]], dtype=torch.int8)
    stored = QuantizedWeight(codes, torch.ones(1, 1), None, 8, 2)
    rest = 8, 2, torch.float32
    assert fitted(stored, *rest, largest=64) is None
    assert fitted(stored, *rest, largest=100) is not None


def test_a_graph_that_rounds_otherwise_is_refused(
    tiny_checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Its codes of inputs end at 115 on one side; the weights are right."""
    graphs = weighing.Graphs

    def spoiled(draft: Path, *rest: object, exact: bool = True, wide: bool = False) -> object:
        model = onnx.load(draft / "decoder.onnx", load_external_data=False)
        for tensor in model.graph.initializer:
            if tensor.data_type == TensorProto.UINT8 and not tensor.dims:
                tensor.raw_data = bytes([140])
                break
        onnx.save(model, draft / "decoder.onnx")
        return graphs(draft, *rest, exact=exact, wide=wide)  # type: ignore[arg-type]

    monkeypatch.setattr(weighing, "Graphs", spoiled)
    options = ["--model", tiny_checkpoint, "--method", "none", "--parity", 2]
    output = tmp_path / "bundle"
    code = main([*map(str, ["export", *options, "--weights", WEIGHTS, "-o", output])])
    assert code == 2 and not output.exists()
    assert (
        "farther from float32 than the eager model in activations of int8" in capfd.readouterr().err
    )


@pytest.mark.parametrize(
    ("target", "dtype", "weights", "why"),
    [
        ("cpu", "fp16", "int8:activations=on", "computes between products in fp32 on --target cpu"),
        (
            "cuda",
            None,
            "int8:activations=on",
            "is for the targets cpu, rtx, jetpack7, jetpack6; got --target cuda",
        ),
        ("cpu", None, "int4:activations=on", "activations=on is an option of --weights int8"),
        ("cpu", None, "int4:activations=on:awq=on", "is an option of --weights int8"),
        ("rtx", None, "int8:activations=on:awq=on", "awq=on of --weights is for activations of fl"),
        ("rtx", None, "fp8:smooth=on", "smooth=on of --weights is for int8 with activations=on"),
        ("jetpack6", None, "fp8", "fp8 is for the targets rtx, jetpack7; got --target jetpack6"),
        ("cpu", None, "int8:head=fp8", "fp8 is for the targets rtx, jetpack7; got --target cpu"),
        ("cpu", None, "int8:activations=yes", "activations of --weights is on or off; got 'yes'"),
    ],
)
def test_what_no_target_has_is_refused(target, dtype, weights, why) -> None:
    with pytest.raises(SpecError, match=why):
        resolve(target, dtype, weights)
