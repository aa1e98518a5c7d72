"""Keeping the best tokens and merging those that come next."""

from __future__ import annotations

import torch
from torch import Tensor

from edgeprune.policies._clusters import merge
from edgeprune.policies._policy import Selection
from edgeprune.policies._select import ascending, ranked, top
from edgeprune.spec import Stage


def recycle(tokens: Tensor, scores: Tensor, stage: Stage, live: Stage, pool: int) -> Selection:
    """The live.keep best tokens, then live.merged that stand for the next ones.

    [n, width], float32 [n]; `live` is the `stage` with the sizes of this call. The tokens ranked up
    to `pool` (symbolic where n is) are kept or merged, in clusters of density peaks, at their
    centres' places; those after them are dropped.
    """
    if stage.merged == 0:
        return Selection(top(scores, live.keep))
    order = ranked(scores, pool)
    kept, spare = ascending(order[: live.keep]), ascending(order[live.keep :])
    centres, means = merge(tokens.index_select(0, spare), live.merged)
    features = torch.cat([tokens.index_select(0, kept), means.to(tokens.dtype)])
    return Selection(torch.cat([kept, spare.index_select(0, centres)]), features[None])
