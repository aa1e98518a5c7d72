"""Checkpoints that are not supported: the nearest family, and what is missing, part by part."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from edgeprune.models._text import DECODERS
from edgeprune.models._towers import CLIP, SIGLIP

TOWERS = {
    CLIP: "llava",
    SIGLIP: "llava",
    "siglip2_vision_model": "lfm2_vl",
    "pixtral": "mistral3",
    "idefics3_vision": "smolvlm",
    "glm46v_vision": "glm4v",
}
"""A family by the `model_type` of its `vision_config`, beside those that are named after it."""
BUILT = {**dict.fromkeys(DECODERS, "llava"), "gemma2": "paligemma", "ministral3": "mistral3"}
"""The same of `text_config`; a LLaVA takes any decoder of a kind of its own."""


@dataclass(frozen=True, slots=True)
class Nearby:
    """A model of transformers to which a family of ours is the nearest."""

    name: str
    model_types: tuple[str, ...]  # as config.json says them
    tower: str = ""  # what of each part is not built; empty: nothing
    projector: str = ""
    decoder: str = ""
    processor: str = ""

    @property
    def missing(self) -> str:
        """The parts with what is missing of each, for people."""
        parts = ("tower", "projector", "decoder", "processor")
        found = ((part, getattr(self, part)) for part in parts)
        return "; ".join(f"{part}: {lacks}" for part, lacks in found if lacks)


def parts(config: Mapping[str, Any], families: Collection[str]) -> str:
    """What is known here of the parts of a checkpoint of an unknown family, and the family that is
    the nearest by them, for people; empty where its config names none."""
    found = list(_parts(config, families))
    told = [
        f"its {part}, {kind}, is {f'that of {family}' if family else 'not built here'}"
        for part, kind, family in found
    ]
    nearest = next((family for _, _, family in found if family), "")
    return "; ".join([*told, *([f"the nearest family is {nearest}"] if nearest else [])])


def _parts(config: Mapping[str, Any], families: Collection[str]) -> Iterator[tuple[str, str, str]]:
    """Of tower and decoder the type, and a family that has it; empty where there is none."""
    for part, section, known, end in (
        ("tower", "vision_config", TOWERS, "_vision"),
        ("decoder", "text_config", BUILT, "_text"),
    ):
        inner = config.get(section)
        kind = inner.get("model_type") if isinstance(inner, dict) else None
        if isinstance(kind, str):
            own = kind.removesuffix(end)
            yield part, kind, known.get(kind, own if own in families else "")
