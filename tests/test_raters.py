"""Raters, against loops written from the papers' formulas in numpy."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune.policies._raters import rated, raters, similarity
from tests import oracles


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 7), st.sampled_from([1, 0.35]), st.integers(0, 99))
def test_raters_are_the_text_tokens_above_the_mean(count, words, scale, seed) -> None:
    rng = np.random.default_rng(seed)
    visual, text = rng.standard_normal((count, 8)), rng.standard_normal((words, 8))
    shares = similarity(torch.tensor(visual), torch.tensor(text), scale)
    oracle = oracles.similarity(visual, text, scale)
    np.testing.assert_allclose(shares.numpy(), oracle, atol=1e-6)
    np.testing.assert_allclose(raters(shares).numpy(), oracles.raters(oracle), atol=1e-6)
    alpha = [np.mean(row[oracles.raters(oracle) > 0]) for row in oracle]  # Eq. (11)
    np.testing.assert_allclose(rated(shares, raters(shares)).numpy(), alpha, atol=1e-6)


@given(st.lists(st.lists(st.integers(1, 3), min_size=3, max_size=3), min_size=1, max_size=6))
def test_raters_of_shares_that_tie(rows) -> None:
    shares = np.array(rows, dtype=np.float64)
    found = raters(torch.tensor(shares, dtype=torch.float32))
    np.testing.assert_allclose(found.numpy(), oracles.raters(shares), atol=1e-6)
    assert float(found.sum()) == 1 or abs(float(found.sum()) - 1) < 1e-6


def test_words_that_are_alike_all_rate() -> None:
    """No share passes the mean, however the rounding falls."""
    rng = np.random.default_rng(1)
    for words in (1, 3, 7, 10):
        text = torch.tensor(np.repeat(rng.standard_normal((1, 16)), words, axis=0))
        weights = raters(similarity(torch.tensor(rng.standard_normal((50, 16))), text))
        torch.testing.assert_close(weights, torch.full((words,), 1 / words))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 9), st.integers(1, 7), st.integers(0, 99))
def test_raters_go_with_their_words_and_do_not_see_the_images_order(count, words, seed) -> None:
    rng = np.random.default_rng(seed)
    visual, text = rng.standard_normal((count, 8)), rng.standard_normal((words, 8))
    order, moved = rng.permutation(words), rng.permutation(count)
    weights = raters(similarity(torch.tensor(visual), torch.tensor(text)))
    other = raters(similarity(torch.tensor(visual[moved]), torch.tensor(text[order])))
    torch.testing.assert_close(other, weights[order])


def test_words_of_nothing_and_images_of_nothing() -> None:
    """Embeddings of zeros, as padding has, stay finite; without an image all words rate."""
    text = torch.cat([torch.ones(2, 4), torch.zeros(3, 4)])
    weights = raters(similarity(torch.full((5, 4), 9.0), text))
    torch.testing.assert_close(weights, torch.tensor([0.5, 0.5, 0, 0, 0]))
    shares = similarity(torch.zeros(0, 4), text)
    assert shares.shape == (0, 5)
    torch.testing.assert_close(raters(shares), torch.full((5,), 0.2))
