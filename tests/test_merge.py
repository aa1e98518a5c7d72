"""Mergers in the vision encoder, against loops written from the papers' formulas in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune import policies
from edgeprune.errors import SpecError
from edgeprune.policies import _signals
from edgeprune.policies._merge import join, others, weighted_neighbours
from edgeprune.policies._signals import VisionSignals
from edgeprune.spec import ModelShape, PruneSpec, Stage

Array = np.ndarray[Any, Any]
SHAPE = ModelShape("llava", 144, (12, 12), 12, 192, 352, 6, 6, 32, 66, 1024, True)
HEADS, HEAD = 3, 4


class Encoder:
    """Random features, queries and keys of 1 + N tokens, as signals and in numpy."""

    def __init__(self, count: int, seed: int, scale: float = 1.0, order: Any = None) -> None:
        rng = np.random.default_rng(seed)
        self.tokens = rng.standard_normal((1 + count, HEADS * HEAD)).astype(np.float32)
        self.query, self.key = scale * rng.standard_normal((2, HEADS, 1 + count, HEAD))
        if order is not None:  # of the patches
            indices = np.concatenate([[0], 1 + np.asarray(order)])
            self.tokens, self.query = self.tokens[indices], self.query[:, indices]
            self.key = self.key[:, indices]
        self.count = count

    def signals(self) -> VisionSignals:
        tokens = torch.tensor(self.tokens)[None]
        query, key = torch.tensor(self.query)[None], torch.tensor(self.key)[None]
        return VisionSignals(tokens[:, 1:], query, key, (1, self.count), tokens[:, :1])

    def attention(self, *, one_head: bool = False) -> Array:
        """Of [CLS] to each patch."""
        query, key = self.query[:, 0], self.key
        if one_head:
            query = query.reshape(1, -1)
            key = np.stack([key[:, i].reshape(-1) for i in range(1 + self.count)])[None]
        logits = np.einsum("hd,hnd->hn", query, key) / np.sqrt(query.shape[-1])
        weights = np.exp(logits - logits.max(1, keepdims=True))
        found: Array = (weights / weights.sum(1, keepdims=True)).mean(0)[1:]
        return found


def ranked(scores: Array, keep: int) -> list[int]:
    """The largest first, of equals the first."""
    return sorted(range(len(scores)), key=lambda i: (-float(scores[i]), i))[:keep]


def cosine(a: Array, b: Array) -> float:
    lengths = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / lengths if lengths else 0.0


@settings(deadline=None)
@given(st.integers(0, 12), st.data())
def test_others_are_all_that_were_not_chosen(count: int, data: st.DataObject) -> None:
    everyone = list(range(count))
    chosen = data.draw(st.lists(st.sampled_from(everyone), unique=True) if count else st.just([]))
    found = others(torch.tensor(chosen, dtype=torch.int64), count).tolist()
    assert found == [i for i in everyone if i not in chosen]


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(0, 9), st.data())
def test_each_token_joins_one_target_of_equals_the_first(rows: int, columns: int, data) -> None:
    values = st.lists(st.integers(0, 2), min_size=columns, max_size=columns)
    similar = np.array([data.draw(values) for _ in range(rows)]).reshape(rows, columns)
    members = join(torch.tensor(similar, dtype=torch.float32)).numpy()
    assert members.shape == similar.shape
    assert (members.sum(0) == 1).all()
    assert members.argmax(0).tolist() == [
        column.tolist().index(max(column)) for column in similar.T
    ]


@settings(deadline=None)
@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 99))
def test_neighbours_are_added_by_their_weights(count: int, wanted: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    similar, weights = rng.integers(0, 3, (2, count)), rng.random(count)
    tokens, near = rng.standard_normal((count, 4)), min(wanted, count)
    sums, totals = weighted_neighbours(
        torch.tensor(similar, dtype=torch.float32),
        torch.tensor(tokens),
        torch.tensor(weights, dtype=torch.float32),
        near,
    )
    for row, total, scores in zip(sums.numpy(), totals.numpy(), similar, strict=True):
        chosen = ranked(scores, near)
        np.testing.assert_allclose(row, sum(weights[j] * tokens[j] for j in chosen), atol=1e-5)
        np.testing.assert_allclose(total, [weights[chosen].sum()], atol=1e-5)


def visionzip(encoder: Encoder, keep: int, merged: int, variant: str) -> tuple[list[int], Array]:
    """Places and tokens: [CLS], dominant, contextual."""
    tokens, keys = encoder.tokens[1:], encoder.key[:, 1:].mean(0)
    cls = 1 if keep > 1 else 0
    best = sorted(ranked(encoder.attention(), keep - cls))
    rest = [i for i in range(encoder.count) if i not in best]
    step = len(rest) // merged
    targets = [rest[t * step] for t in range(merged)]
    joined: dict[int, list[int]] = {target: [] for target in targets}
    for i in rest:
        if i not in targets:
            like = [cosine(keys[i], keys[target]) for target in targets]
            joined[targets[like.index(max(like))]].append(i)
    made = []
    for target, members in joined.items():
        if variant == "paper":
            made.append(tokens[[target, *members]].mean(0))
        else:
            made.append(tokens[target] + (tokens[members].mean(0) if members else 0))
    indices = [encoder.count] * cls + best + targets
    return indices, np.concatenate([encoder.tokens[:cls], tokens[best], made])


@settings(max_examples=30, deadline=None)
@given(
    st.integers(4, 20),
    st.integers(0, 99),
    st.sampled_from([0.0, 1.0]),
    st.sampled_from(["released", "paper"]),
    st.data(),
)
def test_visionzip_is_the_papers(count: int, seed: int, scale: float, variant: str, data) -> None:
    merged = data.draw(st.integers(1, count // 2))
    keep = data.draw(st.integers(1, count - merged))
    encoder, policy = Encoder(count, seed, scale), _made("visionzip", variant=variant)
    found = policy.vision(encoder.signals(), Stage("vision", keep, merged))
    indices, tokens = visionzip(encoder, keep, merged, variant)
    assert found.indices.tolist() == indices
    merged = found.gather(encoder.signals().features)[0]
    np.testing.assert_allclose(merged.numpy(), tokens, atol=1e-5)


def spread(attention: Array, chosen: list[int], wanted: int) -> list[int]:
    """The released code's grid, cut to the count by attention, or filled up by it."""
    count, ratio = len(attention), len(chosen) / len(attention)
    step = max(1, int(int(1 / ratio + 1e-9) / 3))
    grid = [i for i in range(0, count - 1, step) if i not in chosen]
    if len(grid) >= wanted:
        best = ranked(attention[grid], wanted)
        return sorted(grid[i] for i in best)
    rest = [i for i in range(count) if i not in chosen and i not in grid]
    return sorted(grid + [rest[i] for i in ranked(attention[rest], wanted - len(grid))])


def prumerge(
    encoder: Encoder, total: int, near: int, variant: str, outliers: float | None
) -> tuple[list[int], Array]:
    """Places and tokens: by attention, then spread where asked, then the sum of the others."""
    attention, tokens = encoder.attention(one_head=True), encoder.tokens[1:]
    keys = encoder.key[:, 1:].transpose(1, 0, 2).reshape(encoder.count, -1)
    extra = int(variant == "released" and total > 1)
    count = total - extra
    best = count if outliers is None else max(1, round(outliers * count))
    chosen = ranked(attention, best)
    if count > best:
        chosen += spread(attention, chosen, count - best)
    made = []
    for i in chosen:
        like = np.array([cosine(keys[i], keys[j]) if j != i else -9 for j in range(encoder.count)])
        members = ranked(like, min(near, encoder.count - 1))
        added = sum(attention[j] * tokens[j] for j in members)
        if variant == "released":
            made.append(tokens[i] + added)
        else:
            weight = attention[i] + attention[members].sum()
            made.append((attention[i] * tokens[i] + added) / weight)
    left = [i for i in range(encoder.count) if i not in chosen]
    if extra:
        made.append(sum(attention[i] * tokens[i] for i in left))
    largest = [ranked(np.where(np.isin(range(encoder.count), left), attention, -1), 1)[0]]
    return chosen + largest * extra, np.array(made)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(3, 20),
    st.integers(0, 99),
    st.sampled_from([0.0, 1.0]),
    st.sampled_from(["released", "paper"]),
    st.sampled_from([None, 0.0, 0.25, 1.0]),
    st.integers(1, 25),
    st.data(),
)
def test_prumerge_is_the_papers(
    count: int, seed: int, scale: float, variant: str, outliers: float | None, near: int, data
) -> None:
    total = data.draw(st.integers(1, count - 1))
    encoder, options = Encoder(count, seed, scale), {"variant": variant, "neighbours": f"{near}"}
    if outliers is None:
        policy = _made("prumerge", **options)
    else:
        policy = _made("prumergeplus", **options, outliers=f"{outliers}")
    found = policy.vision(encoder.signals(), Stage("vision", 0, total))
    indices, tokens = prumerge(encoder, total, near, variant, outliers)
    assert found.indices.tolist() == indices
    merged = found.gather(encoder.signals().features)[0]
    np.testing.assert_allclose(merged.numpy(), tokens, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(9)), st.integers(0, 20))
def test_prumerge_does_not_care_for_the_order_of_patches(order: list[int], seed: int) -> None:
    stage, policy = Stage("vision", 0, 4), _made("prumerge", neighbours="3")
    signals, others = Encoder(9, seed).signals(), Encoder(9, seed, order=order).signals()
    plain, moved = policy.vision(signals, stage), policy.vision(others, stage)
    assert [order[i] for i in moved.indices.tolist()] == plain.indices.tolist()
    merged = plain.gather(signals.features)
    torch.testing.assert_close(moved.gather(others.features), merged, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("at_once", [_signals.WEIGHTS, 130])
def test_an_encoder_without_cls_judges_by_received_attention(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether all queries are looked at together, or a few after the other."""
    monkeypatch.setattr(_signals, "WEIGHTS", at_once)
    encoder = Encoder(12, 0)
    signals = encoder.signals()
    bare = VisionSignals(signals.features, signals.query[:, :, 1:], signals.key[:, :, 1:], (3, 4))
    logits = np.einsum("hqd,hkd->hqk", encoder.query[:, 1:], encoder.key[:, 1:]) / 2
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    received = weights.mean((0, 1))
    np.testing.assert_allclose(bare.salience().numpy(), received, atol=1e-5)
    others_only = (weights.mean(0).sum(0) - weights.mean(0).diagonal()) / 11
    found = bare.received_attention(from_others=True)
    np.testing.assert_allclose(found.numpy(), others_only, atol=1e-5)
    with pytest.raises(SpecError, match="no \\[CLS\\]"):
        bare.cls_attention()
    chosen = _made("visionzip").vision(bare, Stage("vision", 4, 1)).indices.tolist()
    assert chosen[:4] == sorted(ranked(received, 4))


def test_counts_are_those_of_the_papers() -> None:
    seven = ModelShape("llava", 576, (24, 24), 32, 4096, 11008, 32, 32, 128, 32064, 4096, True)
    counts = {
        cr: _made("visionzip").plan(seven, cr).stages[0] for cr in (576 / 192, 576 / 128, 576 / 64)
    }
    assert [(s.keep, s.merged) for s in counts.values()] == [(162, 30), (108, 20), (54, 10)]
    for method, cr, count in (("prumerge", 16, 36), ("prumergeplus", 4, 144)):
        assert _made(method).plan(seven, cr).counts == (count,) * 32


def test_options_out_of_range_are_refused() -> None:
    for method, option, value in (
        ("visionzip", "variant", "both"),
        ("visionzip", "contextual", "1"),
        ("prumerge", "variant", "both"),
        ("prumerge", "neighbours", "0"),
        ("prumergeplus", "outliers", "2"),
    ):
        with pytest.raises(SpecError, match=f"--set {option}= is"):
            _made(method, **{option: value})


def _made(method: str, **options: str) -> policies.Policy:
    return policies.make(PruneSpec(method, 4, options=options))
