"""A checkpoint's tokenizer: tokenizer.json as it is stored, where a checkpoint has one.

For some families transformers 5 builds another tokenizer from the vocabulary in that file, and
leaves out how the file treats spaces. The models were trained and published with the file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgeprune.errors import ModelError, brief

_PROBE = "\nWhat is it? It's 3  é女\n"


def read_tokenizer(folder: Path) -> tuple[Any, tuple[str, ...]]:
    """A tokenizer of transformers, and notes on it; ModelError where a folder has none."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        built: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        if type(built) is PreTrainedTokenizerFast or not (folder / "tokenizer.json").is_file():
            return built, ()
        stored: Any = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises many kinds for a broken folder
        raise ModelError(
            f"{folder} has no usable processor or tokenizer: {brief(error)}"
        ) from error
    for role, token in built.special_tokens_map.items():
        if getattr(stored, role, None) is None:  # which the class knows and the file does not
            setattr(stored, role, token)
    if _reads(built) == _reads(stored):
        return stored, ()
    return stored, (
        "tokenizer.json is used as it is stored; transformers 5 builds a"
        f" {type(built).__name__} from it, which reads some prompts as other tokens",
    )


def _reads(tokenizer: Any) -> list[int]:
    """Ids of a text that holds every added token."""
    added = [token.content for _, token in sorted(tokenizer.added_tokens_decoder.items())]
    ids: list[int] = tokenizer.encode(_PROBE + "".join(token + _PROBE for token in added))
    return ids
