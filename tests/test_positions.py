"""Where tokens stand after a drop: where they stood, or one behind the other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import Refused
from torch import Tensor

from edgeprune import policies
from edgeprune.errors import SpecError
from edgeprune.making import make
from edgeprune.models import open_model
from edgeprune.models._ops import TorchOps
from edgeprune.models._processor import random_prompt
from edgeprune.models._reference import Reference
from edgeprune.recipe import Recipe
from edgeprune.spec import ModelShape, PruneSpec

V, PREFIX, TEXT = 16, 8, 16  # of the tiny checkpoint and of random_prompt
QWEN = ModelShape("qwen2_vl", 64, (8, 8), 28, 64, 96, 4, 2, 16, 66, 512, False, mrope=True)


class Spy(TorchOps):
    """Notes the positions of every call of a layer."""

    def __init__(self) -> None:
        self.seen: list[list[int]] = []

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
        self.seen.append(positions[0].tolist())
        return super().rotate(x, cos, sin, positions)

    def by_layer(self) -> list[list[int]]:
        """Of the layers just run: queries and keys of one stand at the same positions."""
        queries, keys, self.seen = self.seen[::2], self.seen[1::2], []
        assert queries == keys
        return queries


@pytest.mark.parametrize(
    ("method", "options", "moves"),
    [
        ("pyramiddrop", {}, True),
        ("pyramiddrop", {"positions": "keep"}, False),
        ("sparsevlm", {}, True),
        ("sparsevlm", {"version": "2"}, False),
        ("sparsevlm", {"version": "2", "positions": "renumber"}, True),
        ("fastv", {"K": "1"}, False),
        ("fastv", {"K": "1", "positions": "renumber"}, True),
    ],
)
def test_positions_after_a_drop(
    method: str, options: dict[str, str], moves: bool, tiny_checkpoint: Path
) -> None:
    """Released PyramidDrop and SparseVLM 1.5 close the gaps; a decode step follows in each layer
    what its cache holds. The others stand where they stood, and a step follows the whole image."""
    policy, spy = policies.make(PruneSpec(method, 1.3, options=options)), Spy()
    adapter = open_model(str(tiny_checkpoint))
    plan = policy.plan(adapter.shape, 1.3)
    with torch.device("meta"):
        vision, decoder = adapter.vision(policy, plan), adapter.decoder(policy, plan, spy)
    reference = Reference(adapter.load(vision), adapter.load(decoder))  # type: ignore[arg-type]
    reference.prefill(random_prompt((1, 3, 56, 56), 66, 0))
    prefill, counts = spy.by_layer(), plan.counts
    assert counts[0] == V > counts[-1]
    for count, positions in zip(counts, prefill, strict=True):
        text = positions[-TEXT:]
        assert len(positions) == PREFIX + count + TEXT
        if moves:
            assert positions == list(range(PREFIX + count + TEXT))
        else:
            assert text == list(range(PREFIX + V, PREFIX + V + TEXT))
            assert set(positions) <= set(range(PREFIX + V + TEXT))
    reference.step(torch.tensor([[7]]))
    reference.step(torch.tensor([[8, 9]]))
    steps = spy.by_layer()
    for count, one, two in zip(counts, steps[:3], steps[3:], strict=True):
        first = PREFIX + TEXT + (count if moves else V)
        assert (one, two) == ([first], [first + 1, first + 2])


@pytest.mark.parametrize(
    ("method", "options", "moves"),
    [
        ("fastervlm", {}, True),
        ("fastervlm", {"positions": "keep"}, False),
        ("visionzip", {"positions": "keep"}, False),
        ("cdpruner", {"positions": "keep"}, False),
        ("dpp", {}, False),
        ("dpp", {"positions": "renumber"}, True),
    ],
)
def test_positions_before_the_decoder(
    method: str, options: dict[str, str], moves: bool, tiny_checkpoint: Path
) -> None:
    """Kept, a token stands where it stood among the V, and text where it stands without pruning."""
    policy, spy = policies.make(PruneSpec(method, 2, options=options)), Spy()
    adapter = open_model(str(tiny_checkpoint))
    plan = policy.plan(adapter.shape, 2)
    with torch.device("meta"):
        vision, decoder = adapter.vision(policy, plan), adapter.decoder(policy, plan, spy)
    reference = Reference(adapter.load(vision), adapter.load(decoder))  # type: ignore[arg-type]
    step = reference.prefill(random_prompt((1, 3, 56, 56), 66, 0))
    seen, count = spy.by_layer()[0], plan.entering
    span = count if moves else V
    indices = reference.vision_kept
    if plan.in_decoder:
        indices = indices[step.kept[0]]
    wanted = torch.arange(count) if moves else indices.clamp(max=V - 1)  # V is [CLS]
    assert seen[PREFIX : PREFIX + count] == (PREFIX + wanted).tolist()
    assert seen[-TEXT:] == list(range(PREFIX + span, PREFIX + span + TEXT))
    reference.step(torch.tensor([[7]]))
    assert spy.by_layer()[0] == [PREFIX + span + TEXT]


@pytest.mark.parametrize("target", ["cpu", "jetpack6"])
def test_a_bundle_that_keeps_positions_answers_as_eager_does(
    target: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    spec = PruneSpec("visionzip", 2, options={"positions": "keep"})
    recipe = Recipe(spec, tmp_path / "bundle", str(tiny_checkpoint), target=target, dtype="fp32")
    exported = make(replace(recipe, parity=3))
    assert exported.manifest.decoder.image_positions == V
    assert exported.manifest.graphs["decoder.onnx"].input("visual_indices") is not None
    assert exported.manifest.parity.ties == 0


def test_a_graph_whose_caches_grow_renumbers_as_eager_does(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """One whose caches stay where they are is among the exports of every method."""
    spec, model = PruneSpec("pyramiddrop", 1.3), str(tiny_checkpoint)
    recipe = Recipe(spec, tmp_path / "bundle", model, target="jetpack6", dtype="fp32", parity=3)
    exported = make(recipe)
    assert any(stage.renumber for stage in exported.manifest.prune.stages)
    assert exported.manifest.parity.ties == 0


@pytest.mark.parametrize("method", ["pyramiddrop", "sparsevlm"])
def test_three_positions_a_token_stay(method: str) -> None:
    plan = policies.make(PruneSpec(method)).plan(QWEN, 2)
    assert plan.stages and not any(stage.renumber for stage in plan.stages)
    policy = policies.make(PruneSpec(method, options={"positions": "renumber"}))
    with pytest.raises(SpecError, match=r"three \(M-RoPE\)"):
        policy.plan(QWEN, 2)
    assert policy.plan(replace(QWEN, mrope=False), 2).stages[0].renumber


def test_positions_are_named(refused: Refused) -> None:
    said = refused("export", "--method", "pyramiddrop", "--set", "positions=move")
    assert "--set positions= is one of auto, keep, renumber; got 'move'" in said
