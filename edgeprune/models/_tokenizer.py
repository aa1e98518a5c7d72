"""A checkpoint's tokenizer: tokenizer.json as it is stored, or made of the vocabulary.

For some families transformers 5 builds another tokenizer from the vocabulary in tokenizer.json, and
leaves out how the file treats spaces. The models were trained and published with the file. Where
there is only a SentencePiece vocabulary, it is read here: transformers wants a package for it, or
code of the checkpoint, which is never run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgeprune.errors import ModelError, brief
from edgeprune.models import _qwen_tiktoken
from edgeprune.models._sentencepiece import FILE, Vocabulary
from edgeprune.models._stored import read_json

_PROBE = "\nWhat is it? It's 3  é女\n"
_KNOWN = "tokenizer.json", "vocab.json", "vocab.txt"
_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")


def read_tokenizer(folder: Path) -> tuple[Any, tuple[str, ...]]:
    """A tokenizer of transformers, and notes on it; ModelError where a folder has none."""
    if (folder / "tokenizer.json").is_file() and _asks_for_code(folder):
        return _as_stored(folder), ()
    if (folder / "vocab.json").is_file() and _asks_for_code(folder):
        return _of_class(folder), ()
    if (folder / FILE).is_file() and not (folder / "tokenizer.json").is_file():
        return of_pieces(folder), ()
    if (folder / _qwen_tiktoken.FILE).is_file() and not (folder / "tokenizer.json").is_file():
        return _qwen_tiktoken.tokenizer(folder / _qwen_tiktoken.FILE), ()
    if not any((folder / name).is_file() for name in (*_KNOWN, "tokenizer_config.json")):
        raise _missing(folder)
    return _as_transformers_does(folder)


def _as_transformers_does(folder: Path) -> tuple[Any, tuple[str, ...]]:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        built: Any = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # transformers raises many kinds for a broken folder
        if not any((folder / name).is_file() for name in _KNOWN):
            raise _missing(folder) from error
        raise _unusable(folder, error) from error
    if type(built) is PreTrainedTokenizerFast or not (folder / "tokenizer.json").is_file():
        return built, ()
    stored = _as_stored(folder)
    for role, token in built.special_tokens_map.items():
        if getattr(stored, role, None) is None:  # which the class knows and the file does not
            setattr(stored, role, token)
    if _reads(built) == _reads(stored):
        return stored, ()
    return stored, (
        "tokenizer.json is used as it is stored; transformers 5 builds a"
        f" {type(built).__name__} from it, which reads some prompts as other tokens",
    )


def _as_stored(folder: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    try:
        return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise _unusable(folder, error) from error


def _of_class(folder: Path) -> Any:
    """The tokenizer of transformers that the folder names, without a look at config.json, which
    names code."""
    import transformers

    name = str(_settings(folder).get("tokenizer_class"))
    kind = getattr(transformers, name, None)
    if kind is None:
        raise ModelError(
            f"{folder} names the tokenizer {name}, which transformers {transformers.__version__}"
            " has not; add tokenizer.json"
        )
    try:
        return kind.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise _unusable(folder, error) from error


def of_pieces(folder: Path) -> Any:
    """The tokenizer of a folder with tokenizer.model and the files that stand beside it.

    An added token may have the id of a piece, whose place it takes then.
    """
    from tokenizers import AddedToken, processors
    from transformers import PreTrainedTokenizerFast

    settings, vocabulary = _settings(folder), Vocabulary.read(folder / FILE)
    added, count = _added(folder, settings), len(vocabulary.pieces)
    made = vocabulary.tokenizer({n: token.content for n, token in added.items() if n < count})
    for number in sorted(added):
        token = added[number]
        made.add_special_tokens([token]) if token.special else made.add_tokens([token])
        if made.token_to_id(token.content) != number:
            raise ModelError(
                f"{folder}: the added token {token.content!r} has id {number}, after {FILE} it"
                f" would be {made.token_to_id(token.content)}; add tokenizer.json"
            )
    roles = {role: _content(settings.get(role)) for role in _ROLES}
    roles = {role: text or _usual(role, made) for role, text in roles.items()}
    known = {role: text for role, text in roles.items() if text}
    made.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in known.values()])
    around = [known.get("bos_token") if settings.get("add_bos_token", True) else None, "$A"]
    around.append(known.get("eos_token") if settings.get("add_eos_token", False) else None)
    written = [part for part in around if part]
    ids = [(part, made.token_to_id(part)) for part in dict.fromkeys(written) if part != "$A"]
    made.post_processor = processors.TemplateProcessing(" ".join(written), None, ids)
    return PreTrainedTokenizerFast(
        tokenizer_object=made, clean_up_tokenization_spaces=False, **known
    )


def _added(folder: Path, settings: dict[str, Any]) -> dict[int, Any]:
    """Tokens beside the vocabulary's own by id: tokenizer_config.json's, or added_tokens.json's."""
    from tokenizers import AddedToken

    found = dict[int, Any]()
    if (folder / "added_tokens.json").is_file():
        for text, number in read_json(folder / "added_tokens.json").items():
            found[int(number)] = AddedToken(text, normalized=False, special=True)
    decoder = settings.get("added_tokens_decoder")
    for number, token in (decoder if isinstance(decoder, dict) else {}).items():
        flags = {f: bool(token.get(f)) for f in ("lstrip", "rstrip", "normalized", "special")}
        found[int(number)] = AddedToken(str(token["content"]), **flags)
    return found


def _settings(folder: Path) -> dict[str, Any]:
    file = folder / "tokenizer_config.json"
    special = folder / "special_tokens_map.json"
    roles = read_json(special) if special.is_file() else {}
    return {**roles, **(read_json(file) if file.is_file() else {})}


def _asks_for_code(folder: Path) -> bool:
    """Whether transformers would ask to run code of the folder."""
    file = folder / "config.json"
    return "auto_map" in {**_settings(folder), **(read_json(file) if file.is_file() else {})}


def _content(token: Any) -> str | None:
    """The text of a token that is given by itself or with its flags."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _usual(role: str, made: Any) -> str | None:
    """The token of a role in vocabularies of LLaMA's kind, where nothing names it."""
    usual = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}.get(role)
    return usual if usual and made.token_to_id(usual) is not None else None


def _missing(folder: Path) -> ModelError:
    other = " (tekken.json is not read)" if (folder / "tekken.json").is_file() else ""
    return ModelError(
        f"{folder} has no usable processor or tokenizer: neither tokenizer.json nor {FILE}{other};"
        " name a folder that has one with --tokenizer"
    )


def _unusable(folder: Path, error: Exception) -> ModelError:
    return ModelError(f"{folder} has no usable processor or tokenizer: {brief(error)}")


def _reads(tokenizer: Any) -> list[int]:
    """Ids of a text that holds every added token."""
    added = [token.content for _, token in sorted(tokenizer.added_tokens_decoder.items())]
    ids: list[int] = tokenizer.encode(_PROBE + "".join(token + _PROBE for token in added))
    return ids
