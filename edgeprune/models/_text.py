"""Reading the decoder of a checkpoint from transformers' text config."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from edgeprune.errors import ModelError
from edgeprune.models._decoder import DecoderConfig, LayerConfig
from edgeprune.models._encoder import ACTIVATIONS
from edgeprune.models._rope import read_rope


def _plain(text: Any) -> LayerConfig:
    return LayerConfig(activation=text.hidden_act)


def _biased(text: Any) -> LayerConfig:
    """As the config says; the other classes of transformers do not look at it."""
    bias = text.attention_bias
    return replace(_plain(text), qkv_bias=bias, output_bias=bias)


def _llama(text: Any) -> LayerConfig:
    return replace(_biased(text), mlp_bias=text.mlp_bias)


def _qwen2(text: Any) -> LayerConfig:
    return replace(_plain(text), qkv_bias=True)


def _qwen3(text: Any) -> LayerConfig:
    return replace(_biased(text), qk_norm=True)


DECODERS: dict[str, Callable[[Any], LayerConfig]] = {
    "llama": _llama,
    "mistral": _plain,
    "qwen2": _qwen2,
    "qwen2_vl_text": _qwen2,
    "qwen2_5_vl_text": _qwen2,
    "qwen3": _qwen3,
}
"""By `model_type` of a text config: what the layers of the kind are, by that config."""


def decoder_config(text: Any, tied: bool) -> DecoderConfig:
    """Sizes of a decoder; ModelError names what it asks for and is not supported."""
    kind = text.model_type
    if kind not in DECODERS:
        raise ModelError(f"this checkpoint has a {kind} decoder; supported: {', '.join(DECODERS)}")
    if text.hidden_act not in ACTIVATIONS:
        raise ModelError(f"activation {text.hidden_act!r} in the decoder is not supported")
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    positions = _positions(text)
    return DecoderConfig(
        layers=(DECODERS[kind](text),) * text.num_hidden_layers,
        width=text.hidden_size,
        mlp_width=text.intermediate_size,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        head_size=head_size,
        vocabulary=text.vocab_size,
        eps=text.rms_norm_eps,
        max_positions=positions,
        rope=read_rope(text, head_size, positions),
        tied=tied,
    )


def _positions(text: Any) -> int:
    """Tokens that a dialogue may have: within a sliding window, attention is the full one."""
    window = getattr(text, "sliding_window", None)
    most: int = text.max_position_embeddings
    return min(most, window or most)
