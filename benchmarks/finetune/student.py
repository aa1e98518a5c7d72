"""The modules that are exported, with gradients: what is trained is what is traced."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from benchmarks.finetune.examples import Encoded
from edgeprune.models._decoder import Decoder
from edgeprune.models._layers import Linear
from edgeprune.models._reference import Reference


class AnswerDecoder(Decoder):
    """Keeps the logits of the last `wanted` tokens of a call: [wanted, vocabulary]."""

    wanted = 1
    seen: Tensor

    def logits(self, hidden: Tensor) -> Tensor:
        total = hidden.shape[1]
        ends = range(total - self.wanted + 1, total + 1)
        rows = [super(AnswerDecoder, self).logits(hidden[:, :end]) for end in ends]
        self.seen = torch.cat(rows, dim=1)[0]
        return rows[-1]


class Student(Reference):
    """A dialogue with the policy in place, through which the loss of an answer flows back.

    The prompt is one call, as when a bundle is asked, so that policies see no answer. The answer's
    tokens are a second one, on the caches of the first.
    """

    def loss(self, example: Encoded) -> Tensor:
        """Mean cross-entropy of the answer's tokens: []."""
        prompt, answer, decoder = example.prompt, example.answer, self.decoder
        assert isinstance(decoder, AnswerDecoder) and isinstance(self.vision, nn.Module)
        self.restart()
        with torch.no_grad():  # the encoder stays as it is
            seen = self.vision.encoder(prompt.pixels, self.vision.merge_in_encoder)  # type: ignore[operator]
        visual, self.vision_kept = self.vision.select(seen)  # type: ignore[operator]
        decoder.wanted = 1
        self._run(prompt.prefix_ids, visual, prompt.text_ids, self.vision_kept)
        logits = [decoder.seen]
        if len(answer) > 1:
            decoder.wanted = len(answer) - 1
            empty = visual[:, :0]
            nothing = torch.zeros(1, 0, dtype=torch.int64)
            self._run(nothing, empty, answer[None, :-1], nothing[0])
            logits.append(decoder.seen)
        return F.cross_entropy(torch.cat(logits), answer)


class LowRank(nn.Module):
    """W + A B, with A and B of a low rank (LoRA, arXiv 2106.09685); A B is zero at first."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        inputs, outputs = weight.shape
        self.down = nn.Parameter(torch.randn(inputs, rank) * inputs**-0.5)
        self.up = nn.Parameter(torch.zeros(rank, outputs))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.down @ self.up


def trainable(student: Student, rank: int | None) -> dict[str, nn.Parameter]:
    """What is trained, by path: all of the decoder's layers, its last norm and the projector, or
    with a rank a low-rank change of each of their products."""
    parts = {
        "vision.projector": student.vision.get_submodule("projector"),
        "decoder.layers": student.decoder.layers,
        "decoder.norm": student.decoder.norm,
    }
    found = dict[str, nn.Parameter]()
    for path, part in parts.items():
        if rank is not None:
            for module in [m for m in part.modules() if isinstance(m, Linear)]:
                change = LowRank(module.weight, rank)
                parametrize.register_parametrization(module, "weight", change)
        for name, parameter in part.named_parameters():
            if rank is None or name.endswith((".down", ".up")):
                found[f"{path}.{name}"] = parameter.requires_grad_(True)
    return found


def trained(module: nn.Module, names: Iterator[str]) -> dict[str, Tensor]:
    """Parameters of a module by the names that they had before, low-rank changes added."""
    found = dict[str, Tensor]()
    for name in names:
        owner, _, leaf = name.rpartition(".")
        found[name] = getattr(module.get_submodule(owner), leaf).detach()
    return found
