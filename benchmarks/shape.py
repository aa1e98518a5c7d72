"""What a made-up checkpoint is like; read where no torch is, too."""

from __future__ import annotations

from dataclasses import dataclass

PATCH = 14  # pixels a side


@dataclass(frozen=True)
class Shape:
    """A decoder, and a vision tower in front of it: of 24 x 24 patches unless said otherwise."""

    layers: int
    width: int
    mlp: int
    heads: int
    kv_heads: int
    vocabulary: int
    bias: bool = False
    vision_layers: int = 4
    vision_width: int = 256
    image: int = 336  # pixels a side

    @property
    def patches(self) -> int:
        return (self.image // PATCH) ** 2
