"""`qwen.tiktoken`, the vocabulary of the first Qwen models, as a tokenizer of `tokenizers`.

A line is a token's bytes in base64 and its rank. Of two neighbours those are joined whose bytes
together have the lowest rank. Control tokens are numbered on from the ranks.
"""

from __future__ import annotations

import base64
import binascii
from pathlib import Path
from typing import Any

from edgeprune.errors import ModelError

FILE = "qwen.tiktoken"

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""What a text is cut into first; Qwen2 has the same in its tokenizer.json."""

END, TURN, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
IMAGE, IMAGE_END, PATCH = "<img>", "</img>", "<imgpad>"
CONTROL = (
    *(END, TURN, TURN_END),
    *(f"<|extra_{number}|>" for number in range(205)),
    *("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>"),
    *(IMAGE, IMAGE_END, PATCH),
)


def tokenizer(file: Path) -> Any:
    """A tokenizer of transformers; ModelError where a line is wrong."""
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
    )
    from transformers import PreTrainedTokenizerFast

    ranks, letters = _ranks(file), _letters()
    vocabulary = {"".join(letters[b] for b in token): rank for token, rank in ranks.items()}
    pairs = [tuple("".join(letters[b] for b in part) for part in pair) for pair in _merges(ranks)]
    made = Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=True))  # type: ignore[arg-type]
    made.normalizer = normalizers.NFC()
    cut = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([cut, whole])
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in CONTROL])
    roles = {"eos_token": END, "pad_token": END}
    return PreTrainedTokenizerFast(
        tokenizer_object=made, clean_up_tokenization_spaces=False, **roles
    )


def _ranks(file: Path) -> dict[bytes, int]:
    """Tokens by their bytes: ranks 0, 1, 2, ..., all single bytes among them."""
    found = dict[bytes, int]()
    try:
        lines = file.read_bytes().splitlines()
    except OSError as error:
        raise ModelError(f"{file} cannot be read ({error.strerror}); download it again") from error
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            token, rank = line.split()
            found[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise ModelError(
                f"{file}, line {number}, is not a token in base64 and its rank; download it again"
            ) from error
    single = all(bytes([byte]) in found for byte in range(256))
    if sorted(found.values()) != list(range(len(lines) - lines.count(b""))) or not single:
        raise ModelError(
            f"{file} does not rank every byte and every token once, from 0 on; download it again"
        )
    return found


def _merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Pairs of tokens that are a token together, by its rank: every way to make it of two."""
    found = list[tuple[int, int, int, tuple[bytes, bytes]]]()
    for token, rank in ranks.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ranks and right in ranks:
                found.append((rank, ranks[left], ranks[right], (left, right)))
    return [pair for *_, pair in sorted(found)]


def _letters() -> list[str]:
    """The letter by which byte-level vocabularies name each byte: itself where it can be seen, else
    one from 256 on (as GPT-2 has them)."""
    seen = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = [byte for byte in range(256) if byte not in seen]
    return [chr(byte) if byte in seen else chr(256 + hidden.index(byte)) for byte in range(256)]
