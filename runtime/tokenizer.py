"""The tokenizer of a bundle. Its file may come from anybody, so every fault of it is one error, and
none takes long.

The tokenizers library is written in Rust. On a file that contradicts itself it panics, which Python
sees as a BaseException, or raises a bare ValueError; a regular expression may take hours over a
short text. What is left to the operating system is memory: a file of TOKENIZER_BYTES may make the
library take several times as much.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

from tokenizers import AddedToken, Tokenizer

from edgeprune.errors import BundleError, InputError, brief

TOKENIZER_BYTES = 128 << 20
"""A larger file is not read: 256,000 words with their merges take 34 MB."""
PART_BYTES = 4 << 20
"""A normalizer, pre-tokenizer, post-processor or decoder is no larger; one of T5 takes 0.4 MB."""
GROWTH = 64
"""A text is made so many times longer at most by what replaces characters."""
LAST = 1 << 24
"""The largest id: the library lists all that lie between two, which takes 4 bytes each and more."""
SECONDS = 5.0
"""What a piece of a prompt may take to become ids; a page takes a millisecond."""
TEXT = 1 << 20
"""Characters of a text at most."""
PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")


class SafeTokenizer:
    """Text -> ids and back; BundleError where the file is damaged or what it says is impossible."""

    def __init__(self, file: Path, tokenizer: Tokenizer, ids: Mapping[int, int]) -> None:
        self._file, self._tokenizer, self._ids = file, tokenizer, ids
        self.added: Mapping[int, AddedToken] = tokenizer.get_added_tokens_decoder()

    @classmethod
    def open(cls, file: Path | str) -> SafeTokenizer:
        """Read a file; what would cut or pad texts is left out."""
        with _guarded(file := Path(file), "is missing or damaged"):
            if (size := file.stat().st_size) > TOKENIZER_BYTES:
                raise ValueError(f"{size:,} bytes, at most {TOKENIZER_BYTES:,} are read")
            tokenizer = Tokenizer.from_file(str(file))
            tokenizer.no_truncation()
            tokenizer.no_padding()
            for name in PARTS:
                _check_part(name, getattr(tokenizer, name))
            return cls(file, tokenizer, {})

    def without(self, added: Collection[int]) -> SafeTokenizer:
        """The same, but that some added tokens are texts like any other."""
        with _guarded(self._file, "cannot be changed"):
            if (last := max(self._tokenizer.get_vocab().values(), default=0)) > LAST:
                raise ValueError(f"its largest id is {last:,}, at most {LAST:,} is read")
            content = json.loads(self._tokenizer.to_str())
            kept = [token for token in content["added_tokens"] if token["id"] not in added]
            content |= {"added_tokens": kept, "post_processor": None}  # it may name the others
            fewer = Tokenizer.from_str(json.dumps(content))
            ours = {token.content: number for number, token in self.added.items()}
            theirs = fewer.get_added_tokens_decoder().items()
            return SafeTokenizer(self._file, fewer, {n: ours[t.content] for n, t in theirs})

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Ids of a text; with `special` what the file puts around every text."""
        found = self._timed(lambda: _ids(self._tokenizer, text, special), text)
        return [self._ids.get(number, number) for number in found]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, without control tokens."""
        with _guarded(self._file, "cannot decode an answer"):
            return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def for_grammars(self, ends: list[int]) -> Any:
        """The tokens as llguidance takes them, `ends` among them those that end an answer."""
        from llguidance import LLTokenizer, TokenizerWrapper

        with _guarded(self._file, "has tokens that cannot be kept to a form"):
            if self._tokenizer.decoder is not None:
                return LLTokenizer(self._tokenizer.to_str(), eos_token=ends)
            words = _SpacedWords(self._tokenizer, ends)
            return LLTokenizer(TokenizerWrapper(words), n_vocab=len(words.tokens), eos_token=ends)

    def id_of(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def ids_of_word(self, word: str) -> set[int]:
        """What the vocabulary alone makes of a word."""
        with _guarded(self._file, "cannot read a word"):
            return {token.id for token in self._tokenizer.model.tokenize(word)}

    def _timed(self, work: Callable[[], list[int]], text: str) -> list[int]:
        """The work's result; BundleError where it fails, or takes longer than SECONDS.

        Rust cannot be interrupted, so it works in a thread that is left behind.
        """
        if len(text) > TEXT:
            raise InputError(f"the prompt has {len(text):,} characters, at most {TEXT:,} are read")
        outcome: list[list[int] | BaseException] = []

        def run() -> None:
            try:
                outcome.append(work())
            except BaseException as error:  # handed to the thread that waits
                outcome.append(error)

        thread = Thread(target=run, daemon=True)
        thread.start()
        thread.join(SECONDS)
        with _guarded(self._file, "cannot read this prompt"):
            if not outcome:
                raise TimeoutError(f"it took longer than {SECONDS:g} s")
            if isinstance(outcome[0], BaseException):
                raise outcome[0]
            return outcome[0]


class _SpacedWords:
    """Words that a space joins: what a file without a decoder makes of its tokens.

    Behind them stand the bytes, which the model has not: llguidance writes text that is certain
    in tokens, and takes those back that a longer one may begin with.
    """

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, ends: list[int]) -> None:
        vocabulary, added = tokenizer.get_vocab(), tokenizer.get_added_tokens_decoder()
        if (last := max(vocabulary.values(), default=0)) > LAST:
            raise ValueError(f"its largest id is {last:,}, at most {LAST:,} is read")
        self.eos_token_id = ends[0]
        self.special_token_ids = [number for number, token in added.items() if token.special]
        words = [b""] * (last + 1)
        for word, number in vocabulary.items():
            words[number] = f" {word}".encode()
        self._numbers = {word: number for number, word in enumerate(words) if word}
        self._first_byte, self._longest = len(words), max(map(len, words))
        self.tokens = words + [bytes([byte]) for byte in range(256)]

    def __call__(self, text: bytes) -> list[int]:
        """Tokens of a text, each as long as can be."""
        found, at = list[int](), 0
        while at < len(text):
            ends = range(min(at + self._longest, len(text)), at + 1, -1)
            end = next((end for end in ends if text[at:end] in self._numbers), at + 1)
            found.append(self._numbers.get(text[at:end], self._first_byte + text[at]))
            at = end
        return found


@contextmanager
def _guarded(file: Path, fault: str) -> Iterator[None]:
    """Whatever goes wrong but an interrupt is a fault of the file."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise BundleError(f"{file} {fault} ({brief(error)}); export the bundle again") from error


def _ids(tokenizer: Tokenizer, text: str, special: bool) -> list[int]:
    """As `encode`, which would keep every other thread of Python waiting."""
    (found,) = tokenizer.encode_batch([text], add_special_tokens=special)
    return list(found.ids)


def _check_part(name: str, part: Any) -> None:
    """ValueError where a part is larger than any, or makes a text grow without bound."""
    if part is None:
        return
    state = part.__getstate__()
    if len(state) > PART_BYTES:
        raise ValueError(f"its {name} has {len(state):,} bytes, at most {PART_BYTES:,} are read")
    growth = 1
    for inner in _objects(json.loads(state)):
        pattern, content = inner.get("pattern"), inner.get("content")
        if name == "decoder" and isinstance(pattern, dict) and "Regex" in pattern:
            raise ValueError("its decoder has a regular expression")
        if pattern is not None and isinstance(content, str):
            growth *= max(1, len(content))
    if growth > GROWTH:
        raise ValueError(f"its {name} makes a text {growth:,} times longer")


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    """All objects of a JSON value; Rust has bounded their depth."""
    inner = list(value.values()) if isinstance(value, dict) else value
    if isinstance(value, dict):
        yield value
    if isinstance(inner, list):
        for one in inner:
            yield from _objects(one)
