"""Towers whose MLPs have a number of channels that no block of int4 divides: zeros are added."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.qwen_shapes import write
from edgeprune.models import open_model
from edgeprune.models._processor import random_prompt
from edgeprune.policies import make
from edgeprune.spec import Plan, PruneSpec
from edgeprune.weight_format import Form, WeightFormat
from tests.families import llava_onevision
from tests.qwen import TINY

POLICY = make(PruneSpec("none"))
TOWERS = {
    "siglip": lambda folder: llava_onevision().save(folder),
    "qwen2_5_vl": lambda folder: write(
        replace(TINY, windowed=True, vision_mlp=48), folder
    ),  # gate too
}


@pytest.mark.parametrize(
    ("width", "options", "channels"),
    [
        (4304, "", 4352),  # SigLIP so400m
        (3420, "", 3456),  # Qwen2.5-VL
        (3420, ":block=32", 3424),
        (48, "", 64),  # a block of 128 would take more
        (4096, "", 4096),
        (4304, ":vision=int8", 4304),
    ],
)
def test_as_few_channels_are_added_as_take_the_fewest_bits(width, options, channels):
    vision = "" if "vision" in options else ":vision=on"
    assert WeightFormat.parse(f"int4{options}{vision}").padded(width) == channels


@pytest.mark.parametrize("tower", TOWERS)
def test_added_channels_change_nothing(tower: str, tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    TOWERS[tower](folder)
    adapter = open_model(str(folder))
    own = adapter.vision_config.encoder.mlp_width
    wide = adapter.with_weights(WeightFormat.parse("int4:vision=on"), torch.float32)
    assert own % 32 and wide.vision_config.encoder.mlp_width == 64
    forms = {n: f for n, f in wide.weights.forms.items() if n.startswith("encoder.blocks.0.")}
    mlp = [f for name, f in forms.items() if name.endswith(("up.weight", "down.weight"))]
    assert len(mlp) == 2 and all(isinstance(f, Form) and f.bits == 4 for f in mlp)
    plan = Plan(adapter.shape.visual_tokens, adapter.shape.layers)
    pixels = random_prompt(adapter.pixels, adapter.shape.vocabulary, 0).pixels
    found = list[torch.Tensor]()
    for one in (adapter, wide.in_floats()):
        with torch.device("meta"):
            module = one.vision(POLICY, plan)
        with torch.no_grad():
            found.append(one.load(module)(pixels)[0])
    assert torch.allclose(*found, rtol=1e-5, atol=1e-5)
    sizes = [one.weight_bytes(WeightFormat.parse("float"), 4) for one in (adapter, wide)]
    assert sizes[0] == sizes[1]
