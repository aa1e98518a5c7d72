"""Quantised checkpoints of every stored format answer as the floats that their codes mean."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from edgeprune.models import Adapter, open_model
from edgeprune.models._quantised import QuantizedWeight
from edgeprune.policies import make
from edgeprune.spec import Plan, PruneSpec
from tests import families, packing
from tests.families import Family
from tests.packing import Codes
from tests.test_weights import answers_as, change, loaded

GROUP = 16
Packer = Callable[[Tensor], tuple[dict[str, Tensor], Tensor]]


@dataclass(frozen=True)
class Form:
    """A stored format: how config.json tells of it, and what packs a weight in it."""

    scheme: dict[str, Any]
    packed: Packer
    told: str
    bits: int = 0  # of the codes; 0: it has none
    symmetric: bool = False
    block: int = GROUP  # 0: all inputs
    linears: Any = field(default=packing.LINEARS)


def coded(
    pack: Callable[[Codes], dict[str, Tensor]], bits: int = 4, *, symmetric: bool = False
) -> Packer:
    """Codes in groups of 16 inputs, packed by `pack`."""

    def packed(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        codes = Codes.of(weight, bits, GROUP, symmetric=symmetric)
        return pack(codes), codes.floats()

    return packed


def rectangles(
    rows: int, columns: int, leaf: str = "weight_scale", shape: tuple[int, ...] | None = None
) -> Packer:
    """float8 with a scale for each block, all of it where a size is 0."""

    def packed(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        sizes = rows or len(weight), columns or weight.shape[1]
        codes, scales, floats = packing.float8(weight, *sizes)
        return {"weight": codes, leaf: scales if shape is None else scales.view(shape)}, floats

    return packed


def by_output(pack: Callable[[Codes], dict[str, Tensor]], *, symmetric: bool) -> Packer:
    """8 bits with one scale an output."""

    def packed(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        codes = Codes.of(weight, 8, weight.shape[1], symmetric=symmetric)
        return pack(codes), codes.floats()

    return packed


def compressed(format: str, **weights: Any) -> dict[str, Any]:
    """config.json of compressed-tensors, whose activations are quantised too."""
    group = {"weights": weights, "targets": ["Linear"], "input_activations": {"num_bits": 8}}
    scheme = {"quant_method": "compressed-tensors", "format": format, "ignore": ["lm_head"]}
    return {**scheme, "quantization_status": "compressed", "config_groups": {"group_0": group}}


def of(pack: Callable[..., dict[str, Tensor]], *, zeros: bool) -> Callable[..., dict[str, Tensor]]:
    return partial(pack, zeros=zeros)


AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True}
AWQ |= {"version": "gemm", "modules_to_not_convert": ["visual"]}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": False}
V2 = {"checkpoint_format": "gptq_v2"}
W4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP}
W8 = {"num_bits": 8, "type": "int", "strategy": "channel"}
F8 = {"num_bits": 8, "type": "float"}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}
BNB = {"quant_method": "bitsandbytes", "llm_int8_threshold": 6.0}
BNB4 = BNB | {"load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": "nf4"}
PACKED, INTS = packing.compressed, packing.integers
FORMS = {
    "awq": Form(AWQ, coded(packing.awq), "AWQ, 4 bits in groups of 16", 4),
    "gptq": Form(GPTQ, coded(packing.gptq), "GPTQ, 4 bits in groups of 16", 4),
    "gptq symmetric": Form(
        GPTQ, coded(packing.gptq, symmetric=True), "GPTQ, 4 bits in groups of 16", 4, True
    ),
    "gptq v2": Form(
        GPTQ | V2, coded(partial(packing.gptq, less=0)), "GPTQ, 4 bits in groups of 16", 4
    ),
    "gptq of 8 bits": Form(
        GPTQ | {"bits": 8},
        coded(packing.gptq, 8, symmetric=True),
        "GPTQ, 8 bits in groups of 16",
        8,
        True,
    ),
    "packed": Form(
        compressed("pack-quantized", **W4, symmetric=True),
        coded(of(PACKED, zeros=False), symmetric=True),
        "compressed-tensors, 4 bits in groups of 16",
        4,
        True,
    ),
    "packed asymmetric": Form(
        compressed("pack-quantized", **W4, symmetric=False, actorder="weight"),
        coded(of(PACKED, zeros=True)),
        "compressed-tensors, 4 bits in groups of 16",
        4,
    ),
    "packed 8 bits": Form(
        compressed("pack-quantized", **W8, symmetric=True),
        by_output(of(PACKED, zeros=False), symmetric=True),
        "compressed-tensors, 8 bits in one scale an output",
        8,
        True,
        block=0,
    ),
    "int8": Form(
        compressed("int-quantized", **W8, symmetric=True),
        by_output(of(INTS, zeros=False), symmetric=True),
        "compressed-tensors, 8 bits in one scale an output",
        8,
        True,
        block=0,
    ),
    "int8 of 4 bits": Form(
        compressed("int-quantized", **W4, symmetric=True),
        coded(of(INTS, zeros=False), symmetric=True),
        "compressed-tensors, 4 bits in groups of 16",
        4,
        True,
    ),
    "int8 asymmetric": Form(
        compressed("int-quantized", **W8, symmetric=False),
        by_output(of(INTS, zeros=True), symmetric=False),
        "compressed-tensors, 8 bits in one scale an output",
        8,
        block=0,
    ),
    "float8": Form(
        compressed("float-quantized", **F8, strategy="tensor"),
        rectangles(0, 0, shape=(1,)),
        "compressed-tensors, float8, one scale a weight",
        8,
        True,
        block=0,
    ),
    "float8 by output": Form(
        compressed("float-quantized", **F8, strategy="channel"),
        rectangles(1, 0),
        "compressed-tensors, float8, one scale an output",
        8,
        True,
        block=0,
    ),
    "float8 in blocks": Form(
        compressed("float-quantized", **F8, strategy="block", block_structure=[20, 12]),
        rectangles(20, 12),
        "compressed-tensors, float8, blocks of 20 x 12",
    ),
    "fine-grained float8": Form(
        FP8 | {"weight_block_size": [20, 12]},
        rectangles(20, 12, "weight_scale_inv"),
        "float8, blocks of 20 x 12",
    ),
    "float8 of one scale": Form(
        FP8, rectangles(0, 0, shape=()), "float8, one scale a weight", 8, True, block=0
    ),
    "nf4": Form(BNB4, packing.four_bit_floats, "bitsandbytes, 4 bits"),
    "fp4": Form(BNB4, partial(packing.four_bit_floats, kind="fp4"), "bitsandbytes, 4 bits"),
    "nf4 nested": Form(BNB4, partial(packing.four_bit_floats, nested=True), "bitsandbytes, 4 bits"),
    "bitsandbytes of 8 bits": Form(
        BNB | {"load_in_8bit": True},
        packing.int8_by_output,
        "bitsandbytes, 8 bits",
        8,
        True,
        block=0,
    ),
}


@pytest.fixture(scope="module")
def family() -> Family:
    return families.llava()


@pytest.fixture(scope="module")
def saved(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return family.save(tmp_path_factory.mktemp("llava") / "tiny")


def parameters(adapter: Adapter, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """All that a dense decoder reads."""
    with torch.device("meta"):
        plan = Plan(adapter.shape.visual_tokens, adapter.shape.layers)
        module = adapter.decoder(make(PruneSpec("none")), plan)
    return adapter.load(module, dtype).state_dict()


def codes(adapter: Adapter) -> dict[str, QuantizedWeight]:
    """The parameters of a dense decoder that are stored in codes."""
    with torch.device("meta"):
        plan = Plan(adapter.shape.visual_tokens, adapter.shape.layers)
        module = adapter.decoder(make(PruneSpec("none")), plan)
    sources = adapter.sources(module).items()
    found = {name: adapter.reader.quantized(source) for name, source in sources}
    return {name: weight for name, weight in found.items() if weight is not None}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_a_quantised_checkpoint_answers_as_the_floats_that_it_means(
    form: Form, family: Family, saved: Path, tmp_path: Path
) -> None:
    packed, floats = packing.pack(saved, tmp_path, form.scheme, form.packed, form.linears)
    ours, theirs = open_model(str(packed)), open_model(str(floats))
    found, wanted = parameters(ours), parameters(theirs)
    for name, weight in wanted.items():
        assert torch.equal(found[name], weight), name
    assert ours.all_notes == (f"21 weights are stored in codes ({form.told})",)
    assert ours.checkpoint.num_parameters() == theirs.checkpoint.num_parameters()
    assert ours.checkpoint.fingerprint() != theirs.checkpoint.fingerprint()
    assert answers_as(loaded(floats), family, packed)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_codes_are_handed_on_as_they_are_stored(form: Form, saved: Path, tmp_path: Path) -> None:
    """Symmetric ones without zero points, so that every engine takes them."""
    packed, floats = packing.pack(saved, tmp_path, form.scheme, form.packed, form.linears)
    found, wanted = codes(open_model(str(packed))), parameters(open_model(str(floats)))
    assert len(found) == (21 if form.bits else 0)
    for name, weight in found.items():
        block = form.block or len(weight.codes)
        assert (weight.bits, weight.block) == (form.bits, block)
        assert (weight.zeros is None) == form.symmetric
        assert torch.equal(weight.dequantised(), wanted[name]), name


def by_shape(pack: Callable[[Codes], dict[str, Tensor]]) -> Packer:
    """8 bits for the product of 48 inputs, 4 for all others."""

    def packed(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        wide = weight.shape[1] == 48
        codes = Codes.of(weight, 8 if wide else 4, GROUP, symmetric=True)
        return pack(codes), codes.floats()

    return packed


MIXED = compressed("pack-quantized", **W4)
MIXED["config_groups"]["group_1"] = {"weights": W4 | {"num_bits": 8}, "targets": ["re:.*down.*"]}
VARIED = GPTQ | {"dynamic": {"+:.*down.*": {"bits": 8}}}


@pytest.mark.parametrize(
    ("scheme", "packer"),
    [(MIXED, of(PACKED, zeros=False)), (VARIED, packing.gptq)],
    ids=["compressed-tensors", "gptq"],
)
def test_modules_of_other_bits_are_told_by_their_tensors(
    scheme: dict[str, Any],
    packer: Callable[[Codes], dict[str, Tensor]],
    saved: Path,
    tmp_path: Path,
) -> None:
    packed, floats = packing.pack(saved, tmp_path, scheme, by_shape(packer))
    ours = open_model(str(packed))
    found, wanted = parameters(ours), parameters(open_model(str(floats)))
    assert all(torch.equal(found[name], weight) for name, weight in wanted.items())
    bits = {name: weight.bits for name, weight in codes(ours).items()}
    assert {name for name, width in bits.items() if width == 8} == {
        f"layers.{layer}.mlp.down.weight" for layer in range(3)
    }


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_a_bias_of_zeros_that_the_model_has_not_is_no_news(
    value: float, saved: Path, tmp_path: Path
) -> None:
    """AutoGPTQ stores one with every weight; any other is told, for nothing reads it."""
    packed, _ = packing.pack(saved, tmp_path, GPTQ, FORMS["gptq"].packed)
    name = "language_model.model.layers.0.self_attn.o_proj.bias"
    change(packed, lambda tensors: tensors.update({name: torch.full((32,), value)}))
    told = [note for note in open_model(str(packed)).all_notes if "read by nothing" in note]
    assert told == ([f"stored, and read by nothing: {name}"] if value else [])
