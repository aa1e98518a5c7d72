"""LFM2-VL: pixels, answers and later turns are those of transformers, whatever keeps the states."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from benchmarks.schedules import MadeUp, planned
from edgeprune.calib.schedule import Evidence, pose, solve
from edgeprune.calib.solvers.grouped import groups_of
from edgeprune.errors import ModelError, SpecError
from edgeprune.export.exporter import ExportRequest, export
from edgeprune.models import Adapter, open_model
from edgeprune.models._decoder import Flow
from edgeprune.models._layerwise import Layerwise
from edgeprune.models._lfm2_image import Settings
from edgeprune.models._processor import Processor, random_prompt
from edgeprune.models._reference import Reference
from edgeprune.policies import make
from edgeprune.runtime import Session
from edgeprune.runtime.images import to_pixels
from edgeprune.runtime.sampling import Sampling
from edgeprune.runtime.sequence import Sequence
from edgeprune.spec import ModelShape, Plan, PruneSpec
from edgeprune.tiling import Size
from tests import lfm2
from tests.fake_gpu import FakeGpu, pretend
from tests.families import QUESTION, Family
from tests.frozen import frozen
from tests.test_families import block, drawn_image, generated, prompted

SHAPE = Size(60, 100)
IMAGE = drawn_image(SHAPE)
LAYERS = "conv", "conv", "full_attention", "conv", "full_attention", "conv"
LATER = np.array([[5, 6, 7, 8]])


@pytest.fixture(scope="module")
def family() -> Family:
    return lfm2.lfm2_vl(LAYERS)


@pytest.fixture(scope="module")
def checkpoint(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return family.save(tmp_path_factory.mktemp("lfm2") / "tiny")


@pytest.fixture(scope="module")
def adapter(checkpoint: Path) -> Adapter:
    return open_model(str(checkpoint), size=SHAPE)


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return frozen(tmp_path_factory.mktemp("dense") / "b", "none", model=checkpoint, size=SHAPE)


@pytest.mark.parametrize("size", [(84, 84), (60, 100), (110, 41), (20, 30), (103, 101)])
def test_pixels_are_those_of_the_processor(
    family: Family, checkpoint: Path, size: tuple[int, int]
) -> None:
    image, adapter = drawn_image(Size(*size)), open_model(str(checkpoint), size=Size(*size))
    record, wanted = adapter.image_record(Processor(adapter)), family.image_processor.view(image)
    np.testing.assert_array_equal(to_pixels(image, record)[0], wanted.numpy())
    np.testing.assert_array_equal(Processor(adapter)(image, QUESTION).pixels[0], wanted.numpy())


@pytest.mark.parametrize("together", [True, False], ids=["colours together", "colour by colour"])
def test_torch_resizes_as_pillow_does_but_for_a_level(*, together: bool) -> None:
    """As torchvision would, which transformers' own processor needs."""
    image = drawn_image(Size(301, 187))
    levels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None]
    levels = levels if together else levels.contiguous()
    found = F.interpolate(levels, size=(96, 64), mode="bilinear", antialias=True)
    wanted = np.asarray(image.resize((64, 96), 2)).transpose(2, 0, 1)
    assert np.abs(found[0].numpy().astype(int) - wanted).max() <= 1


@given(st.integers(1, 3000), st.integers(1, 3000))
def test_a_view_has_the_size_that_the_processor_makes(height: int, width: int) -> None:
    settings = Settings(encoder_patch_size=8, min_image_tokens=4, max_image_tokens=24)
    assert settings.rule.whole(Size(height, width)) == lfm2.Oracle().smart_resize(height, width)


def test_a_dense_bundle_answers_as_transformers_does(
    family: Family, adapter: Adapter, bundle: Path
) -> None:
    """64 tokens; the second image's states begin anew, in the memory of the first one's."""
    with Session.open(bundle) as session:
        for image in (drawn_image(SHAPE, 1), IMAGE):
            prompt = prompted(adapter, to_pixels(image, session.manifest.image))
            wanted = generated(family, adapter, prompt, tokens=64, **family.look(image))
            answer = session.ask(image, QUESTION, Sampling(max_new_tokens=64))
            assert (list(answer.ids), answer.warnings) == (wanted, ())


def read(session: Session, adapter: Adapter) -> Sequence:
    """A sequence that has read the image and the question."""
    prefix_ids, _, text_ids = adapter.chat.split(adapter.media, QUESTION)
    sequence = session.engine.sequence()
    sequence.read(text_ids.numpy(), prefix_ids.numpy(), session.engine.encode_image(IMAGE))
    return sequence


def logits(sequence: Sequence, ids: np.ndarray) -> np.ndarray:
    found = sequence.read(ids).logits
    assert found is not None
    return found


def test_a_second_turn_is_a_prefill_of_the_whole_dialogue(
    family: Family, adapter: Adapter, bundle: Path
) -> None:
    """And so is one that a fork reads, each with states of its own."""
    with Session.open(bundle) as session:
        sequence = read(session, adapter)
        twin = sequence.fork()
        ours = [logits(sequence, LATER), logits(twin, LATER[:, ::-1]), logits(twin, LATER)]
        assert twin.cache_bytes() == sequence.cache_bytes()
    text = adapter.chat.split(adapter.media, QUESTION)
    first = torch.cat([text[0], torch.tensor([block(adapter)]), text[2]], 1)
    turns = [LATER], [LATER[:, ::-1]], [LATER[:, ::-1], LATER]
    for found, turn in zip(ours, turns, strict=True):
        ids = torch.cat([first, *(torch.from_numpy(ids.copy()) for ids in turn)], 1)
        with torch.no_grad():
            wanted = family.model(input_ids=ids, **family.look(IMAGE)).logits[0, -1]
        np.testing.assert_allclose(found, wanted.numpy(), atol=1e-4)


@pytest.mark.parametrize("target", ["rtx", pytest.param("jetpack6", marks=pytest.mark.slow)])
def test_engines_keep_the_states(
    target: str, adapter: Adapter, checkpoint: Path, tmp_path: Path, gpus: list[FakeGpu]
) -> None:
    """Two turns, a fork and a dialogue in the same memory, with half of the tokens pruned."""
    options = {"model": checkpoint, "size": SHAPE, "target": target, "dtype": "fp32"}
    path = frozen(tmp_path / "b", "fastv", 1.5, **options)
    pretend(path)
    found = []
    for backend in ("trt", "ort-cpu"):
        with Session.open(path, backend=backend) as session:
            for _ in range(2):
                sequence = read(session, adapter)
                twin = sequence.branch()
                turns = LATER, LATER[:, :1], LATER[:, 1:2]
                found.append([logits(sequence, ids) for ids in turns])
                found.append([logits(twin, LATER[:, ::-1])])
                sequence.close()
    for ours, theirs in zip(found[:4], found[4:], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    np.testing.assert_array_equal(found[0], found[2])


SITES = {  # layers that survivors enter, at CR 2 of the published 16 layers
    "fastv": [4],
    "dart": [4],
    "pyramiddrop": [4, 7, 10],
    "sparsevlm": [4, 7, 10],
    "utp": [4, 7, 10, 12, 14, 16],
    "llavolta": [2],  # these look at no attention
    "polymorphic": [3, 5, 9],
    "vtw": [9],
}


def published(shape: ModelShape) -> ModelShape:
    kinds = enumerate(lfm2.PUBLISHED, 1)
    convolutions = tuple(layer for layer, kind in kinds if kind == "conv")
    return replace(shape, visual_tokens=256, layers=16, convolutions=convolutions)


@pytest.mark.parametrize("method", SITES)
def test_attention_is_looked_at_behind_layers_that_have_it(method: str, adapter: Adapter) -> None:
    plan = planned(make(PruneSpec(method, 2)), published(adapter.shape), 2)
    assert [stage.layer for stage in plan.stages if stage.site == "layer"] == SITES[method]


def test_a_schedule_that_falls_elsewhere_is_refused(adapter: Adapter) -> None:
    policy, counts = make(PruneSpec("utp", 2)), (256,) * 7 + (28,) * 9
    with pytest.raises(
        SpecError, match=r"behind layer 7, which has no attention .* behind layer 9"
    ):
        policy.plan(published(adapter.shape), 2, MadeUp(counts))


def test_calibrated_counts_fall_behind_attention_alone() -> None:
    """Near the best of all such schedules, with a bound that holds."""
    rng, convolutions = np.random.default_rng(0), (1, 2, 4, 6)
    attention = rng.dirichlet(np.full(12, 0.3), (5, 7)).astype(np.float32)
    loss = rng.uniform(0.1, 1.0, (5, 7)).astype(np.float32)
    evidence = Evidence(attention, loss, None, tuple("abcde"))
    found = solve(evidence, cr=1.6, first=12, convolutions=convolutions)
    sizes, problem = groups_of(7, convolutions), pose(evidence, 1.6, 12)
    assert sizes == [3, 2, 2] and found.counts[:3] == (12, 12, 12)
    assert len({*found.counts[3:5]}) == len({*found.counts[5:]}) == 1
    every = [(12, m, n) for m in range(1, 13) for n in range(1, m + 1)]
    rows = np.repeat(np.array(every), sizes, axis=1)
    best = problem.evaluate(rows[rows.sum(1) <= problem.total]).min()
    assert found.bound <= best <= found.objective <= 1.02 * best
    with pytest.raises(SpecError, match=r"up to layer 3, the first of 7 .* --cr is at most 2\.1;"):
        solve(evidence, cr=2.5, first=12, convolutions=convolutions)
    few = solve(evidence, cr=1.6, first=12, max_sites=1, convolutions=convolutions)
    assert few.counts[:3] == (12, 12, 12) and len({*few.counts}) == 2
    once = rows[(rows[:, 3] == rows[:, 5]) | (rows[:, 3] == 12)]
    best_once = problem.evaluate(once[once.sum(1) <= problem.total]).min()
    assert few.bound <= best <= best_once <= few.objective <= 1.02 * best_once


@torch.no_grad()
def test_the_last_tokens_resume_as_they_were(adapter: Adapter) -> None:
    """A layer in windows keeps what a convolution reads of the tokens before."""
    plan = Plan(adapter.shape.visual_tokens, adapter.shape.layers)
    engine = Layerwise(adapter, make(PruneSpec("none")), plan)
    prompt = Processor(adapter)(IMAGE, QUESTION)

    def step(index: int, flow: Flow) -> Flow:
        done = engine.advance(index, flow)
        again = engine.resumed(index, flow.hidden[:, -3:], flow, done.cache)
        torch.testing.assert_close(again, done.flow.hidden[:, -3:])
        return done.flow

    list(engine.layers(engine.keep(one.flow for one in engine.start([prompt])), step).drain())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"image_processor_type": "Siglip2ImageProcessor"},
            "is 'Siglip2ImageProcessor', supported",
        ),
        ({"encoder_patch_size": 16}, "encoder_patch_size is 16, supported is config.json's 8"),
        ({"max_image_tokens": 2}, "max_image_tokens is 2, supported is 4 or more"),
        ({"min_image_tokens": "all"}, "min_image_tokens is 'all', supported is whole numbers"),
    ],
)
def test_other_image_processors_are_refused(
    settings: dict[str, object], message: str, checkpoint: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "other")
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
    with pytest.raises(ModelError, match=message):
        open_model(str(folder))


def test_that_images_are_one_view_is_said(checkpoint: Path) -> None:
    assert "one view of 64x64 pixels: image splitting" in open_model(str(checkpoint)).notes()[0]
    assert open_model(str(checkpoint), size=SHAPE).notes() == ()
    with pytest.raises(SpecError, match="is too long and narrow: it gives 154 tokens"):
        open_model(str(checkpoint), size=Size(2, 2000))


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    ("utp", "fastv", "divprune", "dart", "visionzip", "trimtokenator", "polymorphic", "none"),
)
def test_published_layers_equal_their_reference(method: str, tmp_path: Path) -> None:
    """At CR 4, prefill, steps and a second turn; UTP's schedule is made up."""
    folder = lfm2.lfm2_vl(lfm2.PUBLISHED, norm=True, conv_bias=True).save(tmp_path / "tiny")
    adapter, spec = (
        open_model(str(folder), size=SHAPE),
        PruneSpec(method, 4 if method != "none" else 1),
    )
    policy, shape = make(spec), adapter.shape
    plan = planned(policy, shape, spec.cr)
    prompts = [random_prompt(adapter.pixels, shape.vocabulary, seed) for seed in range(3)]
    request = ExportRequest("tiny", spec, plan, tmp_path / "b")
    made = export(request, adapter, policy, Processor(adapter), prompts)
    found = made.manifest.parity
    assert found.samples == 3 and found.ties <= 1 and found.logits < 1e-4
    reference, prompt = Reference.build(adapter, policy, plan), Processor(adapter)(IMAGE, QUESTION)
    with Session.open(made.path) as session:
        answer = session.ask(IMAGE, QUESTION, Sampling(max_new_tokens=16))
        assert list(answer.ids) == reference.generate(prompt, 16, lambda token: False)
        sequence = read(session, adapter)
        reference.prefill(prompt)
        for ids in (LATER, LATER[:, :1]):
            wanted = reference.step(torch.from_numpy(ids.copy())).logits
            np.testing.assert_allclose(logits(sequence, ids), wanted.numpy(), atol=1e-4)
