"""Which tokens compete with each other where an image is several tiles, and how many of them stay.

Codes that encode each crop by itself choose in each crop by itself: T of its tokens stay. A ranking
over all crops together is another method, which gives a dull crop fewer tokens than a busy one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from edgeprune.errors import SpecError
from edgeprune.policies._select import ascending

TILES = ("each", "joint")


def check_tiles(tiles: str) -> None:
    """SpecError where --set tiles= is neither."""
    if tiles not in TILES:
        raise SpecError(f"--set tiles= is one of {', '.join(TILES)}; got {tiles!r}")


def parts(tile_of: Sequence[int], count: int, tiles: str) -> list[list[int]]:
    """The indices of the tokens that compete: those of each tile, or all `count` of them.

    `tile_of` names the tile of each token, nothing where there is one tile.
    """
    if tiles == "joint" or not tile_of:
        return [list(range(count))]
    return [[i for i, own in enumerate(tile_of) if own == tile] for tile in sorted(set(tile_of))]


def shared(total: int, sizes: Sequence[int]) -> list[int]:
    """`total` in shares as large as the sizes, each rounded; of equal remainders the first is more.

    No share is above its size where `total` is not above their sum.
    """
    whole = max(1, sum(sizes))
    shares = [total * size // whole for size in sizes]
    left = total - sum(shares)
    for i in sorted(range(len(sizes)), key=lambda i: -(total * sizes[i] % whole))[:left]:
        shares[i] += 1
    return shares


def part(x: Tensor, indices: Sequence[int]) -> Tensor:
    """The rows at these indices, all of them where they are as many: [N, ...] -> [n, ...]."""
    if len(indices) == x.shape[0]:
        return x
    return x.index_select(0, torch.tensor(indices, device=x.device))


def of_each(
    groups: Sequence[Sequence[int]], keep: int, choose: Callable[[Sequence[int], int], Tensor]
) -> Tensor:
    """Places of `keep` tokens, rising, of each group its share: int64 [keep].

    `choose` takes the indices of a group and how many of them stay, and gives those that do,
    counted within the group and rising.
    """
    if len(groups) == 1:
        return choose(groups[0], keep)
    count, shares = sum(map(len, groups)), shared(keep, [len(indices) for indices in groups])
    return together(
        [
            among_all(choose(indices, share), indices, count)
            for indices, share in zip(groups, shares, strict=True)
            if share
        ]
    )


def among_all(chosen: Tensor, indices: Sequence[int], count: int) -> Tensor:
    """Tokens counted within a group, counted among all `count`: int64 [k] -> int64 [k]."""
    if len(indices) == count:
        return chosen
    return torch.tensor(indices, device=chosen.device).index_select(0, chosen)


def together(chosen: Sequence[Tensor]) -> Tensor:
    """What the groups chose, each rising and none empty, as one that rises: int64 [k]."""
    return chosen[0] if len(chosen) == 1 else ascending(torch.cat(list(chosen)))
