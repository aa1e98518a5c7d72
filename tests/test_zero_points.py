"""Codes with zero points in graphs for TensorRT, which takes none: offsets in a second product."""

from __future__ import annotations

import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto
from safetensors.torch import load_file, save_file

from edgeprune.bundle import Bundle
from edgeprune.cli import main
from edgeprune.errors import ParityError
from edgeprune.models import open_model
from edgeprune.models._processor import random_prompt
from edgeprune.models._quantised import QuantizedWeight
from edgeprune.models._rounding import TORCH
from edgeprune.policies import make
from edgeprune.runtime import Session
from edgeprune.runtime.sampling import Sampling
from edgeprune.spec import PruneSpec
from edgeprune.weight_format import FLOAT, WeightFormat
from tests import families, packing
from tests.conftest import Refused
from tests.families import QUESTION, Family
from tests.frozen import compared
from tests.packing import Codes
from tests.test_families import drawn_image
from tests.test_quantised_checkpoints import FORMS, GPTQ, PACKED, W4, Packer, compressed, of
from tests.test_quantised_exports import WIDE, spoken, wide_awq

PRODUCTS, TENSORS = 21, 12
"""Of 3 layers, and what these products read: queries, keys and values one tensor, gate and up."""


@pytest.fixture(scope="module")
def family() -> Family:
    return families.llava(hidden_size=64, intermediate_size=96)


@pytest.fixture(scope="module")
def awq(family: Family, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint in groups of 32 with zero points, and the floats that it means."""
    folder = tmp_path_factory.mktemp("awq")
    return packing.pack(family.save(folder / "saved"), folder, WIDE, wide_awq)


def exported(model: Path, output: Path, *options: str) -> Path:
    command = ["export", "--model", model, "--method", "none", "--parity", 1, "-o", output]
    assert main([*map(str, command), *options]) == 0
    return output


@pytest.fixture(scope="module")
def bundle(awq: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = ["--target", "jetpack6", "--dtype", "fp32", "--weights", "int4:head=off"]
    return exported(awq[0], tmp_path_factory.mktemp("bundle") / "fp32", *options)


def graph(bundle: Path) -> Any:
    return onnx.load(bundle / "decoder.onnx", load_external_data=False).graph


@pytest.mark.parametrize("dtype", TORCH.values())
@pytest.mark.parametrize("bits", [4, 8])
def test_offsets_stand_for_zero_points(dtype: torch.dtype, bits: int) -> None:
    """But for the rounding of scales times zero points to the graph's dtype."""
    half, drawn = 2 ** (bits - 1), torch.Generator().manual_seed(0)
    codes = torch.randint(-half, half, (64, 6), generator=drawn).to(torch.int8)
    zeros = torch.randint(-half, half, (2, 6), generator=drawn).to(torch.int8)
    scales = (torch.rand(2, 6, generator=drawn) + 0.1).to(dtype).float()
    stored = QuantizedWeight(codes, scales, zeros, bits, 32)
    found = stored.with_offsets(dtype)
    assert found is not None and found.zeros is None and found.offsets is not None
    assert torch.equal(found.codes, codes) and torch.equal(found.scales, scales)
    assert torch.equal(found.offsets, found.offsets.to(dtype).float())
    digit = torch.finfo(dtype).eps * half * float(scales.max())
    apart = (found.dequantised() - stored.dequantised()).abs().max()
    assert apart <= digit and (dtype != torch.float32 or apart < 1e-4)
    part = found.part(slice(2, 6))
    assert torch.equal(part.dequantised(), found.dequantised()[:, 2:6])
    assert torch.equal(
        QuantizedWeight.joined([found.part(slice(0, 2)), part]).dequantised(), found.dequantised()
    )


def test_offsets_that_do_not_fit_the_dtype_are_none() -> None:
    codes, zeros = torch.zeros(2, 1, dtype=torch.int8), torch.full((1, 1), -8, dtype=torch.int8)
    stored = QuantizedWeight(codes, torch.full((1, 1), 6e4), zeros, 4, 2)
    assert stored.with_offsets(torch.float16) is None
    assert stored.with_offsets(torch.bfloat16) is not None


def test_every_code_is_the_checkpoints_own(bundle: Path) -> None:
    record = Bundle.open(bundle).manifest.weights
    assert record is not None
    assert (record.packed, record.own, record.zero_points) == (PRODUCTS,) * 3
    assert record.error < 1e-7
    nodes, tensors = graph(bundle).node, {t.name: t for t in graph(bundle).initializer}
    assert all(len(n.input) == 2 for n in nodes if n.op_type == "DequantizeLinear")
    read = Counter(name.rpartition("/")[2] for node in nodes for name in node.input)
    assert read["offset"] == PRODUCTS
    assert sum(node.op_type == "ReduceSum" for node in nodes) == TENSORS
    bits = sum(8 * _bytes(tensors[n]) for n in tensors if _is_of_product(n, tensors))
    assert record.bits == bits / record.numbers == 4 + 2 * 32 / 32
    assert main(["check", str(bundle), "--target", "jetpack6"]) == 0


def test_every_product_of_codes_is_fused(bundle: Path, tmp_path: Path) -> None:
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    ort.InferenceSession(bundle / "decoder.onnx", options, ["CPUExecutionProvider"])
    optimised = onnx.load(tmp_path / "optimised.onnx", load_external_data=False)
    found = Counter(node.op_type for node in optimised.graph.node)
    assert (found["MatMulNBits"], found["DequantizeLinear"]) == (PRODUCTS, 0)


def _is_of_product(name: str, tensors: dict[str, Any]) -> bool:
    return name.removesuffix("/scale").removesuffix("/offset") + "/scale" in tensors


def _bytes(tensor: Any) -> int:
    return next(int(entry.value) for entry in tensor.external_data if entry.key == "length")


@pytest.fixture
def exact_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32: left alone, ONNX Runtime rounds what products of codes read to int8."""
    made = ort.SessionOptions

    def exact() -> Any:
        options = made()
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
        return options

    monkeypatch.setattr(ort, "SessionOptions", exact)


def said(bundle: Path, family: Family) -> list[int]:
    """32 greedy tokens of a bundle."""
    with Session.open(bundle) as session:
        answer = session.ask(drawn_image(family.sizes[0]), QUESTION, Sampling(max_new_tokens=32))
    return list(answer.ids)


def test_greedy_tokens_are_those_of_the_floats(
    bundle: Path, family: Family, awq: tuple[Path, Path], exact_activations: None
) -> None:
    packed, floats = awq
    assert said(bundle, family) == spoken(family, floats, packed)


def in_groups_of_32(pack: Callable[[Codes], dict[str, torch.Tensor]]) -> Packer:
    def packed(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        codes = Codes.of(weight, 4, 32)
        return pack(codes), codes.floats()

    return packed


@pytest.mark.parametrize(
    ("scheme", "pack"),
    [
        (GPTQ | {"group_size": 32}, packing.gptq),
        (compressed("pack-quantized", **W4 | {"group_size": 32}), of(PACKED, zeros=True)),
    ],
    ids=["gptq", "compressed-tensors"],
)
def test_other_formats_answer_as_their_floats_too(
    scheme: dict[str, Any],
    pack: Callable[[Codes], dict[str, torch.Tensor]],
    family: Family,
    tmp_path: Path,
    exact_activations: None,
) -> None:
    packed, floats = packing.pack(
        family.save(tmp_path / "saved"), tmp_path, scheme, in_groups_of_32(pack)
    )
    options = ["--target", "jetpack6", "--dtype", "fp32", "--weights", "int4:head=off"]
    made = exported(packed, tmp_path / "bundle", *options, "--parity", "0")
    record = Bundle.open(made).manifest.weights
    assert record is not None and record.own == record.zero_points == PRODUCTS
    assert said(made, family) == spoken(family, floats, packed)


def test_parity_finds_one_changed_offset(
    bundle: Path, awq: tuple[Path, Path], tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    adapter = open_model(str(awq[0]))
    stored = adapter.with_weights(WeightFormat.parse("int4:head=off"), torch.float32)
    prompts = [random_prompt(adapter.pixels, adapter.shape.vocabulary, 0)]
    compared(copy, stored, make(PruneSpec("none")), prompts)
    tensors = graph(copy).initializer
    (offsets,) = (t for t in tensors if t.name == "layers.1.mlp.down.weight/offset")
    start = next(int(entry.value) for entry in offsets.external_data if entry.key == "offset")
    held = np.memmap(copy / "weights.bin", np.float32, "r+", start, tuple(offsets.dims))
    held.flat[np.abs(held).argmax()] *= -1
    held.flush()
    with pytest.raises(ParityError, match=r"begins in decoder layers\.1"):
        compared(copy, stored, make(PruneSpec("none")), prompts)


@pytest.mark.parametrize(
    ("target", "options"),
    [
        pytest.param("rtx", ["--dtype", "fp16"], marks=pytest.mark.slow),
        pytest.param("jetpack7", ["--dtype", "bf16"], marks=pytest.mark.slow),
        pytest.param("cuda", ["--dtype", "fp16"], marks=pytest.mark.slow),
    ],
)
def test_half_precision_keeps_the_codes_too(
    target: str, options: list[str], awq: tuple[Path, Path], tmp_path: Path
) -> None:
    settings = ["--target", target, *options, "--weights", "int4:head=off"]
    bundle = exported(awq[0], tmp_path / "bundle", *settings)
    record = Bundle.open(bundle).manifest.weights
    assert record is not None and record.own == record.zero_points == PRODUCTS
    assert record.bits == 5 and record.error < 5e-3
    assert record.distance is not None and record.distance.tokens == 1
    assert main(["check", str(bundle), "--target", "rtx"]) == 0


def test_eight_bits_have_one_offset_an_output(tmp_path: Path) -> None:
    saved, form = families.llava().save(tmp_path / "saved"), FORMS["int8 asymmetric"]
    packed, _ = packing.pack(saved, tmp_path, form.scheme, form.packed)
    settings = ["--target", "jetpack7", "--weights", "int8:head=off"]
    made = exported(packed, tmp_path / "bundle", *settings)
    record = Bundle.open(made).manifest.weights
    assert record is not None and record.own == record.zero_points == PRODUCTS
    offsets = [t for t in graph(made).initializer if t.name.endswith("/offset")]
    assert {tensor.dims[0] for tensor in offsets} == {1}


def test_sizes_count_offsets_and_zero_points(bundle: Path, awq: tuple[Path, Path]) -> None:
    """As the disk does that an export asks for, and `check --memory`."""
    adapter, wanted = open_model(str(awq[0])), WeightFormat.parse("int4:head=off")
    record = Bundle.open(bundle).manifest.weights
    assert record is not None
    told, floats = adapter.weight_bytes(wanted, 4), adapter.weight_bytes(FLOAT, 4)
    assert told == floats + record.numbers * (record.bits / 8 - 4)
    blocks = record.numbers // 32
    assert told - adapter.weight_bytes(wanted, 4, zero_points=True) == blocks * 4 - blocks // 2


@pytest.fixture
def large(awq: tuple[Path, Path], tmp_path: Path) -> Path:
    """Each input of some products fits fp16, 32 of them together do not."""
    folder = shutil.copytree(awq[0], tmp_path / "large")
    (file,) = folder.glob("*.safetensors")
    tensors, layer = load_file(file), "language_model.model.layers.1."
    tensors[f"{layer}post_attention_layernorm.weight"].fill_(9e3)
    for part in ("gate", "up"):
        tensors[f"{layer}mlp.{part}_proj.scales"] *= 1e-3
    save_file(tensors, file, {"format": "pt"})
    return folder


def test_sums_of_blocks_that_leave_fp16_are_refused(
    large: Path, tmp_path: Path, refused: Refused
) -> None:
    settings = ["--target", "rtx", "--weights", "int4:head=off", "--parity", "1"]
    said = refused("export", "--model", large, "--method", "none", *settings, "-o", tmp_path / "b")
    assert "decoder layers.1 mlp.gate reaches " in said and "--keep-fp32 auto" in said


@pytest.mark.slow
def test_products_whose_sums_leave_fp16_may_stay_in_float32(large: Path, tmp_path: Path) -> None:
    settings = ["--target", "rtx", "--weights", "int4:head=off", "--keep-fp32", "auto"]
    made = exported(large, tmp_path / "bundle", *settings)
    record = Bundle.open(made).manifest.weights
    assert record is not None and record.zero_points == PRODUCTS
    kinds = {t.name: t.data_type for t in graph(made).initializer if t.name.endswith("/offset")}
    assert set(kinds.values()) == {TensorProto.FLOAT, TensorProto.FLOAT16}
    assert kinds["layers.1.mlp.up.weight/offset"] == TensorProto.FLOAT


@pytest.mark.slow
def test_an_engine_holds_codes_and_offsets(awq: tuple[Path, Path], tmp_path: Path) -> None:
    if sys.platform != "linux":
        pytest.importorskip("tensorrt_rtx")
    settings = ["--target", "rtx", "--weights", "int4:head=off"]
    bundle = exported(awq[0], tmp_path / "bundle", *settings)
    assert main(["build", str(bundle), "--backend", "trt-rtx", "--text-capacity", "64"]) == 0


def test_a_product_of_integers_has_no_zero_points(tmp_path: Path) -> None:
    """Its codes are rounded anew, on every target."""
    saved, form = families.llava().save(tmp_path / "saved"), FORMS["int8 asymmetric"]
    packed, _ = packing.pack(saved, tmp_path, form.scheme, form.packed)
    adapter = open_model(str(packed)).with_weights(
        WeightFormat.parse("int8:activations=on:smooth=off"), torch.float32, zero_points=True
    )
    _, decoder = adapter.empty_modules()
    source = adapter.sources(decoder)["layers.0.mlp.up.weight"]
    (strip,) = adapter.reader.strips(source)
    assert strip.weight.zeros is None and not strip.own
