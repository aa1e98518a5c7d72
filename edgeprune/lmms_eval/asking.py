"""What a request of lmms-eval asks for, in the words of a session."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from edgeprune.errors import EdgepruneError, InputError, SpecError
from edgeprune.generation import Sampling
from edgeprune.manifest import ImageRecord
from edgeprune.runtime.media import Shown

PLACEHOLDER = "<image>"
"""Where tasks want an image in their text; a bundle has its images at a place of its own."""
NUMBERS = ("top_p", "top_k", "min_p", "repetition_penalty", "no_repeat_ngram_size")
IGNORED = ("do_sample", "num_beams", "temperature", "until", "max_new_tokens", "use_cache")
"""Read by name below, or, as for use_cache, without effect on the answer."""


def sampling(asked: Mapping[str, Any], own: Sampling, most: int | None) -> Sampling:
    """The settings of an answer: the task's, else the checkpoint's own; greedy unless a task draws.

    `most` bounds the tokens of an answer. SpecError for what cannot be done.
    """
    beams = asked.get("num_beams") or 1
    if beams != 1:
        raise SpecError(f"a bundle has no beam search; the task asks for num_beams {beams}")
    if unknown := [n for n in asked if n not in (*NUMBERS, *IGNORED) and asked[n] is not None]:
        raise SpecError(f"a bundle does not know {', '.join(unknown)}, which the task asks for")
    changes = {name: asked[name] for name in NUMBERS if asked.get(name) is not None}
    tokens = [n for n in (asked.get("max_new_tokens"), most) if n is not None]
    until = asked.get("until") or ()
    stops = (until,) if isinstance(until, str) else tuple(until)
    return replace(
        own,
        **changes,
        temperature=_temperature(asked, own),
        stop=tuple(stop for stop in stops if stop),
        max_new_tokens=min(tokens) if tokens else own.max_new_tokens,
    )


def _temperature(asked: Mapping[str, Any], own: Sampling) -> float:
    """0, which takes the likeliest token, unless the task draws."""
    wanted = asked.get("temperature")
    draws = asked.get("do_sample", bool(wanted))
    return float(wanted if wanted is not None else own.temperature or 1.0) if draws else 0.0


def shown(visuals: Sequence[Any] | None, record: ImageRecord) -> Shown:
    """The images of a question, as many as the bundle takes, or the file of a video.

    InputError where they are of another kind or number.
    """
    found = list(visuals or ())
    if record.frames is not None and len(found) == 1 and isinstance(found[0], str):
        return Path(found[0])
    kinds = {type(one).__name__ for one in found if not isinstance(one, (Image.Image, str))}
    if kinds:
        raise InputError(f"a bundle takes images; the question has: {', '.join(sorted(kinds))}")
    wanted, what = (record.frames, "frame") if record.frames else (record.images, "image")
    if len(found) != wanted:
        option = "--frames" if record.frames else "--num-images"
        repair = f"; export with {option} {len(found)}" if found else ""
        raise InputError(
            f"the bundle takes {wanted} {what}{'s' if wanted > 1 else ''}, the question has"
            f" {len(found) or 'none'}{repair}"
        )
    return [Path(one) if isinstance(one, str) else one for one in found]


def prompt(text: str) -> str:
    """The text without placeholders of images, and without the blanks that they leave."""
    return text.replace(PLACEHOLDER, "").strip() if PLACEHOLDER in text else text


def named(task: str, number: object, error: EdgepruneError) -> EdgepruneError:
    """The error with the question that it is about."""
    return type(error)(f"question {number} of {task}: {error}")
