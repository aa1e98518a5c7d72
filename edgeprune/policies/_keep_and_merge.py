"""Keeping the best tokens and merging those that come next."""

from __future__ import annotations

import torch
from torch import Tensor

from edgeprune.policies._clusters import average, clusters
from edgeprune.policies._policy import Selection
from edgeprune.policies._select import ascending, ranked, top
from edgeprune.policies._sizes import least
from edgeprune.spec import Stage


def keep_and_merge(
    tokens: Tensor, scores: Tensor, stage: Stage, live: Stage, spare: int
) -> Selection:
    """The live.keep best tokens, then live.merged that stand for the `spare` next ones.

    [n, width], float32 [n]; `live` is the `stage` with the sizes of this call. The next ones are
    merged in clusters of density peaks, at their centres' indices, the most prominent centre first;
    those after them are dropped.
    """
    if stage.merged == 0:
        return Selection(top(scores, live.keep))
    rest = least(spare, tokens.shape[0])
    order = ranked(scores, live.keep + rest)
    kept = ascending(order.narrow(0, 0, live.keep))
    others = ascending(order.narrow(0, live.keep, rest))
    centres, members = clusters(tokens.index_select(0, others), live.merged)

    def merge(features: Tensor) -> Tensor:
        means = average(members, features.index_select(0, others))
        return torch.cat([features.index_select(0, kept), means.to(features.dtype)])

    return Selection(torch.cat([kept, others.index_select(0, centres)]), merge)
