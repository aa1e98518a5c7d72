"""LFM2-VL and LFM2.5-VL: SigLIP2 for images of any shape, short convolutions in most layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from typing import Any, ClassVar

from PIL import Image
from torch import Tensor

from edgeprune.errors import SpecError
from edgeprune.models import _adapter
from edgeprune.models._family import at_size, on_canvas
from edgeprune.models._image_record import Reader, resample, unsupported
from edgeprune.models._layers import ACTIVATIONS
from edgeprune.models._layout import Layout
from edgeprune.models._lfm2_image import (
    PROCESSOR,
    Lfm2VlImageProcessor,
    Settings,
    in_tiles,
    one_view,
)
from edgeprune.models._media import IMAGE_SLOT, NAMED_TILES, Media, Takes
from edgeprune.models._names import TensorNames
from edgeprune.models._nearby import Nearby
from edgeprune.models._siglip2 import Siglip2Config
from edgeprune.models._vision import ProjectorConfig
from edgeprune.tiling import Size, Tiling

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

    With --image-size of an image above twice that size it is rows and columns of tiles with text
    between, and a view of the whole, as published processors cut it.
    """

    builds: ClassVar[tuple[str, ...]] = (TOWER, "lfm2")
    nearby: ClassVar[tuple[Nearby, ...]] = (
        Nearby(
            "the first revisions of LFM2-VL",
            ("lfm2-vl",),
            processor="settings of code that they carry; take a later revision, of type lfm2_vl",
        ),
    )
    takes: ClassVar[Takes] = Takes(all_tiles=NAMED_TILES)
    frozen: Size  # of one view
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

    @cached_property
    def _every_tile(self) -> Tiling | None:
        """The tiles of an image of the size asked for; None: it is one view."""
        size, settings = self.asked.size, self._settings
        return settings.tiling(size) if size is not None and settings.rule.splits(size) else None

    def read_size(self) -> Size:
        """What the processor makes of an image of the size asked for, or of a tile of it."""
        settings = self._settings
        if self.asked.size is None:
            side = math.isqrt(settings.max_image_tokens) * settings.step
            return Size(side, side)
        size = settings.rule.whole(self.asked.size)
        tokens = size.height * size.width // settings.step**2
        if tokens > settings.max_image_tokens:
            raise SpecError(
                f"--image-size {self.asked.size.width}x{self.asked.size.height} is too long and"
                f" narrow: it gives {tokens} tokens, the model takes {settings.max_image_tokens}"
            )
        tile = self._every_tile.tile if self._every_tile else None
        return Size(tile, tile) if tile else size

    def read_encoder(self) -> Siglip2Config:
        vision, merge = self.config.vision_config, self.config.downsample_factor
        every, whole = self._every_tile, None
        if every is not None and every.overview_size is not None:
            whole = every.overview_grid
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
            merge=merge,
            overview=whole,
        )

    def read_tiling(self) -> Tiling | None:
        return self._every_tile

    def read_media(self) -> Media:
        return Media.of_images(self.config, self.asked.images, written(self.tiling))

    def read_layout(self) -> Layout:
        encoder, tiling = self.encoder, self.tiling
        layout = Layout.plain(encoder.side, encoder.merge, across=encoder.columns)
        layout = layout.chained(self.between)
        if tiling is None or encoder.overview is None:
            return layout
        rows, columns = encoder.overview
        tokens = [tiling.tokens**2] * (tiling.tiles - 1) + [rows * columns]
        return layout.padded(tokens * self.asked.images)

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
        if self.tiling is not None:
            return {PROCESSOR: partial(in_tiles, tiling=self.tiling)}
        return {PROCESSOR: partial(one_view, frozen=self.frozen)}

    def image_processor(self, own: Callable[[], Any]) -> Any:
        """transformers' own needs torchvision."""
        return Lfm2VlImageProcessor(self._settings)

    def preprocess(self, image_processor: Any, image: Image.Image) -> Tensor:
        processor: Lfm2VlImageProcessor = image_processor
        if (tiling := self.tiling) is None:
            how = Image.Resampling(resample(processor.settings.resample))
            return processor(at_size(image, self.frozen, processor.settings.step, how))
        if not tiling.suits(image.height, image.width):
            image = on_canvas(image, Size(tiling.height, tiling.width))
        return processor.tiles(image, tiling)

    def notes(self) -> tuple[str, ...]:
        if self.asked.size is not None or not self._settings.do_image_splitting:
            return ()
        return (
            f"an image is one view of {self.frozen.width}x{self.frozen.height} pixels: image"
            " splitting, which published processors do for images above twice that size, is off;"
            " --image-size WxH of your images turns it on",
        )


def written(tiling: Tiling | None) -> str:
    """What the processor writes for an image: its name before each view of several."""
    if tiling is None:
        return IMAGE
    places = [(r, c) for r in range(1, tiling.rows + 1) for c in range(1, tiling.columns + 1)]
    names = [f"<|img_row_{row}_col_{column}|>" for row, column in places]
    names += [] if tiling.overview == "none" else ["<|img_thumbnail|>"]
    return IMAGE.replace(IMAGE_SLOT, "".join(name + IMAGE_SLOT for name in names))
