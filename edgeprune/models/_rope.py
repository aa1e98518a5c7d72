"""Rotary frequencies of a transformers text config, old field names and new.

YaRN (Peng et al. 2023, arXiv 2309.00071) and LongRoPE (Ding et al. 2024, arXiv 2402.13753) stretch
the frequencies and multiply cosines and sines by a factor. LongRoPE has two sets of frequencies.
Which one a call uses depends on its last position, as in transformers: the keys of earlier calls
stay as they were turned.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from edgeprune.errors import ModelError, brief

KINDS = ("default", "dynamic", "linear", "llama3", "yarn", "longrope")
"""Values of `rope_type` that are supported."""


FULL = "full_attention"
"""The type of a layer that sees all tokens before it, as configs say it."""


@dataclass(frozen=True, slots=True)
class Rope:
    """How a decoder turns the pairs of a head, [head / 2] frequencies in radians per position."""

    frequencies: tuple[float, ...]
    factor: float = 1.0  # on cosines and sines
    long: tuple[float, ...] = ()  # LongRoPE: those of a call that ends beyond `original` positions
    original: int = 0

    def tables(self, positions: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of positions 0, 1, ..., computed in float32 as transformers does: each
        [positions, head / 2], or with `long` [2 * positions, head / 2], the long ones below."""
        frequencies = torch.tensor([self.frequencies, *([self.long] if self.long else [])])
        angles = torch.arange(positions).float()[None, :, None] * frequencies[:, None]
        angles = angles.flatten(0, 1)
        return angles.cos() * self.factor, angles.sin() * self.factor

    def rows(self, positions: Tensor, last: Tensor, count: int) -> Tensor:
        """Rows of the tables of `count` positions each, for the positions of a call that ends at
        position `last`, int64 [1]."""
        if not self.long:
            return positions
        return positions + count * (last >= self.original).to(torch.int64)


def read_rope(config: Any, head_size: int, positions: int, layers: str = FULL) -> Rope:
    """The rotary embedding of a decoder whose dialogues take at most so many positions; where
    `layers` of some types have one of their own, of those.

    transformers 5 keeps the settings in `rope_parameters` and fills it from older configs, so only
    that is read. `dynamic` changes nothing up to the decoder's number of positions, and no
    dialogue is longer; kinds that are not supported are refused by name.
    """
    apart = config.rope_parameters.get(layers)
    parameters = config.rope_parameters if apart is None else apart
    kind = parameters.get("rope_type", "default")
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise ModelError("this decoder rotates only a part of each head, which is not supported")
    if kind not in KINDS:
        raise ModelError(f"this decoder uses rope_type {kind!r}; supported: {', '.join(KINDS)}")
    if kind in ("default", "dynamic"):
        exponents = torch.arange(0, head_size, 2, dtype=torch.int64).float() / head_size
        return Rope(tuple((1.0 / parameters["rope_theta"] ** exponents).tolist()))
    try:
        frequencies, factor = _scaled(config, kind, None if apart is None else layers)
        if kind != "longrope":
            return Rope(frequencies, factor)
        original = int(parameters["original_max_position_embeddings"])
        long = _scaled(config, kind, None, original + 1)[0] if positions > original else ()
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"the rope settings of config.json (rope_type {kind!r}) are incomplete or wrong:"
            f" {brief(error)}"
        ) from error
    return Rope(frequencies, factor, long, original)


def whole_heads(text: Any) -> Any:
    """A text config of which the part of each head that turns is taken for the whole."""
    whole = copy.deepcopy(text)
    whole.rope_parameters = {**text.rope_parameters, "partial_rotary_factor": 1.0}
    return whole


def partly(rope: Rope, head_size: int) -> Rope:
    """The rotary embedding of a part of each head: the other pairs have a frequency of 0."""
    still = head_size // 2 - len(rope.frequencies)
    return replace(rope, frequencies=(*rope.frequencies, *(0.0,) * still))


def _scaled(
    config: Any, kind: str, layers: str | None, length: int | None = None
) -> tuple[tuple[float, ...], float]:
    """Frequencies of a kind for dialogues of a length, and the factor of its tables; of `layers` of
    a type, where these have settings of their own."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    given = {} if layers is None else {"layer_type": layers}
    frequencies, factor = ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=length, **given)
    return tuple(frequencies.tolist()), float(factor)
