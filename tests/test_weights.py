"""What a checkpoint's folder says of its weights: as transformers reads it, or refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Refused
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForImageTextToText
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from edgeprune.cli import main
from edgeprune.models import _stored_formats, open_model
from tests import families
from tests.families import Family
from tests.test_families import answered, drawn_image, generated, ours, prompted

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
QUERY = "language_model.model.layers.1.self_attn.q_proj.weight"
READ = [_stored_formats.load(name).method for name in _stored_formats.names()]
HEAD, EMBEDDING = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"


@pytest.fixture(scope="module")
def family() -> Family:
    return families.llava()


@pytest.fixture(scope="module")
def saved(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return family.save(tmp_path_factory.mktemp("llava") / "tiny")


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(saved, tmp_path / "tiny"))


def change(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    """Edit the stored tensors in place."""
    tensors = load_file(folder / SINGLE)
    edit(tensors)
    save_file(tensors, folder / SINGLE, {"format": "pt"})


def configure(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def answers_as(model: Any, family: Family, folder: Path) -> bool:
    """Whether 32 greedy tokens of the reference are those of a model of transformers."""
    image = drawn_image(family.sizes[0])
    adapter, pixels = ours(family, folder, image)
    prompt = prompted(adapter, pixels)
    wanted = generated(replace(family, model=model), adapter, prompt, **family.look(image))
    return answered(adapter, prompt) == wanted


def loaded(folder: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(folder).eval()


@pytest.mark.parametrize(
    "method", [*sorted(AUTO_QUANTIZATION_CONFIG_MAPPING.keys() - READ), "modelopt", "nosuch"]
)
def test_a_quantisation_that_is_not_read_is_refused_by_its_name(
    method: str, folder: Path, refused: Refused
) -> None:
    configure(folder, quantization_config={"quant_method": method, "bits": 4})
    said = refused("models", "--model", folder)
    assert f"quantization_config says quant_method {method!r}, 4 bits, which is not read;" in said
    assert f"read are {', '.join(READ)}; export the float checkpoint" in said


def test_a_quantisation_is_found_wherever_it_stands(folder: Path, refused: Refused) -> None:
    text = json.loads((folder / "config.json").read_text())["text_config"]
    scheme = {"quant_method": "hqq", "bits": 4}
    configure(folder, text_config={**text, "quantization_config": scheme})
    for command in ("models", "export", "methods"):
        assert "quant_method 'hqq', 4 bits" in refused(command, "--model", folder)
    configure(folder, quantization_config={"quant_method": "awq"})
    assert "tells of two quantisations that differ" in refused("models", "--model", folder)
    configure(folder, text_config=text, compression_config=scheme, quantization_config=None)
    assert "compression_config says quant_method 'hqq'" in refused("models", "--model", folder)


def stored_as(dtype: torch.dtype) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({QUERY: tensors[QUERY].to(dtype)})


def beside(leaf: str) -> Callable[[dict[str, Tensor]], None]:
    name = QUERY.removesuffix("weight") + leaf
    return lambda tensors: tensors.update({name: torch.ones(1)})


def renamed(new: str) -> Callable[[dict[str, Tensor]], None]:
    name = QUERY.removesuffix("weight") + new
    return lambda tensors: tensors.update({name: tensors.pop(QUERY)})


FORMS: dict[str, tuple[Callable[[dict[str, Tensor]], None], str]] = {
    "int8": (stored_as(torch.int8), f"{QUERY} is stored as I8: quantised in a way that config"),
    "float8": (stored_as(torch.float8_e4m3fn), "is stored as F8_E4M3: quantised"),
    "scales": (beside("weight_scale"), f"{QUERY} stands beside weight_scale: quantised"),
    "bitsandbytes": (beside("SCB"), f"{QUERY} stands beside SCB: quantised"),
    "packed": (renamed("qweight"), "q_proj.qweight in its place: quantised in a way that config"),
    "wrapped": (renamed("base_layer.weight"), "base_layer.weight: a model inside peft; save what"),
    "factors": (beside("lora_A.default.weight"), "lora_A.default.weight: a model inside peft"),
    "authors": (lambda t: t.update({"model.mm_projector.0.bias": t.pop(QUERY)}), "LLaVA authors'"),
    "two of one": (
        lambda t: t.update({"lm_head.weight": t[HEAD] + 1}),
        f"stores one weight twice, as lm_head.weight and as {HEAD}, and the two differ; remove",
    ),
}


@pytest.mark.parametrize(("edit", "says"), FORMS.values(), ids=FORMS.keys())
def test_weights_in_another_form_are_refused(
    edit: Callable[[dict[str, Tensor]], None],
    says: str,
    folder: Path,
    tmp_path: Path,
    refused: Refused,
) -> None:
    """`models` refuses what `export` refuses."""
    change(folder, edit)
    command = ["--model", folder]
    said = refused("export", *command, "--method", "none", "-o", tmp_path / "bundle")
    assert says in said and not (tmp_path / "bundle").exists()
    assert refused("models", *command) == said


@pytest.mark.parametrize("kind", ["llava", "llava_llama", "llava_qwen"])
def test_the_authors_own_layout_is_told_with_its_converter(
    kind: str, folder: Path, refused: Refused
) -> None:
    config = {"model_type": kind, "mm_vision_tower": "openai/clip", "mm_projector_type": "mlp"}
    (folder / "config.json").write_text(json.dumps(config))
    said = refused("models", "--model", folder)
    assert "the layout of the LLaVA authors' code (mm_vision_tower in config.json)" in said
    assert "convert_llava_weights_to_hf.py" in said and "llava-hf/llava-1.5-7b-hf" in said


def test_files_of_weights_that_are_not_read(folder: Path, refused: Refused) -> None:
    (folder / SINGLE).rename(folder / "model.fp16.safetensors")
    assert "(found model.fp16.safetensors): download or conv" in refused(
        "models", "--model", folder
    )
    configure(folder, transformers_weights="model.fp16.safetensors")
    assert "(transformers_weights), which is not read" in refused("models", "--model", folder)
    (folder / "model.fp16.safetensors").rename(folder / "other.safetensors")
    configure(folder, transformers_weights=None)
    (folder / INDEX).write_text(json.dumps({"weight_map": {QUERY: "../other.safetensors"}}))
    said = refused("models", "--model", folder)
    assert "names ../other.safetensors, a file outside of the folder" in said


def test_a_single_file_goes_before_an_index(family: Family, folder: Path) -> None:
    """As in transformers: an index and shards of another time may lie beside it."""
    old = {name: -tensor for name, tensor in load_file(folder / SINGLE).items()}
    save_file(old, folder / "model-00001-of-00001.safetensors", {"format": "pt"})
    shard = dict.fromkeys(old, "model-00001-of-00001.safetensors")
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": shard}))
    assert answers_as(loaded(folder), family, folder)
    (folder / SINGLE).unlink()
    assert not answers_as(family.model, family, folder)
    assert answers_as(loaded(folder), family, folder)


def of_its_own(tensors: dict[str, Tensor]) -> None:
    """Rolled, so that other tokens are said."""
    tensors[HEAD] = tensors[HEAD].roll(3, 0)


def only_head(tensors: dict[str, Tensor]) -> None:
    tensors[HEAD] = tensors.pop(EMBEDDING)


def elsewhere(tensors: dict[str, Tensor]) -> None:
    tensors["lm_head.weight"] = tensors[HEAD].clone()


@pytest.mark.parametrize(
    ("edit", "tied"),
    [(of_its_own, True), (only_head, True), (elsewhere, True), (None, True), (None, False)],
)
def test_head_and_embedding_are_those_of_transformers(
    edit: Callable[[dict[str, Tensor]], None] | None, tied: bool, family: Family, folder: Path
) -> None:
    """Tied in the configuration only, stored under the head's name only, stored twice."""
    configure(folder, tie_word_embeddings=tied)
    change(folder, edit or (lambda tensors: tensors.pop(HEAD) if tied else None))
    assert answers_as(loaded(folder), family, folder)


def test_tensors_that_nothing_reads_are_told(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Known leftovers are not: blocks after the one that is read, tables, norms."""
    strange = [f"language_model.model.layers.{n}.extra.weight" for n in range(5)]
    known = {
        "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "vision_tower.vision_model.embeddings.position_ids": torch.arange(10),
    }
    change(folder, lambda t: t.update({**{name: torch.ones(1) for name in strange}, **known}))
    assert any("encoder.layers.2." in name for name in load_file(folder / SINGLE))
    options = ["--model", str(folder), "--method", "none", "--parity", "0"]
    assert main(["export", *options, "-o", str(tmp_path / "bundle")]) == 0
    said = [line for line in capfd.readouterr().err.splitlines() if "note: " in line]
    told = f"note: stored, and read by nothing: {', '.join(strange[:3])} and 2 more"
    assert [line for line in said if "stored" in line] == [told]
    assert main(["models", "--model", str(folder)]) == 0
    assert "note           stored, and read by nothing: " in capfd.readouterr().out


def test_a_published_layout_leaves_nothing_to_tell(family: Family, saved: Path) -> None:
    assert open_model(str(saved)).all_notes == ()
