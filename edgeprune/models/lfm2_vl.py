"""LFM2-VL and LFM2.5-VL: SigLIP2 for images of any shape, short convolutions in most layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from edgeprune.errors import SpecError
from edgeprune.manifest import ImageRecord
from edgeprune.models import _adapter
from edgeprune.models._encoder import ACTIVATIONS
from edgeprune.models._family import at_size
from edgeprune.models._image_record import (
    Reader,
    Triple,
    count,
    image_settings,
    levels,
    resample,
    unsupported,
)
from edgeprune.models._layout import Layout
from edgeprune.models._media import IMAGE_SLOT, Media
from edgeprune.models._names import TensorNames
from edgeprune.models._nearby import Nearby
from edgeprune.models._siglip2 import Siglip2Config
from edgeprune.models._vision import ProjectorConfig
from edgeprune.tiling import Size

PROCESSOR = "Lfm2VlImageProcessor"
TOWER = "siglip2_vision_model"
IMAGE = f"<|image_start|>{IMAGE_SLOT}<|image_end|>"
"""What the processor writes for an image of one view."""
_DECODER = {
    r"^embedding\.": "embed_tokens.",
    r"^norm\.": "embedding_norm.",
    r"\.(attention|convolution)_norm\.": ".operator_norm.",
    r"\.mlp_norm\.": ".ffn_norm.",
    r"\.attention\.query\.": ".self_attn.q_proj.",
    r"\.attention\.key\.": ".self_attn.k_proj.",
    r"\.attention\.value\.": ".self_attn.v_proj.",
    r"\.attention\.output\.": ".self_attn.out_proj.",
    r"\.attention\.query_norm\.": ".self_attn.q_layernorm.",
    r"\.attention\.key_norm\.": ".self_attn.k_layernorm.",
    r"\.convolution\.input\.": ".conv.in_proj.",
    r"\.convolution\.output\.": ".conv.out_proj.",
    r"\.convolution\.(weight|bias)$": r".conv.conv.\1",
    r"\.mlp\.gate\.": ".feed_forward.w1.",
    r"\.mlp\.up\.": ".feed_forward.w3.",
    r"\.mlp\.down\.": ".feed_forward.w2.",
}


class Adapter(_adapter.Adapter):
    """An image is one view of 64 to 256 tokens, in about its own shape: sides are multiples of a
    token's 32 pixels.

    Published processors cut images above twice that size into tiles; here they are one view.
    """

    builds: ClassVar[tuple[str, ...]] = (TOWER, "lfm2")
    nearby: ClassVar[tuple[Nearby, ...]] = (
        Nearby(
            "the first revisions of LFM2-VL",
            ("lfm2-vl",),
            processor="settings of code that they carry; take a later revision, of type lfm2_vl",
        ),
    )
    frozen: Size
    encoder: Siglip2Config

    def config_class(self) -> Any:
        from transformers import Lfm2VlConfig

        return Lfm2VlConfig

    def demands(self) -> dict[str, bool]:
        vision, merge = self.config.vision_config, self.config.downsample_factor
        grid, activation = vision.num_patches, self.config.projector_hidden_act
        return {
            f"a {vision.model_type} vision tower": vision.model_type == TOWER,
            f"activation {vision.hidden_act!r}": vision.hidden_act in ACTIVATIONS,
            f"activation {activation!r} in the projector": activation in ACTIVATIONS,
            f"{vision.num_channels} colours": vision.num_channels == 3,
            f"patch_size {vision.patch_size}": isinstance(vision.patch_size, int),
            f"a grid of {grid} positions": math.isqrt(grid) ** 2 == grid,
            f"downsample_factor {merge}": isinstance(merge, int) and merge > 0,
        }

    @property
    def _settings(self) -> Settings:
        """Of the checkpoint's image processor; ModelError where they are not those of the tower."""
        found = Settings.read(self.checkpoint.folder)
        pairs = {
            "encoder_patch_size": (found.encoder_patch_size, self.config.vision_config.patch_size),
            "downsample_factor": (found.downsample_factor, self.config.downsample_factor),
        }
        for name, (value, wanted) in pairs.items():
            if value != wanted:
                raise unsupported(name, value, f"config.json's {wanted}")
        return found

    def read_size(self) -> Size:
        """What the processor makes of an image of the size asked for, shown as one view."""
        settings = self._settings
        if self.asked.size is None:
            side = math.isqrt(settings.max_image_tokens) * settings.step
            return Size(side, side)
        size = settings.view(self.asked.size)
        tokens = size.height * size.width // settings.step**2
        if tokens > settings.max_image_tokens:
            raise SpecError(
                f"--image-size {self.asked.size.width}x{self.asked.size.height} is too long and"
                f" narrow: it gives {tokens} tokens, the model takes {settings.max_image_tokens}"
            )
        return size

    def read_encoder(self) -> Siglip2Config:
        vision = self.config.vision_config
        return Siglip2Config(
            blocks=vision.num_hidden_layers,
            width=vision.hidden_size,
            mlp_width=vision.intermediate_size,
            heads=vision.num_attention_heads,
            image=self.frozen.height,
            patch=vision.patch_size,
            eps=vision.layer_norm_eps,
            activation=vision.hidden_act,
            cls=False,
            post_norm=True,
            columns=self.frozen.width // vision.patch_size,
            table=math.isqrt(vision.num_patches),
        )

    def read_media(self) -> Media:
        return Media.of_images(self.config, self.asked.images, IMAGE)

    def read_layout(self) -> Layout:
        merge, encoder = self.config.downsample_factor, self.encoder
        return Layout.plain(encoder.side, merge, across=encoder.columns).chained(self.between)

    def read_projector(self) -> ProjectorConfig:
        config = self.config
        return ProjectorConfig(
            config.downsample_factor**2 * self.encoder.width,
            config.text_config.hidden_size,
            config.projector_hidden_act,
            config.projector_bias,
            config.projector_use_layernorm,
            config.projector_hidden_size,
        )

    def tensor_names(self) -> TensorNames:
        return TensorNames(decoder=_DECODER)

    def image_readers(self) -> Mapping[str, Reader]:
        return {PROCESSOR: partial(view, frozen=self.frozen)}

    def image_processor(self, own: Callable[[], Any]) -> Any:
        """transformers' own needs torchvision."""
        return Lfm2VlImageProcessor(self._settings)

    def look(self, image_processor: Any, image: Image.Image) -> Tensor:
        settings: Settings = image_processor.settings
        how = Image.Resampling(resample(settings.resample))
        pixels: Tensor = image_processor(at_size(image, self.frozen, settings.step, how))
        return pixels

    def notes(self) -> tuple[str, ...]:
        asked, settings = self.asked.size, self._settings
        if asked is None or not settings.splits(asked):
            return ()
        return (
            f"images of {asked.width}x{asked.height} are one view of"
            f" {self.frozen.width}x{self.frozen.height} pixels: image splitting, which published"
            " processors do for images of that size, is not supported",
        )


@dataclass(frozen=True, slots=True)
class Settings:
    """Those of the image processor, by their names in its file, as far as they say anything of one
    view. The defaults are those of transformers."""

    downsample_factor: int = 2
    do_image_splitting: bool = True
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
        given = image_settings(folder)
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

    @property
    def step(self) -> int:
        """Pixels a side of a token."""
        return self.encoder_patch_size * self.downsample_factor

    def view(self, image: Size) -> Size:
        """The pixels of one view: sides to the nearest multiples of the step, unless that makes
        too few tokens or too many; then both are scaled and rounded up, or down."""
        step, area = self.step, image.height * image.width
        height, width = (max(step, round(side / step) * step) for side in image)
        least, most = (n * step**2 for n in (self.min_image_tokens, self.max_image_tokens))
        if height * width > most:
            scale = math.sqrt(area / most)
            height, width = (max(step, math.floor(s / scale / step) * step) for s in image)
        elif height * width < least:
            scale = math.sqrt(least / area)
            height, width = (math.ceil(side * scale / step) * step for side in image)
        return Size(height, width)

    def splits(self, image: Size) -> bool:
        """Whether the processor cuts an image of this size into tiles."""
        step = self.step
        height, width = (max(self.encoder_patch_size, round(side / step) * step) for side in image)
        most = self.max_image_tokens * step**2 * self.max_pixels_tolerance
        return self.do_image_splitting and height * width > most

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
    """What the processor of that name in transformers does to a resized image. transformers resizes
    with torchvision, whose levels differ by 1 at most from those of Pillow here."""

    settings: Settings

    def __call__(self, image: Image.Image) -> Tensor:
        """One view: float32 [1, 3, height, width]."""
        levels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        factor, mean, std = self.settings.levels()
        pixels = levels.view(image.height, image.width, 3).permute(2, 0, 1).float() * factor
        centre, spread = (torch.tensor(values)[:, None, None] for values in (mean, std))
        return ((pixels - centre) / spread)[None]


def view(processor: Any, frozen: Size) -> ImageRecord:
    """Of a processor that shows an image as one view."""
    settings: Settings = processor.settings
    how, step = resample(settings.resample), settings.step
    (scale, mean, std), size = settings.levels(), (frozen.height, frozen.width)
    return ImageRecord(*size, size, how, None, scale, mean, std, step=step)
