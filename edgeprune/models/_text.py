"""Reading the decoder of a checkpoint from transformers' text config."""

from __future__ import annotations

from typing import Any

from edgeprune.errors import ModelError
from edgeprune.models._decoder import DecoderConfig
from edgeprune.models._rope import read_rope

DECODERS = ("llama", "mistral", "qwen2", "qwen2_vl_text", "qwen2_5_vl_text", "qwen3")
"""Values of `model_type` whose layers DecoderConfig describes in full."""


def decoder_config(text: Any, tied: bool) -> DecoderConfig:
    """Sizes of a decoder; ModelError names what it asks for and is not supported."""
    kind = text.model_type
    if kind not in DECODERS:
        raise ModelError(f"this checkpoint has a {kind} decoder; supported: {', '.join(DECODERS)}")
    if text.hidden_act != "silu":
        raise ModelError(f"activation {text.hidden_act!r} in the decoder is not supported")
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    positions = _positions(text)
    llama = kind in ("llama", "qwen3")  # the others have what their class says, not the config
    biased = llama and getattr(text, "attention_bias", False)
    return DecoderConfig(
        layers=text.num_hidden_layers,
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
        qkv_bias=biased or kind.startswith("qwen2"),
        output_bias=biased,
        mlp_bias=kind == "llama" and getattr(text, "mlp_bias", False),
        head_norms=kind == "qwen3",
    )


def _positions(text: Any) -> int:
    """Tokens that a dialogue may have: within a sliding window, attention is the full one."""
    window = getattr(text, "sliding_window", None)
    most: int = text.max_position_embeddings
    return min(most, window or most)
