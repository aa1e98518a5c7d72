"""A checkpoint's tokenizer and chat template: a question becomes ids as transformers makes them."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgeprune.errors import ModelError
from edgeprune.models._checkpoint import read_json
from edgeprune.models._media import RUN, Media


class Chat:
    """Reads tokenizer and template by themselves: none of a checkpoint's code is run."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # transformers raises many kinds for a broken folder
            raise ModelError(f"{folder} has no usable processor or tokenizer: {error}") from error
        if template := _processors_template(folder):
            self.tokenizer.chat_template = template

    def ids(self, media: Media, question: str) -> Tensor:
        """The whole prompt, one visual token for each run of them: int64 [n]."""
        content = [{"type": media.part}] * media.count + [{"type": "text", "text": question}]
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        written, token = map(self._token, (media.placeholder, media.token))
        text = text.replace(written, media.spelled.replace(RUN, token))
        bos = self.tokenizer.bos_token
        special = not (bos and text.startswith(bos))
        return torch.tensor(self.tokenizer(text, add_special_tokens=special)["input_ids"])

    def split(self, media: Media, question: str) -> tuple[Tensor, list[list[int]], Tensor]:
        """Ids before the first run of visual tokens [1, P], between runs, after the last [1, T]."""
        ids = self.ids(media, question)
        places = (ids == media.token).nonzero()[:, 0].tolist()
        if len(places) != media.runs:
            raise ModelError(
                f"the chat template leaves place for {len(places)} runs of visual tokens, want"
                f" {media.runs}; repair chat_template.jinja"
            )
        between = [ids[first + 1 : last].tolist() for first, last in pairwise(places)]
        return ids[: places[0]][None], between, ids[places[-1] + 1 :][None]

    def _token(self, number: int) -> str:
        return str(self.tokenizer.convert_ids_to_tokens(number))


def _processors_template(folder: Path) -> str | None:
    """The chat template of a processor, which goes before its tokenizer's."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if (folder / "chat_template.json").is_file():
        return str(read_json(folder / "chat_template.json").get("chat_template", "")) or None
    return None
