"""Ministral 3 as Mistral publishes it: weights in float8 with one scale, a layout of its own."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
import torch
from conftest import Refused
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import (
    Fp8Dequantize,
    FP8Linear,
    Fp8Quantize,
    replace_with_fp8_linear,
)

from edgeprune.bundle import Bundle
from edgeprune.cli import main
from edgeprune.models import open_model
from edgeprune.models._processor import Processor
from edgeprune.tiling import Size
from tests import pixtral
from tests.dense import dense
from tests.families import QUESTION
from tests.test_families import drawn_image, generated
from tests.test_quantised_checkpoints import codes

FLOATS = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
"""What mistralai/Ministral-3-3B-Instruct-2512 keeps in floats, by `modules_to_not_convert`."""
SIZE = Size(84, 84)


def in_float8(model: Any) -> tuple[Any, Any]:
    """A model as transformers holds a published one, and the model of the floats that it means."""
    stored, meant = copy.deepcopy(model), copy.deepcopy(model)
    config = FineGrainedFP8Config("static", weight_block_size=None, modules_to_not_convert=FLOATS)
    weights = {name: module.weight for name, module in stored.named_modules() if linear(module)}
    quantizer: Any = SimpleNamespace(quantization_config=config)
    replace_with_fp8_linear(stored, FLOATS, config)
    quantised = [(n, m) for n, m in stored.named_modules() if isinstance(m, FP8Linear)]
    for number, (name, module) in enumerate(quantised):
        made = Fp8Quantize(quantizer)._quantize_one("weight", weights[name].detach())
        scale = made["weight_scale_inv"].reshape(()).bfloat16()  # as published
        module.weight, module.weight_scale_inv = fixed(made["weight"]), fixed(scale)
        module.activation_scale = fixed(torch.tensor(0.02 + 0.001 * number).bfloat16())
        floats = Fp8Dequantize(quantizer)._dequantize_one(made["weight"], scale, torch.float32)
        meant.get_submodule(name).weight.data = floats
    stored.config.quantization_config = config
    return stored, meant


def fixed(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """Such a checkpoint, as transformers writes it, and the model of its floats."""
    family = pixtral.ministral3()
    folder = family.save(tmp_path_factory.mktemp("ministral3") / "tiny")
    stored, meant = in_float8(family.model)
    stored.save_pretrained(folder)
    return folder, meant


def test_float8_of_one_scale_answers_as_the_floats_that_it_means(
    published: tuple[Path, Any],
) -> None:
    folder, meant = published
    family, image = pixtral.ministral3(), drawn_image(SIZE)
    adapter = open_model(str(folder), size=SIZE)
    assert adapter.all_notes == ("21 weights are stored in codes (float8, one scale a weight)",)
    prompt, seen = Processor(adapter)(image, QUESTION), family.look(image)
    ours = dense(adapter).generate(prompt, 64, lambda token: False)
    theirs = replace(family, model=meant)
    assert ours == generated(theirs, adapter, prompt, tokens=64, **seen)
    assert ours != generated(family, adapter, prompt, tokens=64, **seen), "rounding changes much"


def test_the_checkpoint_is_of_the_form_that_is_published(published: tuple[Path, Any]) -> None:
    folder, _ = published
    told = json.loads((folder / "config.json").read_text())["quantization_config"]
    told.pop("dequantize", None)
    names = "activation_scheme", "modules_to_not_convert", "quant_method", "weight_block_size"
    assert {name: told[name] for name in names} == {
        "activation_scheme": "static",
        "modules_to_not_convert": FLOATS,
        "quant_method": "fp8",
        "weight_block_size": None,
    }
    tensors = load_file(folder / "model.safetensors")
    stem = "language_model.model.layers.1.mlp.up_proj"
    found = {name.rpartition(".")[2]: t for name, t in tensors.items() if name.startswith(stem)}
    kinds = {leaf: (tensor.dtype, tensor.dim()) for leaf, tensor in found.items()}
    assert kinds == {
        "weight": (torch.float8_e4m3fn, 2),
        "weight_scale_inv": (torch.bfloat16, 0),
        "activation_scale": (torch.bfloat16, 0),
    }
    assert not any(t.dtype == torch.float8_e4m3fn for n, t in tensors.items() if "vision" in n)


def test_codes_of_float8_are_handed_on(published: tuple[Path, Any]) -> None:
    folder, meant = published
    found = codes(open_model(str(folder), size=SIZE))
    assert len(found) == 21 and all(weight.is_float8 for weight in found.values())
    up = meant.model.language_model.layers[1].mlp.up_proj.weight
    assert torch.equal(found["layers.1.mlp.up.weight"].dequantised().t(), up)


def test_scales_of_activations_are_kept_too(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Without samples: each product rounds its inputs with the scale that is stored beside it."""
    family, output = pixtral.ministral3(num_hidden_layers=1), tmp_path / "bundle"
    folder = family.save(tmp_path / "tiny")
    in_float8(family.model)[0].save_pretrained(folder)
    command = ["export", "--model", folder, "--method", "none", "--parity", 1, "-o", output]
    command += ["--image-size", "84x84", "--weights", "fp8:head=off", "--target", "rtx"]
    assert main([*map(str, command)]) == 0
    said = capfd.readouterr().err
    assert "7 quantised weights keep their codes; the inputs of products are rounded with" in said
    record = Bundle.open(output).manifest.weights
    assert record is not None and record.own == 7 and record.rounded and record.running
    assert record.running.logits == pytest.approx(record.rounded.logits, rel=0.3)
    graph = onnx.load(output / "decoder.onnx").graph
    held = {tensor.name: tensor for tensor in graph.initializer}
    rounding = [node.input[1] for node in graph.node if node.op_type == "QuantizeLinear"]
    found = sorted(float(onnx.numpy_helper.to_array(held[name])) for name in rounding)
    tensors = load_file(folder / "model.safetensors")
    own = [tensor for name, tensor in tensors.items() if name.endswith("activation_scale")]
    assert len(own) == 7 and found == sorted(float(scale.float().half()) for scale in own)


def test_a_scale_that_is_none_is_refused(tmp_path: Path, refused: Refused) -> None:
    family = pixtral.ministral3(num_hidden_layers=1)
    folder = family.save(tmp_path / "tiny")
    in_float8(family.model)[0].save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("activation_scale"))
    command = ["export", "--model", folder, "--method", "none", "--parity", 0]
    command += ["--image-size", "84x84", "--weights", "fp8", "--target", "rtx"]
    for value, says in (
        (torch.tensor(0.0), f"{name} is 0, want a positive number"),
        (torch.ones(3), f"{name} is F32 [3], want floats [] or [1]"),
        (torch.tensor(1e-12), "by 1e-12 before they are rounded, which does not fit float16; exp"),
        (torch.tensor(1e12), "by 1e+12 before they are rounded, which does not fit float16; exp"),
    ):
        save_file({**tensors, name: value}, folder / "model.safetensors", {"format": "pt"})
        assert says in refused(*command, "-o", tmp_path / "bundle")
    save_file({n: t for n, t in tensors.items() if n != name}, folder / "model.safetensors")
    assert "measures on samples; give images" in refused(*command, "-o", tmp_path / "bundle")


PIXTRAL = {"hidden_size": 1024, "patch_size": 16, "image_size": 1024}
OWN = {
    "repository": ({**PIXTRAL, "spatial_merge_size": 2}, "take the other files of its repository"),
    "pixtral": (PIXTRAL, "of Pixtral 12B take mistral-community/pixtral-12b, which is the same"),
    "text": (None, "and it says of no vision_encoder: edgeprune exports models that see images"),
}


@pytest.mark.parametrize("name", OWN)
def test_the_layout_of_mistral_is_refused_with_what_to_take(
    name: str, tmp_path: Path, refused: Refused
) -> None:
    vision, says = OWN[name]
    params = {"dim": 3072, "n_layers": 26, **({"vision_encoder": vision} if vision else {})}
    (tmp_path / "params.json").write_text(json.dumps(params))
    (tmp_path / "consolidated.safetensors").write_bytes(b"")
    said = refused("export", "--model", tmp_path)
    assert f"{tmp_path} has Mistral's own layout (params.json, no config.json), which is" in said
    assert says in said


def test_of_two_layouts_in_a_repository_one_is_fetched(
    tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing more of a model that has Mistral's alone."""
    fetched = list[Any]()

    def snapshot(model: str, **asked: Any) -> str:
        if asked.get("local_files_only"):
            raise LocalEntryNotFoundError("not there")
        fetched.append((asked["allow_patterns"], asked.get("ignore_patterns")))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: None)
    (tmp_path / "params.json").write_text(json.dumps({"vision_encoder": PIXTRAL}))
    said = refused("models", "--model", "mistralai/Pixtral-12B-2409")
    assert "mistralai/Pixtral-12B-2409 has Mistral's own layout" in said
    assert fetched == [(["config.json", "params.json"], None)]
    pixtral.ministral3().save(tmp_path)
    assert open_model("mistralai/Ministral-3-3B-Instruct-2512", size=SIZE).shape.layers == 3
    assert fetched[2][1] == ["consolidated*"]


def test_files_of_the_layout_that_are_in_the_place_of_others(
    tmp_path: Path, refused: Refused
) -> None:
    folder = pixtral.ministral3().save(tmp_path / "tiny")
    tokenizer = folder / "tokenizer.json"
    tokenizer.rename(folder / "tekken.json")
    (folder / "tokenizer_config.json").unlink()
    assert "(tekken.json is not read); name a folder that has one" in refused(
        "models", "--model", folder
    )
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")
    said = refused("models", "--model", folder)
    assert "own layout, which is not read: download model*.safetensors of the same rep" in said
