"""A checkpoint's tokenizer and chat template: a question becomes ids as transformers makes them."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgeprune.errors import ModelError, brief
from edgeprune.models._media import IMAGE_SLOT, Media, Turns
from edgeprune.models._stored import read_json, read_text
from edgeprune.models._tokenizer import read_tokenizer


class Chat:
    """Reads tokenizer and template by themselves: none of a checkpoint's code is run."""

    def __init__(self, folder: Path, template: str | None = None) -> None:
        """Of the folder's tokenizer; `template` goes before what the folder has."""
        self.tokenizer, self.notes = read_tokenizer(folder)
        if found := template or processors_template(folder):
            self.tokenizer.chat_template = found

    def ids(self, media: Media, question: str) -> Tensor:
        """The whole prompt, one visual token for each run of them: int64 [n]."""
        written, token = map(self._token, (media.placeholder, media.token))
        text = self._written(media, question, written)
        begun = text
        while begun.startswith(written):  # of several images all may stand in front
            begun = begun.removeprefix(written)
        text = text.replace(written, media.template.replace(IMAGE_SLOT, token))
        bos = self.tokenizer.bos_token
        special = not (bos and begun.startswith(bos))
        return torch.tensor(self.tokenizer(text, add_special_tokens=special)["input_ids"])

    def _written(self, media: Media, question: str, placeholder: str) -> str:
        """The prompt as the template writes it; ModelError where it cannot."""
        if not self.tokenizer.chat_template:
            first = known(media.assumed).first
            shown = placeholder * media.count
            return first.replace("{image}", shown).replace("{prompt}", question)
        content = [{"type": media.part}] * media.count + [{"type": "text", "text": question}]
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    [{"role": "user", "content": content}],
                    add_generation_prompt=True,
                    tokenize=False,
                )
            )
        except Exception as error:  # a template may fail in any way
            raise ModelError(
                f"the chat template fails ({brief(error)}); repair chat_template.jinja"
            ) from error

    def split(self, media: Media, question: str) -> tuple[Tensor, list[list[int]], Tensor]:
        """Ids before the first run of visual tokens [1, P], between runs, after the last [1, T]."""
        ids = self.ids(media, question)
        starts = (ids == media.token).nonzero()[:, 0].tolist()
        if len(starts) != media.runs:
            raise ModelError(
                f"the chat template leaves room for {len(starts)} runs of visual tokens, want"
                f" {media.runs}; repair chat_template.jinja"
            )
        between = [ids[first + 1 : last].tolist() for first, last in pairwise(starts)]
        return ids[: starts[0]][None], between, ids[starts[-1] + 1 :][None]

    def _token(self, number: int) -> str:
        return str(token_at(self.tokenizer, number))


def token_at(tokenizer: Any, number: int) -> str | None:
    """The token of a number; None where the tokenizer has none, or takes no such number."""
    try:
        found: str | None = tokenizer.convert_ids_to_tokens(number)
    except OverflowError:
        return None
    return found


def known(assumed: Turns | None) -> Turns:
    """What to assume for a checkpoint without a template; ModelError where that is not known."""
    if assumed is None:
        raise ModelError("the checkpoint has no chat template; add chat_template.jinja to it")
    return assumed


def processors_template(folder: Path) -> str | None:
    """The chat template of a processor, which goes before its tokenizer's."""
    if (folder / "chat_template.jinja").is_file():
        return read_text(folder / "chat_template.jinja")
    if (folder / "chat_template.json").is_file():
        return str(read_json(folder / "chat_template.json").get("chat_template", "")) or None
    return None
