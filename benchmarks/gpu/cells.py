"""What is measured: shapes of decoders, sizes of images, methods and targets.

A prompt has 64 tokens of text. An image of 336 pixels a side gives 576 visual tokens, one of 756
gives 2,916: the numbers of LLaVA-1.5 and, within two percent, of LLaVA-NeXT.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from benchmarks.shape import PATCH, Shape

SIDES = (336, 756)

SHAPES = {
    # Decoders of Qwen2-0.5B, Qwen2-1.5B (as in Qwen2-VL 2B) and Vicuna 7B behind CLIP-L/14.
    "0.5b": Shape(24, 896, 4864, 14, 2, 32064, bias=True, vision_layers=24, vision_width=1024),
    "2b": Shape(28, 1536, 8960, 12, 2, 32064, bias=True, vision_layers=24, vision_width=1024),
    "7b": Shape(32, 4096, 11008, 32, 32, 32064, vision_layers=24, vision_width=1024),
    # For a dry run: every step, in seconds, on any machine.
    "tiny": Shape(8, 128, 256, 4, 2, 512, bias=True, vision_layers=3, vision_width=128),
}


@dataclass(frozen=True)
class Cell:
    """One bundle."""

    shape: str
    side: int  # of the image, in pixels
    method: str
    cr: float
    target: str = "cuda"
    sites: int | None = None  # layers at which tokens go; None: nearly every one
    weights: str = "float"  # as --weights says it

    @property
    def visual(self) -> int:
        return (self.side // PATCH) ** 2

    @property
    def name(self) -> str:
        method = "dense" if self.method == "none" else f"{self.method}-cr{self.cr:g}"
        method += "" if self.sites is None else f"-sites{self.sites}"
        method += "" if self.weights == "float" else f"-{self.weights}"
        return f"{self.shape}-{self.visual}-{method}-{self.target}"

    @property
    def sized(self) -> Shape:
        return replace(SHAPES[self.shape], image=self.side)


def cells() -> list[Cell]:
    """All, in the order in which they are measured."""
    pairs = [("7b", 336), ("0.5b", 336), ("7b", 756), ("2b", 336), ("2b", 756), ("0.5b", 756)]
    found = [cell for shape, side in pairs for cell in _methods(shape, side)]
    return [*found, *_dialects("7b")]


def tiny() -> list[Cell]:
    """The cells of a dry run."""
    return [*_methods("tiny", 168)]


def _methods(shape: str, side: int) -> Iterator[Cell]:
    yield Cell(shape, side, "none", 1)
    yield Cell(shape, side, "utp", 4)
    yield Cell(shape, side, "utp", 4, sites=4)
    if shape != "2b":
        yield Cell(shape, side, "utp", 16)
    for weights in ("int4", "int8"):
        yield Cell(shape, side, "none", 1, weights=weights)
    yield Cell(shape, side, "utp", 4, sites=4, weights="int4")


def _dialects(shape: str) -> Iterator[Cell]:
    """The same graph in the operators of other targets: what a dialect costs on one engine."""
    for target in ("jetpack7", "jetpack6"):
        yield Cell(shape, 336, "none", 1, target)
        yield Cell(shape, 336, "utp", 4, target)
