"""VisionTrim and LLaVolta, against loops written from the papers' formulas in numpy."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune import policies
from edgeprune.errors import SpecError
from edgeprune.policies._locality import locality
from edgeprune.policies._signals import InputSignals, VisionSignals
from edgeprune.policies.llavolta import runs
from edgeprune.policies.visiontrim import shares
from edgeprune.spec import ModelShape, Plan, PruneSpec, Stage

Array = np.ndarray[Any, Any]
SEVEN = ModelShape("llava", 576, (24, 24), 32, 4096, 11008, 32, 32, 128, 32064, 4096, True)


def made(method: str, **options: str) -> policies.Policy:
    return policies.make(PruneSpec(method, 4, options=options))


def plan_of(method: str, cr: float, shape: ModelShape = SEVEN, **options: str) -> Plan:
    return made(method, **options).plan(shape, cr)


def softmax(logits: Array, axis: int = -1) -> Array:
    weights = np.exp(logits - logits.max(axis, keepdims=True))
    return weights / weights.sum(axis, keepdims=True)


def unit(x: Array) -> Array:
    lengths = np.linalg.norm(x, axis=-1, keepdims=True)
    return x / np.maximum(lengths, 1e-12)


def ranked(scores: Array, keep: int) -> list[int]:
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:keep]


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 99))
def test_locality_is_the_released_codes(rows: int, columns: int, seed: int) -> None:
    features = np.random.default_rng(seed).standard_normal((rows * columns, 3))
    if features.size < 6:
        return  # no variance to speak of
    indices = [divmod(i, columns) for i in range(rows * columns)]
    scale, reach = features.var(ddof=1), np.array(indices).var(ddof=1)
    oracle = []
    for (y, x), own in zip(indices, features, strict=True):
        total = 0.0
        for (v, u), other in zip(indices, features, strict=True):
            if max(abs(y - v), abs(x - u)) <= 1:
                total -= ((own - other) ** 2).sum() / scale
                total -= 0.5 * ((y - v) ** 2 + (x - u) ** 2) / max(reach, 1e-12)
        oracle.append(total / 9)
    found = locality(torch.tensor(features), (rows, columns))
    np.testing.assert_allclose(found.numpy(), oracle, rtol=1e-4)


def test_locality_of_two_patches_is_the_value_of_the_released_code() -> None:
    found = locality(torch.tensor([[0.0], [2.0]]), (1, 2))
    np.testing.assert_allclose(found.numpy(), [-4 / 9, -4 / 9], rtol=1e-6)


def vision(seed: int, *, cls: bool = True) -> tuple[VisionSignals, Array, Array, Array]:
    """Signals of 3 x 4 patches; their features, the attention of [CLS] and that of each patch."""
    rng = np.random.default_rng(seed)
    tokens, (query, key) = rng.standard_normal((13, 6)), rng.standard_normal((2, 2, 13, 3))
    first = 0 if cls else 1
    logits = np.einsum("hqd,hkd->hqk", query[:, first:], key[:, first:]) / np.sqrt(3)
    attention = softmax(logits).mean(0)
    signals = VisionSignals(
        torch.tensor(tokens[None, 1:]),
        torch.tensor(query[None, :, first:]),
        torch.tensor(key[None, :, first:]),
        (3, 4),
        torch.tensor(tokens[None, :1]) if cls else None,
    )
    return signals, tokens[1:], attention[0, 1:], attention[1 - first :, 1 - first :]


@pytest.mark.parametrize("seed", range(5))
def test_released_dvts_is_two_attentions_of_length_one(seed: int) -> None:
    signals, _, wide, among = vision(seed)
    received = among.sum(0) - among.diagonal()
    scores = unit(wide) / 2 + unit(received) / 2
    found = made("visiontrim").vision(signals, Stage("vision", 12, lead=5)).indices.tolist()
    assert found[:5] == sorted(ranked(scores, 5))
    assert found[5:] == [i for i in range(12) if i not in found[:5]]
    bare, _, _, among = vision(seed, cls=False)
    received = among.sum(0) - among.diagonal()
    found = made("visiontrim").vision(bare, Stage("vision", 5)).indices.tolist()
    assert found == sorted(ranked(received, 5))


@pytest.mark.parametrize("seed", range(5))
def test_paper_dvts_weighs_by_the_others_variance(seed: int) -> None:
    signals, features, wide, _ = vision(seed)
    near = locality(torch.tensor(features), (3, 4)).numpy().astype(float)
    first, second = softmax(wide), softmax(softmax(near))  # LTAM's own, then that of both
    share = second.var() / (first.var() + second.var())
    scores = share * first + (1 - share) * second
    policy = made("visiontrim", variant="paper")
    found = policy.vision(signals, Stage("vision", 12, lead=4)).indices.tolist()
    assert found[:4] == sorted(ranked(scores, 4))


def gathered(rest: Array, text: Array, count: int, variant: str, rounds: int) -> tuple[Any, Array]:
    """TGVC: centres and complement tokens."""
    size = rest.shape[1]
    if variant == "released":
        scores = (unit(rest) @ unit(text).T).mean(1)
    else:
        scores = softmax(text @ rest.T / np.sqrt(size), axis=1).mean(0)
    centres = sorted(ranked(scores, count))
    tokens = rest[centres].copy()

    def related(x: Array) -> Array:
        if variant == "released":
            found: Array = unit(x) @ unit(text).T
            return found
        return softmax(x @ text.T / np.sqrt(size))

    for _ in range(rounds):
        like, joined = related(rest) @ related(tokens).T, [[] for _ in centres]
        for i in range(len(rest)):
            if i not in centres:
                joined[int(like[i].argmax())].append(i)
        for j, members in enumerate(joined):
            if members and variant == "released":
                tokens[j] += rest[members].mean(0)
            elif members:
                weights = like[members, j]
                tokens[j] += weights @ rest[members] / weights.sum()
    return centres, tokens


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 5),
    st.integers(2, 14),
    st.integers(1, 4),
    st.sampled_from(["released", "paper"]),
    st.integers(1, 3),
    st.integers(0, 99),
    st.data(),
)
def test_complement_tokens_are_the_papers(
    dominant: int, others: int, words: int, variant: str, rounds: int, seed: int, data
) -> None:
    rng = np.random.default_rng(seed)
    count = data.draw(st.integers(1, others))
    visual = 2 * rng.standard_normal((dominant + others, 6))
    text = 2 * rng.standard_normal((words, 6))
    if variant == "paper" and words == 1:
        return  # all shares are 1: every choice is a tie
    stage = Stage("input", dominant, count, text=True)
    signals = InputSignals(torch.tensor(visual)[None], len(visual), torch.tensor(text)[None])
    policy = made("visiontrim", variant=variant, rounds=f"{rounds}")
    found = policy.input(signals, stage, stage)
    centres, tokens = gathered(visual[dominant:], text, count, variant, rounds)
    assert found.indices.tolist() == [*range(dominant), *(dominant + i for i in centres)]
    wanted = np.concatenate([visual[:dominant], tokens])
    merged = found.gather(signals.visual)[0]
    np.testing.assert_allclose(merged.numpy(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", ["released", "paper"])
def test_where_all_tokens_are_equal_the_first_are_centres(variant: str) -> None:
    """The text is zeros, so that exp() of every score is 1 to the last bit."""
    stage = Stage("input", 2, 3, text=True)
    signals = InputSignals(torch.ones(1, 9, 4), 9, torch.zeros(1, 3, 4))
    found = made("visiontrim", variant=variant).input(signals, stage, stage)
    assert found.indices.tolist() == [0, 1, 2, 3, 4]
    heights = found.gather(signals.visual)[0, :, 0].tolist()
    assert heights == pytest.approx([1, 1, 4, 1, 1]), "all join the first, empty ones stay"


@pytest.mark.parametrize("variant", ["released", "paper"])
def test_a_call_without_a_image_passes(variant: str) -> None:
    signals = InputSignals(torch.zeros(1, 0, 4), 9, torch.randn(1, 3, 4))
    stage, none = Stage("input", 2, 3, text=True), Stage("input", 0, 0, text=True)
    found = made("visiontrim", variant=variant).input(signals, stage, none)
    assert found.gather(signals.visual).shape == (1, 0, 4)
    assert found.indices.shape == (0,)


def test_the_stage_in_the_decoder_is_eq_13_over_the_visual_tokens() -> None:
    rng = np.random.default_rng(3)
    visual, text = rng.standard_normal((7, 5)), rng.standard_normal((3, 5))
    oracle = softmax(text @ visual.T / np.sqrt(5), axis=1).mean(0)
    found = shares(torch.tensor(visual), torch.tensor(text))
    np.testing.assert_allclose(found.numpy(), oracle, rtol=1e-5)
    stage = Stage("layer", 3, layer=2)
    signals: Any = SimpleNamespace(visual=torch.tensor(visual)[None], text=torch.tensor(text)[None])
    kept = made("visiontrim").layer(signals, stage, stage).indices.tolist()
    assert kept == sorted(ranked(oracle, 3))


def test_visiontrim_plans_are_the_papers() -> None:
    """144 + 48, 96 + 32, 48 + 16 and 24 + 8 of 576 tokens; Table 9."""
    for total, dominant in ((192, 144), (128, 96), (64, 48), (32, 24)):
        first, second = plan_of("visiontrim", 576 / total).stages
        assert (first.keep, first.lead) == (576, dominant)
        assert (second.keep, second.merged, second.text) == (dominant, total - dominant, True)
    plan = plan_of("visiontrim", 4, llm="16")
    assert plan.counts == (192,) * 16 + (96,) * 16
    assert plan_of("visiontrim", 576).counts == (1,) * 32
    many = ModelShape("llava_next", 700, (1, 700), 8, 8, 8, 1, 1, 8, 9, 4096, True, separators=20)
    with pytest.raises(SpecError, match="none for this model's separators; choose"):
        plan_of("visiontrim", 4, many)


@given(st.integers(0, 200), st.integers(1, 40))
def test_runs_cover_all_and_differ_by_one(count: int, parts: int) -> None:
    found = runs(count, parts)
    assert [i for first, end in found for i in range(first, end)] == list(range(count))
    assert len(found) == parts
    sizes = {end - first for first, end in found}
    assert max(sizes) - min(sizes) <= 1


@settings(deadline=None)
@given(st.integers(1, 24), st.integers(0, 9), st.data())
def test_llavolta_averages_neighbours(count: int, seed: int, data) -> None:
    merged = data.draw(st.integers(1, count))
    hidden = np.random.default_rng(seed).standard_normal((count, 4))
    stage = Stage("layer", 0, merged, layer=3)
    signals: Any = SimpleNamespace(visual=torch.tensor(hidden)[None], visual_tokens=count)
    found = made("llavolta").layer(signals, stage, stage)
    bounds = [i * count // merged for i in range(merged + 1)]
    means = [hidden[a:b].mean(0) for a, b in pairwise(bounds)]
    merged = found.gather(signals.visual.float())[0]
    np.testing.assert_allclose(merged.numpy(), means, atol=1e-6)
    middles = [a + (b - a - 1) // 2 for a, b in pairwise(bounds)]
    assert found.indices.tolist() == middles
    nothing: Any = SimpleNamespace(visual=torch.zeros(1, 0, 4), visual_tokens=count)
    passed = made("llavolta").layer(nothing, stage, Stage("layer", 0, 0, layer=3))
    assert passed.gather(nothing.visual).shape == (1, 0, 4)


def test_llavolta_of_the_papers_sizes() -> None:
    """K = 2 and runs of 5 at CR 4; of 8 at most as the released code's heaviest has."""
    plan = plan_of("llavolta", 4)
    assert plan.counts == (576,) * 2 + (115,) * 30
    assert plan_of("llavolta", 4, K="1").counts[:2] == (576, 130)
    assert [end - first for first, end in runs(576, 72)] == [8] * 72
    with pytest.raises(SpecError, match=r"--set K= is a layer from 1 to 31 of 32; got 'two'"):
        plan_of("llavolta", 4, K="two")


def test_options_out_of_range_are_refused() -> None:
    for option, value in (("variant", "x"), ("complement", "0"), ("rounds", "0")):
        with pytest.raises(SpecError, match=f"--set {option}= is"):
            made("visiontrim", **{option: value})
    with pytest.raises(SpecError, match="--set llm= is a layer from 1 to 31 of 32; got '32'"):
        plan_of("visiontrim", 4, llm="32")
    assert plan_of("visiontrim", 4, llm="auto") == plan_of("visiontrim", 4, llm="16")
    single = replace(SEVEN, layers=1)
    with pytest.raises(SpecError, match="--set llm= is a layer from 1 to 0 of 1; got 'auto'"):
        plan_of("visiontrim", 4, single, llm="auto")
