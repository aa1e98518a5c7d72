"""Checkpoints with numbers that float16 does not hold, planted one at a time."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]


def edited(checkpoint: Path, copy: Path, edit: Callable[[Tensors], None]) -> Path:
    """A copy of a checkpoint of one file, in float32, its tensors changed in place by `edit`."""
    shutil.copytree(checkpoint, copy)
    (file,) = copy.glob("*.safetensors")
    tensors = {name: tensor.float() for name, tensor in load_file(file).items()}
    edit(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, file, {"format": "pt"})
    return copy


@dataclass(frozen=True)
class Overflow:
    """Factors of tensors, by the end of their names, and what must be said of them."""

    factors: Mapping[str, float]
    named: str  # by plain fp16
    kept: frozenset[str]  # parts that stay in float32, residual streams aside
    stream: str = ""  # the first part of the residual stream that does
    rows: tuple[int, ...] = ()  # only these

    def __call__(self, tensors: Tensors) -> None:
        for end, factor in self.factors.items():
            (name,) = (name for name in tensors if name.endswith(end))
            tensors[name][list(self.rows) if self.rows else ...] *= factor


LLAVA = {
    "residual": Overflow(
        {"language_model.model.layers.1.mlp.down_proj.weight": 1e5},
        "decoder layers.1 mlp.down",
        frozenset({"decoder.layers.1.mlp.down"}),
        "decoder.layers.1.residual",
        (5,),
    ),
    "gate * up": Overflow(
        {
            "language_model.model.layers.1.mlp.gate_proj.weight": 300,
            "language_model.model.layers.1.mlp.up_proj.weight": 300,
            "language_model.model.layers.1.mlp.down_proj.weight": 1e-3,
        },
        "decoder layers.1 gate * up",
        frozenset({"decoder.layers.1.mlp.product", "decoder.layers.1.mlp.down"}),
        "decoder.layers.1.residual",
    ),
    "scores": Overflow(
        {
            "language_model.model.layers.0.self_attn.q_proj.weight": 200,
            "language_model.model.layers.0.self_attn.k_proj.weight": 200,
        },
        "decoder layers.0 attention scores",
        frozenset({"decoder.layers.0.scores"}),
    ),
    "tower": Overflow(
        {"vision_tower.encoder.layers.1.mlp.fc2.weight": 1e5},
        "vision blocks.1 down",
        frozenset({"vision.encoder.blocks.1.down", "vision.projector.first"}),
        "vision.encoder.blocks.1.residual",
        (5,),
    ),
    "tower scores": Overflow(
        {
            "vision_tower.encoder.layers.0.self_attn.q_proj.weight": 200,
            "vision_tower.encoder.layers.0.self_attn.k_proj.weight": 200,
        },
        "vision blocks.0 attention scores",
        frozenset({"vision.encoder.blocks.0.scores"}),
    ),
}
"""Of tests.families.llava."""
