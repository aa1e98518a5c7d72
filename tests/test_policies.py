"""Policies and what they are made of, against formulas written out in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune import policies
from edgeprune.errors import SpecError
from edgeprune.policies._select import lattice, top
from edgeprune.policies._signals import (
    VisionSignals,
)
from edgeprune.spec import ModelShape, PruneSpec, Stage
from tests.layer_signals import layer_signals, rotate

SHAPE = ModelShape("llava", 144, (12, 12), 12, 192, 352, 6, 6, 32, 66, 1024, True)


class Counts:
    def __init__(self, *counts: int) -> None:
        self.counts = counts


@given(st.lists(st.integers(0, 4), min_size=1, max_size=40), st.data())
def test_top_keeps_the_largest_and_of_equals_the_first(values: list[int], data) -> None:
    keep = data.draw(st.integers(0, len(values)))
    kept = top(torch.tensor(values, dtype=torch.float32), keep).tolist()
    oracle = sorted(sorted(range(len(values)), key=lambda i: (-values[i], i))[:keep])
    assert kept == oracle


@given(st.integers(1, 24), st.integers(1, 24), st.data())
def test_a_lattice_is_spread_and_rises(rows: int, columns: int, data) -> None:
    keep = data.draw(st.integers(1, rows * columns))
    cells = lattice((rows, columns), keep)
    assert len(cells) == keep
    assert cells == sorted(set(cells))
    assert cells[0] >= 0 and cells[-1] < rows * columns


def test_a_lattice_has_cells_of_the_image() -> None:
    assert lattice((12, 12), 36) == [y * 12 + x for y in range(1, 12, 2) for x in range(1, 12, 2)]


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 4),
    st.integers(1, 9),
    st.integers(1, 5),
    st.sampled_from([(2, 2), (4, 2), (6, 1)]),
    st.sampled_from(["own", "start", "middle", "end", "none"]),
    st.integers(0, 99),
)
def test_last_query_attention_is_the_papers_formula(prefix, visual, text, heads, position, seed):
    """UTP Eq. (2): every visual token at p', text tokens where they are, one softmax, head mean.

    And its ablations (Tables 3, 4): p' at either end of the image, or no positions at all.
    """
    signals, query, key, positions, tables = layer_signals(prefix, visual, text, *heads, seed)
    applied, last = positions.copy(), positions[-1]
    ends = positions[prefix], positions[prefix + visual - 1]
    at = {"start": ends[0], "middle": (ends[0] + ends[1] + 1) // 2, "end": ends[1]}
    if position in at:
        applied[prefix : prefix + visual] = at[position]
    if position == "none":
        applied, last = 0 * applied, 0
    group = heads[0] // heads[1]
    rows = []
    for head in range(heads[0]):
        turned = rotate(query[head, -1], tables, last)
        keys = [rotate(key[head // group, i], tables, p) for i, p in enumerate(applied)]
        logits = np.array([turned @ k for k in keys]) / np.sqrt(query.shape[-1])
        weights = np.exp(logits - logits.max())
        rows.append(weights / weights.sum())
    oracle = np.mean(rows, axis=0)[prefix : prefix + visual]
    options = {"ure": "off"} if position == "own" else {"position": position}
    found = policies.make(PruneSpec("utp", options=options)).calibration_scores(1, signals)
    np.testing.assert_allclose(found.numpy(), oracle, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 4),
    st.integers(0, 9),
    st.integers(1, 5),
    st.sampled_from([(2, 2), (4, 2), (6, 1)]),
    st.integers(0, 99),
    st.booleans(),
)
def test_text_attention_is_causal_attention(prefix, visual, text, heads, seed, agnostic) -> None:
    """Row by row: a text token sees what stands before it and itself, each at its position, or
    each visual token at the middle of the image."""
    signals, query, key, positions, tables = layer_signals(prefix, visual, text, *heads, seed)
    group, end = heads[0] // heads[1], prefix + visual
    found = signals.text_attention(signals.anchors.middle if agnostic else None).numpy()
    if agnostic:
        positions = positions.copy()
        positions[prefix:end] = signals.anchors.middle.item()
    assert found.shape == (heads[0], text, visual)
    for head in range(heads[0]):
        for row in range(text):
            turned = rotate(query[head, end + row], tables, positions[end + row])
            seen = positions[: end + row + 1]
            keys = [rotate(key[head // group, i], tables, p) for i, p in enumerate(seen)]
            weights = np.exp([turned @ k / np.sqrt(query.shape[-1]) for k in keys])
            oracle = (weights / weights.sum())[prefix:end]
            np.testing.assert_allclose(found[head, row], oracle, atol=1e-5)


def test_text_nearness_is_what_rotation_makes_of_ones() -> None:
    """The dot product of two vectors of ones, rotated to the two positions, over that of none."""
    signals, _, _, positions, tables = layer_signals(2, 5, 3, 2, 2, seed=1)
    ones, found = np.ones(8), signals.text_nearness().numpy()
    for row, far in enumerate(positions[7:]):
        for column, near in enumerate(positions[2:7]):
            product = rotate(ones, tables, far) @ rotate(ones, tables, near)
            assert found[row, column] == pytest.approx(product / 8, abs=1e-6)


def test_cls_attention_is_a_softmax_over_cls_and_patches() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, 3, 10, 4, generator=generator)
    signals = VisionSignals(torch.zeros(1, 9, 12), query, key, (3, 3), torch.zeros(1, 1, 12))
    logits = np.einsum("hd,hnd->hn", query[0, :, 0].numpy(), key[0].numpy()) / 2
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(signals.cls_attention().numpy(), weights.mean(0)[1:], rtol=1e-5)


@pytest.mark.parametrize("cr", [1.5, 2, 4, 8, 16])
@pytest.mark.parametrize("method", ["random", "uniform"])
def test_controls_reach_the_ratio(method: str, cr: float) -> None:
    plan = policies.make(PruneSpec(method, cr)).plan(SHAPE, cr)
    assert plan.cr == pytest.approx(cr, rel=0.01)


def test_random_is_drawn_by_its_seed() -> None:
    signals = VisionSignals(torch.zeros(1, 144, 4), torch.empty(0), torch.empty(0), (12, 12))
    draws = [
        policies.make(PruneSpec("random", 4, seed))
        .vision(signals, Stage("vision", 36))
        .indices.tolist()
        for seed in (0, 0, 1)
    ]
    assert draws[0] == draws[1] != draws[2]


def test_utp_enters_with_all_tokens_up_to_a_ratio_of_four() -> None:
    first = {cr: policies.make(PruneSpec("utp")).entry_tokens(SHAPE, cr) for cr in (1.5, 4, 8, 16)}
    assert first == {1.5: 144, 4: 144, 8: 72, 16: 36}


def test_utp_scores_the_first_layers_without_positions() -> None:
    signals, *_ = layer_signals(2, 6, 3, 2, 2, seed=1)
    policy = policies.make(PruneSpec("utp", options={"agnostic_layers": "3"}))
    plain, agnostic = (signals.last_query_attention(p) for p in (None, signals.anchors.middle))
    assert not torch.allclose(plain, agnostic)
    assert torch.equal(policy.calibration_scores(3, signals), agnostic)
    assert torch.equal(policy.calibration_scores(4, signals), plain)


def test_utp_scores_by_all_text_where_asked_to() -> None:
    signals, *_ = layer_signals(2, 6, 3, 2, 2, seed=1)
    policy = policies.make(PruneSpec("utp", options={"query": "text"}))
    for layer, position in ((3, signals.anchors.middle), (4, None)):
        wanted = signals.text_attention(position).mean((0, 1))
        assert torch.equal(policy.calibration_scores(layer, signals), wanted)
        assert not torch.allclose(wanted, signals.last_query_attention(position))
    with pytest.raises(SpecError, match="position=none is for query=last"):
        policies.make(PruneSpec("utp", options={"query": "text", "position": "none"}))


def test_utp_without_its_schedule_prunes_once() -> None:
    """Table 2 without UTR: what FastV's plan is up to CR 4, and nothing to calibrate."""
    policy = policies.make(PruneSpec("utp", options={"utr": "off"}))
    fastv = policies.make(PruneSpec("fastv"))
    for cr in (1.0, 2.0, 4.0):
        assert policy.entry_tokens(SHAPE, cr) is None
        assert policy.plan(SHAPE, cr).counts == fastv.plan(SHAPE, cr).counts
    assert policy.plan(SHAPE, 16).counts == (36,) * 2 + (4,) * 10
    with pytest.raises(SpecError, match=r"--cr is at most 96, not 144; choose a smaller --cr"):
        policy.plan(SHAPE, 144)
    with pytest.raises(SpecError, match="a layer from 1 to 11 of 12; got 12"):
        policies.make(PruneSpec("utp", options={"utr": "off", "K": "12"})).plan(SHAPE, 2)


def test_utp_wants_a_schedule() -> None:
    policy = policies.make(PruneSpec("utp"))
    with pytest.raises(SpecError, match="schedule"):
        policy.plan(SHAPE, 4)
    assert policy.plan(SHAPE, 4, Counts(*[36] * 12)).counts == (36,) * 12


def test_options_are_checked() -> None:
    with pytest.raises(SpecError, match="no option 'k'"):
        policies.make(PruneSpec("utp", options={"k": "1"}))
    with pytest.raises(SpecError, match="one of middle, start, end, none; got 'left'"):
        policies.make(PruneSpec("utp", options={"position": "left"}))
    with pytest.raises(SpecError, match="takes a int"):
        policies.make(PruneSpec("utp", options={"agnostic_layers": "many"}))
    with pytest.raises(SpecError, match="choose one of: cdpruner, dart, divprune"):
        policies.make(PruneSpec("fastest"))
