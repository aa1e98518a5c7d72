"""Drawing follows transformers' filters, and an answer ends before its stop string."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from edgeprune.errors import BackendError, SpecError
from edgeprune.runtime.sampling import Sampler, Sampling, StopWatcher, distribution

NOTHING = np.zeros(0, np.int64)


def reference(
    logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float = 0.0
) -> np.ndarray:
    """transformers' distribution: its filters in the order in which `generate` applies them."""
    scores, no_ids = torch.tensor(logits, dtype=torch.float64)[None], torch.zeros(1, 0)
    scores = TemperatureLogitsWarper(temperature)(no_ids, scores)
    if top_k:
        scores = TopKLogitsWarper(top_k)(no_ids, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(no_ids, scores)
    if min_p:
        scores = MinPLogitsWarper(min_p)(no_ids, scores)
    return np.asarray(scores.softmax(-1)[0])


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    vocabulary=st.integers(1, 400),
    spread=st.sampled_from([0.1, 1.0, 8.0, 40.0]),
    temperature=st.sampled_from([0.05, 0.2, 0.7, 1.0, 1.7]),
    top_k=st.sampled_from([0, 1, 2, 5, 50, 1000]),
    top_p=st.sampled_from([0.0, 0.01, 0.3, 0.5, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.001, 0.1, 0.5, 1.0]),
)
def test_the_distribution_is_that_of_transformers(
    seed: int,
    vocabulary: int,
    spread: float,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
) -> None:
    logits = np.random.default_rng(seed).normal(0, spread, vocabulary).astype(np.float32)
    mine = distribution(logits, Sampling(temperature, top_k, top_p, min_p=min_p))
    theirs = reference(logits, temperature, top_k, top_p, min_p)
    np.testing.assert_array_equal(mine > 0, theirs > 0)
    np.testing.assert_allclose(mine, theirs, rtol=1e-9, atol=1e-300)
    assert mine.sum() == pytest.approx(1)


def test_masked_logits_are_never_drawn() -> None:
    logits = np.array([1.0, -np.inf, 2.0, -np.inf])
    sampling = Sampling(temperature=1.0, top_k=3, top_p=0.99)
    np.testing.assert_allclose(distribution(logits, sampling), reference(logits, 1.0, 3, 0.99))
    masking = replace(sampling, suppress_tokens=(1, 3))
    assert set(draws(masking, np.array([1.0, 9.0, 2.0, 9.0]), 200)) == {0, 2}


def test_what_equals_the_kth_stays() -> None:
    logits = np.array([3.0, 1.0, 1.0, 1.0, 0.0])
    mine = distribution(logits, Sampling(temperature=1.0, top_k=2))
    np.testing.assert_allclose(mine, reference(logits, 1.0, 2, 1.0))
    assert (mine > 0).tolist() == [True, True, True, True, False]


def draws(sampling: Sampling, logits: np.ndarray, count: int) -> list[int]:
    sampler = Sampler(sampling, (), 0)
    return [sampler.pick(logits, NOTHING) for _ in range(count)]


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=30))
def test_greedy_takes_the_first_of_the_likeliest(values: list[int]) -> None:
    logits = np.array(values, np.float16)
    assert draws(Sampling(), logits, 1) == [values.index(max(values))]


def test_draws_follow_the_distribution_and_the_seed() -> None:
    logits = np.log([0.1, 0.6, 0.3])
    sampling = Sampling(temperature=1.0, seed=7)
    drawn = draws(sampling, logits, 4000)
    assert drawn == draws(sampling, logits, 4000)
    assert drawn != draws(Sampling(temperature=1.0, seed=8), logits, 4000)
    np.testing.assert_allclose(np.bincount(drawn) / 4000, [0.1, 0.6, 0.3], atol=0.03)


def test_a_tiny_temperature_is_greedy() -> None:
    logits = np.array([0.0, 5.0, 4.9], np.float32)
    assert set(draws(Sampling(temperature=1e-6), logits, 20)) == {1}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_refused(bad: float, temperature: float) -> None:
    sampling = Sampling(temperature=temperature)
    for logits in (np.array([0.0, bad, 1.0]), np.array([0.0, -np.inf, 1.0])):
        with pytest.raises(BackendError, match="not finite"):
            draws(sampling, logits, 1)


NONSENSE: list[dict[str, Any]] = [
    {"temperature": -0.1},
    {"temperature": float("nan")},
    {"temperature": float("inf")},
    {"temperature": 10**400},
    {"top_k": -1},
    {"temperature": "0.7"},
    {"temperature": True},
    {"top_k": 1.5},
    {"top_p": -0.1},
    {"top_p": 1.1},
    {"top_p": float("nan")},
    {"seed": -1},
    {"stop": ("",)},
    {"stop": "END"},
    {"max_new_tokens": 0},
    {"max_new_tokens": "9"},
    {"max_length": 0},
    {"min_p": 1.5},
    {"repetition_penalty": 0.0},
    {"repetition_penalty": float("inf")},
    {"no_repeat_ngram_size": -1},
    {"min_new_tokens": -1},
    {"min_length": 0.5},
    {"suppress_tokens": (-1,)},
    {"suppress_tokens": 3},
    {"begin_suppress_tokens": ("a",)},
    {"bad_words_ids": ((),)},
    {"bad_words_ids": (3,)},
    {"bad_words_ids": ((3,),) * 20_000},
    {"suppress_tokens": (1 << 70,)},
]


@pytest.mark.parametrize("options", NONSENSE, ids=str)
def test_nonsense_is_refused_at_birth(options: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match="got "):
        Sampling(**options)


def watched(pieces: list[str], stop: tuple[str, ...]) -> tuple[str, bool]:
    watcher = StopWatcher(stop)
    shown = "".join(watcher.feed(piece) for piece in pieces)
    return shown + watcher.finish(), watcher.stopped


def expected(text: str, stop: tuple[str, ...]) -> tuple[str, bool]:
    """The same, letter by letter: cut before the longest string of those that complete first."""
    for end in range(1, len(text) + 1):
        if complete := [s for s in stop if text[:end].endswith(s)]:
            return text[: end - max(map(len, complete))], True
    return text, False


@settings(max_examples=400, deadline=None)
@given(
    st.lists(st.text("ab\n", max_size=5), max_size=8),
    st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3).map(tuple),
)
def test_the_cut_does_not_depend_on_the_pieces(pieces: list[str], stop: tuple[str, ...]) -> None:
    assert watched(pieces, stop) == expected("".join(pieces), stop)


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    watcher = StopWatcher(("USER:", "###"))
    assert [watcher.feed(p) for p in ("a red", " US", "A #", "#", "b U", "SER", ":", " more")] == [
        *("a red", " ", "USA ", "", "##b ", "", "", ""),
    ]
    assert watcher.stopped and watcher.finish() == ""


def test_without_stop_strings_nothing_is_held_back() -> None:
    watcher = StopWatcher(())
    assert watcher.feed("abc") == "abc" and watcher.finish() == "" and not watcher.stopped
