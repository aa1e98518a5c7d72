"""A LoRA adapter in a checkpoint's folder is merged exactly, or refused with what to do."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Refused
from safetensors.torch import save_file
from torch import Tensor

from edgeprune.cli import main
from edgeprune.models import open_model
from tests import families
from tests.families import Family
from tests.test_weights import answers_as, change, configure

RANK, ALPHA = 4, 12.0
CONFIG = {
    "peft_type": "LORA",
    "base_model_name_or_path": "some/where",
    "r": RANK,
    "lora_alpha": ALPHA,
    "lora_dropout": 0.1,
    "bias": "none",
    "target_modules": ["q_proj"],
    "modules_to_save": None,
    "init_lora_weights": True,
    "use_rslora": False,
    "use_dora": False,
    "fan_in_fan_out": False,
    "alpha_pattern": {},
    "rank_pattern": {},
    "runtime_config": {"ephemeral_gpu_offload": False},
}
LAYER = "model.language_model.layers.1."
MODULES = f"{LAYER}self_attn.q_proj", f"{LAYER}mlp.down_proj", "lm_head"
PATCH = "model.vision_tower.embeddings.patch_embedding"


@pytest.fixture(scope="module")
def family() -> Family:
    return families.llava()


@pytest.fixture(scope="module")
def saved(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return family.save(tmp_path_factory.mktemp("llava") / "tiny")


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "tiny"))


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def factors(module: str, inputs: int, outputs: int, rank: int = RANK) -> dict[str, Tensor]:
    return {
        f"{module}.lora_A.weight": noise(rank, inputs, seed=1) * 0.3,
        f"{module}.lora_B.weight": noise(outputs, rank, seed=2) * 0.3,
    }


def adapt(folder: Path, tensors: dict[str, Tensor], **config: Any) -> None:
    """Write an adapter as peft does."""
    stored = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
    save_file(stored, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **config}))


def changed(family: Family, tensors: dict[str, Tensor], scale: Callable[[str, int], float]) -> Any:
    """transformers' model with each weight W of a module set to W + s B A, one row at a time."""
    model = copy.deepcopy(family.model)
    for name, first in tensors.items():
        if not name.endswith("lora_A.weight"):
            continue
        module = name.removesuffix(".lora_A.weight")
        second, weight = tensors[f"{module}.lora_B.weight"], model.get_submodule(module).weight.data
        for row, wanted in enumerate(weight):
            product = sum(second[row, r].item() * first[r] for r in range(len(first)))
            wanted += scale(module, len(first)) * product.reshape(wanted.shape)
    return model


LINEAR = {
    **factors(MODULES[0], 32, 32),
    **factors(MODULES[1], 48, 32, rank=2),
    **factors(MODULES[2], 32, 72),
}
CONV = {
    f"{PATCH}.lora_A.weight": noise(RANK, 3, 14, 14, seed=3) * 0.02,
    f"{PATCH}.lora_B.weight": noise(32, RANK, 1, 1, seed=4) * 0.3,
}


@pytest.mark.parametrize(
    ("tensors", "config", "scale"),
    [
        (LINEAR, {}, lambda module, rank: ALPHA / rank),
        (CONV, {}, lambda module, rank: ALPHA / rank),
        (LINEAR, {"use_rslora": True}, lambda module, rank: ALPHA / rank**0.5),
        (
            LINEAR,
            {"alpha_pattern": {"layers.1.mlp.down_proj": 1, "proj": 99}},
            lambda module, rank: (1 if "down_proj" in module else ALPHA) / rank,
        ),
    ],
    ids=["linear", "convolution", "rank-stabilised", "alphas by pattern"],
)
def test_an_adapter_beside_the_weights_is_merged(
    tensors: dict[str, Tensor],
    config: dict[str, Any],
    scale: Callable[[str, int], float],
    family: Family,
    folder: Path,
) -> None:
    adapt(folder, tensors, **config)
    assert answers_as(changed(family, tensors, scale), family, folder)
    assert not answers_as(family.model, family, folder), "the adapter changes the answer"
    count = sum("lora_A" in name for name in tensors)
    said = f"the LoRA adapter ({count} products of rank 4) is merged into the weights"
    assert open_model(str(folder)).all_notes == (said,)


def test_an_adapter_of_older_names_changes_the_embedding_too(family: Family, folder: Path) -> None:
    """Names of transformers 4; an embedding's factors; biases and whole modules."""
    first, second = noise(RANK, 72, seed=5) * 0.3, noise(32, RANK, seed=6) * 0.3
    bias, head = noise(32, seed=7), noise(72, 32, seed=8) * 0.2
    head[2] = 0
    adapt(
        folder,
        {
            "language_model.model.embed_tokens.lora_embedding_A": first,
            "language_model.model.embed_tokens.lora_embedding_B": second,
            "multi_modal_projector.linear_1.base_layer.bias": bias,
            "language_model.lm_head.modules_to_save.default.weight": head,
        },
        bias="all",
        modules_to_save=["lm_head"],
    )
    model = copy.deepcopy(family.model)
    model.get_input_embeddings().weight.data += ALPHA / RANK * (second @ first).T
    model.model.multi_modal_projector.linear_1.bias.data = bias
    model.lm_head.weight.data = head
    assert answers_as(model, family, folder)
    assert "(1 products of rank 4, 2 whole tensors)" in open_model(str(folder)).all_notes[0]


def test_export_says_that_it_merged(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Parity holds, for the reference reads the merged weights too."""
    adapt(folder, LINEAR)
    options = ["--model", str(folder), "--method", "none", "--parity", "1"]
    assert main(["export", *options, "-o", str(tmp_path / "bundle")]) == 0
    assert "note: the LoRA adapter (3 products" in capfd.readouterr().err


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Tensor], str]] = {
    "another kind": ({"peft_type": "IA3"}, {}, "is an adapter of type IA3, only LORA is merged"),
    "dora": ({"use_dora": True}, {}, "says use_dora True, which is not supported; merge it first"),
    "pissa": ({"init_lora_weights": "pissa"}, {}, "says init_lora_weights 'pissa', with which"),
    "tokens": ({"trainable_token_indices": [1]}, {}, "says trainable_token_indices [1]"),
    "lone": ({}, {"gate.lora_A.weight": noise(4, 32)}, "has one of two factors of gate.weight"),
    "bias of B": ({}, {"lm_head.lora_B.bias": noise(72)}, "lora_B.bias, which is not supported"),
    "alpha": ({"lora_alpha": "much"}, {}, "lora_alpha or alpha_pattern is wrong (could not"),
    "pattern": ({"alpha_pattern": {"(": 1}}, {}, "lora_alpha or alpha_pattern is wrong (miss"),
    "int8": ({}, {"a.lora_A.weight": torch.ones(1).char()}, "a.lora_A.weight is stored as I8"),
    "misshapen": ({}, factors("lm_head", 31, 72), "makes lm_head.weight [72, 31], the checkpoint"),
    "elsewhere": ({}, factors("model.gate", 8, 8), "changes model.gate.weight, which this model"),
}


@pytest.mark.parametrize(("config", "tensors", "says"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_merged_exactly_is_refused(
    config: dict[str, Any],
    tensors: dict[str, Tensor],
    says: str,
    folder: Path,
    tmp_path: Path,
    refused: Refused,
) -> None:
    adapt(folder, LINEAR | tensors, **config)
    command = ["export", "--model", folder, "--method", "none", "--parity", 0]
    assert says in refused(*command, "-o", tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_an_adapter_of_a_tied_head_is_refused(folder: Path, refused: Refused) -> None:
    """Applied to one of the two it would not be the other's any more."""
    configure(folder, tie_word_embeddings=True)
    change(folder, lambda tensors: tensors.pop("language_model.lm_head.weight"))
    adapt(folder, LINEAR)
    said = refused("models", "--model", folder)
    assert "changes lm_head.weight, which is both embedding and output head of this model" in said


def test_an_adapter_that_lacks_a_part(folder: Path, refused: Refused) -> None:
    adapt(folder, LINEAR)
    weights = folder / "adapter_model.safetensors"
    weights.rename(folder / "adapter_model.bin")
    assert "stands without adapter_model.safetensors" in refused("models", "--model", folder)


def test_an_adapter_alone_is_merged_into_its_base(
    family: Family, saved: Path, tmp_path: Path, refused: Refused
) -> None:
    """Its configuration names the base; what it brings of its own has to be the base's."""
    alone = tmp_path / "adapter"
    alone.mkdir()
    adapt(alone, LINEAR, base_model_name_or_path=str(saved))
    for name in ("tokenizer.json", "chat_template.jinja"):
        shutil.copy(saved / name, alone)
    assert answers_as(changed(family, LINEAR, lambda module, rank: ALPHA / rank), family, alone)
    (alone / "chat_template.jinja").write_text("USER: {{ messages }}")
    said = refused("models", "--model", alone)
    assert f"the chat template in {alone} differs from its base's; copy the base's files" in said
    (alone / "tokenizer.json").write_text("{}")
    assert f"tokenizer.json differs from that of its base {saved}" in refused(
        "export", "--model", alone
    )
    adapt(alone, LINEAR, base_model_name_or_path=str(tmp_path / "nosuch"))
    said = refused("models", "--model", alone)
    assert f"is an adapter of '{tmp_path / 'nosuch'}'" in said and "no checkpoint" in said
    adapt(alone, LINEAR, base_model_name_or_path=str(alone))
    assert "which is or has one itself; merge it first" in refused("models", "--model", alone)
