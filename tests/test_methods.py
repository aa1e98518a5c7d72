"""Every pruning method: counts that give the CR, graphs that agree with their reference."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune import policies
from edgeprune.bundle import Bundle
from edgeprune.cli import main
from edgeprune.demo.questions import held_out
from edgeprune.errors import ParityError, SpecError
from edgeprune.models import open_model
from edgeprune.models._processor import Processor, random_prompt
from edgeprune.models._reference import Reference
from edgeprune.policies._policy import Selection
from edgeprune.runtime import Sampling, Session
from edgeprune.spec import ModelShape, Plan, PruneSpec, budget
from tests.frozen import compared
from tests.graphs import NEVER, sized_by_data

DEMO = ModelShape("llava", 144, (12, 12), 12, 192, 352, 6, 6, 32, 66, 1024, True, blocks=5)
SEVEN = ModelShape(
    "llava", 576, (24, 24), 32, 4096, 11008, 32, 32, 128, 32064, 4096, True, blocks=23
)
TINY = ModelShape("llava", 16, (4, 4), 3, 64, 96, 4, 2, 16, 66, 1024, True, blocks=1)
CONTROLS = {"none", "random", "uniform", "utp"}  # tests/test_export.py exports these
OURS = [name for name in policies.names() if name not in CONTROLS]


def plan_of(method: str, shape: ModelShape, cr: float, **options: str) -> Plan:
    return policies.make(PruneSpec(method, cr, options=options)).plan(shape, cr)


@pytest.mark.parametrize("cr", [1.5, 2, 4, 8, 16])
@pytest.mark.parametrize("shape", [DEMO, SEVEN], ids=["demo", "7b"])
@pytest.mark.parametrize("method", policies.names())
def test_a_plan_gives_the_ratio_or_says_what_would(
    method: str, shape: ModelShape, cr: float
) -> None:
    try:
        plan = plan_of(method, shape, cr)
    except SpecError as error:
        assert re.search("choose|calibrate first|--cr is 1", str(error)), error
        return
    _holds(plan, shape, cr)


@settings(deadline=None)
@given(
    st.sampled_from(OURS),
    st.integers(1, 3000),
    st.integers(1, 48),
    st.floats(1, 40, allow_nan=False),
)
def test_any_size_gets_a_plan_or_advice(method: str, tokens: int, layers: int, cr: float) -> None:
    shape = ModelShape("llava", tokens, (1, tokens), layers, 8, 8, 1, 1, 8, 9, 4096, True)
    try:
        plan = plan_of(method, shape, min(cr, tokens))
    except SpecError:
        return
    _holds(plan, shape, min(cr, tokens))


def _holds(plan: Plan, shape: ModelShape, cr: float) -> None:
    counts = plan.counts
    assert len(counts) == shape.layers
    assert list(counts) == sorted(counts, reverse=True)
    assert counts[0] <= plan.encoded <= shape.visual_tokens
    assert abs(sum(counts) - budget(shape.visual_tokens, shape.layers, cr)) <= shape.layers


def test_plans_of_the_papers_models() -> None:
    """LLaVA-1.5-7B: 576 tokens, 32 layers; counts as the methods' own reports have them."""
    assert plan_of("fastv", SEVEN, 4).counts == (576,) * 2 + (115,) * 30
    pyramid = tuple(n for n in (576, 288, 144, 72) for _ in range(8))
    assert plan_of("pyramiddrop", SEVEN, 32 / 15).counts == pyramid
    assert plan_of("vtw", SEVEN, 32 / 15).counts == (576,) * 15 + (0,) * 17
    assert plan_of("fastervlm", SEVEN, 9).counts == (64,) * 32
    assert plan_of("divprune", SEVEN, 1 / 0.098).counts == (56,) * 32


def test_pyramiddrop_drops_earlier_where_the_budget_is_small() -> None:
    """The author's layers 2, 8, 16 of 32 above the paper's own ratio; or any that are asked for."""
    for cr, layers in ((2, [9, 17, 25]), (4, [3, 9, 17])):
        assert [s.layer for s in plan_of("pyramiddrop", SEVEN, cr).stages] == layers
    asked = plan_of("pyramiddrop", SEVEN, 4, stages="5,1")
    assert [s.layer for s in asked.stages] == [2, 6]
    for text in ("two", "0,4", "32", "1,2,3,4,5,6,7,8,9"):
        with pytest.raises(SpecError, match="up to 8 layers from 1 to 31"):
            plan_of("pyramiddrop", SEVEN, 4, stages=text)


@pytest.mark.parametrize("shape", [DEMO, SEVEN], ids=["demo", "7b"])
@pytest.mark.parametrize("method", ["dart", "fastv", "pyramiddrop", "sparsevlm"])
def test_the_largest_ratio_named_is_reached(method: str, shape: ModelShape) -> None:
    with pytest.raises(SpecError, match="is at most") as refused:
        plan_of(method, shape, 30)
    most = float(re.findall(r"at most ([\d.]+)", str(refused.value))[0])
    _holds(plan_of(method, shape, most), shape, most)
    with pytest.raises(SpecError):
        plan_of(method, shape, most + 1)


@pytest.mark.parametrize("cr", [1.85, 2.1, 5, 14, 30])
def test_vtw_names_its_neighbours(cr: float) -> None:
    with pytest.raises(SpecError, match="choose") as refused:
        plan_of("vtw", DEMO, cr)
    choices = [float(text) for text in re.findall(r"--cr ([\d.]+) \(", str(refused.value))]
    assert choices and choices[0] == max(choices)
    for choice in choices:
        _holds(plan_of("vtw", DEMO, choice), DEMO, choice)


def test_options_out_of_range_are_refused() -> None:
    with pytest.raises(SpecError, match="a layer from 1 to 11 of 12"):
        plan_of("fastv", DEMO, 2, K="12")
    with pytest.raises(SpecError, match="at most 1"):
        plan_of("trimtokenator", DEMO, 2, aligned="1.5")
    assert plan_of("fastv", DEMO, 8, K="1").counts[0] == 144


@pytest.fixture(scope="module", params=OURS)
def bundle(request, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint exported with one method, at the first of some ratios it can reach."""
    method, output = request.param, tmp_path_factory.mktemp("bundle") / "bundle"
    cr = next(cr for cr in ("4", "1.5", "1.3") if _reaches(method, float(cr)))
    options = ["--model", str(tiny_checkpoint), "--method", method, "--cr", cr, "--parity", "2"]
    assert main(["export", *options, "-o", str(output)]) == 0
    return output


def _reaches(method: str, cr: float) -> bool:
    try:
        return bool(plan_of(method, TINY, cr))
    except SpecError:
        return False


def test_the_bundle_agrees_with_its_reference_over_two_turns(
    bundle: Path, tiny_checkpoint: Path
) -> None:
    """Parity is checked by the export; the runtime keeps its own account of positions, so again."""
    manifest = Bundle.open(bundle).manifest
    assert manifest.parity.samples == 2
    assert manifest.parity.ties == 0
    adapter, prune = open_model(str(tiny_checkpoint)), manifest.prune
    spec = PruneSpec(prune.method, prune.cr)
    policy = policies.make(spec)
    reference = Reference.build(adapter, policy, policy.plan(adapter.shape, prune.cr))
    assert reference.decoder.plan.counts == prune.counts
    session, processor = Session.open(bundle), Processor(adapter)
    image, question = next(held_out(1))
    answer = session.ask(image, question.text, Sampling(max_new_tokens=5))
    ends = manifest.text.eos_token_ids
    said = reference.generate(processor(image, question.text), 5, lambda token: token in ends)
    assert list(answer.ids) == said
    step = reference.step(torch.from_numpy(session.engine.prompter.next_turn("how many ?")))
    again = session.follow_up("how many ?", Sampling(max_new_tokens=1))
    assert again.ids == (int(step.logits.argmax()),)


def test_the_graphs_hold_no_data_dependent_shape_nor_loop(bundle: Path) -> None:
    """Every size, K of every TopK among them, follows from constants and the inputs' shapes."""
    for name in ("vision", "join", "decoder"):
        graph = onnx.load(bundle / f"{name}.onnx", load_external_data=False).graph
        assert not {node.op_type for node in graph.node} & NEVER
        assert not sized_by_data(graph)


def test_a_graph_that_chooses_otherwise_is_found_out(bundle: Path, tiny_checkpoint: Path) -> None:
    """The reference keeps the first tokens here, so kept sets differ on every sample."""
    prune = Bundle.open(bundle).manifest.prune
    if set(prune.counts) == {0, prune.visual_tokens}:
        pytest.skip("all or nothing: there is no choice")
    method = policies.load(prune.method)

    class First(method):
        def merge_in_block(self, signals, stage):
            merge = super().merge_in_block(signals, stage)
            return replace(merge, stay=torch.cat([merge.stay[:1], merge.stay[1:].flip(0)]))

        def vision(self, signals, stage):
            return Selection(torch.arange(stage.survivors))

        def input(self, signals, stage, live):
            return Selection(torch.arange(live.survivors))

        layer = input

    adapter = open_model(str(tiny_checkpoint))
    plan = method().plan(adapter.shape, prune.cr)
    prompts = [random_prompt((1, 3, 56, 56), 66, seed) for seed in range(2)]
    with pytest.raises(ParityError, match=r"other tokens than the|hidden states differ"):
        compared(bundle, adapter, First(), prompts, plan)


def test_what_each_site_kept_is_told(bundle: Path) -> None:
    session = Session.open(bundle)
    image, question = next(held_out(1))
    answer = session.ask(image, question.text, Sampling(max_new_tokens=1))
    counts = session.manifest.prune.counts
    sites = [site.layer or 0 for site in session.manifest.graph.kept]
    assert [len(kept) for kept in answer.layer_kept] == [counts[site - 1] for site in sites]
    stages = session.manifest.prune.stages
    merged = [s.merged for s in stages if s.in_decoder]
    before = [s.merged for s in stages if not s.in_decoder] or [0]
    lead = {s.survivors: [s.lead] for s in stages if s.lead}  # those ahead, then the others
    told = zip([answer.vision_kept, *answer.layer_kept], [before[-1], *merged], strict=True)
    for kept, last in told:  # merged tokens come last, [CLS] has no place
        indices = kept[: len(kept) - last]
        for run in np.split(indices[indices < 16], lead.get(len(kept), [])):
            assert (np.diff(run) > 0).all()
        assert len(set(kept.tolist())) == len(kept)
    assert len(answer.vision_kept) == session.manifest.prune.encoded
    assert session.manifest.prune.encoded == (16 if 1 in sites else counts[0])
