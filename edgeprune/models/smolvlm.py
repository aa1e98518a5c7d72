"""SmolVLM, SmolVLM2 and Idefics3 (types `smolvlm`, `idefics3`): SigLIP, pixel shuffle, tiles."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from edgeprune.errors import SpecError
from edgeprune.manifest import ImageRecord
from edgeprune.models import _adapter
from edgeprune.models._chat import Chat
from edgeprune.models._encoder import EncoderConfig
from edgeprune.models._image_record import (
    Reader,
    count,
    image_settings,
    levels,
    resample,
    unsupported,
)
from edgeprune.models._layers import ACTIVATIONS, Linear
from edgeprune.models._layout import Layout
from edgeprune.models._media import IMAGE_SLOT, NAMED_TILES, Media, Takes
from edgeprune.models._names import TensorNames
from edgeprune.models._nearby import Nearby
from edgeprune.models._ops import TorchOps, cast
from edgeprune.models._smolvlm_video import frame_processor, video_rate, written_video
from edgeprune.models._towers import siglip
from edgeprune.models._video import timed_at
from edgeprune.tiling import Tiling, round_up_grid

EDGE = "<fake_token_around_image>"
IMAGE = f"{EDGE}<global-img>{IMAGE_SLOT}{EDGE}"
"""What the processor writes for an image of one tile, and for the view after the tiles."""
LONGEST = 4096
"""Pixels of the longest side to which the image processor resizes at most."""


class Adapter(_adapter.Adapter):
    """An image is one tile, or with --image-size rows and columns of tiles and a view of it all.

    One tile is what the processor makes where its image splitting is off, and of each frame of a
    video.

    The tower is SigLIP's. Its position grid, made for tiles that are partly padding, gives a whole
    tile the positions in order.
    """

    nearby: ClassVar[tuple[Nearby, ...]] = (
        Nearby(
            "Idefics2",
            ("idefics2",),
            tower="one for images of any size, padded",
            projector="learned queries (a perceiver)",
        ),
    )
    model_types: ClassVar[tuple[str, ...]] = ("idefics3",)
    takes: ClassVar[Takes] = Takes(frames=True, all_tiles=NAMED_TILES)
    encoder: EncoderConfig

    def config_class(self) -> Any:
        from transformers import Idefics3Config, SmolVLMConfig

        first = self.checkpoint.config["model_type"] == "idefics3"
        return Idefics3Config if first else SmolVLMConfig

    def demands(self) -> dict[str, bool]:
        vision, merge = self.config.vision_config, self.config.scale_factor
        sides = vision.image_size, vision.patch_size
        whole = all(isinstance(side, int) and side > 0 for side in sides)
        patches = vision.image_size // vision.patch_size if whole else 0
        return {
            f"activation {vision.hidden_act!r}": vision.hidden_act in ACTIVATIONS,
            f"{vision.num_channels} colours": vision.num_channels == 3,
            f"tiles of {sides[0]} pixels with patches of {sides[1]}": whole and in_order(patches),
            f"scale_factor {merge} for {patches} x {patches} patches": merge > 0
            and patches % merge == 0,
        }

    def read_encoder(self) -> EncoderConfig:
        return siglip(self.config.vision_config)

    def read_tiling(self) -> Tiling | None:
        """The grid that the processor gives an image of the asked size; None: one tile."""
        size, tile = self.asked.size, self.encoder.image
        if size in (None, (tile, tile)):
            return None
        edge = longest_edge(image_settings(self.checkpoint.folder).get("size"))
        rows, columns = round_up_grid(size, edge, tile)
        if rows * columns == 1:
            return None
        tokens = self.encoder.side // self.config.scale_factor
        frozen, whole = (rows, columns, *size, tile, tokens), "last"
        return Tiling("round_up", *frozen, whole, longest_edge=edge)

    def read_media(self) -> Media:
        if self.asked.frames is None:
            return Media.of_images(self.config, self.asked.images, written(self.tiling))
        if self.config.model_type == "idefics3":
            raise SpecError("idefics3 bundles take images, not videos; leave out --frames")
        media = Media.of_images(self.config, 1, written_video(self.shown, self._fps, IMAGE))
        return replace(media, part="video")

    @property
    def _fps(self) -> float:
        """Frames a second that a video is taken to be sampled at."""
        return video_rate(self.checkpoint)

    def read_chat(self) -> Chat:
        """For a video with the template that transformers takes then, whatever the checkpoint's
        is; the token of an image stands for the video."""
        if self.asked.frames is None:
            return super().read_chat()
        from transformers.models.smolvlm.processing_smolvlm import DEFAULT_CHAT_TEMPLATE

        chat = super().read_chat()
        token = str(chat.tokenizer.convert_ids_to_tokens(int(self.config.image_token_id)))
        template = DEFAULT_CHAT_TEMPLATE.replace("<image>", token).replace("<video>", token)
        chat.tokenizer.chat_template = template
        return chat

    def read_layout(self) -> Layout:
        return Layout.plain(self.encoder.side, self.config.scale_factor).chained(self.between)

    def read_projector(self) -> Connector:
        inputs = self.config.scale_factor**2 * self.encoder.width
        return Connector(inputs, self.config.text_config.hidden_size)

    def tensor_names(self) -> TensorNames:
        return TensorNames(
            tower_prefixes=("model.vision_model.",),
            projector={r"^linear\.": "modality_projection.proj."},
            projector_prefixes=("model.connector.",),
            decoder_prefixes=("model.text_model.",),
            head=("lm_head.weight",),
        )

    def image_readers(self) -> Mapping[str, Reader]:
        reader: Reader = partial(squeezed, side=self.encoder.image)
        if self.tiling is not None:
            reader = partial(cut, tiling=self.tiling)
        return {"SmolVLMImageProcessor": reader, "Idefics3ImageProcessor": reader}

    def image_processor(self, own: Callable[[], Any]) -> Any:
        if self.asked.frames is not None:
            return frame_processor(self.checkpoint, self.encoder.image)
        processor = own()
        processor.do_image_splitting = self.tiling is not None
        return processor

    def notes(self) -> tuple[str, ...]:
        if self.tiling is not None:
            return ()
        if self.asked.frames is not None:
            return (timed_at(self._fps),)
        side = self.encoder.image
        return (
            f"an image is one tile of {side} x {side} pixels: image splitting, which published"
            " processors do, is off; --image-size WxH of your images turns it on",
        )


@dataclass(frozen=True, slots=True)
class Connector:
    """One linear layer from merged patches to the decoder's width."""

    inputs: int
    output: int

    def build(self, ops: TorchOps) -> nn.Module:
        return _Connector(self, ops)


class _Connector(nn.Module):
    def __init__(self, config: Connector, ops: TorchOps) -> None:
        super().__init__()
        self.linear = Linear(config.inputs, config.output, ops)

    def forward(self, features: Tensor) -> Tensor:
        return cast(self.linear(features), self.linear.weight.dtype)


def written(tiling: Tiling | None) -> str:
    """What the processor writes for an image: text before each tile, a line for each row of them,
    and the view of the whole image last."""
    if tiling is None:
        return IMAGE
    tiles = [
        [f"{EDGE}<row_{row + 1}_col_{column + 1}>{IMAGE_SLOT}" for column in range(tiling.columns)]
        for row in range(tiling.rows)
    ]
    return "".join(f"{''.join(row)}\n" for row in tiles) + f"\n{IMAGE}"


def longest_edge(size: Any) -> int:
    """Pixels of the longer side to which a processor with such a `size` resizes an image first."""
    longest = count("size", dict(size or {}).get("longest_edge"))
    if longest > LONGEST:
        raise unsupported("size", longest, f"a longest edge of at most {LONGEST} pixels")
    return longest


def squeezed(processor: Any, side: int) -> ImageRecord:
    """Of a processor that resizes an image to a longest edge, then to a tile, whatever its shape.

    What it pads is nothing then, and its mask of pixels is all ones.
    """
    longest = longest_edge(processor.size) if processor.do_resize else None
    check_tile(processor, side)
    values, size = levels(processor), (side, side)
    how = resample(processor.resample)
    return ImageRecord(side, side, size, how, None, *values, longest_edge=longest)


def cut(processor: Any, tiling: Tiling) -> ImageRecord:
    """Of a processor that cuts an image into tiles."""
    if not processor.do_resize:
        raise unsupported("do_resize", False, "True")
    check_tile(processor, tiling.tile)
    side, how = tiling.tile, resample(processor.resample)
    return ImageRecord(side, side, None, how, None, *levels(processor), tiling=tiling)


def check_tile(processor: Any, side: int) -> None:
    """ModelError unless tiles come out of the processor as large as the encoder takes them."""
    tile = dict(processor.max_image_size).get("longest_edge")
    if tile != side:
        raise unsupported("max_image_size", tile, f"the encoder's {side} pixels a side")


def in_order(patches: int) -> bool:
    """Whether the tower gives each of so many patches a side a position of its own.

    Positions are read off coordinates in float32, which for some numbers fall on the wrong side of
    a boundary.
    """
    if patches < 1:
        return False
    coordinates = (torch.arange(patches) * (1.0 / torch.tensor(patches))).clamp(max=1 - 1e-6)
    boundaries = torch.arange(1 / patches, 1.0, 1 / patches)
    found = torch.bucketize(coordinates, boundaries, right=True)
    return torch.equal(found, torch.arange(patches))
