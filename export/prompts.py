"""How a prompt becomes tokens, frozen as a TextRecord: chat template, tokenizer, generation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from edgeprune.errors import ModelError
from edgeprune.export.generation import Generation
from edgeprune.export.templates import ImageToken, Templates, template_text, templates, token_text
from edgeprune.export.tokens import check_rows, letters, user_tokens
from edgeprune.manifest import TextRecord
from edgeprune.models._media import Media


@dataclass(frozen=True)
class Text:
    """The text side of a bundle, and what was assumed or left out, one sentence each."""

    record: TextRecord
    notes: tuple[str, ...]


def read_text(
    source: Any,
    config: Any,
    generation: Generation,
    rows: int,
    media: Media | None = None,
    visual_ids: Sequence[int] = (),
) -> Text:
    """Freeze the prompt format of a processor or a tokenizer; ModelError where it cannot be.

    `rows` is how many tokens the embedding has. `media` says what prompts show, None for one
    image; `visual_ids` [V] is what transformers has in `input_ids` for it.
    """
    tokenizer = _tokenizer(source)
    image = ImageToken.of(tokenizer, config, media)
    if media is not None:
        token_text(tokenizer, media.token)
    found = templates(source, tokenizer, image)
    written = [found.first, found.following, found.with_system]
    around = media.around if media else ("", "")
    check_rows(tokenizer, [*written, *around], rows)
    whole = "".join([template_text(source), *written, *around])
    free, refused = user_tokens(tokenizer, config, whole, generation.eos_token_ids, rows)
    bos = tokenizer.bos_token
    record = TextRecord(
        first=found.first,
        next=found.following,
        with_system=found.with_system,
        add_special_tokens=not (bos and found.first.removeprefix("{image}").startswith(bos)),
        image_token_id=config.image_token_id if media is None else media.token,
        eos_token_ids=generation.eos_token_ids,
        generation=generation.sampling,
        around_image=around,
        visual_ids=tuple((i, len(list(run))) for i, run in groupby(visual_ids)),
        user_tokens=free,
    )
    notes = *found.notes, *_notes(tokenizer, found), *refused, *generation.notes
    return Text(record, tuple(notes))


def save_tokenizer(source: Any, path: Path) -> None:
    """Write tokenizer.json as it is run, which may differ from the checkpoint's file."""
    text = _tokenizer(source).backend_tokenizer.to_str(pretty=True)
    path.write_text(text, encoding="utf-8")  # an OSError names a full disk, `save` would not


def _notes(tokenizer: Any, found: Templates) -> Iterator[str]:
    if marks := letters(tokenizer, [found.first, found.following]):
        yield (
            f"the chat template writes {', '.join(marks)}, which this tokenizer reads as letters,"
            " not as a control token; so does transformers"
        )
    if tokenizer.clean_up_tokenization_spaces and not _is_bpe(tokenizer):
        yield "transformers tidies spaces before punctuation in answers, the runtime does not"


def _tokenizer(source: Any) -> Any:
    tokenizer = getattr(source, "tokenizer", source)
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise ModelError(
            f"the checkpoint's tokenizer is a {type(tokenizer).__name__} without a tokenizer.json;"
            " convert it with transformers' fast tokenizers"
        )
    return tokenizer


def _is_bpe(tokenizer: Any) -> bool:
    return type(tokenizer.backend_tokenizer.model).__name__ == "BPE"
