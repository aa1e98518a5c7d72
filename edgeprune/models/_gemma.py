"""The decoders of the Gemma models, as settings of ours.

Embeddings of text are multiplied by m, the root of the width; visual tokens are not. Here the
residual stream is held divided by m: norms do not see that, but for their eps, which is divided by
m^2, visual tokens are divided by m in the projector's weights, and what comes back from a branch in
those of its last norm or product. So the graph has no product for it, and the numbers of the
stream, which is known to overflow in half precision, are m times smaller.

transformers rounds m to the dtype of the weights; this is its m in float32.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from edgeprune.models._decoder_config import DecoderConfig, LayerConfig, Rescale
from edgeprune.models._names import LLAMA
from edgeprune.models._rope import read_rope

SLIDING = "sliding_attention"
"""Among `layer_types` of a text config, a layer with a window."""


BRANCH_NORMS = {
    **LLAMA,
    r"\.mlp_norm\.": ".pre_feedforward_layernorm.",
    r"\.attention_out_norm\.": ".post_attention_layernorm.",
    r"\.mlp_out_norm\.": ".post_feedforward_layernorm.",
}
"""Names of decoder parameters where norms stand before and behind both branches."""


def gemma(text: Any, decoder: DecoderConfig) -> DecoderConfig:
    """Norms before both branches, as LLaMA has them."""
    bias = text.attention_bias
    layers = (replace(layer, qkv_bias=bias, output_bias=bias) for layer in decoder.layers)
    return _gemma(text, replace(decoder, layers=tuple(layers)))


def gemma2(text: Any, decoder: DecoderConfig) -> DecoderConfig:
    """Norms before and behind both branches; caps of attention scores and of logits."""
    scores, logits = text.attn_logit_softcapping or None, text.final_logit_softcapping or None
    layers = (replace(layer, branch_norms=True, cap=scores) for layer in _layers(text, decoder))
    return _gemma(text, replace(decoder, layers=tuple(layers), cap=logits))


def gemma3(text: Any, decoder: DecoderConfig) -> DecoderConfig:
    """Norms before and behind both branches, of queries and keys; two rotary embeddings."""
    local = read_rope(text, decoder.head_size, text.max_position_embeddings, SLIDING)
    layers = (
        replace(layer, qk_norm=True, branch_norms=True, rope=local if layer.window else None)
        for layer in _layers(text, decoder)
    )
    return _gemma(text, replace(decoder, layers=tuple(layers), sees="image"))


def _layers(text: Any, decoder: DecoderConfig) -> list[LayerConfig]:
    """Layers with their windows and the scale of attention."""
    scale, bias = text.query_pre_attn_scalar**-0.5, text.attention_bias
    windows = [text.sliding_window if kind == SLIDING else None for kind in text.layer_types]
    return [
        replace(layer, qkv_bias=bias, output_bias=bias, scale=scale, window=window)
        for layer, window in zip(decoder.layers, windows, strict=True)
    ]


def _gemma(text: Any, decoder: DecoderConfig) -> DecoderConfig:
    """Weights of norms that are stored less 1, and the factor of the embeddings."""
    m, last = math.sqrt(text.hidden_size), r"layers\.\d+\.(attention\.output|mlp\.down)\."
    if decoder.layers[0].branch_norms:
        last = r"layers\.\d+\.(attention|mlp)_out_norm\."
    return replace(
        decoder,
        eps=decoder.eps / m**2,
        branch_eps=decoder.eps,
        max_positions=text.max_position_embeddings,
        rescaled=(
            Rescale(last, 1 / m, 1 / m if decoder.layers[0].branch_norms else 0.0),
            Rescale(r"(layers\..*_norm|norm)\.", offset=1.0),
            Rescale(r"projector\.(weight|bias|linear\.|second\.)", 1 / m),
        ),
    )
