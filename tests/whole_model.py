"""A model with every layer in memory: its plain forward, and what calibration measures of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from edgeprune.models import Adapter
from edgeprune.models._decoder import Advanced
from edgeprune.models._decoder_layer import Cache
from edgeprune.models._ops import BidirectionalSpan
from edgeprune.models._processor import Prompt
from edgeprune.models._reference import Reference
from edgeprune.policies import Policy
from edgeprune.policies._signals import Segments
from edgeprune.spec import Plan


def advances(reference: Reference, prompt: Prompt) -> list[Advanced]:
    """What each layer gives in a prefill."""
    decoder, found = reference.decoder, list[Advanced]()
    advance = decoder.advance

    def listen(*arguments: object) -> Advanced:
        found.append(advance(*arguments))  # type: ignore[arg-type]
        return found[-1]

    decoder.advance = listen  # type: ignore[method-assign]
    try:
        reference.prefill(prompt)
    finally:
        del decoder.advance
    return found


@dataclass(frozen=True)
class Measured:
    """As `Evidence`, of one sample."""

    attention: np.ndarray  # [L, V]
    loss: np.ndarray  # [L]
    entry: np.ndarray  # [V]


@torch.no_grad()
def measured(adapter: Adapter, policy: Policy, prompts: Sequence[Prompt]) -> list[Measured]:
    """Attention and losses of the dense model, from one forward and L - 1 text-only ones."""
    plan = Plan(adapter.shape.visual_tokens, adapter.shape.layers)
    reference, found = Reference.build(adapter, policy, plan), []
    for prompt in prompts:
        layers = advances(reference, prompt)
        attention, last = list[Tensor](), torch.full((plan.visual_tokens,), 1 / plan.visual_tokens)
        for number, layer in enumerate(layers, 1):  # one without attention has that of the last
            if layer.signals.attention is not None:
                last = policy.calibration_scores(number, layer.signals)
            attention.append(last)
        states = [layer.flow.hidden for layer in layers]
        entry = reference.vision.entry_scores(reference.vision.encoder(prompt.pixels))  # type: ignore[operator]
        loss = _losses(reference, prompt, states)
        found.append(Measured(torch.stack(attention).numpy(), loss, entry.numpy()))
    return found


def _losses(reference: Reference, prompt: Prompt, states: list[Tensor]) -> np.ndarray:
    """[0, ell_2 .. ell_L]: the text alone goes on from where each layer starts."""
    decoder = reference.decoder
    prefix, text = prompt.prefix_ids.shape[1], prompt.text_ids.shape[1]
    at = [*range(prefix), *range(prefix + decoder.plan.visual_tokens, states[0].shape[1])]
    positions = torch.tensor(
        [*range(prefix), *range(prefix + decoder.span, prefix + decoder.span + text)]
    )
    rows, config = decoder.rows(positions, positions[-1:])[None], decoder.config
    bidirectional, alone = None, Segments(prefix, 0, text)
    if config.sees == "prompt":
        bidirectional = BidirectionalSpan(torch.tensor(0), torch.tensor(len(at)), windowed=False)
    ends, batch = (torch.tensor([0]), torch.tensor([len(at)])), states[0][:0, at]
    for index, before in enumerate(states[:-1], start=1):
        layer, rotary = decoder.layers[index], decoder.own_rotary(index)
        batch = torch.cat([batch, before[:, at]])
        kept = config.nothing_kept(index, len(at), torch.float32, len(batch))
        cache = Cache(kept, *ends)
        batch = layer(batch, rows, rotary, cache, alone, bidirectional)[0]
    full, without = (decoder.norm(hidden[:, -1]) for hidden in (states[-1], batch))
    angles = torch.cosine_similarity(without, full).clamp(-1, 1).acos()
    return np.concatenate([np.zeros(1, np.float32), angles.numpy()])
