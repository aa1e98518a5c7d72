"""What UTR needs to know of a model: where the last prompt token looks, and what each layer loses.

For each sample, one full forward collects a^l, the attention of layer l to each visual token, and
L - 1 text-only continuations give ell_l: how far the output turns when layers l .. L see no visual
token. A continuation needs only the text tokens' hidden states of the full forward, and all of them
that have begun run as one batch, so the whole costs about 1.6 prefills and not L.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from edgeprune.calib.samples import Sample
from edgeprune.calib.schedule import Evidence
from edgeprune.models import Adapter
from edgeprune.models._decoder import Cache, Decoder, Rotary
from edgeprune.models._processor import Prompt
from edgeprune.models._reference import Reference
from edgeprune.policies import Policy
from edgeprune.policies._signals import LayerSignals
from edgeprune.spec import Plan


class Recorder(Decoder):
    """A decoder that keeps what each layer's signals say, and its hidden states."""

    def begin(self) -> None:
        self.attention: list[Tensor] = []  # each [V]
        self.states: list[Tensor] = []  # each layer's output [1, S, width]

    def observe(self, layer: int, signals: LayerSignals) -> None:
        self.attention.append(self.policy.calibration_scores(layer, signals))
        self.states.append(signals.hidden)

    def feature(self, hidden: Tensor) -> Tensor:
        """Output feature of the last token after the final norm: [n, S, width] -> [n, width]."""
        feature: Tensor = self.norm(hidden[:, -1])
        return feature.float()

    def without_vision(self, text: Tensor, rows: Tensor) -> Tensor:
        """Features [L - 1, width] when layers l .. L, l = 2 .. L, see text tokens only.

        `text` [L - 1, S, width] holds the text tokens' hidden states that enter layer l.
        """
        rotary, batch, length = Rotary(self.cos, self.sin), text[:0], text.shape[1]
        start, end = torch.tensor([0]), torch.tensor([length])
        for index in range(1, len(self.layers)):
            batch = torch.cat([batch, text[index - 1 : index]])  # one more has begun
            shape = (len(batch), self.config.kv_heads, length, self.config.head_size)
            empty = Cache(batch.new_zeros(shape), batch.new_zeros(shape), start, end)
            batch, _, _ = self.layers[index](batch, rows, rotary, empty)
        return self.feature(batch)


def collect(
    adapter: Adapter,
    policy: Policy,
    samples: Iterable[Sample],
    progress: Callable[[int], None] = lambda done: None,
) -> Evidence:
    """Run the dense model over samples: attention [S, L, V], loss [S, L], [CLS] scores [S, V]."""
    shape = adapter.shape
    plan = Plan(shape.visual_tokens, shape.layers)
    reference = Reference.build(adapter, policy, plan, decoder=Recorder)
    rows, ids = [], []
    for done, sample in enumerate(samples, start=1):
        rows.append(_one(reference, sample.prompt))
        ids.append(sample.id)
        progress(done)
    attention, loss, entry = (np.stack(column) for column in zip(*rows, strict=True))
    return Evidence(attention, loss, entry, tuple(ids))


@torch.no_grad()
def _one(reference: Reference, prompt: Prompt) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    decoder: Recorder = reference.decoder  # type: ignore[assignment]
    decoder.begin()
    reference.prefill(prompt)
    text, rows = _text_only(decoder, prompt)
    full = decoder.feature(decoder.states[-1])
    cosine = torch.cosine_similarity(decoder.without_vision(text, rows), full)
    loss = torch.cat([torch.zeros(1), cosine.clamp(-1, 1).acos()])  # ell_1 is not used
    # its salience decides the tokens that enter layer 1 above CR 4
    entry = reference.vision.entry_scores(prompt.pixels)  # type: ignore[operator]
    return torch.stack(decoder.attention).numpy(), loss.numpy(), entry.numpy()


def _text_only(decoder: Recorder, prompt: Prompt) -> tuple[Tensor, Tensor]:
    """Hidden states entering layers 2 .. L without the image's, and their rows of the rotary
    tables, which are those of their true positions."""
    prefix, visual = prompt.prefix_ids.shape[1], decoder.plan.visual_tokens
    before, after = torch.arange(prefix), torch.arange(prefix, prefix + prompt.text_ids.shape[1])
    states = torch.cat(decoder.states[:-1])[:, torch.cat([before, after + visual])]
    positions = torch.cat([before, after + decoder.span])
    return states, decoder.rows(positions, positions[-1:])[None]
