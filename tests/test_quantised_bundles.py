"""Bundles with quantised weights: of every target, run, compared with the eager model, and bound
to be caught where a code or a scale is another."""

from __future__ import annotations

import shutil
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto

from benchmarks.shape import Shape
from benchmarks.shapes import write
from edgeprune.bundle import Bundle
from edgeprune.cli import main
from edgeprune.errors import ParityError
from edgeprune.generation import Sampling
from edgeprune.lowering import TARGETS
from edgeprune.models import open_model
from edgeprune.models._processor import random_prompt
from edgeprune.models._rounding import TORCH
from edgeprune.policies import make
from edgeprune.runtime.session import Session
from edgeprune.spec import PruneSpec
from edgeprune.weight_format import WeightFormat
from tests.families import llava_onevision
from tests.frozen import compared, frozen

IMAGE = np.random.default_rng(0).integers(0, 255, (56, 56, 3), np.uint8)
ALL = [*((target, "int4") for target in TARGETS), ("cpu", "int8"), ("jetpack6", "int8")]
FAULTS = [
    ("cpu", "int4", ""),
    ("cpu", "int8", "/scale"),
    ("rtx", "int4", "/scale"),
    ("jetpack6", "int8", ""),
]


@pytest.fixture(scope="module")
def bundles(tiny_checkpoint, tmp_path_factory):
    """Bundles by target and kind, made when they are first asked for."""
    folder, made = tmp_path_factory.mktemp("quantised"), dict[tuple[str, str], Path]()

    def bundle(target: str, kind: str) -> Path:
        if (target, kind) not in made:
            output = folder / f"{target}-{kind}"
            options = ["--model", tiny_checkpoint, "--method", "none", "--parity", 1]
            options += ["--target", target, "--weights", kind, "-o", output]
            assert main(["export", *map(str, options)]) == 0
            made[target, kind] = output
        return made[target, kind]

    return bundle


@pytest.mark.parametrize(("target", "kind"), ALL)
def test_every_target_runs_and_every_product_is_fused(bundles, target, kind, tmp_path):
    bundle = bundles(target, kind)
    with Session.open(bundle) as session:
        assert session.ask(IMAGE, "What is it?", Sampling(max_new_tokens=2)).text is not None
    manifest = Bundle.open(bundle).manifest
    assert manifest.opset == (21 if target == "jetpack6" else 24)
    assert manifest.weights.tensors[kind] == 22  # 3 layers of 7, and the head
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    ort.InferenceSession(bundle / "decoder.onnx", options, ["CPUExecutionProvider"])
    optimised = onnx.load(tmp_path / "optimised.onnx", load_external_data=False)
    found = Counter(node.op_type for node in optimised.graph.node)
    assert found["MatMulNBits"] == 22
    assert found["DequantizeLinear"] == 0


@pytest.mark.parametrize(("target", "kind", "part"), FAULTS)
def test_parity_finds_one_changed_byte(bundles, target, kind, part, tiny_checkpoint, tmp_path):
    bundle = Path(shutil.copytree(bundles(target, kind), tmp_path / "bundle"))
    manifest, adapter = Bundle.open(bundle).manifest, open_model(str(tiny_checkpoint))
    dtype = TORCH[manifest.dtype]
    stored = adapter.with_weights(WeightFormat.parse(kind), dtype)
    prompts = [random_prompt(adapter.pixels, adapter.shape.vocabulary, n) for n in range(2)]

    def check() -> None:
        compared(bundle, stored, make(PruneSpec("none")), prompts)

    check()
    _flip(bundle, f"layers.1.mlp.down.weight{part}")
    with pytest.raises(ParityError, match=r"begins in decoder layers\.1"):
        check()


def _flip(bundle: Path, name: str) -> None:
    """Change the upper half of the last byte of the first number of a tensor."""
    initializers = onnx.load(bundle / "decoder.onnx", load_external_data=False).graph.initializer
    (tensor,) = (found for found in initializers if found.name == name)
    offset = next(int(e.value) for e in tensor.external_data if e.key == "offset")
    size = {TensorProto.FLOAT: 4, TensorProto.FLOAT16: 2}.get(tensor.data_type, 1)
    with (bundle / "weights.bin").open("r+b") as file:
        file.seek(offset + size - 1)
        byte = file.read(1)[0]
        file.seek(offset + size - 1)
        file.write(bytes([byte ^ (0x04 if size > 1 else 0x80)]))


@pytest.mark.parametrize(("target", "scale"), [("cpu", 32), ("rtx", 16)])
def test_the_file_holds_as_many_bits_a_weight_as_is_told(bundles, target, scale):
    bundle = bundles(target, "int4")
    record = Bundle.open(bundle).manifest.weights
    graph = onnx.load(bundle / "decoder.onnx", load_external_data=False).graph
    stored = {t.name: next(int(e.value) for e in t.external_data if e.key == "length")
              for t in graph.initializer if t.external_data}  # fmt: skip
    scales = [name for name in stored if name.endswith("/scale")]
    size = sum(stored[name] + stored[name.removesuffix("/scale")] for name in scales)
    blocks = {64: 64, 96: 32}  # inputs of the tiny model's products, and their blocks
    products = [(64, 64), (64, 32), (64, 32), (64, 64), (64, 96), (64, 96), (96, 64)] * 3
    products.append((64, 66))
    assert record.numbers == sum(k * n for k, n in products)
    assert 8 * size == sum(k * n * 4 + k // blocks[k] * n * scale for k, n in products)
    assert record.bits == 8 * size / record.numbers
    assert record.error == pytest.approx(0.1, rel=0.3)


def test_the_distance_to_the_float_model_is_stored_and_told(bundles, tiny_checkpoint):
    four, eight = (Bundle.open(bundles("cpu", kind)).manifest.weights for kind in ("int4", "int8"))
    assert 0 < eight.distance.logits < four.distance.logits < 1
    assert four.running.logits != four.distance.logits  # activations are rounded too
    assert Bundle.open(bundles("rtx", "int4")).manifest.weights.running is None


def test_scales_are_searched_for_unless_that_is_off(bundles):
    kinds = ("int4", "int4:clip=off")
    clipped, rounded = (Bundle.open(bundles("cpu", kind)).manifest.weights for kind in kinds)
    assert clipped.error < 0.95 * rounded.error
    assert (clipped.algorithm, rounded.algorithm) == ("rounding, clipped", "rounding")


@pytest.mark.parametrize("target", ["cpu", "rtx"])
def test_rows_of_an_embedding_are_int8(target, tiny_checkpoint, tmp_path):
    """They are compared with the eager model of the same rows, as all weights are."""
    bundle = tmp_path / "bundle"
    options = ["--model", tiny_checkpoint, "--method", "none", "--parity", 1]
    options += ["--target", target, "--weights", "int4:embedding=on", "-o", bundle]
    assert main(["export", *map(str, options)]) == 0
    with Session.open(bundle) as session:
        assert session.ask(IMAGE, "What is it?", Sampling(max_new_tokens=2)).text is not None
    graph = onnx.load(bundle / "decoder.onnx", load_external_data=False).graph
    (table,) = (t for t in graph.initializer if t.name == "embedding.weight")
    held = {"cpu": (TensorProto.INT8, [66, 64]), "rtx": (TensorProto.INT32, [66, 16])}
    assert (table.data_type, list(table.dims)) == held[target]  # four codes in a word
    assert {n.op_type for n in graph.node if table.name in n.input} == {"Gather"}
    assert Bundle.open(bundle).manifest.weights.tensors["int8"] == 1


def test_a_tied_model_holds_its_head_apart(tmp_path):
    """The embedding stays as it is; the head is its tensor, quantised, and is compared so."""
    model, output = llava_onevision().save(tmp_path / "tied"), tmp_path / "bundle"
    assert open_model(str(model)).decoder_config.tied
    options = ["--model", model, "--method", "none", "--parity", 1, "--weights", "int4"]
    assert main([*map(str, ["export", *options, "-o", output])]) == 0
    graph = onnx.load(output / "decoder.onnx", load_external_data=False).graph
    assert {"embedding.weight", "head.weight"} <= {t.name for t in graph.initializer}


@pytest.mark.parametrize(
    ("target", "kind"),
    [("rtx", "int4"), pytest.param("jetpack6", "int8", marks=pytest.mark.slow)],
)
def test_tensorrt_rtx_keeps_codes_as_they_are(target, kind, tmp_path):
    """An engine of a wide model takes about as many bits a weight as the bundle, and some code."""
    if sys.platform != "linux":
        pytest.importorskip("tensorrt_rtx")
    wide = Shape(2, 1024, 2048, 16, 4, 66, vision_layers=2, vision_width=64, image=56)
    model = write(wide, tmp_path / "wide")
    bundle = tmp_path / "bundle"
    frozen(bundle, "none", model=model, target=target, dtype="fp16", weights=kind)
    assert main(["build", str(bundle), "--backend", "trt-rtx", "--text-capacity", "64"]) == 0
    (engine,) = bundle.glob("engines/*/decoder.engine")
    products = 2 * (1024 * (2 * 1024 + 2 * 256) + 3 * 1024 * 2048)
    bits = 8 * engine.stat().st_size / products
    assert {"int4": 4.1, "int8": 8.0}[kind] < bits < {"int4": 8, "int8": 12}[kind]
