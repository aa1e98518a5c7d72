"""Greedy choices and text alignment, against loops written from the papers' formulas in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune import policies
from edgeprune.errors import SpecError
from edgeprune.policies._select import max_min, min_sum
from edgeprune.policies._signals import InputSignals
from edgeprune.spec import PruneSpec, Stage
from tests import oracles

FOUR = st.lists(st.sampled_from([-1, 1]), min_size=4, max_size=4)
SIGNS = st.lists(FOUR, min_size=1, max_size=14)
"""Tokens whose cosines are multiples of 1/2: sums are exact, ties and repeats are common."""


@settings(deadline=None)
@given(SIGNS, st.data())
def test_greedy_choices_are_the_papers_of_equals_the_first(rows, data) -> None:
    tokens = torch.tensor(rows, dtype=torch.float32).reshape(-1, 4)
    keep = data.draw(st.integers(0, len(rows)))
    assert min_sum(tokens, keep, keep).tolist() == oracles.min_sum(np.array(rows), keep)
    assert max_min(tokens, keep).tolist() == oracles.max_min(np.array(rows), keep)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 60), st.integers(0, 99), st.data())
def test_greedy_choices_of_real_tokens(count: int, seed: int, data) -> None:
    tokens = np.random.default_rng(seed).standard_normal((count, 24)) + 0.5
    keep = data.draw(st.integers(0, count))
    assert min_sum(torch.tensor(tokens), keep, keep).tolist() == oracles.min_sum(tokens, keep)
    assert max_min(torch.tensor(tokens), keep).tolist() == oracles.max_min(tokens, keep)


@pytest.mark.parametrize("steps", [1, 5, 9])
@pytest.mark.parametrize("count", [0, 1, 4])
def test_greedy_steps_may_outnumber_the_tokens(steps: int, count: int) -> None:
    tokens = torch.randn(count, 8, generator=torch.Generator().manual_seed(count))
    keep = min(steps, count)
    oracle = oracles.min_sum(tokens.double().numpy(), keep) if count else []
    assert min_sum(tokens, steps, keep).tolist() == oracle


def test_of_equal_tokens_the_first_stay() -> None:
    assert max_min(torch.ones(6, 3), 4).tolist() == [0, 1, 2, 3]
    assert min_sum(torch.ones(6, 3), 4, 4).tolist() == [0, 1, 2, 3]
    assert max_min(torch.zeros(6, 3), 4).tolist() == [0, 1, 2, 3]


@settings(deadline=None)
@given(st.integers(0, 12), st.integers(1, 6), st.integers(0, 99))
def test_alignment_is_the_mean_distance(count: int, words: int, seed: int) -> None:
    """TrimTokenator Eq. (3), each distance on its own."""
    rng = np.random.default_rng(seed)
    visual, text = rng.standard_normal((count, 5)), rng.standard_normal((words, 5))
    oracle = [-np.mean([np.linalg.norm(x - t) for t in text]) for x in visual]
    signals = InputSignals(torch.tensor(visual)[None], count, torch.tensor(text)[None])
    np.testing.assert_allclose(signals.alignment().numpy(), oracle, atol=1e-5)


def test_alignment_wants_the_text() -> None:
    with pytest.raises(SpecError, match="text=True"):
        InputSignals(torch.zeros(1, 3, 4), 3).alignment()


def test_trimtokenator_filters_before_it_spreads() -> None:
    rng = np.random.default_rng(5)
    visual, text = rng.standard_normal((20, 6)), rng.standard_normal((3, 6))
    signals = InputSignals(torch.tensor(visual)[None], 20, torch.tensor(text)[None])
    alignment = -np.linalg.norm(visual[:, None] - text[None], axis=-1).mean(1)
    near = sorted(np.argsort(-alignment)[:16])
    oracle = [int(near[i]) for i in oracles.min_sum(visual[near], 5)]
    policy = policies.make(PruneSpec("trimtokenator", 4))
    few, many = Stage("input", 5, text=True), Stage("input", 18, text=True)
    assert policy.input(signals, few, few).indices.tolist() == oracle
    assert policy.input(signals, many, many).indices.tolist() == sorted(
        np.argsort(-alignment)[:18].tolist()
    )
