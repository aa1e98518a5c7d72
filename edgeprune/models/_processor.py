"""The checkpoint's own processor: an image and a prompt become the three inputs of a prefill."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from edgeprune.errors import ModelError, brief
from edgeprune.models._adapter import Adapter
from edgeprune.models._image_record import no_settings, settings_file

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Prompt:
    """One image with one question, as tensors."""

    pixels: Tensor  # float32 [tiles, 3, H, W]
    prefix_ids: Tensor  # int64 [1, P], before the image
    text_ids: Tensor  # int64 [1, T], after it


class Processor:
    """A checkpoint's tokenizer, chat template and image processor; none of its code is run.

    They are read by themselves: a processor of transformers asks for torchvision where the family
    knows video too. Images are always resized by Pillow, as at run time.
    """

    def __init__(self, adapter: Adapter) -> None:
        folder = adapter.checkpoint.folder
        self.chat, self.adapter = adapter.chat, adapter
        self.image_processor: Any = adapter.image_processor(partial(_image_processor, folder))

    @property
    def tokenizer(self) -> Any:
        return self.chat.tokenizer

    def __call__(self, image: Image | Sequence[Image], question: str) -> Prompt:
        """Tensors for one question, wrapped in the checkpoint's chat template.

        One image alone is every image of a bundle for several, or every frame of a video.
        """
        prefix_ids, _, text_ids = self.chat.split(self.adapter.media, question)
        shown = list(image) if isinstance(image, Sequence) else [image]
        seen = [self.adapter.preprocess(self.image_processor, i.convert("RGB")) for i in shown]
        pixels = torch.cat(seen * (self.adapter.shown // len(seen)))
        if tuple(pixels.shape) != self.adapter.pixels:
            raise ModelError(
                f"the image processor makes pixels {list(pixels.shape)}, config.json says"
                f" {list(self.adapter.pixels)}; the two are not of one checkpoint"
            )
        return Prompt(pixels, prefix_ids, text_ids)

    def text(self, ids: Tensor) -> str:
        decoded: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return decoded


def _image_processor(folder: Path) -> Any:
    """The image processor that a checkpoint names; ModelError where there is none such."""
    import transformers

    try:
        return transformers.AutoImageProcessor.from_pretrained(
            folder, backend="pil", local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # transformers raises many kinds for a broken folder
        file, settings = settings_file(folder)
        if not settings:
            raise no_settings(folder) from error
        kind = str(settings.get("image_processor_type") or "")
        if kind and str(error).startswith("Unrecognized image processor"):
            raise ModelError(
                f"{file} names the image processor {kind}, which transformers"
                f" {transformers.__version__} has not; take image_processor_type out of the file,"
                " and the family's own is used with the other settings"
            ) from error
        raise ModelError(
            f"{folder} has no usable processor or tokenizer: {brief(error)}"
        ) from error


def random_prompt(pixels: tuple[int, ...], vocabulary: int, seed: int) -> Prompt:
    """A prompt of noise, `pixels` its shape, for checkpoints whose own samples are not at hand."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, vocabulary, (1, 24), generator=generator)
    noise = torch.randn(pixels, generator=generator)
    return Prompt(noise, ids[:, :8], ids[:, 8:])
