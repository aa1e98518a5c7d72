"""What an export makes of a quantised checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from safetensors.torch import load_file

from edgeprune.bundle import Bundle
from edgeprune.cli import main
from edgeprune.models import open_model
from edgeprune.onnx_file import Quantised, Value
from edgeprune.quantised_contract import check_quantised
from edgeprune.runtime import Session
from edgeprune.runtime.sampling import Sampling
from edgeprune.weight_format import WeightFormat
from tests import families, packing
from tests.families import QUESTION, Family
from tests.test_families import drawn_image, generated, ours, prompted
from tests.test_lora import ALPHA, LINEAR, MODULES, RANK, adapt
from tests.test_quantised_checkpoints import AWQ, FORMS, GPTQ, Packer, codes, parameters
from tests.test_weights import answers_as, loaded


@pytest.fixture(scope="module")
def family() -> Family:
    return families.llava()


@pytest.fixture(scope="module")
def saved(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return family.save(tmp_path_factory.mktemp("llava") / "tiny")


@pytest.fixture
def pair(saved: Path, tmp_path: Path) -> Callable[[str], tuple[Path, Path]]:
    """A quantised checkpoint of a form, and the floats that it means."""
    return lambda name: packing.pack(saved, tmp_path, FORMS[name].scheme, FORMS[name].packed)


def spoken(family: Family, floats: Path, checkpoint: Path) -> list[int]:
    """32 greedy tokens of transformers' model with the floats of a quantised checkpoint."""
    image = drawn_image(family.sizes[0])
    adapter, pixels = ours(family, checkpoint, image)
    theirs = replace(family, model=loaded(floats))
    return generated(theirs, adapter, prompted(adapter, pixels), **family.look(image))


@pytest.mark.parametrize("name", ["awq", "float8 in blocks"])
def test_a_bundle_of_a_quantised_checkpoint_answers_as_its_floats(
    name: str,
    family: Family,
    pair: Callable[[str], tuple[Path, Path]],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    packed, floats = pair(name)
    output = tmp_path / "bundle"
    command = ["export", "--model", str(packed), "--method", "none", "--parity", "1"]
    assert main([*command, "-o", str(output)]) == 0
    told = f"note: 21 weights are stored in codes ({FORMS[name].told})"
    said = capfd.readouterr().err
    assert told in said and "21 quantised weights are written as floats (fp32); --weights" in said
    assert Bundle.open(output).manifest.checkpoint_weights == FORMS[name].told
    with Session.open(output) as session:
        sampling = Sampling(max_new_tokens=32)
        answer = session.ask(drawn_image(family.sizes[0]), QUESTION, sampling)
    assert list(answer.ids) == spoken(family, floats, packed)


@pytest.mark.parametrize("name", ["gptq symmetric", "nf4"])
def test_a_lora_adapter_is_merged_into_the_floats_of_its_base(
    name: str, family: Family, pair: Callable[[str], tuple[Path, Path]]
) -> None:
    """As it was trained. A weight that it changes is no longer what the codes say."""
    packed, floats = pair(name)
    for folder in (packed, floats):
        adapt(folder, LINEAR)
    ours, theirs = open_model(str(packed)), open_model(str(floats))
    found, wanted = parameters(ours), parameters(theirs)
    assert all(torch.equal(found[name], weight) for name, weight in wanted.items())
    changed = {"layers.1.attention.query.weight", "layers.1.mlp.down.weight"}
    packed_codes = codes(ours).keys()
    assert not changed & packed_codes
    assert len(packed_codes) == (19 if FORMS[name].bits else 0)
    assert "(3 products of rank 4) is merged" in ours.all_notes[1]
    model, stored = loaded(floats), load_file(floats / packing.SINGLE)
    for module in MODULES[:2]:
        factors = (LINEAR[f"{module}.lora_{factor}.weight"] for factor in "BA")
        second, first = factors
        weight = stored[f"{module.replace('model.language_model', 'language_model.model')}.weight"]
        scale = ALPHA / len(first)
        model.get_submodule(module).weight.data = weight + scale * second @ first
    head = LINEAR["lm_head.lora_B.weight"] @ LINEAR["lm_head.lora_A.weight"]
    model.lm_head.weight.data = model.lm_head.weight.data + ALPHA / RANK * head
    assert answers_as(model, family, packed)


def wide_awq(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """In groups of 32, of which engines take blocks."""
    found = packing.Codes.of(weight, 4, 32)
    return packing.awq(found), found.floats()


def even_gptq(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The same, symmetric."""
    found = packing.Codes.of(weight, 4, 32, symmetric=True)
    return packing.gptq(found), found.floats()


WIDE, EVEN = AWQ | {"group_size": 32}, GPTQ | {"group_size": 32}
INT8, FLOAT8 = FORMS["bitsandbytes of 8 bits"], FORMS["float8 by output"]
KEPT = "note: the checkpoint's 21 quantised weights keep their codes"
ZEROS = f"{KEPT}; 21 have zero points"
OFFSETS = f"{ZEROS} in a second product of sums of blocks"
ANEW = "note: the checkpoint's 21 quantised weights are rounded anew, 21 of them: not of the bits"


@pytest.mark.parametrize(
    ("scheme", "packer", "weights", "target", "own", "told"),
    [
        (WIDE, wide_awq, "int4:head=off", "cpu", 21, ZEROS),
        (WIDE, wide_awq, "int4:head=off", "rtx", 21, OFFSETS),
        (EVEN, even_gptq, "int4:head=off", "rtx", 21, KEPT),
        (INT8.scheme, INT8.packed, "int8:head=off", "jetpack7", 21, KEPT),
        pytest.param(
            *(FLOAT8.scheme, FLOAT8.packed, "fp8:activations=off:head=off", "rtx", 21, KEPT),
            marks=pytest.mark.slow,
        ),
        (FORMS["nf4"].scheme, FORMS["nf4"].packed, "int8:head=off", "cpu", 0, ANEW),
    ],
    ids=["zero points", "zero points in a second product", "int4", "int8", "float8", "no codes"],
)
def test_codes_of_the_checkpoint_are_kept_where_the_target_takes_them(
    scheme: dict[str, Any],
    packer: Packer,
    weights: str,
    target: str,
    own: int,
    told: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Parity holds with the eager model of the bundle's weights, the checkpoint's own or not."""
    saved = families.llava(hidden_size=64, intermediate_size=96).save(tmp_path / "saved")
    packed, floats = packing.pack(saved, tmp_path, scheme, packer)
    output = tmp_path / "bundle"
    command = ["export", "--model", packed, "--method", "none", "--parity", 1]
    command += ["--weights", weights, "--target", target, "-o", output]
    assert main([*map(str, command)]) == 0
    assert told in capfd.readouterr().err
    record = Bundle.open(output).manifest.weights
    assert record is not None and (record.packed, record.own) == (21, own)
    assert (record.error < 1e-3) == (own == 21)  # float32 scales are rounded to fp16
    exact_codes = own == 21 and packer not in (INT8.packed, FLOAT8.packed)
    offsets = packer is wide_awq and target != "cpu"  # rounded to fp16
    assert (record.error == 0) == (exact_codes and not offsets)
    graph = onnx.load(output / "decoder.onnx", load_external_data=False).graph
    shifts = [t.name.rpartition("/")[2] for t in graph.initializer if "/" in t.name]
    assert shifts.count("zero") == (21 if packer is wide_awq and target == "cpu" else 0)
    assert shifts.count("offset") == (21 if offsets else 0)
    assert record.zero_points == (21 if packer is wide_awq else 0)
    exact = parameters(open_model(str(floats)))
    bundled = open_model(str(packed)).with_weights(
        WeightFormat.parse(weights), torch.float32, zero_points=target == "cpu"
    )
    query = "layers.1.attention.query.weight"
    found = parameters(bundled)[query]
    assert torch.allclose(found, exact[query], rtol=1e-5, atol=1e-7) == (own == 21)
    assert offsets or torch.equal(found, exact[query]) == (own == 21)


def test_zero_points_of_other_sizes_are_refused() -> None:
    """A bundle of a stranger: an engine would read past their end."""
    codes, scales = Value("w", "uint8", (64, 3, 16)), Value("s", "fp32", (64, 3))
    sizes = {"K": 96, "N": 64, "bits": 4, "block_size": 32, "accuracy_level": 4}

    def check(*zeros: Value | None) -> None:
        check_quantised(Quantised("n", "MatMulNBits", (None, codes, scales, *zeros), sizes))

    check()
    check(Value("z", "uint8", (64, 2)))
    for wrong in (Value("z", "uint8", (64, 3)), Value("z", "int8", (64, 2)), None):
        with pytest.raises(ValueError, match=r"has zero points|reads what is no constant"):
            check(wrong)
