"""Positions of a call whose visual tokens stand where they stood among all V of the image, or all
at one."""

from __future__ import annotations

import torch
from torch import Tensor

from edgeprune.policies._signals import Segments


def kept_positions(first: Tensor, segments: Segments, visual_indices: Tensor, span: int) -> Tensor:
    """The position of each token of a call, then those of the image's first, middle and last token.

    `first` int64 [1] is the position of the call's first token; `visual_indices` int64 [visual]
    says which of the `span` = V tokens the visual ones are: int64 [S + 3]. An encoder's [CLS],
    whose index is V, has no place of its own and stands at the last one.
    """
    start = first + segments.prefix
    before = first + torch.arange(segments.prefix, device=first.device)
    # 0 in decode steps, 1 in prefill; a minimum, for TensorRT clips no integers
    seen = torch.scalar_tensor(segments.visual, dtype=torch.int64).minimum(torch.tensor(1))
    after = start + span * seen + torch.arange(segments.text, device=first.device)
    visual = start + visual_indices.minimum(torch.tensor(span - 1))
    anchors = start + seen * torch.tensor([0, span // 2, span - 1])  # never past the tables
    placed = torch.cat([before, visual, after, anchors])
    # Read once more by as many rows as there are tokens: the tracer does not know that there is an
    # index for each visual token.
    return placed.index_select(0, torch.arange(segments.total + 3, device=first.device))


def image_at_one(first: Tensor, segments: Segments) -> Tensor:
    """The position of each token of a call, int64 [S], where those of an image share one."""
    start = first + segments.prefix
    before = first + torch.arange(segments.prefix, device=first.device)
    # 0 in decode steps, 1 in prefill; a minimum, for TensorRT clips no integers
    seen = torch.scalar_tensor(segments.visual, dtype=torch.int64).minimum(torch.tensor(1))
    after = start + seen + torch.arange(segments.text, device=first.device)
    visual = start + torch.zeros(segments.visual, dtype=torch.int64, device=first.device)
    return torch.cat([before, visual, after])
