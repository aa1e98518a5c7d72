"""What LFM2-VL's image processor does, which transformers has for torchvision alone: here with
Pillow, whose levels differ from those by 1 at most."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from edgeprune.manifest import ImageRecord
from edgeprune.models._image_record import (
    Triple,
    count,
    image_settings,
    levels,
    no_settings,
    resample,
    unsupported,
)
from edgeprune.tile_views import arranged
from edgeprune.tiling import Size, Tiling, ViewRule, grids

PROCESSOR = "Lfm2VlImageProcessor"


@dataclass(frozen=True, slots=True)
class Settings:
    """Those of the image processor, by their names in its file. The defaults are those of
    transformers."""

    downsample_factor: int = 2
    do_image_splitting: bool = True
    min_tiles: int = 2
    max_tiles: int = 10
    use_thumbnail: bool = True
    tile_size: int = 512
    min_image_tokens: int = 64
    max_image_tokens: int = 256
    encoder_patch_size: int = 16
    max_pixels_tolerance: float = 2.0
    resample: int = 2
    do_rescale: bool = True
    rescale_factor: float = 1 / 255
    do_normalize: bool = True
    image_mean: list[float] = field(default_factory=lambda: [0.5, 0.5, 0.5])
    image_std: list[float] = field(default_factory=lambda: [0.5, 0.5, 0.5])

    @classmethod
    def read(cls, folder: Path) -> Settings:
        """ModelError where the folder's settings are of another processor, or no numbers."""
        if not (given := image_settings(folder)):
            raise no_settings(folder)
        name = given.get("image_processor_type", PROCESSOR)
        if str(name).removesuffix("Fast") != PROCESSOR:
            raise unsupported("image_processor_type", name, PROCESSOR)
        found = cls(**{name: given[name] for name in cls.__slots__ if name in given})
        for name in ("downsample_factor", "encoder_patch_size", "min_image_tokens"):
            count(name, getattr(found, name))
        most = count("max_image_tokens", found.max_image_tokens)
        if most < found.min_image_tokens:
            raise unsupported("max_image_tokens", most, f"{found.min_image_tokens} or more")
        return found

    def _check_tiles(self) -> None:
        """ModelError where tiles cannot be frozen: the view of the whole has to fit into one."""
        least, most = count("min_tiles", self.min_tiles), count("max_tiles", self.max_tiles)
        if least < 2:
            raise unsupported("min_tiles", least, "2 or more, or do_image_splitting false")
        if most < least:
            raise unsupported("max_tiles", most, f"{least} or more")
        if count("tile_size", self.tile_size) % self.step:
            raise unsupported("tile_size", self.tile_size, f"a multiple of {self.step} pixels")
        if self.max_image_tokens > (fits := self.tile_tokens**2):
            raise unsupported("max_image_tokens", self.max_image_tokens, f"a tile's {fits} or less")

    @property
    def step(self) -> int:
        """Pixels a side of a token."""
        return self.encoder_patch_size * self.downsample_factor

    @property
    def tile_tokens(self) -> int:
        """Tokens a side of a tile."""
        return self.tile_size // self.step

    @property
    def rule(self) -> ViewRule:
        """Which views are made of an image; ModelError where a setting is no number."""
        return ViewRule(
            self.encoder_patch_size,
            self.step,
            (self.min_image_tokens, self.max_image_tokens),
            count("tile_size", self.tile_size) if self.do_image_splitting else None,
            (count("min_tiles", self.min_tiles), count("max_tiles", self.max_tiles)),
            self.max_pixels_tolerance,
            self.use_thumbnail,
        )

    def tiling(self, image: Size) -> Tiling:
        """The tiles of an image that is cut, and the view of the whole after them; ModelError where
        they cannot be frozen."""
        self._check_tiles()
        side = self.tile_size
        grid, whole = self.rule.views(image)
        return Tiling(
            "stretch",
            *grid,
            *image,
            side,
            self.tile_tokens,
            "last" if whole else "none",
            tuple(sorted({grid.width / grid.height for grid in grids(*self.rule.tiles)})),
            overview_size=None if whole == (side, side) else whole,
        )

    def levels(self) -> tuple[float, Triple, Triple]:
        """What levels of 0 to 255 are normalised with: rescaling is part of mean and deviation, in
        float32, as the processor computes it."""
        factor, mean, std = levels(self)
        if not (self.do_rescale and self.do_normalize):
            return factor, mean, std
        red, green, blue = (torch.tensor(mean) * (1.0 / factor)).tolist()
        wide, high, deep = (torch.tensor(std) * (1.0 / factor)).tolist()
        return 1.0, (red, green, blue), (wide, high, deep)


@dataclass(frozen=True)
class Lfm2VlImageProcessor:
    """What the processor of that name in transformers does to an image of the frozen size."""

    settings: Settings

    def __call__(self, image: Image.Image) -> Tensor:
        """One view, which has been resized: float32 [1, 3, height, width]."""
        levels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        factor, mean, std = self.settings.levels()
        pixels = levels.view(image.height, image.width, 3).permute(2, 0, 1).float() * factor
        centre, spread = (torch.tensor(values)[:, None, None] for values in (mean, std))
        return ((pixels - centre) / spread)[None]

    def tiles(self, image: Image.Image, tiling: Tiling) -> Tensor:
        """Tiles row by row and the view of the whole: float32 [tiles, channels, side, side]."""
        how, side = Image.Resampling(resample(self.settings.resample)), tiling.tile
        whole = image.resize((tiling.canvas.width, tiling.canvas.height), how)
        corners = [(c * side, r * side) for r in range(tiling.rows) for c in range(tiling.columns)]
        views = [whole.crop((x, y, x + side, y + side)) for x, y in corners]
        if tiling.overview != "none":
            height, width = tiling.overview_size or (side, side)
            views.append(image.resize((width, height), how))
        return torch.from_numpy(arranged([self(view).numpy() for view in views], tiling))


def one_view(processor: Lfm2VlImageProcessor, frozen: Size) -> ImageRecord:
    """Of a processor that shows an image as one view."""
    settings = processor.settings
    how, step = resample(settings.resample), settings.step
    (scale, mean, std), size = settings.levels(), (frozen.height, frozen.width)
    return ImageRecord(*size, size, how, None, scale, mean, std, step=step, view_rule=settings.rule)


def in_tiles(processor: Lfm2VlImageProcessor, tiling: Tiling) -> ImageRecord:
    """Of a processor that cuts an image into tiles."""
    settings, side = processor.settings, tiling.tile
    how = resample(settings.resample)
    return ImageRecord(
        side, side, None, how, None, *settings.levels(), tiling=tiling, view_rule=settings.rule
    )
