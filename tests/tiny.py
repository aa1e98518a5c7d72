"""The sizes of the tiny LLaVA that most tests use: 3 layers, 16 visual tokens."""

from __future__ import annotations

from benchmarks.shape import Shape
from edgeprune.demo import SAMPLES_DIR

TINY = Shape(
    layers=3,
    width=64,
    mlp=96,
    heads=4,
    kv_heads=2,
    vocabulary=66,
    vision_layers=2,
    vision_width=64,
    image=56,  # 16 visual tokens
)

ASK_SCENE = ["--image", SAMPLES_DIR / "scene-1.png", "--prompt", "what color is the star ?"]
"""Options of `run` for a bundle of it."""
