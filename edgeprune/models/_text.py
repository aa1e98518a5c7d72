"""Reading the decoder of a checkpoint from transformers' text config."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from edgeprune.errors import ModelError
from edgeprune.models._decoder_config import DecoderConfig, LayerConfig, Rescale
from edgeprune.models._gemma import gemma
from edgeprune.models._layers import ACTIVATIONS
from edgeprune.models._rope import read_rope

Kind = Callable[[Any, DecoderConfig], DecoderConfig]
"""From a text config, and the plain decoder of its sizes, to the decoder of one kind."""
ACTIVATION = "hidden_activation", "hidden_act"
"""Names of the setting that says the MLP's activation, likeliest first."""
UNSAID = {"lfm2": "silu"}
"""The activation of decoders whose configs have no such setting."""


def _plain(text: Any, decoder: DecoderConfig) -> DecoderConfig:
    return decoder


def _biased(text: Any, decoder: DecoderConfig) -> DecoderConfig:
    bias = text.attention_bias
    return _layers(decoder, qkv_bias=bias, output_bias=bias)


def _llama(text: Any, decoder: DecoderConfig) -> DecoderConfig:
    return _layers(_biased(text, decoder), mlp_bias=text.mlp_bias)


def _qwen2(text: Any, decoder: DecoderConfig) -> DecoderConfig:
    return _layers(decoder, qkv_bias=True)  # whatever the config says


def _qwen3(text: Any, decoder: DecoderConfig) -> DecoderConfig:
    return _layers(_biased(text, decoder), qk_norm=True)


def _granite(text: Any, decoder: DecoderConfig) -> DecoderConfig:
    """LLaMA with four factors: m of the embeddings, r of both branches, those of attention and of
    the logits.

    The residual stream is held divided by m: norms do not see that, but for their eps, which is
    divided by m^2, and branches have the factor r / m. So the graph is LLaMA's.
    """
    m, r = text.embedding_multiplier, text.residual_multiplier
    rescaled = (
        Rescale(r"layers\.\d+\.(attention\.output|mlp\.down)\.", r / m),
        Rescale(r"norm\.", 1 / text.logits_scaling),
    )
    llama = _layers(_llama(text, decoder), scale=text.attention_multiplier)
    return replace(llama, eps=decoder.eps / m**2, rescaled=rescaled)


def _ministral3(text: Any, decoder: DecoderConfig) -> DecoderConfig:
    """Mistral's, whose queries are scaled from some position on; no dialogue gets there."""
    rope = text.rope_parameters
    if not rope.get("llama_4_scaling_beta"):
        return decoder
    first = int(rope.get("original_max_position_embeddings") or 0)
    return replace(decoder, max_positions=min(decoder.max_positions, first))


def _lfm2(text: Any, decoder: DecoderConfig) -> DecoderConfig:
    """Short convolutions in most layers, in the others attention with norms of queries and keys."""
    kinds, known = list(text.layer_types), {"conv", "full_attention"}
    if len(kinds) != len(decoder.layers) or not set(kinds) <= known or "conv" not in kinds:
        raise ModelError(f"layer_types of a lfm2 decoder are conv and full_attention; got {kinds}")
    if text.conv_L_cache < 2:
        raise ModelError(f"conv_L_cache of a lfm2 decoder is at least 2; got {text.conv_L_cache}")
    attention = replace(decoder.layers[0], qk_norm=True)
    short = replace(decoder.layers[0], kernel=text.conv_L_cache, output_bias=text.conv_bias)
    layers = tuple(short if kind == "conv" else attention for kind in kinds)
    return replace(decoder, layers=layers, mlp_width=_lfm2_mlp(text))


def _lfm2_mlp(text: Any) -> int:
    """Width of the MLP: two thirds of what the config says, in multiples of a number."""
    width: int = text.intermediate_size
    if not text.block_auto_adjust_ff_dim:
        return width
    width = int(2 * width / 3)
    if text.block_ffn_dim_multiplier is None:
        return width
    step: int = text.block_multiple_of
    return step * -(-int(text.block_ffn_dim_multiplier * width) // step)


def _layers(decoder: DecoderConfig, **changes: Any) -> DecoderConfig:
    """The same changes of all layers."""
    return replace(decoder, layers=tuple(replace(layer, **changes) for layer in decoder.layers))


DECODERS: dict[str, Kind] = {
    "gemma": gemma,
    "llama": _llama,
    "granite": _granite,
    "ministral3": _ministral3,
    "lfm2": _lfm2,
    "mistral": _plain,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
}
"""By `model_type` of a text config; a family with text configs of its own says of what kind they
are."""


def decoder_config(text: Any, tied: bool, kind: str | Kind | None = None) -> DecoderConfig:
    """Sizes of a decoder of some kind, or of the one that the config names; ModelError names what
    it asks for and is not supported."""
    name = text.model_type if kind is None else kind
    if isinstance(name, str) and name not in DECODERS:
        raise ModelError(f"this checkpoint has a {name} decoder; supported: {', '.join(DECODERS)}")
    made = DECODERS[name] if isinstance(name, str) else name
    named = (getattr(text, setting, None) for setting in ACTIVATION)
    activation = next(filter(None, named), UNSAID.get(text.model_type))
    if activation not in ACTIVATIONS:
        raise ModelError(f"activation {activation!r} in the decoder is not supported")
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    positions = _positions(text)
    plain = DecoderConfig(
        layers=(LayerConfig(activation),) * text.num_hidden_layers,
        width=text.hidden_size,
        mlp_width=text.intermediate_size,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        head_size=head_size,
        vocabulary=text.vocab_size,
        eps=text.norm_eps if text.model_type == "lfm2" else text.rms_norm_eps,
        max_positions=positions,
        rope=read_rope(text, head_size, positions),
        tied=tied,
    )
    return made(text, plain)


def _positions(text: Any) -> int:
    """Tokens that a dialogue may have: within a sliding window, attention is the full one."""
    window = getattr(text, "sliding_window", None)
    most: int = text.max_position_embeddings
    return min(most, window or most)
