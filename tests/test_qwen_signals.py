"""What policies and calibration see of Qwen-VL: attention received in the encoder, attention
without positions under M-RoPE, losses without visual tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AutoModelForImageTextToText
from transformers.vision_utils import get_vision_window_index

from edgeprune.calib.calibrate import CalibrationRequest, evidence_key
from edgeprune.calib.collect import collect
from edgeprune.calib.samples import Sample
from edgeprune.models import Adapter, open_model
from edgeprune.models._processor import Processor, Prompt
from edgeprune.models._reference import Reference
from edgeprune.models._vision import Vision
from edgeprune.policies import make
from edgeprune.spec import Plan, PruneSpec, plan_from_counts
from edgeprune.tiling import Size
from tests.qwen import IMAGES, QUESTION, drawn_image, plain_checkpoint, windowed_checkpoint
from tests.whole_model import advances

SIZE = Size(140, 196)  # 5 x 7 tokens


@pytest.fixture(scope="module", params=[plain_checkpoint, windowed_checkpoint])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made: Path = request.param(tmp_path_factory.mktemp("qwen"), layers=4)
    return made


@pytest.fixture(scope="module")
def adapter(checkpoint: Path) -> Adapter:
    return open_model(str(checkpoint), size=SIZE)


@pytest.fixture(scope="module")
def prompt(adapter: Adapter) -> Prompt:
    return Processor(adapter)(drawn_image(*IMAGES["196x140"]), QUESTION)


class Spy:
    """transformers' attention, its weights kept."""

    def __init__(self) -> None:
        self.weights: list[Tensor] = []

    def __call__(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        **options: Any,
    ) -> tuple[Tensor, None]:
        groups = query.shape[1] // key.shape[1]
        key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
        logits = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
        rows, columns = logits.shape[-2:]
        if type(module).__name__.endswith("VLAttention"):  # the decoder's
            logits = logits + torch.full((rows, columns), float("-inf")).triu(1 + columns - rows)
        self.weights.append(logits.softmax(-1))
        return (self.weights[-1] @ value).transpose(1, 2), None


@pytest.fixture(scope="module")
def seen(checkpoint: Path, adapter: Adapter, prompt: Prompt) -> tuple[list[Tensor], list[Tensor]]:
    """Attention of transformers' model in the last encoder block, and in each decoder layer."""
    spy = Spy()
    AttentionInterface.register("spy", spy)
    model = AutoModelForImageTextToText.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="spy"
    )
    processor = Processor(adapter)
    encoded = processor.image_processor(drawn_image(*IMAGES["196x140"]), return_tensors="pt")
    token = torch.full((1, 35), adapter.image_token_id)
    ids = torch.cat([prompt.prefix_ids, token, prompt.text_ids], 1)
    kinds = (ids == adapter.image_token_id).int()
    with torch.no_grad():
        model(**encoded, input_ids=ids, mm_token_type_ids=kinds)
    layers = adapter.shape.layers
    return spy.weights[:-layers], spy.weights[-layers:]


def test_salience_is_the_attention_that_a_tokens_patches_receive(
    adapter: Adapter, prompt: Prompt, seen: Any
) -> None:
    """Of the last block, which looks at all patches: mean over heads and queries, then over four
    patches."""
    reference = Reference.build(adapter, make(PruneSpec("none")), Plan(35, 4))
    vision: Vision = reference.vision  # type: ignore[assignment]
    found = vision.signals(vision.encoder(prompt.pixels))
    received = seen[0][-1].mean((0, 1, 2)).view(35, 4).mean(1)  # in the order of windows
    if adapter.shape.family == "qwen2_5_vl":
        order, _ = get_vision_window_index(torch.tensor([[1, 10, 14]]), 2, 112, 14)
        received = received[order.argsort()]
    torch.testing.assert_close(found.salience(), received, atol=1e-6, rtol=1e-5)


def test_agnostic_attention_has_every_visual_token_in_the_middle_of_the_image(
    adapter: Adapter, prompt: Prompt
) -> None:
    """UTP's Eq. 2 with three positions: each visual token's are the image's own middles."""
    reference = Reference.build(adapter, make(PruneSpec("none")), Plan(35, 4))
    signals = advances(reference, prompt)[1].signals
    start, visual = prompt.prefix_ids.shape[1], 35
    # grid of 5 x 7: rows start .. start + 4, columns start .. start + 6
    middle = np.array([start, start + 2, start + 3])
    frequencies = np.array(reference.decoder.config.rope.frequencies)
    axes = list(adapter.decoder_config.mrope.axes)  # type: ignore[union-attr]
    angles = middle[axes] * frequencies
    key = signals.states.key[0].numpy()
    low, high = np.split(key[:, start : start + visual], 2, axis=-1)
    turned = [low * np.cos(angles) - high * np.sin(angles)]
    turned.append(high * np.cos(angles) + low * np.sin(angles))
    keys = signals.states.rotated_key[0].numpy().copy()
    keys[:, start : start + visual] = np.concatenate(turned, axis=-1)
    query = signals.states.rotated_query[0, :, -1].numpy()
    grouped = np.repeat(keys, len(query) // len(keys), axis=0)
    logits = np.einsum("hd,hnd->hn", query, grouped) / np.sqrt(query.shape[-1])
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    wanted = weights.mean(0)[start : start + visual]
    found = make(PruneSpec("utp", 4)).calibration_scores(2, signals)
    np.testing.assert_allclose(found.numpy(), wanted, atol=1e-6)


def test_calibration_sees_what_transformers_attends_to_and_what_each_layer_loses(
    adapter: Adapter, prompt: Prompt, seen: Any
) -> None:
    """Plain attention of the last prompt token; ell_l by its definition, at true positions."""
    policy = make(PruneSpec("utp", 4, options={"agnostic_layers": "0"}))
    evidence = collect(adapter, policy, [Sample("one", prompt)])
    start = prompt.prefix_ids.shape[1]
    for layer in range(4):
        wanted = seen[1][layer][0, :, -1, start : start + 35].mean(0)
        np.testing.assert_allclose(evidence.attention[0, layer], wanted, atol=1e-5)
    features = [_feature(adapter, prompt, layer) for layer in (5, 2, 3, 4)]
    for layer, feature in zip((2, 3, 4), features[1:], strict=True):
        angle = torch.cosine_similarity(feature, features[0], dim=0).clamp(-1, 1).acos()
        np.testing.assert_allclose(evidence.loss[0, layer - 1], angle, atol=2e-3)


def _feature(adapter: Adapter, prompt: Prompt, first_without: int) -> Tensor:
    """The last token's output where layers from `first_without` on see no visual token."""
    counts = tuple(35 if layer < first_without else 0 for layer in range(1, 5))
    plan = plan_from_counts(35, counts)
    reference = Reference.build(adapter, make(PruneSpec("none")), plan)
    hidden = advances(reference, prompt)[-1].flow.hidden
    feature: Tensor = reference.decoder.norm(hidden[0, -1])
    return feature


def test_evidence_is_stored_for_one_image_size(checkpoint: Path) -> None:
    """Sizes with as many tokens, and even as many pixels, are told apart."""
    policy, request = make(PruneSpec("utp", 4)), CalibrationRequest(4)
    sizes = (Size(112, 224), Size(224, 112), Size(56, 56))
    keys = {evidence_key(request, open_model(str(checkpoint), size=size), policy) for size in sizes}
    assert len(keys) == 3
