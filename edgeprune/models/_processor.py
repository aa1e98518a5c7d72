"""The checkpoint's own processor: a picture and a prompt become the three inputs of a prefill."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from edgeprune.errors import ModelError

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Prompt:
    """One picture with one question, as tensors."""

    pixels: Tensor  # float32 [tiles, 3, H, W]
    prefix_ids: Tensor  # int64 [1, P], before the picture
    text_ids: Tensor  # int64 [1, T], after it


class Processor:
    """Wraps transformers' AutoProcessor of a local folder; no code of the checkpoint is run."""

    def __init__(self, folder: Path, image_token_id: int) -> None:
        from transformers import AutoProcessor

        try:
            self.hf: Any = AutoProcessor.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # transformers raises many kinds for a broken folder
            raise ModelError(f"{folder} has no usable processor or tokenizer: {error}") from error
        self.image_token_id = image_token_id

    def __call__(self, image: Image, question: str) -> Prompt:
        """Tensors for one question, wrapped in the checkpoint's chat template."""
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text = self.hf.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        encoded = self.hf(images=image.convert("RGB"), text=text, return_tensors="pt")
        prefix_ids, text_ids = self.split(encoded["input_ids"][0])
        return Prompt(encoded["pixel_values"].float(), prefix_ids, text_ids)

    def split(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Ids [n] around the run of image tokens: [1, P] and [1, T]."""
        places = (ids == self.image_token_id).nonzero()[:, 0]
        if not len(places):
            raise ModelError("the chat template left no place for the picture")
        return ids[: int(places[0])][None], ids[int(places[-1]) + 1 :][None]

    def text(self, ids: Tensor) -> str:
        decoded: str = self.hf.tokenizer.decode(ids, skip_special_tokens=True)
        return decoded


def random_prompt(pixels: tuple[int, ...], vocabulary: int, seed: int) -> Prompt:
    """A prompt of noise, `pixels` its shape, for checkpoints whose own samples are not at hand."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, vocabulary, (1, 24), generator=generator)
    noise = torch.randn(pixels, generator=generator)
    return Prompt(noise, ids[:, :8], ids[:, 8:])
