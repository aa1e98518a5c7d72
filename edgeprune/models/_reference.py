"""The eager reference: the same modules that are traced, run in torch with the same caches."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from edgeprune.models._adapter import Adapter
from edgeprune.models._decoder import Decoder
from edgeprune.models._layers import Linear, Narrow, Part, parts, widen
from edgeprune.models._ops import TorchOps
from edgeprune.models._processor import Prompt
from edgeprune.policies import Policy
from edgeprune.spec import Plan

ROOM = 256
"""Tokens of text that caches have room for."""

R = TypeVar("R", bound="Reference")


@dataclass(frozen=True)
class Step:
    """Logits [vocabulary] of the last token, and the kept positions at each site."""

    logits: Tensor
    kept: tuple[Tensor, ...]


class Reference:
    """A dialogue about one image, batch 1."""

    def __init__(self, vision: nn.Module, decoder: Decoder, capacity: int = ROOM) -> None:
        self.vision, self.decoder, self.room = vision, decoder, capacity
        self.restart()

    @classmethod
    def build(
        cls: type[R],
        adapter: Adapter,
        policy: Policy,
        plan: Plan,
        dtype: torch.dtype = torch.float32,
        decoder: type[Decoder] | None = None,
        ops: TorchOps | None = None,
    ) -> R:
        """Load a checkpoint's weights into fresh modules."""
        with torch.device("meta"):
            vision = adapter.vision(policy, plan, ops)
            traced = adapter.decoder(policy, plan, ops)
            if decoder is not None:
                traced = decoder(traced.config, policy, plan)
        for module in (vision, traced):
            adapter.load(module, dtype)
            if dtype == torch.float16:
                _by_output(module)
        return cls(vision, traced)

    @property
    def parts(self) -> dict[str, Part]:
        """What may stay in float32, by path, in the order of the model."""
        return parts("vision", self.vision) | parts("decoder", self.decoder)

    def is_narrow(self, path: str) -> bool:
        """Whether a module computes what is held in the model's dtype, as in a cache."""
        tower, _, rest = path.partition(".")
        owner = {"vision": self.vision, "decoder": self.decoder}.get(tower)
        return owner is not None and isinstance(owner.get_submodule(rest), Narrow)

    def widen(self, paths: Collection[str]) -> None:
        """Let the parts of these paths compute in float32."""
        widen("vision", self.vision, paths)
        widen("decoder", self.decoder, paths)

    def restart(self) -> None:
        """Forget everything."""
        config, counts = self.decoder.config, self.decoder.plan.counts
        self.dtype = self.decoder.embedding.weight.dtype
        rooms = [n + self.room for n in counts]
        self.caches = [config.nothing_kept(i, n, self.dtype) for i, n in enumerate(rooms)]
        self.lengths = torch.zeros(len(counts), dtype=torch.int64)
        self.position = 0
        self.visual = torch.empty(1, 0, config.visual_width, dtype=self.dtype)
        self.vision_kept = torch.empty(0, dtype=torch.int64)

    @torch.no_grad()
    def prefill(self, prompt: Prompt) -> Step:
        """An image and a first question; `visual` and `vision_kept` are the vision module's."""
        self.restart()
        self.visual, self.vision_kept, _ = self.vision(prompt.pixels.to(self.dtype))
        return self._run(prompt.prefix_ids, self.visual, prompt.text_ids, self.vision_kept)

    @torch.no_grad()
    def step(self, ids: Tensor) -> Step:
        """More text, int64 [1, T]: one token to decode, or the next turn's."""
        empty = torch.zeros(1, 0, self.decoder.config.visual_width, dtype=self.dtype)
        nothing = torch.zeros(1, 0, dtype=torch.int64)
        return self._run(nothing, empty, ids, nothing[0])

    def _run(
        self, prefix_ids: Tensor, visual: Tensor, text_ids: Tensor, visual_indices: Tensor
    ) -> Step:
        logits, self.caches, kept, _ = self.decoder(
            prefix_ids,
            visual,
            text_ids,
            torch.tensor([self.position]),
            self.lengths,
            self.caches,
            visual_indices,
        )
        counts = torch.tensor(self.decoder.plan.counts).clamp(max=visual.shape[1])
        text = prefix_ids.shape[1] + text_ids.shape[1]
        self.lengths = self.lengths + text + counts
        self.position += text + (self.decoder.span if visual.shape[1] else 0)
        return Step(logits[0, 0].float(), tuple(kept))

    def generate(self, prompt: Prompt, tokens: int, stop: Callable[[int], bool]) -> list[int]:
        """Greedy ids, at most `tokens`, the stopping one included."""
        logits, ids = self.prefill(prompt).logits, list[int]()
        while len(ids) < tokens:
            ids.append(int(logits.argmax()))
            if stop(ids[-1]):
                break
            logits = self.step(torch.tensor([ids[-1:]])).logits
        return ids


def _by_output(module: nn.Module) -> None:
    """Lay out each product's weights output by output: torch multiplies fp16 matrices on a CPU ten
    times as fast so."""
    for part in module.modules():
        if isinstance(part, Linear):
            part.weight.data = part.weight.data.t().contiguous().t()
