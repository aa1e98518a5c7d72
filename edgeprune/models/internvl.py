"""InternVL 2.5 to 3.5 as transformers has them: InternViT, 2 x 2 patches a token, tiles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from edgeprune.models import _adapter
from edgeprune.models._chat import Chat
from edgeprune.models._checkpoint import Checkpoint
from edgeprune.models._encoder import ACTIVATIONS, EncoderConfig
from edgeprune.models._layout import Layout
from edgeprune.models._media import RUN, Asked, Media
from edgeprune.models._names import INTERNVIT
from edgeprune.models._stored import read_json
from edgeprune.models._text import decoder_config
from edgeprune.models._towers import is_tied, projector, read_config, refuse
from edgeprune.models._video import frame_processor
from edgeprune.models._vision import VisionConfig
from edgeprune.tiling import Size, Tiling, grids, stretch_grid

PICTURE = f"<img>{RUN}</img>"


class Adapter(_adapter.Adapter):
    tower = INTERNVIT

    def __init__(self, checkpoint: Checkpoint, asked: Asked) -> None:
        from transformers import InternVLConfig

        asked.allow("internvl", pictures=True, frames=True)
        config = read_config(checkpoint, InternVLConfig)
        super().__init__(checkpoint, config, asked)
        _refuse(config)
        encoder, merge = _encoder(config), round(1 / config.downsample_ratio)
        self.media, layout = self._shown(encoder, merge)
        width = merge**2 * encoder.width
        self.vision_config = VisionConfig(encoder, projector(config, width, norm=True), layout)
        self.decoder_config = decoder_config(config.text_config, is_tied(checkpoint, config))

    def _shown(self, encoder: EncoderConfig, merge: int) -> tuple[Media, Layout]:
        """Tiles of each picture, or the frames of a video, a tile each with text before it."""
        if self.asked.frames is None:
            self.tiling = _tiling(self.checkpoint, encoder, merge, self.asked.size)
            self.media = Media.pictures(self.config, self.asked.pictures, PICTURE)
            one = Layout.plain(encoder.side, merge, self.tiling.tiles)
        else:
            self.media = self._video(self.asked.frames)
            one = Layout.plain(encoder.side, merge)
        return self.media, one.chained(self.between())

    def _video(self, frames: int) -> Media:
        tokenizer = Chat(self.checkpoint.folder, self.config.model_type).tokenizer
        placeholder = tokenizer.convert_tokens_to_ids(tokenizer.video_token)
        spelled = "\n".join(f"Frame{i}: {PICTURE}" for i in range(1, frames + 1))
        return Media(placeholder, int(self.config.image_token_id), "video", spelled=spelled)

    def picture_processor(self, own: Callable[[], Any]) -> Any:
        """The family's processor in transformers asks its image processor for tiles, whatever the
        settings say: published ones have `crop_to_patches` false."""
        if self.asked.frames is not None:
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
    checkpoint: Checkpoint, encoder: EncoderConfig, merge: int, size: Size | None
) -> Tiling:
    """The grid that the checkpoint's processor gives a picture of the asked size, or one tile."""
    settings = _settings(checkpoint)
    least, most = settings.get("min_patches", 1), settings.get("max_patches", 12)
    picture = size or Size(encoder.image, encoder.image)
    rows, columns = stretch_grid(picture, encoder.image, least, most)
    return Tiling(
        kind="stretch",
        rows=rows,
        columns=columns,
        height=picture.height,
        width=picture.width,
        tile=encoder.image,
        tokens=encoder.side // merge,
        overview="last" if rows * columns > 1 else "none",
        ratios=tuple(sorted({grid.width / grid.height for grid in grids(least, most)})),
    )


def _settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """Of the image processor, wherever the checkpoint keeps them."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (checkpoint.folder / name).is_file():
            found = read_json(checkpoint.folder / name)
            inner = found.get("image_processor", found)
            return inner if isinstance(inner, dict) else {}
    return {}


def _refuse(config: Any) -> None:
    vision, layer = config.vision_config, config.vision_feature_layer
    ratio = config.downsample_ratio
    refuse(
        config,
        {
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
        },
    )
