"""The dense model, and whether its logits over two turns are those of transformers' model."""

from __future__ import annotations

import torch
from torch import Tensor

from edgeprune.models import Adapter
from edgeprune.models._processor import Prompt
from edgeprune.models._reference import Reference
from edgeprune.policies import make
from edgeprune.spec import Plan, PruneSpec

MORE = torch.tensor([[7, 8, 9]])
"""Tokens that follow a prompt: one is decoded, the others are a second turn."""


def dense(adapter: Adapter) -> Reference:
    """The eager model of a checkpoint, nothing pruned."""
    plan = Plan(adapter.shape.visual_tokens, adapter.shape.layers)
    return Reference.build(adapter, make(PruneSpec("none")), plan)


def assert_same_logits(
    ours: Reference, prompt: Prompt, theirs: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5
) -> None:
    """`theirs` [S, vocabulary]: of the prompt and of MORE behind it, in one forward."""
    close = {"atol": atol, "rtol": rtol}
    torch.testing.assert_close(ours.prefill(prompt).logits, theirs[-4], **close)
    torch.testing.assert_close(ours.step(MORE[:, :1]).logits, theirs[-3], **close)
    torch.testing.assert_close(ours.step(MORE[:, 1:]).logits, theirs[-1], **close)
