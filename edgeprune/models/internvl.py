"""InternVL 2.5 to 3.5 as transformers has them: InternViT, 2 x 2 patches a token, tiles."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

from edgeprune.models import _adapter
from edgeprune.models._encoder import EncoderConfig
from edgeprune.models._family import Elsewhere
from edgeprune.models._image_record import Reader, image_settings, tiled
from edgeprune.models._layers import ACTIVATIONS
from edgeprune.models._layout import Layout
from edgeprune.models._media import IMAGE_SLOT, Media, Takes
from edgeprune.models._names import TensorNames
from edgeprune.models._nearby import Nearby
from edgeprune.models._towers import projector
from edgeprune.models._video import FRAME_READERS, frame_processor
from edgeprune.models._vision import ProjectorConfig
from edgeprune.tiling import Size, Tiling, grids, stretch_grid

IMAGE = f"<img>{IMAGE_SLOT}</img>"


TOWER = {
    r"^cls$": "embeddings.cls_token",
    r"^patch\.": "embeddings.patch_embeddings.projection.",
    r"^position$": "embeddings.position_embeddings",
    r"^post_norm\.": "layernorm.",
    r"^blocks\.": "encoder.layer.",
    r"\.query\.": ".attention.q_proj.",
    r"\.key\.": ".attention.k_proj.",
    r"\.value\.": ".attention.v_proj.",
    r"\.query_norm\.": ".attention.q_norm.",
    r"\.key_norm\.": ".attention.k_norm.",
    r"\.output\.": ".attention.projection_layer.",
    r"\.attention_gain\.weight$": ".lambda_1",
    r"\.mlp_gain\.weight$": ".lambda_2",
    r"\.attention_norm\.": ".layernorm_before.",
    r"\.mlp_norm\.": ".layernorm_after.",
    r"\.up\.": ".mlp.fc1.",
    r"\.down\.": ".mlp.fc2.",
}
"""Parameters of the vision tower, in transformers' own layout."""


class Adapter(_adapter.Adapter):
    """An image is cut into tiles; a frame of a video is one tile with text before it."""

    elsewhere: ClassVar[tuple[Elsewhere, ...]] = (
        Elsewhere("Ovis up to 2 as published", "Ovis", "internvl"),
        Elsewhere("Ovis 2.5", "Ovis2_5", "internvl"),
    )
    nearby: ClassVar[tuple[Nearby, ...]] = (
        Nearby(
            "Aya Vision and Command A Vision",
            ("aya_vision", "cohere2_vision"),
            projector="a product of two halves",
            decoder="Cohere 2: attention and MLP side by side",
        ),
        Nearby(
            "Ovis2",
            ("ovis2",),
            tower="one of its own",
            projector="shares of a visual vocabulary",
        ),
        Nearby(
            "GOT-OCR 2",
            ("got_ocr2",),
            tower="SAM's",
            projector="convolutions",
        ),
        Nearby(
            "DeepSeek-VL2",
            ("deepseek_vl_v2",),
            decoder="a mixture of experts (DeepSeek V2)",
            processor="code that is not in transformers",
        ),
        Nearby(
            "Llama 4",
            ("llama4",),
            tower="one of its own",
            decoder="a mixture of experts, layers without rotary embedding",
        ),
    )
    takes: ClassVar[Takes] = Takes(frames=True, all_tiles="")
    encoder: EncoderConfig

    def config_class(self) -> Any:
        from transformers import InternVLConfig

        return InternVLConfig

    def demands(self) -> dict[str, bool]:
        return _demands(self.config)

    @property
    def _merge(self) -> int:
        """Patches a side that become one token."""
        ratio: float = self.config.downsample_ratio
        return round(1 / ratio)

    def read_encoder(self) -> EncoderConfig:
        return _encoder(self.config)

    def read_tiling(self) -> Tiling | None:
        if self.asked.frames is not None:
            return None
        return _tiling(self.encoder, self._merge, self.asked.size, self.grid_limits())

    def grid_limits(self) -> tuple[int, int]:
        """The fewest and the most tiles of a grid."""
        settings = image_settings(self.checkpoint.folder)
        return settings.get("min_patches", 1), settings.get("max_patches", 12)

    def read_media(self) -> Media:
        if self.asked.frames is None:
            return Media.of_images(self.config, self.asked.images, IMAGE)
        template = "\n".join(f"Frame{i}: {IMAGE}" for i in range(1, self.asked.frames + 1))
        token = int(self.config.image_token_id)
        return Media(self.video_token_id, token, "video", template=template)

    @property
    def video_token_id(self) -> int:
        """What the chat template writes for a video."""
        tokenizer = self.chat.tokenizer
        return int(tokenizer.convert_tokens_to_ids(tokenizer.video_token))

    def read_layout(self) -> Layout:
        tiles = self.tiling.tiles if self.tiling else 1
        return Layout.plain(self.encoder.side, self._merge, tiles).chained(self.between)

    def read_projector(self) -> ProjectorConfig:
        return projector(self.config, self._merge**2 * self.encoder.width, norm=True)

    def tensor_names(self) -> TensorNames:
        return TensorNames(tower=TOWER)

    def image_readers(self) -> Mapping[str, Reader]:
        if self.tiling is None:
            return FRAME_READERS
        return {"GotOcr2ImageProcessor": partial(tiled, tiling=self.tiling)}

    def image_processor(self, own: Callable[[], Any]) -> Any:
        """The family's processor in transformers asks its image processor for tiles, whatever the
        settings say: published ones have `crop_to_patches` false."""
        if self.tiling is None:
            return frame_processor(self.checkpoint)
        processor = own()
        processor.crop_to_patches = True
        return processor


def _encoder(config: Any) -> EncoderConfig:
    vision = config.vision_config
    return EncoderConfig(
        blocks=vision.num_hidden_layers,
        width=vision.hidden_size,
        mlp_width=vision.intermediate_size,
        heads=vision.num_attention_heads,
        image=vision.image_size[0],
        patch=vision.patch_size[0],
        eps=vision.layer_norm_eps,
        activation=vision.hidden_act,
        patch_bias=True,
        qkv_bias=vision.attention_bias,
        post_norm=not vision.use_mean_pooling,
        qk_norm=vision.use_qk_norm,
        gain=True,
        rms_norm=vision.norm_type == "rms_norm",
    )


def _tiling(
    encoder: EncoderConfig, merge: int, size: Size | None, limits: tuple[int, int]
) -> Tiling:
    """The grid that the checkpoint's processor gives an image of the asked size, or one tile."""
    least, most = limits
    image = size or Size(encoder.image, encoder.image)
    rows, columns = stretch_grid(image, encoder.image, least, most)
    return Tiling(
        kind="stretch",
        rows=rows,
        columns=columns,
        height=image.height,
        width=image.width,
        tile=encoder.image,
        tokens=encoder.side // merge,
        overview="last" if rows * columns > 1 else "none",
        ratios=tuple(sorted({grid.width / grid.height for grid in grids(least, most)})),
    )


def _demands(config: Any) -> dict[str, bool]:
    vision, layer = config.vision_config, config.vision_feature_layer
    ratio = config.downsample_ratio
    return {
        f"a {vision.model_type} vision tower": vision.model_type == "internvl_vision",
        f"vision_feature_layer {layer}": layer == -1,
        f"vision_feature_select_strategy {config.vision_feature_select_strategy!r}": (
            config.vision_feature_select_strategy == "default"
        ),
        f"downsample_ratio {ratio}": ratio in (1, 0.5, 0.25),
        f"tiles of {list(vision.image_size)} pixels": len(set(vision.image_size)) == 1,
        f"patches of {list(vision.patch_size)} pixels": len(set(vision.patch_size)) == 1,
        f"activation {vision.hidden_act!r}": vision.hidden_act in ACTIVATIONS,
        "no position embeddings": vision.use_absolute_position_embeddings,
    }
