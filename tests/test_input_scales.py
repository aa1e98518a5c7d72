"""Scales of inputs that a float8 checkpoint stores, by the settings that say whether they hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from edgeprune.models import open_model
from edgeprune.models._input_scales import own_peaks
from edgeprune.weight_format import WeightFormat
from tests import families, packing
from tests.test_quantised_checkpoints import F8, FP8, compressed, rectangles
from tests.test_weights import change

STATIC = compressed("float-quantized", **F8, strategy="tensor")
STATIC["config_groups"]["group_0"]["input_activations"] = F8 | {"dynamic": False}
INPUTS: dict[str, tuple[dict[str, Any], str, bool]] = {
    "static": (FP8 | {"activation_scheme": "static"}, "activation_scale", True),
    "static, another name": (FP8 | {"activation_scheme": "static"}, "input_scale", True),
    "dynamic": (FP8, "activation_scale", False),
    "compressed": (compressed("float-quantized", **F8, strategy="tensor"), "input_scale", False),
    "compressed static": (STATIC, "input_scale", True),
}


@pytest.mark.parametrize("name", INPUTS)
def test_scales_of_inputs_are_known_where_the_checkpoint_has_all(name: str, tmp_path: Path) -> None:
    """Named beside the weight, and used where the settings say that they are static."""
    saved, (scheme, leaf, static) = families.llava().save(tmp_path / "saved"), INPUTS[name]
    pack = rectangles(0, 0, "weight_scale", shape=())

    def packed(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        leaves, floats = pack(weight)
        return leaves | {leaf: weight.abs().max().view(1) / 7}, floats

    folder, _ = packing.pack(saved, tmp_path, scheme, packed)
    wanted = WeightFormat.parse("fp8:head=off")
    found = own_peaks(open_model(str(folder)).with_weights(wanted, torch.float32))
    assert len(found) == (21 if static else 0)
    weights = load_file(saved / packing.SINGLE)
    up = weights["language_model.model.layers.1.mlp.up_proj.weight"]
    if static:
        assert found["layers.1.mlp.up.weight"] == pytest.approx(float(up.abs().max()) / 7 * 448)
    change(folder, lambda tensors: tensors.pop(next(n for n in tensors if n.endswith(leaf))))
    assert own_peaks(open_model(str(folder)).with_weights(wanted, torch.float32)) == {}
