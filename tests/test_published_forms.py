"""Files of repositories that say the same in other places: what transformers reads is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Refused
from transformers import AutoImageProcessor
from transformers.video_processing_utils import BaseVideoProcessor

from edgeprune.models import open_model
from edgeprune.models._checkpoint import Checkpoint
from edgeprune.models._image_record import image_settings
from edgeprune.models._processor import Processor
from edgeprune.models._video import video_settings
from edgeprune.tiling import Size
from tests import families, smolvlm
from tests.families import Family
from tests.lfm2 import lfm2_vl

OWN, WHOLE = "preprocessor_config.json", "processor_config.json"


def test_settings_within_those_of_the_processor_go_first(tmp_path: Path) -> None:
    """Newer releases write them there, and leave the older file as it was."""
    folder = families.internvl().save(tmp_path)
    settings = json.loads((folder / OWN).read_text())
    write(folder / OWN, {**settings, "max_patches": 12})
    write(folder / WHOLE, {"image_processor": {**settings, "max_patches": 2}})
    theirs = AutoImageProcessor.from_pretrained(folder, backend="pil")
    adapter = open_model(str(folder), size=Size(112, 168))
    assert adapter.tiling is not None
    assert theirs.max_patches == adapter.tiling.cut == 2
    assert Processor(adapter).image_processor.max_patches == 2


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        ({WHOLE: {"image_processor": {"a": 1}}, OWN: {"a": 2}}, {"a": 1}),
        ({WHOLE: {"processor_class": "P"}, OWN: {"a": 2}}, {"a": 2}),
        ({WHOLE: {"image_processor": {"a": 1}}}, {"a": 1}),
        ({OWN: {"a": 2}}, {"a": 2}),
        ({WHOLE: {"processor_class": "P"}}, {}),
        ({}, {}),
    ],
    ids=str,
)
def test_settings_are_found_wherever_they_are(
    files: dict[str, Any], wanted: dict[str, Any], tmp_path: Path
) -> None:
    for name, settings in files.items():
        write(tmp_path / name, settings)
    assert image_settings(tmp_path) == wanted


def test_settings_of_videos_go_first_likewise(tmp_path: Path) -> None:
    folder = smolvlm.smolvlm().save(tmp_path)
    kind = {"video_processor_type": "SmolVLMVideoProcessor"}
    write(folder / "video_preprocessor_config.json", {**kind, "fps": 5})
    assert video_settings(Checkpoint.open(folder))["fps"] == 5
    write(folder / WHOLE, {"video_processor": {**kind, "fps": 3}})
    assert video_settings(Checkpoint.open(folder))["fps"] == 3
    theirs, _ = BaseVideoProcessor.get_video_processor_dict(folder)
    assert theirs["fps"] == 3


MISSING = {
    OWN: "neither preprocessor_config.json nor image_processor in processor_config.json; download",
    "tokenizer.json": "neither tokenizer.json nor tokenizer.model; name a folder that has one with",
}


@pytest.mark.parametrize("family", [families.llava, lfm2_vl])
@pytest.mark.parametrize("name", MISSING)
def test_a_file_that_is_missing_is_named(
    name: str, family: Callable[[], Family], tmp_path: Path, refused: Refused
) -> None:
    folder = family().save(tmp_path)
    (folder / name).unlink()
    assert MISSING[name] in refused("models", "--model", folder)


def write(file: Path, settings: dict[str, Any]) -> None:
    file.write_text(json.dumps(settings))
