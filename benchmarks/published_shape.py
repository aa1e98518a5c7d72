"""A checkpoint of published sizes: config and image processor of a real model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer

from benchmarks.shapes import write_random, write_sparse
from edgeprune.demo import MODEL_DIR
from edgeprune.models import Adapter, open_model
from edgeprune.tiling import Size

IMAGE_TOKEN = 4  # of the demo's tokenizer
VIDEO_TOKEN = 66  # the first that it has not


@dataclass(frozen=True)
class Published:
    """One model: config and image processor, and the image size that papers use."""

    config: Callable[[], Any]
    image_processor: Callable[[], Any]
    size: Size | None = None
    frames: int | None = None  # of a video in place of an image
    tokens: tuple[str, ...] = ()  # that stand around an image

    def write(self, folder: Path, *, sparse: bool = True) -> Path:
        """A checkpoint in the layout that transformers saves, its weights a hole in a file."""
        folder.mkdir(parents=True, exist_ok=True)
        config = self.config()
        config.save_pretrained(folder)
        self.image_processor().save_pretrained(folder)
        self._write_tokenizer(folder)
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config)
        tied = model.all_tied_weights_keys
        sizes = {n: tuple(t.shape) for n, t in model.state_dict().items() if n not in tied}
        if sparse:
            write_sparse(sizes, folder)
        else:
            write_random(sizes, folder, seed=0)
        return folder

    def open(self, folder: Path) -> Adapter:
        """The checkpoint, frozen for what papers show it."""
        return open_model(str(folder), size=self.size, frames=self.frames)

    def _write_tokenizer(self, folder: Path) -> None:
        """The demo's, for a video with a placeholder for one."""
        tokens = {f"around_{i}": token for i, token in enumerate(self.tokens)}
        if self.frames is not None:
            tokens = {"video_token": "<video>"}
        tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR, extra_special_tokens=tokens)
        if self.frames is not None:
            tokenizer.chat_template = str(tokenizer.chat_template).replace("image", "video")
        tokenizer.save_pretrained(folder)
