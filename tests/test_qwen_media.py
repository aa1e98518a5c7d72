"""Several images, and videos, in Qwen2-VL and Qwen2.5-VL against transformers' own models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Refused
from PIL import Image

from edgeprune.export.exporter import ExportRequest, export
from edgeprune.models import Adapter, open_model
from edgeprune.models._mrope import Grid, MRope, in_runs
from edgeprune.models._processor import Processor, random_prompt
from edgeprune.models._reference import Reference
from edgeprune.policies import make
from edgeprune.runtime import Sampling, Session, media
from edgeprune.spec import Plan, PruneSpec, plan_from_counts
from edgeprune.tiling import Size
from tests.qwen import QUESTION, drawn_image, generated, plain_checkpoint, windowed_checkpoint

SIZE = Size(140, 196)  # 5 x 7 tokens
ASKED: dict[str, dict[str, Any]] = {
    "3 images": {"size": SIZE, "images": 3},
    "6 frames": {"size": SIZE, "frames": 6},
}


@pytest.fixture(scope="module", params=[plain_checkpoint, windowed_checkpoint])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made: Path = request.param(tmp_path_factory.mktemp("qwen"))
    return made


def opened(checkpoint: Path, asked: str) -> tuple[Adapter, list[Image.Image]]:
    """And what is shown: images of the frozen shape, or frames."""
    adapter = open_model(str(checkpoint), **ASKED[asked])
    return adapter, [drawn_image(190, 150, seed) for seed in range(adapter.shown)]


def seen(adapter: Adapter, images: list[Image.Image]) -> torch.Tensor:
    """Pixels as the runtime makes them."""
    record = adapter.image_record(Processor(adapter))
    pixels = torch.from_numpy(media.prepare(images, replace(record, images=len(images))).pixels)
    assert pixels.shape == adapter.pixels
    return pixels


@pytest.mark.parametrize("asked", ASKED)
def test_answers_are_those_of_transformers(asked: str, checkpoint: Path) -> None:
    adapter, images = opened(checkpoint, asked)
    pixels = seen(adapter, images)
    prompt = Processor(adapter)(images, QUESTION)
    assert torch.equal(prompt.pixels, pixels)
    plan = Plan(adapter.shape.visual_tokens, adapter.shape.layers)
    ours = Reference.build(adapter, make(PruneSpec("none")), plan)
    assert ours.generate(prompt, 32, lambda token: False) == generated(adapter, images, pixels)


@pytest.mark.slow
@pytest.mark.parametrize("asked", ASKED)
def test_a_pruned_bundle_equals_the_eager_reference(
    asked: str, checkpoint: Path, tmp_path: Path
) -> None:
    """Tokens are dropped in both graphs; text between images stays."""
    adapter, images = opened(checkpoint, asked)
    spec, count = PruneSpec("utp", 4), adapter.shape.visual_tokens
    policy = make(spec)
    plan = plan_from_counts(count, (2 * count // 5, count // 10))
    prompts = [random_prompt(adapter.pixels, 256, seed) for seed in range(2)]
    request = ExportRequest(asked, spec, plan, tmp_path / "bundle")
    exported = export(request, adapter, policy, Processor(adapter), prompts)
    assert exported.manifest.parity.ties == 0
    answer = Session.open(exported.path).ask(images, QUESTION, Sampling(max_new_tokens=5))
    reference = Reference.build(adapter, policy, plan)
    prompt = Processor(adapter)(images, QUESTION)
    ends = exported.manifest.text.eos_token_ids
    assert list(answer.ids) == reference.generate(prompt, 5, lambda token: token in ends)
    assert set(adapter.vision_config.layout.fixed) <= set(answer.vision_kept.tolist())


def test_images_stand_one_after_the_other_with_text_between() -> None:
    """An image takes as many positions as its longest axis; a video may be longest in time."""
    mrope = MRope.of(in_runs((2, 3, 3)), Grid(2, 3), 2, Grid(3, 1))
    first = [(0, r, c) for r in range(2) for c in range(3)]
    assert list(mrope.offsets) == [
        *first,
        (3, 3, 3),
        (4, 4, 4),
        *((5, 5 + row, 5) for row in range(3)),
    ]
    assert mrope.span == 8
    film = MRope.of(in_runs((2, 3, 3)), Grid(1, 2, times=(0, 4)))
    assert (film.offsets, film.span) == (((0, 0, 0), (0, 0, 1), (4, 0, 0), (4, 0, 1)), 5)


def test_times_are_those_of_two_frames_a_second(tmp_path: Path) -> None:
    for make_one, wanted in ((plain_checkpoint, (0, 1, 2)), (windowed_checkpoint, (0, 2, 4))):
        adapter = open_model(str(make_one(tmp_path / make_one.__name__)), **ASKED["6 frames"])
        assert adapter.decoder_config.mrope is not None
        times = np.array(adapter.decoder_config.mrope.offsets)[:, 0]
        assert tuple(dict.fromkeys(times.tolist())) == wanted


def test_an_odd_number_of_frames_is_refused(tmp_path: Path, refused: Refused) -> None:
    said = refused("models", "--model", plain_checkpoint(tmp_path), "--frames", "5")
    assert "--frames of a qwen2_vl is a multiple of 2; got 5" in said
