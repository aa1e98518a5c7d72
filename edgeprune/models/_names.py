"""Translation of our parameter names into those of Hugging Face checkpoints."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

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
"""Decoder parameters, below the text model's prefix; `head.` is apart."""

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
"""CLIP and SigLIP vision tower parameters, below the tower's prefix."""

PROJECTOR = {
    r"^norm\.": "layer_norm.",
    r"^first\.": "linear_1.",
    r"^second\.": "linear_2.",
}
"""Projector parameters, below its prefix."""


PACKED = "query", "key", "value"
"""Projections that some checkpoints store as one tensor."""


def packed_rows(name: str, queries: int, others: int | None = None) -> range:
    """Rows of one of PACKED in a tensor that holds them one below the other; `others` are those of
    keys, and of values, where these have not as many as queries."""
    others = queries if others is None else others
    start = {"query": 0, "key": queries, "value": queries + others}[name]
    return range(start, start + (queries if name == "query" else others))


@dataclass(frozen=True, slots=True)
class TensorNames:
    """How the checkpoints of a family name our parameters.

    Each part of a model has a table for what stands below its prefix, and the prefixes under which
    checkpoints have stored it over the years, likeliest first; all are read. The defaults are those
    of a CLIP or SigLIP tower, a projector of two layers and a LLaMA-like decoder.
    """

    tower: Mapping[str, str] = field(default_factory=lambda: CLIP)
    tower_prefixes: tuple[str, ...] = (
        "vision_tower.vision_model.",
        "model.vision_tower.vision_model.",
        "vision_tower.",
        "model.vision_tower.",
    )
    projector: Mapping[str, str] = field(default_factory=lambda: PROJECTOR)
    projector_prefixes: tuple[str, ...] = ("multi_modal_projector.", "model.multi_modal_projector.")
    decoder: Mapping[str, str] = field(default_factory=lambda: LLAMA)
    decoder_prefixes: tuple[str, ...] = (
        "language_model.model.",
        "model.language_model.",
        "language_model.",
    )
    head: tuple[str, ...] = ("lm_head.weight", "language_model.lm_head.weight")
    deepstack: Mapping[str, str] = field(default_factory=dict)
    newline: tuple[str, ...] = ("image_newline", "model.image_newline")

    def of(self, parameter: str) -> tuple[str, ...]:
        """The names of one parameter of a vision or a decoder module, likeliest first."""
        owner, _, rest = parameter.partition(".")
        if owner == "head":
            return self.head
        if parameter == "fixed.newline":
            return self.newline
        prefixes, table = self.decoder_prefixes, self.decoder
        if owner == "encoder":
            prefixes, table = self.tower_prefixes, self.tower
        elif owner == "deepstack":
            prefixes, table = self.tower_prefixes, self.deepstack
        elif owner == "projector":
            prefixes, table = self.projector_prefixes, self.projector
        else:  # text between images is of the decoder's embedding
            rest = "embedding.weight" if parameter == "fixed.text" else parameter
        return tuple(prefix + translate(rest, table) for prefix in prefixes)


@dataclass(frozen=True, slots=True)
class Stored:
    """How checkpoints of a family store a weight W: tensors T that stand one below the other, and
    W = factor * T + offset."""

    parts: tuple[tuple[str, ...], ...]  # of each tensor its names, likeliest first
    rows: Sequence[int] = ()  # only these of a single tensor, a tuple or a range; (): all
    factor: float = 1.0
    offset: float = 0.0


def translate(name: str, table: Mapping[str, str]) -> str:
    """Every rule of a table applied in turn."""
    for pattern, theirs in table.items():
        name = re.sub(pattern, theirs, name)
    return name
