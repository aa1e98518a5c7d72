"""The LLaVA adapter and the decoder forward against transformers' own model."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from edgeprune.errors import ModelError
from edgeprune.models import open_model
from edgeprune.models._processor import random_prompt
from edgeprune.models._reference import Reference
from edgeprune.policies import Policy, make
from edgeprune.policies._policy import Selection
from edgeprune.policies._signals import LayerSignals
from edgeprune.spec import Plan, PruneSpec, Stage, plan_from_counts
from tests.dense import MORE, assert_same_logits

TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "vocab_size": 50,
    "max_position_embeddings": 256,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped": {"num_key_value_heads": 2},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "dynamic": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    "llama3": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 1e4,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
}


def config(**text: Any) -> LlavaConfig:
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=56,
        patch_size=14,
        projection_dim=32,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**{**TEXT, **text}),
        image_token_id=4,
        image_seq_length=16,
    )


def saved(folder: Path, **text: Any) -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config(**text)).eval()
    for name, weight in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(weight, std=0.3 if weight.dim() < 2 else weight.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    return model


def reference(folder: Path, policy: Policy, plan: Plan | None = None) -> Reference:
    adapter = open_model(str(folder))
    return Reference.build(adapter, policy, plan or Plan(16, adapter.shape.layers))


@torch.no_grad()
def theirs(model: LlavaForConditionalGeneration, prompt: Any, more: Tensor | None = None) -> Tensor:
    """Logits of every position."""
    image = torch.full((1, 16), 4)
    ids = [prompt.prefix_ids, image, prompt.text_ids, *([] if more is None else [more])]
    return model(input_ids=torch.cat(ids, 1), pixel_values=prompt.pixels).logits[0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_dense_logits_are_those_of_transformers(variant: str, tmp_path: Path) -> None:
    model = saved(tmp_path, **VARIANTS[variant])
    ours = reference(tmp_path, make(PruneSpec("none")))
    prompt = random_prompt((1, 3, 56, 56), 4, seed=1)
    wanted = theirs(model, prompt, MORE)
    assert_same_logits(ours, prompt, wanted)


def test_greedy_generation_is_that_of_transformers(tmp_path: Path) -> None:
    model = saved(tmp_path)
    ours = reference(tmp_path, make(PruneSpec("none")))
    prompt = random_prompt((1, 3, 56, 56), 4, seed=2)
    ids = torch.cat([prompt.prefix_ids, torch.full((1, 16), 4), prompt.text_ids], 1)
    wanted = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=prompt.pixels,
        max_new_tokens=32,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )[0, ids.shape[1] :]
    assert ours.generate(prompt, 32, stop=lambda token: False) == wanted.tolist()


@dataclass(frozen=True)
class Fixed(Policy):
    """Keeps every second of the live tokens: a choice that does not look at the text."""

    def layer(self, signals: LayerSignals, stage: Stage, live: Stage) -> Selection:
        return Selection(torch.arange(live.keep) * signals.segments.visual // max(live.keep, 1))

    def vision(self, signals: Any, stage: Stage) -> Selection:
        return Selection(torch.arange(stage.keep))


@pytest.mark.parametrize("counts", [(16, 8, 8, 3), (16, 16, 4, 0), (12, 12, 5, 5)])
def test_a_second_turn_equals_one_long_prompt_with_the_same_kept_tokens(
    counts: tuple[int, ...], tmp_path: Path
) -> None:
    saved(tmp_path)
    ours = reference(tmp_path, Fixed(), plan_from_counts(16, counts))
    prompt = random_prompt((1, 3, 56, 56), 4, seed=3)
    turns = torch.tensor([[11], [12]]), torch.tensor([[13, 14, 15]])
    ours.prefill(prompt)
    for token in turns[0]:
        ours.step(token[None])
    dialogue = ours.step(turns[1]).logits
    whole = torch.cat([prompt.text_ids, turns[0].T, turns[1]], 1)
    at_once = ours.prefill(type(prompt)(prompt.pixels, prompt.prefix_ids, whole))
    assert [len(kept) for kept in at_once.kept] == [
        after for before, after in itertools.pairwise(counts) if after < before
    ]
    torch.testing.assert_close(dialogue, at_once.logits, atol=1e-5, rtol=1e-5)


def test_pruned_tokens_are_as_if_masked(tmp_path: Path) -> None:
    """Dropping tokens before layer 3 equals hiding them from every query of layers 3 and 4."""
    model = saved(tmp_path)
    ours = reference(tmp_path, Fixed(), plan_from_counts(16, (16, 16, 4, 4)))
    prompt = random_prompt((1, 3, 56, 56), 4, seed=4)
    pruned = ours.prefill(prompt)
    first = prompt.prefix_ids.shape[1]
    dropped = [first + i for i in range(16) if i not in pruned.kept[0].tolist()]

    def hide(module: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        length = kwargs["hidden_states"].shape[1] if "hidden_states" in kwargs else args[0].shape[1]
        mask = torch.full((length, length), float("-inf")).triu(1)
        mask[:, dropped] = float("-inf")
        mask[dropped, dropped] = 0  # a dropped row needs something to look at
        return args, {**kwargs, "attention_mask": mask[None, None]}

    for layer in model.model.language_model.layers[2:]:
        layer.self_attn.register_forward_pre_hook(hide, with_kwargs=True)
    torch.testing.assert_close(pruned.logits, theirs(model, prompt)[-1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "relu"}, "activation 'relu' in the decoder"),
        (
            {"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4}},
            "proportional",
        ),
    ],
)
def test_what_is_not_supported_is_named(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    saved(tmp_path, **change)
    with pytest.raises(ModelError, match=message):
        open_model(str(tmp_path))
