"""The checkpoint's own processor: a picture and a prompt become the three inputs of a prefill."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from edgeprune.errors import ModelError
from edgeprune.models._adapter import Adapter
from edgeprune.models._checkpoint import read_json

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Prompt:
    """One picture with one question, as tensors."""

    pixels: Tensor  # float32 [tiles, 3, H, W]
    prefix_ids: Tensor  # int64 [1, P], before the picture
    text_ids: Tensor  # int64 [1, T], after it


class Processor:
    """A checkpoint's tokenizer, chat template and image processor; none of its code is run.

    The three are read by themselves: a processor of transformers asks for torchvision where the
    family knows video too. Pictures are always resized by Pillow, as at run time.
    """

    def __init__(self, adapter: Adapter) -> None:
        from transformers import AutoImageProcessor, AutoTokenizer

        folder, local = adapter.checkpoint.folder, {"local_files_only": True}
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, **local)
            self.image_processor: Any = AutoImageProcessor.from_pretrained(
                folder, backend="pil", **local
            )
        except Exception as error:  # transformers raises many kinds for a broken folder
            raise ModelError(f"{folder} has no usable processor or tokenizer: {error}") from error
        if template := _processors_template(folder):
            self.tokenizer.chat_template = template
        self.adapter = adapter

    def __call__(self, image: Image, question: str) -> Prompt:
        """Tensors for one question, wrapped in the checkpoint's chat template."""
        prefix_ids, text_ids = self.split(self.ids(question))
        pixels = self.adapter.look(self.image_processor, image.convert("RGB"))
        if tuple(pixels.shape) != self.adapter.pixels:
            raise ModelError(
                f"the image processor makes pixels {list(pixels.shape)}, config.json says"
                f" {list(self.adapter.pixels)}; the two are not of one checkpoint"
            )
        return Prompt(pixels, prefix_ids, text_ids)

    def ids(self, question: str) -> Tensor:
        """The whole prompt, one token for the picture: int64 [n]."""
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        image = self.tokenizer.convert_ids_to_tokens(self.adapter.image_token_id)
        before, after = self.adapter.around_picture
        text = text.replace(image, before + image + after)
        bos = self.tokenizer.bos_token
        special = not (bos and text.startswith(bos))
        return torch.tensor(self.tokenizer(text, add_special_tokens=special)["input_ids"])

    def split(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Ids [n] around the run of image tokens: [1, P] and [1, T]."""
        places = (ids == self.adapter.image_token_id).nonzero()[:, 0]
        if not len(places):
            raise ModelError("the chat template left no place for the picture")
        return ids[: int(places[0])][None], ids[int(places[-1]) + 1 :][None]

    def text(self, ids: Tensor) -> str:
        decoded: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return decoded


def _processors_template(folder: Path) -> str | None:
    """The chat template of a processor, which goes before its tokenizer's."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if (folder / "chat_template.json").is_file():
        return str(read_json(folder / "chat_template.json").get("chat_template", "")) or None
    return None


def random_prompt(pixels: tuple[int, ...], vocabulary: int, seed: int) -> Prompt:
    """A prompt of noise, `pixels` its shape, for checkpoints whose own samples are not at hand."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, vocabulary, (1, 24), generator=generator)
    noise = torch.randn(pixels, generator=generator)
    return Prompt(noise, ids[:, :8], ids[:, 8:])
