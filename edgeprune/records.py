"""JSON from others -> frozen dataclasses: types, ranges and names are checked, nothing is guessed.

A field declares what it may hold: `layers: Annotated[int, Between(1, 1024)]`. A key that a record
does not know is ignored: an older program reads what a newer one wrote. What changes the meaning of
the known keys raises the schema, which the reader compares first.
"""

from __future__ import annotations

import json
import math
import re
from contextlib import suppress
from dataclasses import dataclass, fields, is_dataclass
from types import UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    NoReturn,
    Protocol,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

DEPTH = 64
"""Lists and objects inside each other; JSON that nests deeper is refused."""


class Rule(Protocol):
    """What a value may be, beyond its type."""

    def broken(self, value: Any) -> bool:
        """Whether a value of the right type may not stand here."""
        ...


@dataclass(frozen=True, slots=True)
class Between:
    """A number from `least` to `most`, both included; never NaN nor infinite."""

    least: float
    most: float

    def broken(self, value: float) -> bool:
        return not self.least <= value <= self.most

    def __str__(self) -> str:
        return f"from {self.least:,} to {self.most:,}"


@dataclass(frozen=True, slots=True)
class OneOf:
    """One of a few texts."""

    choices: tuple[str, ...]

    def broken(self, value: str) -> bool:
        return value not in self.choices

    def __str__(self) -> str:
        return f"one of {', '.join(self.choices)}"


@dataclass(frozen=True, slots=True)
class Matches:
    """A text that a regular expression describes as a whole; `title` says it in words."""

    pattern: str
    title: str

    def broken(self, value: str) -> bool:
        return re.fullmatch(self.pattern, value) is None

    def __str__(self) -> str:
        return self.title


Count = Annotated[int, Between(1, 1 << 24)]
"""Tokens, features, entries of a vocabulary."""
Amount = Annotated[int, Between(0, 1 << 24)]
"""As Count, and none."""
Few = Annotated[int, Between(1, 1 << 12)]
"""Layers, heads, images, tiles."""
LongestEdge = Annotated[int, Between(1, 1 << 12)]
"""Pixels; its square is held in memory."""
Bytes = Annotated[int, Between(0, 1 << 50)]
"""Of files and of memory; also operations."""
Ratio = Annotated[float, Between(1, 1 << 24)]
"""A compression ratio."""
Magnitude = Annotated[float, Between(0, 1e39)]
"""Of a number of a model, without sign."""
Side = Annotated[int, Between(1, 1 << 15)]
"""Pixels of an image's side."""


def parse(text: str) -> Any:
    """The value of a JSON text; ValueError also for NaN, for infinities and for deep nesting."""
    try:
        value = json.loads(text, parse_constant=_no_number)
    except RecursionError:
        value = None
        _too_deep()
    level, depth = [value], 0
    while level := [inner for outer in level for inner in _inside(outer)]:
        depth += 1
        if depth > DEPTH:
            _too_deep()
    return value


def _inside(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def _too_deep() -> NoReturn:
    raise ValueError(f"it nests more than {DEPTH} levels deep") from None


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def build(kind: Any, value: Any, path: str) -> Any:
    """A JSON value as the type that a record declares for it; TypeError names its path.

    `path` is where the value stands, such as `manifest.decoder.layers`.
    """
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        found = build(inner[0], value, path)
        for rule in inner[1:]:
            if rule.broken(found):
                raise TypeError(f"{path} is {rule}; got {_shown(value)}")
        return found
    if origin in (UnionType, Union):  # the latter where a part is Annotated
        return _first(inner, value, path)
    if is_dataclass(kind) and isinstance(value, dict):
        return _record(kind, value, path)
    if origin is tuple and isinstance(value, list):
        kinds = inner[:1] * len(value) if inner[-1] is ... else inner
        if len(kinds) == len(value):
            return tuple(build(k, v, path) for k, v in zip(kinds, value, strict=True))
    elif origin is list and isinstance(value, list):
        return [build(inner[0], item, path) for item in value]
    elif origin is Literal:
        if value in inner:
            return value
        raise TypeError(f"{path} is one of {', '.join(map(str, inner))}; got {_shown(value)}")
    elif origin is dict and isinstance(value, dict):
        return {
            build(inner[0], k, path): build(inner[1], v, f"{path}.{k}") for k, v in value.items()
        }
    elif kind is Any or _plain(kind, value):
        return value
    raise TypeError(f"{path} cannot be {_shown(value)}")


def _plain(kind: Any, value: Any) -> bool:
    """Whether a value is of a plain type: a whole number is a float too, true is no number.

    A text is such as UTF-8 can write, without NUL.
    """
    if kind is float:
        return type(value) is int or (type(value) is float and math.isfinite(value))
    if type(value) is str:  # what follows hands it to systems that want it so
        return kind is str and "\0" not in value and is_utf8(value)
    return type(value) is kind


def is_utf8(text: str) -> bool:
    """Whether UTF-8 can write a text; of a path, whether its bytes are UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _first(kinds: tuple[Any, ...], value: Any, path: str) -> Any:
    """The value as the first of several types that takes it."""
    refusal = TypeError(f"{path} cannot be {_shown(value)}")
    for kind in kinds:
        try:
            return build(kind, value, path)
        except TypeError as error:
            if get_origin(kind) is Annotated and type(value) is get_args(kind)[0]:
                refusal = error  # the type is right: say what is wrong with the value
    raise refusal


def _record(kind: Any, value: dict[str, Any], path: str) -> Any:
    hints = get_type_hints(kind, include_extras=True)
    known = [field.name for field in fields(kind) if field.name in value]
    parts = {name: build(hints[name], value[name], f"{path}.{name}") for name in known}
    try:
        return kind(**parts)
    except TypeError as error:  # a field is missing
        raise TypeError(f"{path}: {error}") from error


def _shown(value: Any) -> str:
    with suppress(ValueError, TypeError, RecursionError):
        return json.dumps(value)[:40]
    return type(value).__name__
