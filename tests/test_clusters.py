"""Density peaks, assignment and averages, against loops written from the formulas in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune.policies._clusters import assign, average, clusters, density_peaks, distances
from tests import oracles

FOUR = st.lists(st.integers(-2, 2), min_size=4, max_size=4)
HALF = st.lists(FOUR, min_size=1, max_size=8)
"""With their opposites, tokens whose squared distances are exact: ties and repeats are common."""


def merge(tokens: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Centres, and the mean of each cluster."""
    centres, members = clusters(tokens, count)
    return centres, average(members, tokens)


@settings(deadline=None)
@given(HALF, st.data())
def test_clusters_are_the_formulas_of_equals_the_first(half, data) -> None:
    tokens = np.array(half + [[-x for x in row] for row in half], dtype=np.float64)
    count = data.draw(st.integers(1, len(tokens)))
    centres, means = merge(torch.tensor(tokens), count)
    wanted, features = oracles.merged(tokens, count)
    assert centres.tolist() == wanted
    np.testing.assert_allclose(means.numpy(), features, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 60), st.integers(0, 99), st.sampled_from([0, 50]), st.data())
def test_clusters_of_real_tokens(count: int, seed: int, shared: float, data) -> None:
    """`shared` is a part that all tokens have, which a plain Gram matrix would drown in."""
    rng = np.random.default_rng(seed)
    tokens = (rng.standard_normal((count, 24)) + shared).astype(np.float32).astype(np.float64)
    number = data.draw(st.integers(1, count))
    centres, means = merge(torch.tensor(tokens), number)
    wanted, features = oracles.merged(tokens, number)
    assert centres.tolist() == wanted
    np.testing.assert_allclose(means.numpy(), features, atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 40), st.integers(0, 99))
def test_distances_are_symmetric_nothing_to_itself_and_exact_enough(count: int, seed: int) -> None:
    tokens = np.random.default_rng(seed).standard_normal((count, 32)) * 3 + 20
    found = distances(torch.tensor(tokens))
    assert torch.equal(found, found.T)
    assert not found.diagonal().any()
    np.testing.assert_allclose(found.numpy(), oracles.root_distances(tokens) ** 2, atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 40), st.integers(0, 99), st.data())
def test_the_order_of_the_tokens_does_not_matter(count: int, seed: int, data) -> None:
    rng = np.random.default_rng(seed)
    tokens, order = torch.tensor(rng.standard_normal((count, 16))), rng.permutation(count)
    number = data.draw(st.integers(2, count))  # one cluster has any centre, see below
    centres, means = merge(tokens, number)
    others, moved = merge(tokens[order], number)
    indices = order[others.numpy()]
    assert sorted(indices.tolist()) == sorted(centres.tolist())
    back, first = np.argsort(indices), centres.argsort()  # two may tie, and then the first is first
    torch.testing.assert_close(moved[back], means[first], atol=1e-4, rtol=1e-4)


def test_the_most_prominent_centre_is_the_first() -> None:
    """Two groups: the tighter one's middle, though it stands last, leads the other's."""
    tokens = np.array([[0.0], [-0.3], [0.3], [2.0], [1.9], [2.1]])
    centres, means = merge(torch.tensor(tokens), 3)
    assert centres.tolist()[:2] == [3, 0] == oracles.centres(oracles.root_distances(tokens), 3)[:2]
    np.testing.assert_allclose(means[1].numpy(), [-0.15], atol=1e-6)  # the third is 0.3


def test_mutual_neighbours_of_one_density_are_both_centres() -> None:
    """Each is the other's nearest and both are densest: an exact tie, whatever the numbers."""
    rng = np.random.default_rng(3)
    tokens = rng.standard_normal((30, 64)) * 5
    tokens[17] = tokens[4] + 0.01 * rng.standard_normal(64)
    assert merge(torch.tensor(tokens), 2)[0].tolist() == [4, 17]


def test_one_cluster_is_the_mean_and_as_many_as_tokens_are_the_tokens() -> None:
    tokens = torch.tensor(np.random.default_rng(0).standard_normal((9, 5)))
    _, mean = merge(tokens, 1)
    torch.testing.assert_close(mean, tokens.float().mean(0, keepdim=True))
    centres, own = merge(tokens, 9)
    assert sorted(centres.tolist()) == list(range(9))
    torch.testing.assert_close(own, tokens[centres].float())


def test_equal_tokens_make_the_first_centres() -> None:
    centres, means = merge(torch.ones(6, 3), 4)
    assert centres.tolist() == [0, 1, 2, 3]
    assert torch.equal(means, torch.ones(4, 3))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 30), st.integers(0, 99), st.data())
def test_every_token_has_one_cluster_and_a_centre_its_own(count: int, seed: int, data) -> None:
    rng = np.random.default_rng(seed)
    apart = distances(torch.tensor(rng.integers(0, 2, (count, 4))))
    centres = density_peaks(apart, data.draw(st.integers(1, count)))
    members = assign(apart, centres)
    assert torch.equal(members.sum(0), torch.ones(count))
    assert members[torch.arange(len(centres)), centres].all()


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.integers(1, 12), st.booleans(), st.integers(0, 99))
def test_averages_are_means_and_nobodys_is_nothing(clusters, count, weighted, seed) -> None:
    rng = np.random.default_rng(seed)
    of, tokens = rng.integers(0, clusters, count), rng.standard_normal((count, 3))
    weights = rng.integers(0, 3, count).astype(float) if weighted else np.ones(count)
    members = (np.arange(clusters)[:, None] == of).astype(np.float32)
    found = average(
        torch.tensor(members), torch.tensor(tokens), torch.tensor(weights) if weighted else None
    )
    for cluster, mean in enumerate(found):
        mine = of == cluster
        if weights[mine].sum() == 0:
            assert not mean.any()
        else:
            oracle = np.average(tokens[mine], axis=0, weights=weights[mine])
            np.testing.assert_allclose(mean.numpy(), oracle, atol=1e-5)


@pytest.mark.parametrize("width", [1, 8])
def test_no_tokens_make_no_clusters(width: int) -> None:
    centres, means = merge(torch.zeros(0, width), 0)
    assert centres.shape == (0,) and means.shape == (0, width)
