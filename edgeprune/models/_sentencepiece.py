"""A SentencePiece vocabulary, `tokenizer.model`, as a tokenizer of the tokenizers library.

The file is a protobuf message (sentencepiece_model.proto): pieces with scores and types, settings
of the training and of the normaliser. Read are BPE vocabularies without a table of character
replacements, as LLaMA's and InternLM2's are.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeprune.errors import ModelError
from edgeprune.protobuf import BYTES, FIXED32, VARINT, fields, varint

FILE = "tokenizer.model"

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Types of pieces."""

BPE = 2
"""The model type of a vocabulary whose pieces are merged pair by pair."""

SPACE = "\u2581"
"""What a space is in a piece."""

Message = dict[int, list[Any]]


@dataclass(frozen=True)
class Piece:
    text: str
    score: float
    kind: int


@dataclass(frozen=True)
class Vocabulary:
    """The pieces by id, and what the normaliser does."""

    pieces: tuple[Piece, ...]
    byte_fallback: bool
    dummy_prefix: bool  # a space before every text

    @classmethod
    def read(cls, file: Path) -> Vocabulary:
        """ModelError where the file is damaged, or is a vocabulary of another kind."""
        try:
            message = _message(memoryview(file.read_bytes()))
            pieces = tuple(map(_piece, message.get(1, ())))
            training, normaliser = (_message(message.get(n, [memoryview(b"")])[0]) for n in (2, 3))
            kind, charsmap = _first(training, 3, 1), bytes(_first(normaliser, 2, b""))
        except (OSError, ValueError, TypeError, struct.error) as error:
            raise ModelError(
                f"{file} is no whole SentencePiece vocabulary ({error}); download it again"
            ) from error
        squeezed = bool(_first(normaliser, 4, 1))
        for what, found in (
            ("another model than BPE", kind != BPE),
            ("a table of character replacements", bool(charsmap)),
            ("remove_extra_whitespaces", squeezed),
            ("no pieces", not pieces),
        ):
            if found:
                raise ModelError(f"{file} has {what}, which is not supported; add tokenizer.json")
        return cls(pieces, bool(_first(training, 35, 0)), bool(_first(normaliser, 3, 1)))

    def tokenizer(self, named: Mapping[int, str]) -> Any:
        """The tokenizer in which some pieces have other names; an added token is in a piece's
        place where both have its id."""
        from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

        texts = [named.get(number, piece.text) for number, piece in enumerate(self.pieces)]
        vocabulary = {text: number for number, text in enumerate(texts)}
        kinds = [piece.kind for piece in self.pieces]
        unknown = texts[kinds.index(UNKNOWN)] if UNKNOWN in kinds else None
        model = models.BPE(
            vocabulary,
            self._merges(named),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=self.byte_fallback,
        )
        made = Tokenizer(model)
        prefix = [normalizers.Prepend(SPACE)] if self.dummy_prefix else []
        made.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", SPACE)])
        strip = [decoders.Strip(" ", 1, 0)] if self.dummy_prefix else []
        parts = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
        made.decoder = decoders.Sequence(parts)
        own = [n for n, kind in enumerate(kinds) if kind == USER_DEFINED and n not in named]
        made.add_tokens([AddedToken(texts[n], normalized=True, special=False) for n in own])
        return made

    def _merges(self, named: Mapping[int, str]) -> list[tuple[str, str]]:
        """Pairs of pieces, that of the best piece first: every way to make it of two."""
        normal = (n for n, piece in enumerate(self.pieces) if piece.kind == NORMAL)
        usable = {self.pieces[n].text: n for n in normal if n not in named}
        found = list[tuple[float, int, int, int]]()
        for text, number in usable.items():
            for cut in range(1, len(text)):
                left, right = usable.get(text[:cut]), usable.get(text[cut:])
                if left is not None and right is not None:
                    found.append((-self.pieces[number].score, left, right, number))
        found.sort()
        return [(self.pieces[left].text, self.pieces[right].text) for _, left, right, _ in found]


def _piece(data: memoryview) -> Piece:
    fields = _message(data)
    text = bytes(_first(fields, 1, b"")).decode("utf-8")
    return Piece(text, float(_first(fields, 2, 0.0)), int(_first(fields, 3, NORMAL)))


def _message(data: memoryview) -> Message:
    """The values of a message's fields, by number."""
    found: Message = {}
    for number, kind, _, begin, end in fields(data):
        if kind == BYTES:
            value: Any = data[begin:end]
        elif kind == FIXED32:
            value = struct.unpack("<f", data[begin:end])[0]
        elif kind == VARINT:
            value = varint(data, begin)[0]
        else:
            continue
        found.setdefault(number, []).append(value)
    return found


def _first(message: Message, number: int, default: Any) -> Any:
    return message.get(number, [default])[-1]
