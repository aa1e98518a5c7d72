"""Selectors that avoid repeats, against loops written from the papers' formulas in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune.policies._diverse import determinant, unlike, without_pairs
from tests import oracles

FOUR = st.lists(st.sampled_from([-1, 1]), min_size=4, max_size=4)
SIGNS = st.lists(FOUR, min_size=1, max_size=14)
"""Tokens whose cosines are multiples of 1/2: ties and repeats are common."""


@settings(deadline=None)
@given(SIGNS, st.data())
def test_determinants_of_equals_the_first(rows, data) -> None:
    """Four directions at most: what is chosen after them is spanned by them."""
    keep = data.draw(st.integers(0, len(rows)))
    found = determinant(torch.tensor(rows, dtype=torch.float32).reshape(-1, 4), keep, keep)
    assert found.tolist() == oracles.determinant(np.array(rows, dtype=float), keep)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 50), st.integers(0, 99), st.data())
def test_determinants_of_real_tokens(count: int, seed: int, data) -> None:
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((count, 64)) * rng.uniform(0.2, 1, (count, 1))
    keep = data.draw(st.integers(0, count))
    found = determinant(torch.tensor(vectors), keep, keep)
    assert found.tolist() == oracles.determinant(vectors, keep)


def test_a_determinant_is_as_large_as_a_greedy_choice_makes_it() -> None:
    """Past the steps that are folded into the kernel, beside determinants computed whole."""
    vectors = np.random.default_rng(7).standard_normal((90, 128))
    kernel, chosen = vectors @ vectors.T, list[int]()
    for _ in range(70):
        rest = [i for i in range(90) if i not in chosen]
        volumes = [np.linalg.slogdet(kernel[np.ix_(c, c)])[1] for c in ([*chosen, i] for i in rest)]
        chosen.append(rest[int(np.argmax(volumes))])
    assert determinant(torch.tensor(vectors), 70, 70).tolist() == sorted(chosen)


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 40), st.integers(0, 99), st.data())
def test_determinants_do_not_see_the_order(count: int, seed: int, data) -> None:
    rng = np.random.default_rng(seed)
    vectors, order = torch.tensor(rng.standard_normal((count, 64))), rng.permutation(count)
    keep = data.draw(st.integers(1, count))
    moved = determinant(vectors[order], keep, keep).numpy()
    assert sorted(order[moved].tolist()) == determinant(vectors, keep, keep).tolist()


@pytest.mark.parametrize("steps", [1, 5, 40])
@pytest.mark.parametrize("count", [0, 1, 4])
def test_determinants_steps_may_outnumber_the_tokens(steps: int, count: int) -> None:
    vectors = torch.randn(count, 8, generator=torch.Generator().manual_seed(count))
    keep = min(steps, count)
    oracle = oracles.determinant(vectors.double().numpy(), keep)
    assert determinant(vectors, steps, keep).tolist() == oracle


def test_equal_tokens_and_tokens_of_nothing_stay_in_order() -> None:
    assert determinant(torch.ones(6, 3), 4, 4).tolist() == [0, 1, 2, 3]
    assert determinant(torch.zeros(6, 3), 4, 4).tolist() == [0, 1, 2, 3]


@settings(deadline=None)
@given(SIGNS, st.sampled_from([1, 3, 8]), st.data())
def test_pairs_leave_as_the_passes_say(rows, batch, data) -> None:
    tokens = np.array(rows, dtype=float)
    order = data.draw(st.permutations(range(len(rows))))
    order = order[: data.draw(st.integers(1, len(rows)))]
    keep = data.draw(st.integers(1, len(order)))
    found = without_pairs(torch.tensor(tokens), torch.tensor(order), keep, batch)
    assert found.tolist() == oracles.without_pairs(tokens, order, keep, batch)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 120), st.integers(0, 99), st.data())
def test_pairs_of_real_tokens(count: int, seed: int, data) -> None:
    rng = np.random.default_rng(seed)
    tokens, order = rng.standard_normal((count, 24)) + 1, rng.permutation(count)
    keep = data.draw(st.integers(1, count))
    found = without_pairs(torch.tensor(tokens), torch.tensor(order), keep)
    assert found.tolist() == oracles.without_pairs(tokens, order, keep, 8, apart=1e-6)
    assert len(set(found.tolist())) == keep


def test_an_odd_number_and_a_small_one() -> None:
    """The released code cannot halve an odd list, nor take eight of fewer."""
    tokens = np.random.default_rng(0).standard_normal((13, 6))
    for count, keep in ((13, 4), (5, 1), (3, 1), (2, 1), (13, 12)):
        order = np.arange(count)[::-1].copy()
        found = without_pairs(torch.tensor(tokens), torch.tensor(order), keep)
        assert found.tolist() == oracles.without_pairs(tokens, order, keep, 8)


@settings(deadline=None)
@given(SIGNS, st.lists(FOUR, min_size=1, max_size=4), st.data())
def test_pivots_take_what_is_least_alike(rows, pivots, data) -> None:
    marks = st.lists(st.sampled_from([0.0, 1.0]), min_size=len(rows), max_size=len(rows))
    taken = data.draw(marks)
    free, quotas = taken.count(0), []
    for _ in pivots:
        quotas.append(data.draw(st.integers(0, free - sum(quotas))))
    tensors = [torch.tensor(x, dtype=torch.float32) for x in (rows, pivots, taken)]
    found = unlike(tensors[0], tensors[1], quotas, tensors[2])
    assert found.tolist() == oracles.unlike(np.array(rows), np.array(pivots), quotas, taken)
    assert found.sum() == sum(quotas) + sum(taken)


def test_pivots_find_nothing_to_take() -> None:
    assert unlike(torch.zeros(0, 4), torch.ones(2, 4), [5, 2], torch.zeros(0)).shape == (0,)
    assert unlike(torch.ones(3, 4), torch.ones(1, 4), [0], torch.zeros(3)).tolist() == [0, 0, 0]
    assert unlike(torch.ones(3, 4), torch.ones(1, 4), [2], torch.zeros(3)).tolist() == [1, 1, 0]
