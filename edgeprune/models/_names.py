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
    r"\.attention\.query_norm\.": ".self_attn.q_norm.",
    r"\.attention\.key_norm\.": ".self_attn.k_norm.",
    r"\.attention_norm\.": ".input_layernorm.",
    r"\.mlp_norm\.": ".post_attention_layernorm.",
    r"\.mlp\.(gate|up|down)\.": r".mlp.\1_proj.",
}
"""Decoder parameters, below the text model's stem; `head.` is apart."""

_BLOCK = {
    r"\.query\.": ".self_attn.q_proj.",
    r"\.key\.": ".self_attn.k_proj.",
    r"\.value\.": ".self_attn.v_proj.",
    r"\.output\.": ".self_attn.out_proj.",
    r"\.attention_norm\.": ".layer_norm1.",
    r"\.mlp_norm\.": ".layer_norm2.",
    r"\.up\.": ".mlp.fc1.",
    r"\.down\.": ".mlp.fc2.",
}

CLIP = {
    r"^cls$": "embeddings.class_embedding",
    r"^patch\.": "embeddings.patch_embedding.",
    r"^position$": "embeddings.position_embedding.weight",
    r"^pre_norm\.": "pre_layrnorm.",
    r"^post_norm\.": "post_layernorm.",
    r"^blocks\.": "encoder.layers.",
    **_BLOCK,
}
"""CLIP and SigLIP vision tower parameters, below the tower's stem."""

INTERNVIT = {
    r"^cls$": "embeddings.cls_token",
    r"^patch\.": "embeddings.patch_embeddings.projection.",
    r"^position$": "embeddings.position_embeddings",
    r"^post_norm\.": "layernorm.",
    r"^blocks\.": "encoder.layer.",
    r"\.query\.": ".attention.q_proj.",
    r"\.key\.": ".attention.k_proj.",
    r"\.value\.": ".attention.v_proj.",
    r"\.query_norm\.": ".attention.q_norm.",
    r"\.key_norm\.": ".attention.k_norm.",
    r"\.output\.": ".attention.projection_layer.",
    r"\.attention_gain\.weight$": ".lambda_1",
    r"\.mlp_gain\.weight$": ".lambda_2",
    r"\.attention_norm\.": ".layernorm_before.",
    r"\.mlp_norm\.": ".layernorm_after.",
    r"\.up\.": ".mlp.fc1.",
    r"\.down\.": ".mlp.fc2.",
}
"""InternViT's, in transformers' own layout."""

PROJECTOR = {
    r"^norm\.": "layer_norm.",
    r"^first\.": "linear_1.",
    r"^second\.": "linear_2.",
}
"""Below multi_modal_projector."""

# transformers has written these families under several stems over the years; all are read.
_TEXT = ("language_model.model.", "model.language_model.", "language_model.")
_TOWER = ("{}.vision_model.", "model.{}.vision_model.", "{}.", "model.{}.")
_PROJECTOR = ("multi_modal_projector.", "model.multi_modal_projector.")


def stored_names(
    parameter: str, tower: Mapping[str, str], stem: str = "vision_tower"
) -> tuple[str, ...]:
    """A parameter's names in checkpoints of a vision tower, a projector and a decoder."""
    owner, _, rest = parameter.partition(".")
    if owner == "encoder":
        return tuple(place.format(stem) + translate(rest, tower) for place in _TOWER)
    if owner == "projector":
        return tuple(stem + translate(rest, PROJECTOR) for stem in _PROJECTOR)
    if parameter == "fixed.newline":
        return "image_newline", "model.image_newline"
    if parameter == "fixed.text":
        parameter = "embedding.weight"
    if owner == "head":
        return "lm_head.weight", "language_model.lm_head.weight"
    return tuple(stem + translate(parameter, LLAMA) for stem in _TEXT)


def translate(name: str, table: Mapping[str, str]) -> str:
    """Every rule of a table applied in turn."""
    for pattern, theirs in table.items():
        name = re.sub(pattern, theirs, name)
    return name
