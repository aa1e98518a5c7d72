"""Checkpoints that are not supported: the nearest family, and what is missing, part by part."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


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


SECTIONS = {"tower": "vision_config", "decoder": "text_config"}
"""Of a config, by the part that they describe."""


def parts(config: Mapping[str, Any], built: Mapping[str, Sequence[str]]) -> str:
    """What is known here of the parts of a checkpoint of an unknown family, and the family that has
    the most of them, for people; empty where its config names none.

    `built` has the families that build a part of a type.
    """
    found = list(_kinds(config))
    able = [family for _, kind in found for family in built.get(kind, ())]
    nearest = max(able, key=able.count, default="")
    told = list[str]()
    for part, kind in found:
        families = built.get(kind, ())
        own = nearest if nearest in families else next(iter(families), "")
        told.append(f"its {part}, {kind}, is {f'that of {own}' if own else 'not built here'}")
    return "; ".join([*told, *([f"the nearest family is {nearest}"] if nearest else [])])


def _kinds(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The parts whose types a config names, with these."""
    for part, section in SECTIONS.items():
        inner = config.get(section)
        kind = inner.get("model_type") if isinstance(inner, dict) else None
        if isinstance(kind, str):
            yield part, kind
