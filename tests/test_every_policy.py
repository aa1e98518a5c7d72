"""What every method answers, whatever it sees: as many tokens as planned, no token twice, numbers.

The sizes are such that some layers drop nothing, some merge, and one method leaves no token at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from edgeprune import policies
from edgeprune.policies._policy import Policy, Selection
from edgeprune.policies._signals import (
    AttentionStates,
    InputSignals,
    LayerSignals,
    VisionSignals,
)
from edgeprune.spec import ModelShape, Plan, PruneSpec, Stage
from tests.layer_signals import layer_signals

V, PREFIX, TEXT, WIDTH = 36, 3, 5, 8
SHAPE = ModelShape("llava", V, (6, 6), 8, WIDTH, 16, 4, 2, 8, 66, 512, True, blocks=5)
COUNTS = (36, 36, 30, 20, 10, 8, 2, 2)
"""A schedule at CR 2 for the method that wants one: layers 2 and 8 drop nothing."""

METHODS = [(name, {}) for name in policies.names() if name not in ("none", "tome")] + [
    ("visiontrim", {"variant": "paper", "llm": "4"}),
    ("sparsevlm", {"version": "2"}),
    ("polymorphic", {"score": "attention"}),
    ("utp", {"utr": "off", "position": "none"}),
    ("utp", {"utr": "off", "query": "text"}),
]
"""ToMe, which merges inside the encoder, has tests of its own."""

BY_PLACE = {"random", "uniform", "llavolta", "vtw", "visionzip", "prumergeplus"}
"""Methods that choose some tokens for where they stand."""

each_method = pytest.mark.parametrize(
    ("method", "options"), METHODS, ids=lambda x: x if isinstance(x, str) else "-".join(x.values())
)


@dataclass(frozen=True)
class Site:
    """A stage, the signals there, and what the policy is asked."""

    stage: Stage
    signals: Any
    policy: Policy

    @property
    def live(self) -> Tensor:
        """The tokens that the stage sees, [1, n, width]."""
        given = self.signals
        tokens: Tensor = given.features if self.stage.site == "vision" else given.visual
        return tokens

    def chosen(self, signals: Any = None, live: Stage | None = None) -> Selection:
        signals, live = signals or self.signals, live or self.stage
        if self.stage.site == "vision":
            return self.policy.vision(signals, self.stage)
        step = self.policy.input if self.stage.site == "input" else self.policy.layer
        return step(signals, self.stage, live)


def _sites(method: str, options: dict[str, str], seed: int = 0, text: int = TEXT) -> Iterator[Site]:
    policy = policies.make(PruneSpec(method, 2, options=options))
    live = V
    for stage in _plan(policy).stages:
        if stage.survivors:
            make = {"vision": _vision, "input": _input, "layer": _layer}[stage.site]
            yield Site(stage, make(live, text, seed), policy)
        live = stage.survivors


def _plan(policy: Policy) -> Plan:
    schedule = None if policy.entry_tokens(SHAPE, 2) is None else SimpleNamespace(counts=COUNTS)
    return policy.plan(SHAPE, 2, schedule)


def _vision(live: int, text: int, seed: int) -> VisionSignals:
    tokens, query, key = _random(seed, (1, 1 + live, WIDTH), *[(1, 2, 1 + live, 4)] * 2)
    return VisionSignals(tokens[:, 1:], query, key, (6, 6), tokens[:, :1])


def _input(live: int, text: int, seed: int) -> InputSignals:
    visual, words = _random(seed, (1, live, WIDTH), (1, text, WIDTH))
    return InputSignals(visual, live, words)


def _layer(live: int, text: int, seed: int) -> LayerSignals:
    signals = layer_signals(PREFIX, live, text, 4, 2, seed)[0]
    (hidden,) = _random(seed, (1, PREFIX + live + text, WIDTH))
    return replace(signals, hidden=hidden, inputs=_input(live, text, seed + 1))


def _random(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    rng = np.random.default_rng(seed)
    return [torch.tensor(rng.standard_normal(shape)) for shape in shapes]


def _holds(site: Site, found: Selection) -> None:
    stage, live = site.stage, site.live
    count = live.shape[1]
    tokens = found.gather(live)
    assert found.indices.shape == (stage.survivors,)
    assert tokens.shape == (1, stage.survivors, live.shape[2])
    assert torch.isfinite(tokens).all()
    indices = found.indices.tolist()
    assert len(set(indices)) == len(indices)
    assert all(0 <= index < count + (stage.site == "vision") for index in indices)
    kept = [index for index in indices[: stage.keep] if index < count]
    for run in (kept[: stage.lead], kept[stage.lead :]):
        assert run == sorted(run), "kept tokens stay in reading order"


@each_method
@pytest.mark.parametrize("text", [1, TEXT])
def test_as_many_tokens_as_planned_no_place_twice(method: str, options: Any, text: int) -> None:
    sites = list(_sites(method, options, text=text))
    assert sites or method == "vtw"
    for site in sites:
        _holds(site, site.chosen())


@each_method
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_where_all_scores_are_equal_the_first_stay(method: str, options: Any, value: float) -> None:
    """Tokens of nothing, and tokens that are all the same, text tokens too."""
    for site in _sites(method, options):
        found = site.chosen(_flat(site.signals, value))
        _holds(site, found)
        exact = method not in {*BY_PLACE, "vispruner"} and options != {"version": "2"}
        if value == 0 and exact:  # two choose by place or in pairs, one divides by distance
            assert found.indices[: site.stage.keep].tolist() == list(range(site.stage.keep))


def _flat(signals: Any, value: float) -> Any:
    """The same with every vector's entries `value`, before rotation; none for keys to agree on."""
    if isinstance(signals, VisionSignals):
        query, key = torch.zeros_like(signals.query), torch.zeros_like(signals.key)
        features, cls = signals.features, signals.cls
        assert cls is not None
        features, cls = torch.full_like(features, value), torch.full_like(cls, value)
        return replace(signals, features=features, cls=cls, query=query, key=key)
    if isinstance(signals, InputSignals):
        assert signals.text is not None
        visual, text = torch.full_like(signals.visual, value), torch.full_like(signals.text, value)
        return replace(signals, visual=visual, text=text)
    still = _each_state(signals, torch.zeros_like)
    hidden = torch.full_like(signals.hidden, value)
    inputs = _flat(signals.inputs, value)
    return replace(signals, hidden=hidden, inputs=inputs, attention=still)


def _each_state(signals: LayerSignals, change: Callable[[Tensor], Tensor]) -> AttentionStates:
    """Queries and keys, each of them changed."""
    states = signals.states
    return AttentionStates(*(change(getattr(states, one.name)) for one in fields(states)))


@each_method
def test_what_is_chosen_moves_with_the_tokens(method: str, options: Any) -> None:
    """Another order of the visual tokens, each with its position: the same are chosen, the merged
    ones the same too."""
    if method in BY_PLACE:
        pytest.skip("chooses by place")
    for seed in range(3):
        for site in _sites(method, options, seed):
            stage, count = site.stage, site.live.shape[1]
            if options.get("variant") == "paper" and stage.site == "vision":
                continue  # looks at a patch's neighbours
            first = stage.keep if stage.site == "input" and stage.merged else 0  # chosen before
            later = np.random.default_rng(seed).permutation(count - first) + first
            order = torch.tensor([*range(first), *later])
            base, moved = site.chosen(), site.chosen(_moved(site.signals, order))
            ahead = stage.lead or stage.keep
            assert sorted(order[moved.indices[:ahead]].tolist()) == base.indices[:ahead].tolist()
            if not stage.lead:
                tokens = (
                    moved.gather(site.live.index_select(1, order))[0],
                    base.gather(site.live)[0],
                )
                again, wanted = (rows[rows[:, 0].argsort()] for rows in tokens)
                torch.testing.assert_close(again, wanted, atol=1e-5, rtol=1e-5)


def _moved(signals: Any, order: Tensor) -> Any:
    """The same with the visual tokens in another order."""
    if isinstance(signals, VisionSignals):
        after = torch.cat([torch.zeros(1, dtype=torch.int64), 1 + order])
        query, key = (x.index_select(2, after) for x in (signals.query, signals.key))
        features = signals.features.index_select(1, order)
        return replace(signals, features=features, query=query, key=key)
    if isinstance(signals, InputSignals):
        return replace(signals, visual=signals.visual.index_select(1, order))
    total = torch.arange(signals.segments.total)
    total[PREFIX : PREFIX + len(order)] = PREFIX + order
    attention = _each_state(signals, lambda states: states.index_select(2, total))
    return replace(
        signals,
        hidden=signals.hidden.index_select(1, total),
        rows=signals.rows[total],
        inputs=_moved(signals.inputs, order),
        attention=attention,
    )


@each_method
def test_a_step_without_a_image_chooses_nothing(method: str, options: Any) -> None:
    """A decode step passes every site of the decoder's graph."""
    for site in _sites(method, options):
        stage = site.stage
        if stage.in_decoder:
            make = _input if stage.site == "input" else _layer
            nothing = replace(make(0, 1, 0), visual_tokens=site.signals.visual_tokens)
            found = site.chosen(nothing, replace(stage, keep=0, merged=0))
            assert found.gather(nothing.visual).shape == (1, 0, WIDTH)
            assert found.indices.shape == (0,)


def test_layers_that_drop_nothing_have_no_site_and_a_layer_may_drop_all() -> None:
    plan = _plan(policies.make(PruneSpec("utp", 2)))
    assert plan.counts == COUNTS
    assert [stage.layer for stage in plan.stages] == [3, 4, 5, 6, 7]
    last = _plan(policies.make(PruneSpec("vtw", 2))).stages[-1]
    assert (last.layer, last.survivors) == (5, 0)
