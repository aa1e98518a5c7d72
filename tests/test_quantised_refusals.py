"""A quantised checkpoint that is not what it seems is refused in one line, and never read as
something else."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Refused
from safetensors.torch import load_file, save_file
from torch import Tensor

from edgeprune.errors import ModelError
from edgeprune.models import open_model
from edgeprune.models._stored import TensorFiles
from tests import families, packing
from tests.packing import SINGLE
from tests.test_quantised_checkpoints import (
    AWQ,
    BNB,
    FORMS,
    FP8,
    GPTQ,
    W4,
    compressed,
    parameters,
)
from tests.test_weights import configure

QUERY = "language_model.model.layers.1.self_attn.q_proj."
Edit = Callable[[dict[str, Tensor]], object]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families.llava().save(tmp_path_factory.mktemp("llava") / "tiny")


@pytest.fixture(scope="module")
def packed(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A checkpoint of a form; tests change copies of it."""
    made: dict[str, Path] = {}

    def packed_as(name: str) -> Path:
        if name not in made:
            form, folder = FORMS[name], tmp_path_factory.mktemp("packed")
            made[name], _ = packing.pack(saved, folder, form.scheme, form.packed)
        return made[name]

    return packed_as


SETTINGS: dict[str, tuple[str, dict[str, Any], str]] = {
    "awq of 3 bits": ("awq", AWQ | {"bits": 3}, "says bits 3, read is 4"),
    "awq for vectors": ("awq", AWQ | {"version": "GEMV"}, "says version GEMV, read is gemm"),
    "awq by others": ("awq", AWQ | {"backend": "llm-awq"}, "backend llm-awq, read is auto or"),
    "awq groups": (
        "awq",
        AWQ | {"group_size": 8},
        "has scales of 3 groups for 48 inputs, want groups of 8",
    ),
    "awq group": ("awq", AWQ | {"group_size": "all"}, "says group_size all, read is a size or -1"),
    "no awq": ("awq", GPTQ, "has scales of 3 groups for 384 inputs, want groups of 16"),
    "gptq of 3 bits": ("gptq", GPTQ | {"bits": 3}, "says bits 3, read is 4 or 8"),
    "gptq of other bits": ("gptq", GPTQ | {"bits": 8}, "has scales of 3 groups for 24 inputs"),
    "gptq in order": ("gptq", GPTQ | {"desc_act": True}, "says desc_act True, read is false"),
    "gptq of marlin": ("gptq", GPTQ | {"checkpoint_format": "marlin"}, "format marlin, read is"),
    "gptq of marlin too": ("gptq", GPTQ | {"is_marlin_format": True}, "is_marlin_format True, re"),
    "gptq in bytes": ("gptq", GPTQ | {"pack_dtype": "int8"}, "says pack_dtype int8, read is int32"),
    "packed floats": ("packed", compressed("nvfp4-pack-quantized"), "format nvfp4-pack-quantized"),
    "packed 3 bits": (
        "packed",
        compressed("pack-quantized", **W4 | {"num_bits": 3}),
        "says num_bits 3, read is 4 or 8",
    ),
    "packed in order": (
        "packed",
        compressed("pack-quantized", **W4, actorder="group"),
        "says actorder group, read is weight or none",
    ),
    "other groups": (
        "packed",
        compressed("pack-quantized", **W4 | {"group_size": 8}),
        "weight_shape [2] are not 4 bits in groups of 8; the checkpoint is damaged",
    ),
    "other zeros": (
        "packed",
        compressed("pack-quantized", **W4, symmetric=False),
        "are not 4 bits in groups of 16; the checkpoint is damaged",
    ),
    "rotated": (
        "packed",
        compressed("pack-quantized", **W4) | {"transform_config": {"config_groups": {"R1": {}}}},
        "says transform_config {'config_groups': {'R1': {}}}, read is none",
    ),
    "no settings": (
        "packed",
        compressed("pack-quantized") | {"config_groups": {}},
        "groups {}, re",
    ),
    "float8 that divides": (
        "fine-grained float8",
        FP8 | {"weight_scale_method": "block", "weight_block_size": [20, 12]},
        "says weight_scale_method block, read is none",
    ),
    "float8 of other blocks": (
        "fine-grained float8",
        FP8 | {"weight_block_size": [12, 20]},
        "want F8_E8M0 or floats [3, 3]; the checkpoint is damaged, or",
    ),
    "float8 of no blocks": (
        "fine-grained float8",
        FP8 | {"weight_block_size": [0, 20]},
        "says weight_block_size [0, 20], read is rows and columns of a block",
    ),
    "float8 of other exponents": ("float8 of one scale", FP8 | {"fmt": "e5m2"}, "says fmt e5m2"),
    "nf4 of 8 bits": ("nf4", BNB | {"load_in_8bit": True}, "SCB is missing beside weight, weight."),
    "nf4 of no bits": ("nf4", BNB, "says load_in_4bit False, read is one of load_in_4bit and"),
    "floats": ("float8", GPTQ, "(GPTQ, 4 bits in groups of 16), and none is stored so; download"),
}


@pytest.mark.parametrize(("form", "scheme", "says"), SETTINGS.values(), ids=SETTINGS.keys())
def test_settings_that_are_not_read(
    form: str,
    scheme: Mapping[str, Any],
    says: str,
    packed: Callable[[str], Path],
    tmp_path: Path,
    refused: Refused,
) -> None:
    folder = Path(shutil.copytree(packed(form), tmp_path / "copy"))
    configure(folder, quantization_config=scheme)
    command = ["--model", folder, "--method", "none", "--parity", 0, "-o", tmp_path / "bundle"]
    assert says in refused("export", *command)
    assert not (tmp_path / "bundle").exists()


def without(leaf: str) -> Edit:
    return lambda tensors: tensors.pop(QUERY + leaf)


def put(leaf: str, tensor: Tensor) -> Edit:
    return lambda tensors: tensors.update({QUERY + leaf: tensor})


def change(leaf: str, at: Any, value: float) -> Edit:
    return lambda tensors: tensors[QUERY + leaf].__setitem__(at, value)


def state(**changes: Any) -> Edit:
    """Of a weight of bitsandbytes."""
    leaf = "weight.quant_state.bitsandbytes__nf4"

    def edit(tensors: dict[str, Tensor]) -> None:
        told = json.loads(bytes(tensors[QUERY + leaf].tolist())) | changes
        tensors[QUERY + leaf] = torch.tensor(list(json.dumps(told).encode()), dtype=torch.uint8)

    return edit


def edited(folder: Path, to: Path, edit: Edit) -> Path:
    """A copy of a checkpoint with other tensors."""
    copy = Path(shutil.copytree(folder, to / "copy"))
    tensors = load_file(copy / SINGLE)
    edit(tensors)
    save_file(tensors, copy / SINGLE, {"format": "pt"})
    return copy


HUGE = 1 << 40
NF4 = "weight.quant_state.bitsandbytes__nf4"
TENSORS: dict[str, tuple[str, Edit, str]] = {
    "no zeros": ("awq", without("qzeros"), f"{QUERY}qzeros is missing beside qweight, scales; the"),
    "no codes": ("awq", without("qweight"), f"{QUERY}qweight is missing beside qzeros, scales"),
    "two weights": ("awq", put("weight", torch.ones(1)), "weight stands beside qweight: two"),
    "wide scales": ("awq", put("scales", torch.ones(2, 8)), "is F32 [2, 8], want floats [2, 32]"),
    "odd groups": (
        "awq",
        put("scales", torch.ones(3, 32)),
        "has scales of 3 groups for 32 inputs, want",
    ),
    "flat codes": ("awq", put("qweight", torch.ones(4).int()), "is I32 [4], want a matrix of I32"),
    "float codes": ("awq", put("qweight", torch.ones(32, 4)), "is F32 [32, 4], want a matrix of"),
    "other inputs": (
        "awq",
        put("qweight", torch.ones(64, 4).int()),
        "has scales of 2 groups for 64 inputs, want groups of 16",
    ),
    "order": ("gptq", change("g_idx", 0, 1), "g_idx orders the inputs by their activations, whic"),
    "zero points of 0": ("gptq", change("qzeros", (0, 0), -1), "holds zero points of 0, which pro"),
    "packed order": (
        "packed",
        put("weight_g_idx", torch.zeros(32).int()),
        "weight_g_idx orders the inputs by their activations",
    ),
    "no shape": ("packed", without("weight_shape"), "weight_shape is missing beside weight_packed"),
    "huge shape": (
        "packed",
        put("weight_shape", torch.tensor([HUGE, HUGE])),
        f"weight_shape says {HUGE} x {HUGE} of 32 x 4 words",
    ),
    "wide shape": (
        "packed",
        put("weight_shape", torch.tensor([32, 33])),
        "weight_shape says 32 x 33 of 32 x 4 words",
    ),
    "narrow shape": (
        "packed",
        put("weight_shape", torch.tensor([32, 16])),
        "is of 32 x 16: weight_packed [32, 4], weight_scale [32, 2], weight_shape [2] are not",
    ),
    "more weights": (
        "packed",
        lambda tensors: tensors.update({f"lm_head.{n}": torch.ones(1) for n in ("weight_scale",)}),
        "lm_head.weight is missing beside weight_scale",
    ),
    "no scale": ("float8", without("weight_scale"), "q_proj.weight is stored as F8_E4M3: quanti"),
    "other map": ("nf4", change("weight.quant_map", 3, -0.4), "quant_map is not that of nf4; the"),
    "no state": ("nf4", without(NF4), f"{NF4} is missing beside weight, weight.absmax"),
    "no text": ("nf4", put(NF4, torch.ones(9).byte()), f"{NF4} cannot be read; the checkpoint is"),
    "long text": ("nf4", put(NF4, torch.ones(5000).byte()), "is not 4,096 bytes of JSON at most"),
    "nested text": ("nf4", put(NF4, torch.full((4096,), 91).byte()), f"{NF4} cannot be read"),
    "other kind": ("nf4", state(quant_type="fp4"), f"{NF4} contradicts itself"),
    "huge state": ("nf4", state(shape=[HUGE, HUGE]), "numbers of 4 bits; the checkpoint is dam"),
    "negative state": ("nf4", state(shape=[-32, -32]), f"{NF4} contradicts itself"),
    "endless state": ("nf4", state(shape=[1e999, 1]), f"{NF4} cannot be read"),
    "tiny blocks": ("nf4", state(blocksize=32), "is F32 [16], want floats [32]"),
    "by columns": (
        "bitsandbytes of 8 bits",
        put("weight_format", torch.tensor(2, dtype=torch.uint8)),
        "weight_format is not by rows",
    ),
    "short scales": (
        "bitsandbytes of 8 bits",
        put("SCB", torch.ones(31)),
        "is F32 [31], want floats [32]",
    ),
    "another shape": (
        "bitsandbytes of 8 bits",
        lambda t: t.update({f"{QUERY}weight": torch.ones(32, 16).char()}),
        "q_proj.weight is [32, 16], config.json says [32, 32]; the two are not of one checkpoint",
    ),
}


@pytest.mark.parametrize(("form", "edit", "says"), TENSORS.values(), ids=TENSORS.keys())
def test_tensors_that_do_not_fit_together(
    form: str,
    edit: Edit,
    says: str,
    packed: Callable[[str], Path],
    tmp_path: Path,
    refused: Refused,
) -> None:
    folder = edited(packed(form), tmp_path, edit)
    said = refused("models", "--model", folder)
    assert says in said
    command = ["--model", folder, "--method", "none", "--parity", 0, "-o", tmp_path / "bundle"]
    assert refused("export", *command) == said
    assert not (tmp_path / "bundle").exists()


LATE: dict[str, tuple[str, Edit, str]] = {
    "infinite scale": ("awq", change("scales", (0, 0), torch.inf), "holds scales that are infinit"),
    "scale not a number": ("int8", change("weight_scale", (3, 0), torch.nan), "holds scales that"),
    "infinite block": ("nf4", change("weight.absmax", 1, torch.inf), "holds scales that are infin"),
    "damaged float8": (
        "float8",
        lambda t: t.update(
            {f"{QUERY}weight": torch.full((32, 32), torch.nan).to(torch.float8_e4m3fn)}
        ),
        "q_proj.weight holds codes that are not a number; the checkpoint is damaged",
    ),
    "codes of 5 bits": (
        "int8 of 4 bits",
        change("weight", (0, 0), 8),
        "holds codes from -7 to 8 for 4 bits",
    ),
}


@pytest.mark.parametrize(("form", "edit", "says"), LATE.values(), ids=LATE.keys())
def test_numbers_that_no_weight_has_are_refused_where_they_are_read(
    form: str, edit: Edit, says: str, packed: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=re.escape(says)):
        parameters(open_model(str(edited(packed(form), tmp_path, edit))))


def test_nothing_is_left_of_an_export_that_finds_such_a_number(
    packed: Callable[[str], Path], tmp_path: Path, refused: Refused
) -> None:
    folder = edited(packed("awq"), tmp_path, change("scales", (0, 0), torch.nan))
    command = ["--model", folder, "--method", "none", "--parity", 0, "-o", tmp_path / "bundle"]
    assert "holds scales that are infinite or not a number; the c" in refused("export", *command)
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("form", ["awq", "gptq", "packed", "nf4", "bitsandbytes of 8 bits"])
def test_sizes_are_compared_before_anything_large_is_read(
    form: str,
    packed: Callable[[str], Path],
    tmp_path: Path,
    refused: Refused,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A config.json of another model: its smaller tensors alone are read."""
    sizes, read = list[int](), TensorFiles.read

    def counted(self: TensorFiles, name: str) -> Tensor:
        sizes.append(math.prod(self.shape(name)))
        return read(self, name)

    monkeypatch.setattr(TensorFiles, "read", counted)
    folder = Path(shutil.copytree(packed(form), tmp_path / "copy"))
    text = json.loads((folder / "config.json").read_text())["text_config"]
    configure(folder, text_config=text | {"intermediate_size": 64})
    said = refused("models", "--model", folder)
    assert "config.json says [64, 32]; the two are not of one checkpoint" in said
    assert all(size <= 200 for size in sizes)
