"""What a projector reads of the vision tower: several hidden states, [CLS] beside the patches."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Refused

from benchmarks.schedules import planned
from edgeprune.export.exporter import ExportRequest, export
from edgeprune.models import open_model
from edgeprune.models._processor import Processor
from edgeprune.policies import make, names
from edgeprune.runtime import Sampling, Session
from edgeprune.spec import PruneSpec
from tests import families
from tests.families import QUESTION, Family, settled
from tests.test_families import answered, drawn_image, generated, ours, prompted
from tests.test_media import SIZES


def read_otherwise(family: Family, **config: Any) -> Family:
    """The family's model with other settings of what is read, and weights for them."""
    changed = type(family.model.config).from_dict({**family.model.config.to_dict(), **config})
    model = settled(type(family.model)(changed))
    return Family(
        family.name,
        model,
        family.image_processor,
        family.image_token,
        family.tokens,
        family.sizes,
        family.tiled,
    )


SEVERAL = {"vision_feature_layer": [-3, 0, -1]}
CASES: dict[str, tuple[Callable[[], Family], dict[str, Any]]] = {
    "llava, several": (families.llava, SEVERAL),
    "llava, full": (families.llava, {"vision_feature_select_strategy": "full"}),
    "llava, both": (families.llava, {**SEVERAL, "vision_feature_select_strategy": "full"}),
    "llava_next, several": (families.llava_next, SEVERAL),
    "llava_onevision, several": (families.llava_onevision, {"vision_feature_layer": [1, 2]}),
    "video_llava, full": (families.video_llava, {"vision_feature_select_strategy": "full"}),
}


@pytest.mark.parametrize("name", CASES)
def test_answers_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    make_one, config = CASES[name]
    family = read_otherwise(make_one(), **config)
    image = drawn_image(family.sizes[1])
    adapter, pixels = ours(family, family.save(tmp_path / "tiny"), image)
    prompt = prompted(adapter, pixels)
    wanted = generated(family, adapter, prompt, **family.look(image))
    assert answered(adapter, prompt) == wanted
    if config == SEVERAL:
        assert wanted != generated(make_one(), adapter, prompt, **family.look(image))


def test_several_images_have_a_cls_each(tmp_path: Path) -> None:
    family = read_otherwise(families.llava(), vision_feature_select_strategy="full")
    adapter = open_model(str(family.save(tmp_path / "tiny")), images=2)
    images = [drawn_image(SIZES[n], n) for n in range(2)]
    processor = Processor(adapter)
    prompt = processor(images, QUESTION)
    seen = family.look(images)
    assert answered(adapter, prompt) == generated(family, adapter, prompt, **seen)


def frozen_with(method: str, folder: Path, layers: int) -> None:
    """A bundle of a projector that reads both; parity compares its graphs with the reference."""
    family = read_otherwise(families.llava(num_hidden_layers=layers), **CASES["llava, both"][1])
    adapter = open_model(str(family.save(folder / "tiny")))
    assert (adapter.shape.visual_tokens, adapter.shape.separators) == (10, 1)
    options = {"K": "1"} if method in ("fastv", "dart") else {}
    spec = PruneSpec(method, 2, options=options)
    policy = make(spec)
    plan = planned(policy, adapter.shape, spec.cr, (8, 6, 4, 3, 3, 2, 2, 2)[:layers])
    processor = Processor(adapter)
    prompts = [processor(drawn_image(SIZES[n], n), QUESTION) for n in range(2)]
    made = export(
        ExportRequest(method, spec, plan, folder / method), adapter, policy, processor, prompts
    )
    assert (made.manifest.parity.samples, made.manifest.parity.ties) == (2, 0)
    with Session.open(made.path) as session:
        answer = session.ask(drawn_image(SIZES[0]), QUESTION, Sampling(max_new_tokens=2))
        assert len(answer.vision_kept) == plan.encoded


def test_a_pruned_bundle_equals_the_reference(tmp_path: Path) -> None:
    """By [CLS] attention in the last block that is read; merged features of all that are."""
    frozen_with("visionzip", tmp_path, layers=3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", sorted({*names()} - {"none", "vtw", "tome", "visionzip", "visiontrim"})
)
def test_every_method_equals_its_reference(method: str, tmp_path: Path) -> None:
    frozen_with(method, tmp_path, layers=8)


def test_what_cannot_be_read_is_refused_by_name(tmp_path: Path, refused: Refused) -> None:
    """A layer that is not there; [CLS] among tiles, of which transformers makes nothing either; a
    method that merges tokens between the blocks that are read."""
    folder = families.llava_next(num_hidden_layers=1).save(tmp_path / "tiles")
    config = json.loads((folder / "config.json").read_text())
    for key, value in (
        ("vision_feature_layer", 7),
        ("vision_feature_layer", [0]),
        ("vision_feature_layer", []),
        ("vision_feature_select_strategy", "full"),
    ):
        (folder / "config.json").write_text(json.dumps({**config, key: value}))
        said = refused("models", "--model", folder)
        assert f"has {key} {value!r}: not supported" in said
    for number, name in enumerate(("llava, several", "llava, full")):
        family = read_otherwise(families.llava(num_hidden_layers=1), **CASES[name][1])
        folder = family.save(tmp_path / str(number))
        said = refused("export", "--model", folder, "--method", "tome", "--cr", 2)
        assert "[CLS] as a token or the output of several blocks" in said
