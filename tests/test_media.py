"""Several images in a prompt, and videos: answers are those of transformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Refused
from PIL import Image

from edgeprune.bundle import Bundle
from edgeprune.errors import InputError, SpecError
from edgeprune.export.exporter import ExportRequest, export
from edgeprune.models import Adapter, open_model
from edgeprune.models._media import InputOptions
from edgeprune.models._processor import Processor, random_prompt
from edgeprune.policies import make
from edgeprune.runtime import Session, media
from edgeprune.runtime.sampling import Sampling
from edgeprune.spec import PruneSpec, plan_from_counts
from edgeprune.tiling import Size
from tests import families
from tests.families import QUESTION, Family
from tests.test_families import answered, drawn_image, generated, made_up, prompted

SIZES = (Size(60, 100), Size(84, 70), Size(42, 90), Size(50, 50))


@dataclass(frozen=True)
class Case:
    """What a bundle is frozen for, and how transformers takes the same."""

    family: Callable[[], Family]
    asked: dict[str, Any]
    nested: bool = False  # its image processor wants several images of one prompt as one list


CASES = {
    "llava, 2 images": Case(families.llava, {"images": 2}),
    "llava_next, 2 images": Case(families.llava_next, {"images": 2, "size": SIZES[0]}),
    "llava_onevision, 3 images": Case(families.llava_onevision, {"images": 3}, nested=True),
    "internvl, 2 images": Case(families.internvl, {"images": 2, "size": Size(60, 120)}),
    "internvl, video": Case(families.internvl, {"frames": 3}),
    "llava_onevision, video": Case(families.llava_onevision, {"frames": 3}),
    "llava_next_video, video": Case(families.llava_next_video, {"frames": 4}),
    "llava_next_video, 2 images": Case(families.llava_next_video, {"images": 2, "size": SIZES[0]}),
    "video_llava, 2 images": Case(families.video_llava, {"images": 2}),
    "video_llava, video": Case(families.video_llava, {"frames": 4}),
}


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def opened(case: Case, folder: Path) -> tuple[Family, Adapter]:
    family = case.family()
    return family, open_model(str(family.save(folder)), **case.asked)


def shown(case: Case, adapter: Adapter) -> list[Image.Image]:
    """Images of the frozen shape, or frames of one video."""
    if adapter.asked.frames:
        return [drawn_image(SIZES[0], seed) for seed in range(adapter.asked.frames)]
    size = case.asked.get("size")
    return [drawn_image(size or SIZES[n], n) for n in range(adapter.asked.images)]


def taken(adapter: Adapter, images: list[Image.Image]) -> np.ndarray:
    """Pixels as the runtime makes them."""
    record = adapter.image_record(Processor(adapter))
    return media.prepare(images, replace(record, images=len(images))).pixels


def theirs(case: Case, family: Family, pixels: np.ndarray, images: list[Image.Image]) -> Any:
    """What transformers' model is given: its own processor's images, or our frames, since its
    video processors want torchvision."""
    if "frames" not in case.asked:
        found = family.look([images] if case.nested else images)
        theirs = found["pixel_values"].flatten(0, -4).numpy()
        np.testing.assert_array_equal(pixels, theirs)
        return found
    frames = torch.from_numpy(pixels)
    if family.name == "internvl":
        return {"pixel_values": frames}
    return {"pixel_values_videos": frames[None]}


def test_answers_are_those_of_transformers(case: Case, tmp_path: Path) -> None:
    family, adapter = opened(case, tmp_path / "tiny")
    images = shown(case, adapter)
    pixels = taken(adapter, images)
    assert pixels.shape == adapter.pixels
    prompt = prompted(adapter, pixels)
    seen = theirs(case, family, pixels, images)
    assert answered(adapter, prompt) == generated(family, adapter, prompt, **seen)


@pytest.mark.parametrize("name", ["internvl, 2 images", "llava_onevision, video"])
def test_a_pruned_bundle_equals_the_eager_reference(name: str, tmp_path: Path) -> None:
    """Text between images, and tokens that are resized after the projector."""
    case = CASES[name]
    _, adapter = opened(case, tmp_path / "tiny")
    spec, shape = PruneSpec("utp", 4), adapter.shape
    plan = plan_from_counts(shape.visual_tokens, made_up(shape))
    prompts = [random_prompt(adapter.pixels, shape.vocabulary, seed) for seed in range(2)]
    request = ExportRequest(name, spec, plan, tmp_path / "bundle")
    exported = export(request, adapter, make(spec), Processor(adapter), prompts)
    assert exported.manifest.parity.ties == 0
    session, images = Session.open(exported.path), shown(case, adapter)
    answer = session.ask(images, QUESTION, Sampling(max_new_tokens=4))
    assert len(answer.vision_kept) == plan.counts[0]
    assert set(adapter.vision_config.layout.fixed) <= set(answer.vision_kept.tolist())
    with pytest.raises(InputError, match=f"this bundle takes {len(images)} "):
        session.ask([*images, images[0]], QUESTION)


@pytest.mark.parametrize(
    ("family", "asked", "message"),
    [
        (families.llava, {"frames": 4}, "take images, not videos"),
        (families.video_llava, {"images": 2, "frames": 8}, "leave out --num-images or --frames"),
        (families.llava_onevision, {"frames": 4, "size": Size(84, 84)}, "leave out --image-size"),
    ],
)
def test_what_a_family_cannot_be_frozen_for_is_refused(
    family: Callable[[], Family], asked: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(SpecError, match=message):
        open_model(str(family().save(tmp_path)), **asked)


def test_nothing_to_show_is_refused() -> None:
    with pytest.raises(SpecError, match="from 1 to 4,096"):
        InputOptions(frames=0)


def test_a_bundle_says_which_option_it_takes(tiny_bundle: Path, refused: Refused) -> None:
    file = tiny_bundle / "manifest.json"  # read as a file only
    line = refused("run", tiny_bundle, "--video", file, "--prompt", "what ?")
    assert "takes images (--image)" in line
    record = Bundle.open(tiny_bundle).manifest.image
    with pytest.raises(InputError, match="takes 1 image, got 2; give as many, or"):
        media.prepare([drawn_image(SIZES[0])] * 2, record)
