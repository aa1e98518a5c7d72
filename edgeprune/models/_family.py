"""A model family: the steps from a checkpoint's config.json to the modules that are exported.

A family's file holds a class `Adapter` that says of each step what its checkpoints do. Steps that
most families share have a default. Nothing outside of that file knows the family by name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from edgeprune.manifest import ImageRecord
from edgeprune.models._chat import Chat, processors_template
from edgeprune.models._checkpoint import Checkpoint
from edgeprune.models._decoder_config import DecoderConfig
from edgeprune.models._encoder import EncoderConfig
from edgeprune.models._image_record import Reader, read_image_processor
from edgeprune.models._layout import Layout
from edgeprune.models._media import InputOptions, Media, Takes
from edgeprune.models._names import Stored, TensorNames
from edgeprune.models._nearby import Nearby
from edgeprune.models._qwen_tower import TowerConfig
from edgeprune.models._text import decoder_config
from edgeprune.models._towers import is_tied, read_config, refuse
from edgeprune.models._unread import is_spare
from edgeprune.models._vision import ProjectorLike, VisionConfig
from edgeprune.spec import ModelShape
from edgeprune.tile_choice import chosen
from edgeprune.tiling import Size, Tiling, fitted, rounds_to


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """Checkpoints that transformers does not implement: no code of a checkpoint is ever run."""

    name: str
    architecture: str  # as config.json names it
    nearest: str  # what edgeprune has in their place


class Family(ABC):
    """The steps, in the order in which they are taken; later ones may use what earlier ones gave.

    Each `read_` step looks at `checkpoint`, its `config` and what is `asked`, and refuses by name
    what it cannot do: with a ModelError what the checkpoint has, with a SpecError what is asked.
    """

    model_types: ClassVar[tuple[str, ...]] = ()
    """Values of config.json's `model_type` that the family reads beside its file's name."""

    towers: ClassVar[tuple[str, ...]] = ()
    """Of `vision_config` the `model_type` by which a checkpoint of one of `model_types` is of this
    family, though another one has its name."""

    builds: ClassVar[tuple[str, ...]] = ()
    """Types of towers and decoders, as configs name them, that the family has beside those that
    are named after it."""

    architectures: ClassVar[tuple[str, ...]] = ()
    """Of config.json, by which a checkpoint is known that has no `model_type`."""

    elsewhere: ClassVar[tuple[Elsewhere, ...]] = ()
    """Checkpoints with code of their own for which this is the nearest family."""

    nearby: ClassVar[tuple[Nearby, ...]] = ()
    """Models that are not supported, for which this is the nearest family."""

    decoder_kind: ClassVar[str | None] = None
    """The kind of decoder in `_text.py`, where `text_config` has a type of the family's own."""

    takes: ClassVar[Takes] = Takes()
    """What can be asked for beside one image."""

    checkpoint: Checkpoint
    config: Any  # transformers', of the family
    asked: InputOptions
    frozen: Size | None  # the size of images, where the processor leaves it open
    encoder: EncoderConfig | TowerConfig
    tiling: Tiling | None  # the tiles that an image is cut into, where it is
    media: Media
    vision_config: VisionConfig
    decoder_config: DecoderConfig

    def __init__(self, checkpoint: Checkpoint, asked: InputOptions) -> None:
        self.checkpoint, self.asked = checkpoint, asked
        self.config = self.read_config()
        asked.check(self.config.model_type, self.takes)
        refuse(self.config, self.demands())
        self.frozen = self.read_size()
        self.encoder = self.read_encoder()
        self.tiling = asked.choice_of(self.read_tiling())
        self.media = self.read_media()
        layout = self.read_layout()
        parts = self.encoder, self.read_projector(), layout, self.read_deepstack()
        self.vision_config = VisionConfig(*parts)
        self.decoder_config = self.read_decoder()

    @abstractmethod
    def config_class(self) -> Any:
        """transformers' class of config.json; imported here, since that takes long."""

    def read_config(self) -> Any:
        """config.json as an object of that class."""
        return read_config(self.checkpoint, self.config_class())

    def read_chat(self) -> Chat:
        """Tokenizer and chat template."""
        checkpoint = self.checkpoint
        return Chat(checkpoint.text_folder, processors_template(checkpoint.folder))

    def read_ends(self) -> tuple[int, ...]:
        """Ids of the tokens that end an answer, where no settings of the checkpoint say so."""
        return ()

    def demands(self) -> dict[str, bool]:
        """What the config asks for, in words, and whether the steps below do that. Where one is
        False, the checkpoint is refused and the words are shown."""
        return {}

    def read_size(self) -> Size | None:
        """The size of images, where the image processor leaves it open and a bundle freezes it."""
        return None

    @abstractmethod
    def read_encoder(self) -> EncoderConfig | TowerConfig:
        """The vision tower, cut after the last block that the projector reads."""

    def read_tiling(self) -> Tiling | None:
        """The tiles that the image processor cuts an image into; None: it is one."""
        return None

    def read_media(self) -> Media:
        """What a prompt shows, and how chat template and processor write it."""
        return Media.of_images(self.config, self.asked.images)

    @abstractmethod
    def read_layout(self) -> Layout:
        """Which of what the tower gives stands where among the V visual tokens."""

    @abstractmethod
    def read_projector(self) -> ProjectorLike:
        """From the tower's features to the decoder's width."""

    def read_deepstack(self) -> tuple[ProjectorLike, ...]:
        """The same for each middle block of the tower that the decoder reads too: a row of each is
        added to every visual token after one of the first layers, in this order."""
        return ()

    def read_decoder(self) -> DecoderConfig:
        """The language model."""
        tied = is_tied(self.checkpoint, self.config)
        decoder = decoder_config(self.config.text_config, tied, self.decoder_kind)
        return replace(decoder, deepstack=len(self.vision_config.deepstack))

    def tensor_names(self) -> TensorNames:
        """How checkpoints name the parameters."""
        return TensorNames()

    def stored(self, parameter: str) -> Stored:
        """How checkpoints of this family store a parameter: of a tied embedding, under the names of
        the head too. Of such a model the head, where it is read by itself, is the embedding."""
        if parameter == "head.weight" and self.decoder_config.tied:
            return self.stored("embedding.weight")
        names, config = self.names(parameter), self.decoder_config
        if parameter in ("embedding.weight", "fixed.text") and config.tied:
            names += self.names("head.weight")
        rows = self.vision_config.layout.text if parameter == "fixed.text" else ()
        return Stored((names,), rows, *config.rescaling(parameter))

    def is_spare(self, name: str) -> bool:
        """Whether checkpoints of the family store a tensor that no graph of a bundle needs."""
        tower, names = self.vision_config.encoder, self.tensor_names()
        blocks = range(tower.blocks, tower.blocks + tower.left_out)
        left_out = (prefix for block in blocks for prefix in names.of(f"encoder.blocks.{block}."))
        return is_spare(name, tuple(left_out))

    @abstractmethod
    def image_readers(self) -> Mapping[str, Reader]:
        """For each class of image processor that the family is published with, what freezes it.

        Classes are named without `Fast` and `Pil`; readers are those of `_image_record.py`.
        """

    def image_processor(self, own: Callable[[], Any]) -> Any:
        """What treats each image or frame: the checkpoint's own image processor, which `own`
        reads, unless it does otherwise with one image alone."""
        return own()

    def notes(self) -> tuple[str, ...]:
        """What an export of this family leaves out or decides, for people; one sentence each."""
        return ()

    @property
    def shape(self) -> ModelShape:
        decoder, layout = self.decoder_config, self.vision_config.layout
        encoder = self.vision_config.encoder
        return ModelShape(
            family=self.config.model_type,
            visual_tokens=layout.visual_tokens,
            grid=layout.grid,
            layers=len(decoder.layers),
            width=decoder.width,
            mlp_width=decoder.mlp_width,
            attention_heads=decoder.heads,
            kv_heads=decoder.kv_heads,
            head_size=decoder.head_size,
            vocabulary=decoder.vocabulary,
            max_positions=decoder.max_positions,
            has_cls=encoder.cls,
            separators=len(layout.fixed),
            mrope=decoder.mrope is not None,
            one_position=decoder.one_position,
            blocks=encoder.merging_blocks if layout.is_plain else 0,
            convolutions=decoder.convolutions,
            kernel=decoder.kernel,
            linear=decoder.linear,
            output_gate=any(layer.output_gate for layer in decoder.layers),
            after_encoder=self.vision_config.after_encoder,
        )

    @property
    def image_token_id(self) -> int:
        return self.media.token

    @property
    def shown(self) -> int:
        """Images or frames of a prompt."""
        return self.asked.frames or self.asked.images

    @cached_property
    def chat(self) -> Chat:
        """Tokenizer and chat template, read when they are first asked for."""
        return self.read_chat()

    @cached_property
    def between(self) -> list[list[int]]:
        """Ids of the text between the runs of visual tokens of a prompt; none where there is one
        run alone."""
        if self.media.runs == 1:
            return []
        return self.chat.split(self.media, "?")[1]

    @property
    def pixels(self) -> tuple[int, ...]:
        """Shape of what the vision graphs take: [tiles, channels, height, width]."""
        channels = self.tiling.channels if self.tiling else 3
        return self.vision_config.layout.tiles, channels, *self.vision_config.encoder.size

    def image_record(self, processor: Any) -> ImageRecord:
        """What the image processor, or that of a processor, does to one image or frame."""
        return read_image_processor(processor, self.image_readers())

    def preprocess(self, image_processor: Any, image: Image.Image) -> Tensor:
        """An image through the checkpoint's own image processor: float32, of shape `pixels`."""
        if (tiling := self.tiling) is not None:
            size = Size(tiling.height, tiling.width)
            whole = tiling.kind == "stretch" and tiling.suits(image.height, image.width)
            image = stretched(image, size) if whole else on_canvas(image, size)
        found: Tensor = image_processor(image, return_tensors="pt")["pixel_values"]
        pixels = found.float().flatten(0, -4)
        return pixels if tiling is None else torch.from_numpy(chosen(pixels.numpy(), tiling))

    def names(self, parameter: str) -> tuple[str, ...]:
        """Names under which checkpoints of this family store a parameter, likeliest first."""
        return self.tensor_names().of(parameter)


def stretched(image: Image.Image, size: Size) -> Image.Image:
    """An image in another size, whatever its aspect ratio."""
    return image.resize((size.width, size.height), Image.Resampling.BICUBIC)


def at_size(image: Image.Image, frozen: Size, step: int, resample: Any) -> Image.Image:
    """An image in a frozen size: stretched where rounding its sides to multiples of `step` gives
    that size at some scale, else fitted into it."""
    if not rounds_to(Size(image.height, image.width), frozen, step):
        return on_canvas(image, frozen)
    return image.resize((frozen.width, frozen.height), resample)


def on_canvas(image: Image.Image, size: Size) -> Image.Image:
    """An image fitted into another size, its aspect ratio kept, the rest black."""
    height, width = fitted(Size(image.height, image.width), size)
    canvas = Image.new("RGB", (size.width, size.height))
    at = (size.width - width) // 2, (size.height - height) // 2
    canvas.paste(image.resize((width, height), Image.Resampling.BICUBIC), at)
    return canvas
