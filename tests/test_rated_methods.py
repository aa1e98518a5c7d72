"""Methods that choose by raters, pivots, pairs or determinants, against formulas in numpy."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune import policies
from edgeprune.errors import SpecError
from edgeprune.policies._schedules import falling, geometric, merge_candidates, with_merged
from edgeprune.policies._signals import InputSignals, VisionSignals
from edgeprune.spec import ModelShape, Plan, PruneSpec, Stage, plan_from_counts
from tests import oracles
from tests.layer_signals import layer_signals

SEVEN = ModelShape("llava", 576, (24, 24), 32, 4096, 11008, 32, 32, 128, 32064, 4096, True)
VISUAL, TEXT, WIDTH = 50, 6, 16


def _layer(seed: int, text: int = TEXT):
    """Signals of a layer that VISUAL tokens entered, and what they are made of."""
    signals, *_ = layer_signals(3, VISUAL, text, 4, 2, seed)
    rng = np.random.default_rng(seed)
    hidden = rng.standard_normal((3 + VISUAL + text, WIDTH))
    visual, words = rng.standard_normal((VISUAL, WIDTH)), rng.standard_normal((text, WIDTH))
    inputs = InputSignals(torch.tensor(visual)[None], VISUAL, torch.tensor(words)[None])
    return replace(signals, hidden=torch.tensor(hidden)[None], inputs=inputs), hidden, visual, words


def _make(method: str, **options: str):
    return policies.make(PruneSpec(method, 4, options=options))


def _best(scores: np.ndarray) -> list[int]:
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))


def _check_kept_and_merged(
    found, tokens: np.ndarray, order: list[int], stage: Stage, pool: int
) -> None:
    """Kept ones in reading order, then the clusters of the next `pool` at their centres."""
    kept, spare = sorted(order[: stage.keep]), sorted(order[stage.keep : stage.keep + pool])
    centres, means = oracles.merged(tokens[spare], stage.merged)
    assert found.indices.tolist() == kept + [spare[centre] for centre in centres]
    merged = found.gather(torch.tensor(tokens)[None])[0]
    np.testing.assert_allclose(merged.numpy(), [*tokens[kept], *means], atol=1e-5)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 99), st.integers(1, 40), st.sampled_from([1, TEXT]))
def test_sparsevlm_keeps_what_raters_see_and_merges_what_is_next(seed, keep, text) -> None:
    signals, hidden, visual, words = _layer(seed, text)
    weights = oracles.raters(oracles.similarity(visual, words, 1.0))
    scores = signals.text_attention().numpy().mean(0).T @ weights
    np.testing.assert_allclose(
        _make("sparsevlm").calibration_scores(1, signals).numpy(), scores, atol=1e-6
    )
    stage = Stage("layer", keep, 2, layer=2)
    pool = int(0.3 * (VISUAL - keep)) + 1
    found = _make("sparsevlm").layer(signals, stage, stage)
    _check_kept_and_merged(found, hidden[3 : 3 + VISUAL], _best(scores), stage, pool)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 99), st.sampled_from([1, 2, 14]))
def test_sparsevlm_2_looks_at_the_busiest_heads_without_distance(seed: int, heads: int) -> None:
    """14 as a constant, which here are all 4."""
    signals, _, visual, words = _layer(seed)
    weights = oracles.raters(oracles.similarity(visual, words, 1.0))
    nearness = np.maximum(signals.text_nearness().numpy(), 0.05)
    attention = signals.text_attention().numpy() / nearness
    mass = [sum(weights @ head) for head in attention]
    busy = _best(np.array(mass))[:heads]
    scores = np.mean([weights @ attention[head] for head in busy], axis=0)
    policy = _make("sparsevlm", version="2", heads=str(heads))
    assert _make("sparsevlm").heads == 14
    np.testing.assert_allclose(policy.calibration_scores(1, signals).numpy(), scores, rtol=1e-4)
    stage = Stage("layer", 9, layer=2)
    found = policy.layer(signals, stage, stage)
    assert found.indices.tolist() == sorted(_best(scores)[:9]) and found.merge is None


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 99), st.integers(1, 40), st.sampled_from([1, TEXT]))
def test_polymorphic_merges_all_that_goes(seed: int, keep: int, text: int) -> None:
    signals, hidden, *_ = _layer(seed, text)
    tokens = hidden[3 : 3 + VISUAL]
    shares = oracles.similarity(tokens, hidden[3 + VISUAL :], WIDTH**-0.5)
    scores, stage = shares @ oracles.raters(shares), Stage("layer", keep, 2, layer=2)
    np.testing.assert_allclose(
        _make("polymorphic").calibration_scores(1, signals).numpy(), scores, atol=1e-6
    )
    if text == 1:
        scores = np.zeros(VISUAL)  # all of 1: ties, which rounding may not turn
    found = _make("polymorphic").layer(signals, stage, stage)
    _check_kept_and_merged(found, tokens, _best(scores), stage, VISUAL)


@pytest.mark.parametrize("keep", [0, VISUAL])
@pytest.mark.parametrize("method", ["sparsevlm", "polymorphic", "dart"])
def test_a_layer_may_keep_all_or_nothing(method: str, keep: int) -> None:
    signals, *_ = _layer(2)
    stage = Stage("layer", keep, layer=2)
    found = _make(method).layer(signals, stage, stage)
    assert found.indices.tolist() == list(range(keep)) and found.merge is None


def test_polymorphic_can_score_by_attention() -> None:
    signals, hidden, *_ = _layer(1)
    shares = oracles.similarity(hidden[3 : 3 + VISUAL], hidden[3 + VISUAL :], WIDTH**-0.5)
    scores = signals.text_attention().numpy().mean(0).T @ oracles.raters(shares)
    found = _make("polymorphic", score="attention").calibration_scores(1, signals)
    np.testing.assert_allclose(found.numpy(), scores, atol=1e-6)


def _encoder(seed: int, cls: bool = True):
    generator = torch.Generator().manual_seed(seed)
    query, key = torch.randn(2, 1, 3, VISUAL + cls, 4, generator=generator)
    features = torch.randn(1, VISUAL, WIDTH, generator=generator)
    token = torch.zeros(1, 1, WIDTH) if cls else None
    return VisionSignals(features, query, key, (5, 10), token)


@pytest.mark.parametrize("cls", [True, False])
def test_polymorphic_enters_with_salient_patches_and_means_of_the_others(cls: bool) -> None:
    signals, stage = _encoder(3, cls), Stage("vision", 20, 5)
    scores = (signals.cls_attention() if cls else signals.received_attention()).numpy()
    found = _make("polymorphic").vision(signals, stage)
    tokens = signals.features[0].double().numpy()
    _check_kept_and_merged(found, tokens, _best(scores), stage, VISUAL)


@pytest.mark.parametrize("cls", [True, False])
@pytest.mark.parametrize(("keep", "important"), [(21, 0.5), (1, 0.5), (30, 0), (30, 1), (49, 0.3)])
def test_vispruner_is_half_salient_half_unlike(keep: int, important: float, cls: bool) -> None:
    signals = _encoder(4, cls)
    order = _best(signals.salience().numpy())
    first, tokens = int(important * keep), signals.features[0].numpy()
    wanted = order[:first]
    if first < keep:
        wanted = wanted + oracles.without_pairs(tokens, order[first:], keep - first, 8)
    found = _make("vispruner", important=str(important)).vision(signals, Stage("vision", keep))
    assert found.indices.tolist() == sorted(wanted)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 99), st.integers(1, VISUAL))
def test_cdpruner_is_the_determinant_of_relevant_directions(seed: int, keep: int) -> None:
    rng = np.random.default_rng(seed)
    visual, words = rng.standard_normal((VISUAL, 96)), rng.standard_normal((TEXT, 96))
    cosine = oracles.cosines(visual, words).mean(1)
    quality = (cosine - cosine.min() + 1e-6) / (cosine.max() - cosine.min())
    vectors = visual / np.linalg.norm(visual, axis=1, keepdims=True) * quality[:, None]
    signals = InputSignals(torch.tensor(visual)[None], VISUAL, torch.tensor(words)[None])
    stage = Stage("input", keep, text=True)
    found = _make("cdpruner").input(signals, stage, stage).indices
    if keep < VISUAL:  # the last is relevant by 1e-6, and whether it is spanned is rounding
        assert found.tolist() == oracles.determinant(vectors, keep)
    assert len(set(found.tolist())) == keep


def test_cdpruner_of_equal_tokens_keeps_the_first() -> None:
    signals = InputSignals(torch.ones(1, 8, 4), 8, torch.ones(1, 3, 4))
    stage = Stage("input", 5, text=True)
    assert _make("cdpruner").input(signals, stage, stage).indices.tolist() == list(range(5))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 99), st.integers(1, VISUAL - 1), st.sampled_from([1, 3, TEXT]))
def test_dart_keeps_pivots_and_what_is_least_like_them(seed: int, keep: int, text: int) -> None:
    signals, hidden, *_ = _layer(seed, text)
    visual, words = hidden[3 : 3 + VISUAL], hidden[3 + VISUAL :]
    sizes = np.abs(signals.states.rotated_key[0].numpy()).sum((0, 2))
    own = _best(sizes[3 : 3 + VISUAL])[: min(4, keep)]
    others = _best(sizes[3 + VISUAL :])[:4]
    pivots = [*visual[own], *words[others], *[words[-1]] * (4 - len(others))]
    parts = len(own) + 4
    quotas = [(keep - len(own)) // parts + (n < (keep - len(own)) % parts) for n in range(parts)]
    taken = [float(i in own) for i in range(VISUAL)]
    wanted = np.flatnonzero(oracles.unlike(visual, np.array(pivots), quotas, taken))
    stage = Stage("layer", keep, layer=3)
    found = _make("dart").layer(signals, stage, stage).indices
    assert found.tolist() == wanted.tolist()
    assert len(found) == keep


@given(st.integers(2, 3000), st.integers(2, 48), st.floats(1.01, 20), st.integers(1, 5))
def test_falling_counts_are_as_near_as_steps_of_one_bring_them(first, layers, ratio, number):
    drops = tuple(sorted({1 + 7 * n % (layers - 1) for n in range(number)})) if layers > 2 else (1,)
    least = sum(geometric(first, layers, drops, 0))
    wanted = max(least, round(first * layers / ratio))
    counts = falling(first, layers, drops, wanted)
    assert len(counts) == layers and counts[0] == first and counts[-1] >= 1
    assert list(counts) == sorted(counts, reverse=True)
    assert all(a == b for n, (a, b) in enumerate(pairwise(counts), 1) if n not in drops)
    assert abs(sum(counts) - wanted) <= layers


@given(st.integers(2, 3840), st.data())
def test_merged_tokens_are_sparsevlms_share_of_those_that_go(live: int, data) -> None:
    survivors = data.draw(st.integers(1, live - 1))
    plan = with_merged(plan_from_counts(live, (live, survivors)))
    (stage,) = plan.stages
    gone = live - stage.keep
    assert stage.survivors == survivors and stage.keep >= 1
    rule = int((int(0.3 * gone) + 1) / 10) + 1
    assert stage.merged == rule or (stage.keep == 1 and stage.merged < rule)
    assert stage.merged <= merge_candidates(live, stage.keep) <= gone


def _plan(method: str, cr: float, **options: str) -> Plan:
    return policies.make(PruneSpec(method, cr, options=options)).plan(SEVEN, cr)


def test_polymorphic_has_the_papers_counts() -> None:
    """Budgets 192, 128 and 64 of 576: 324+60, 216+40, 108+20 enter, and the mean is the budget."""
    for budget, kept, merged in ((192, 324, 60), (128, 216, 40), (64, 108, 20)):
        plan = _plan("polymorphic", 576 / budget)
        assert plan.stages[0] == Stage("vision", kept, merged, renumber=True)
        assert [stage.layer for stage in plan.stages] == [1, 4, 8, 17]
        assert sum(plan.counts) == 32 * budget
    assert _plan("polymorphic", 3, enter="1").counts == (192,) * 32
    assert [s.site for s in _plan("polymorphic", 2).stages] == ["layer"] * 3


def test_sparsevlm_drops_after_layers_3_7_and_16() -> None:
    for version, merges in (("1.5", True), ("2", False)):
        plan = _plan("sparsevlm", 3, version=version)
        assert [stage.layer for stage in plan.stages] == [4, 8, 17]
        assert sum(plan.counts) == 32 * 192
        assert all((stage.merged > 0) == merges for stage in plan.stages)
    assert [s.layer for s in _plan("sparsevlm", 3, stages="9,2").stages] == [3, 10]


@pytest.mark.parametrize(
    ("method", "options", "told"),
    [
        ("sparsevlm", {"version": "3"}, "1.5 or 2"),
        ("sparsevlm", {"stages": "32"}, "from 1 to 31"),
        ("polymorphic", {"score": "loss"}, "hidden or attention"),
        ("polymorphic", {"enter": "0.5"}, "from 1 to 32"),
        ("polymorphic", {"enter": "32"}, "smaller --set enter="),
        ("vispruner", {"important": "2"}, "from 0 to 1"),
        ("dart", {"image_pivots": "0", "text_pivots": "0"}, "not both 0"),
        ("dart", {"K": "0"}, "a layer from 1 to 31"),
    ],
)
def test_options_out_of_range_are_refused(method: str, options: dict[str, str], told: str) -> None:
    with pytest.raises(SpecError, match=told):
        _plan(method, 32 if "enter" in options else 4, **options)


@pytest.mark.parametrize("method", ["sparsevlm", "polymorphic", "vispruner"])
def test_tokens_that_go_are_ranked_too(method: str) -> None:
    shape = replace(SEVEN, visual_tokens=4000, grid=(1, 4000))
    policy = policies.make(PruneSpec(method, 4))
    assert policy.largest_topk(policy.plan(shape, 4)) == 4000
    assert policy.largest_topk(Plan(4000, 32)) == 0, "nothing is pruned"
