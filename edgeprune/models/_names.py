"""Translation of our parameter names into those of Hugging Face checkpoints."""

from __future__ import annotations

import re
from collections.abc import Mapping

LLAMA = {
    r"^embedding\.": "embed_tokens.",
    r"\.attention\.query\.": ".self_attn.q_proj.",
    r"\.attention\.key\.": ".self_attn.k_proj.",
    r"\.attention\.value\.": ".self_attn.v_proj.",
    r"\.attention\.output\.": ".self_attn.o_proj.",
    r"\.attention_norm\.": ".input_layernorm.",
    r"\.mlp_norm\.": ".post_attention_layernorm.",
    r"\.mlp\.(gate|up|down)\.": r".mlp.\1_proj.",
}
"""Decoder parameters, below the text model's stem; `head.` is apart."""

CLIP = {
    r"^cls$": "embeddings.class_embedding",
    r"^patch\.": "embeddings.patch_embedding.",
    r"^position$": "embeddings.position_embedding.weight",
    r"^pre_norm\.": "pre_layrnorm.",
    r"^blocks\.": "encoder.layers.",
    r"\.query\.": ".self_attn.q_proj.",
    r"\.key\.": ".self_attn.k_proj.",
    r"\.value\.": ".self_attn.v_proj.",
    r"\.output\.": ".self_attn.out_proj.",
    r"\.attention_norm\.": ".layer_norm1.",
    r"\.mlp_norm\.": ".layer_norm2.",
    r"\.up\.": ".mlp.fc1.",
    r"\.down\.": ".mlp.fc2.",
}
"""CLIP vision tower parameters, below the tower's stem."""


def translate(name: str, table: Mapping[str, str]) -> str:
    """Every rule of a table applied in turn."""
    for pattern, theirs in table.items():
        name = re.sub(pattern, theirs, name)
    return name
