"""ToMe: pairs against a loop from the paper, even merges, groups that attend by their size."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from edgeprune.models._encoder import Encoder, EncoderConfig
from edgeprune.models._ops import TorchOps
from edgeprune.models._vision_tower import Groups
from edgeprune.policies import make
from edgeprune.policies._policy import BlockMerge
from edgeprune.policies.tome import mergeable, merges, pairs
from edgeprune.spec import PruneSpec, Stage

FOUR = st.lists(st.sampled_from([-1, 1]), min_size=4, max_size=4)
KEYS = st.lists(FOUR | st.just([0] * 4), min_size=2, max_size=13)
"""Keys of which many are alike, opposite or nothing: cosines are exact, ties are common."""


def pairing(keys: np.ndarray, count: int, *, protected: bool) -> tuple[list[int], dict[int, int]]:
    """Those that stay, in order, and whom each other joins."""

    def like(i: int, j: int) -> float:
        lengths = np.linalg.norm(keys[i]) * np.linalg.norm(keys[j])
        return round(float(keys[i] @ keys[j] / lengths), 5) if lengths else 0.0

    first, second = range(0, len(keys), 2), range(1, len(keys), 2)
    free = [i for i in first if i or not protected]
    best = {i: max(second, key=lambda j: (like(i, j), -j)) for i in free}
    chosen = sorted(free, key=lambda i: (-like(i, best[i]), i))[:count]
    return [*(i for i in first if i not in chosen), *second], {i: best[i] for i in chosen}


@settings(deadline=None)
@given(KEYS, st.booleans(), st.data())
def test_the_most_alike_pairs_become_one(rows, protected: bool, data) -> None:
    keys = np.array(rows, dtype=float)
    count = data.draw(st.integers(0, (len(rows) - protected) // 2))
    assume(count)
    merge = pairs(torch.tensor(keys), count, protected=protected)
    stay, joined = pairing(keys, count, protected=protected)
    assert merge.stay.tolist() == stay
    assert merge.source.tolist() == list(joined)
    partners = [stay[int(column.argmax())] for column in merge.into.T]
    assert partners == list(joined.values())
    assert merge.into.sum(0).tolist() == [1] * count


@given(st.integers(1, 900), st.integers(1, 30), st.data())
def test_merges_leave_what_is_wanted_as_evenly_as_can_be(patches: int, blocks: int, data) -> None:
    most = mergeable(patches, blocks)
    excess = data.draw(st.integers(0, most))
    counts, left, at_limit = merges(patches, patches - excess, blocks), patches, False
    for count in counts:
        assert 0 <= count <= left // 2
        at_limit |= count == left // 2
        left -= count
    assert left == patches - excess
    assert at_limit or max(counts) - min(counts) <= 1


def test_merges_of_the_papers_model() -> None:
    """LLaVA-1.5's 23 blocks from 576 to 192: 384 = 16 x 17 + 7 x 16."""
    assert merges(576, 192, 23) == [17] * 16 + [16] * 7
    assert merges(144, 5, 5) == [64, 40, 20, 10, 5]


def test_a_group_is_the_mean_of_its_patches() -> None:
    x = torch.randn(1, 5, 4, generator=torch.Generator().manual_seed(0))
    into = torch.tensor([[0.0, 0], [1, 1], [0, 0]])
    once, groups = Groups.of(x).merged(
        x, BlockMerge(torch.tensor([1, 3, 4]), torch.tensor([0, 2]), into)
    )
    means = torch.stack([x[0, 1], x[0, [0, 2, 3]].mean(0), x[0, 4]])
    torch.testing.assert_close(once[0], means)
    assert groups.sizes.flatten().tolist() == [1, 3, 1]
    assert groups.indices.tolist() == [1, 3, 4]
    last = BlockMerge(torch.tensor([1]), torch.tensor([0, 2]), torch.ones(1, 2))
    twice, groups = groups.merged(once, last)
    torch.testing.assert_close(twice[0, 0], x[0].mean(0))
    assert (groups.sizes.item(), groups.indices.item()) == (5, 3)


def test_a_group_of_equal_patches_attends_as_they_would() -> None:
    """Proportional attention: two equal keys as one of size 2 leave the result as it was."""
    query, key, value = torch.randn(3, 1, 2, 4, 8, generator=torch.Generator().manual_seed(1))
    key[:, :, 3], value[:, :, 3] = key[:, :, 1], value[:, :, 1]
    groups = Groups(torch.tensor([[1.0], [2], [1]]), torch.arange(3))
    three = (query[:, :, :3], key[:, :, :3], value[:, :, :3])
    ours = TorchOps().attend(*three, groups.bias(query.dtype))
    theirs = TorchOps().attend(query, key, value)[:, :, :3]
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("cls", [True, False])
def test_the_encoder_leaves_so_many_and_says_where_they_are(cls: bool) -> None:
    config = EncoderConfig(3, 16, 24, 2, 40, 8, 1e-5, "gelu", cls=cls)
    torch.manual_seed(0)
    encoder = Encoder(config, TorchOps())
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    policy, stage = make(PruneSpec("tome", 4)), Stage("block", 0, 9)
    pixels = torch.randn(1, 3, 40, 40)
    with torch.no_grad():
        seen = encoder(pixels, lambda signals: policy.merge_in_block(signals, stage))
        whole = encoder(pixels)
    assert seen.features.shape == (1, 9, 16)
    assert (seen.cls is not None) == cls
    assert len(set(seen.indices.tolist())) == 9
    assert set(seen.indices.tolist()) <= set(range(25))
    assert whole.features.shape == (1, 25, 16) and whole.indices is None
