"""Checkpoints that are not supported: the nearest family, and what is missing, part by part."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from edgeprune.models._text import DECODERS
from edgeprune.models._towers import CLIP, SIGLIP


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


def parts(config: Mapping[str, Any]) -> str:
    """What is known here of the parts of a checkpoint of an unknown family, for people; empty where
    its config names none."""
    return "; ".join(_parts(config))


def _parts(config: Mapping[str, Any]) -> Iterator[str]:
    known = {"vision_config": ("tower", (CLIP, SIGLIP)), "text_config": ("decoder", DECODERS)}
    for section, (part, names) in known.items():
        inner = config.get(section)
        kind = inner.get("model_type") if isinstance(inner, dict) else None
        if isinstance(kind, str):
            yield f"its {part}, {kind}, is {'known' if kind in names else 'not'} here"
