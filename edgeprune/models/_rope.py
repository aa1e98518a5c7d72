"""Rotary frequencies of a transformers text config, old field names and new."""

from __future__ import annotations

from typing import Any

import torch

from edgeprune.errors import ModelError


def inverse_frequencies(config: Any, head_size: int) -> tuple[float, ...]:
    """Radians per position for each pair of a head: [head / 2].

    transformers 5 keeps the settings in `rope_parameters` and fills it from older configs, so only
    that is read. `dynamic` changes nothing up to the decoder's number of positions, and no
    dialogue is longer; other kinds whose frequencies depend on the length are refused by name.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = config.rope_parameters
    kind = parameters.get("rope_type", "default")
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise ModelError("this decoder rotates only a part of each head, which is not supported")
    if kind in ("default", "dynamic"):
        exponents = torch.arange(0, head_size, 2, dtype=torch.int64).float() / head_size
        return tuple((1.0 / parameters["rope_theta"] ** exponents).tolist())
    if kind not in ("linear", "llama3"):
        raise ModelError(
            f"this decoder uses rope_type {kind!r}; supported: default, dynamic, linear, llama3"
        )
    frequencies, scaling = ROPE_INIT_FUNCTIONS[kind](config, "cpu")
    if scaling != 1.0:
        raise ModelError(f"rope_type {kind!r} with attention scaling {scaling} is not supported")
    return tuple(frequencies.tolist())
