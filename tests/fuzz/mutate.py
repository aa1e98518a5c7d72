"""Alterations of bytes, and of JSON with regard to types."""

from __future__ import annotations

import copy
import json
from random import Random
from typing import Any

INTEGERS = (
    -1,
    0,
    1,
    2,
    3,
    7,
    255,
    256,
    65_535,
    65_536,
    2**31 - 1,
    2**31,
    2**32,
    2**53,
    2**62,
    2**63,
    2**64,
    -(2**31),
    -(2**62),
    10**30,
)
FLOATS = (0.0, -0.0, 0.5, 1.5, -1.0, 1e-30, 1e30, 1e308, float("nan"), float("inf"), float("-inf"))
STRINGS = (
    "",
    " ",
    "nosuch",
    "../x",
    "/etc/passwd",
    "C:\\x",
    "a\0b",
    "\x1b[31mred\x1b[0m",
    "\n\n",
    "\ud800",
    "\u202e",
    "{prompt}",
    "{image}",
    "{}",
    "%s",
    "<image>",
    "0",
    "none",
    "in-place",
    "x" * 70_000,
    "\U0001f600" * 99,
    "e\u0301" * 99,
    "-1",
    "1e999",
    "true",
)
DEEP = "@@deep@@"
"""Stands for a value nested too deep for `json.dumps`."""


def hostile(value: Any, rng: Random) -> Any:
    """A value in place of another: of its own type more often than not."""
    if rng.random() < 0.2:
        value = rng.choice([None, True, 0, 0.5, "", [], {}])
    if isinstance(value, bool) or value is None:
        return rng.choice([True, False, None, 0, 1, "true", [], {}])
    if isinstance(value, int):
        near = [value - 1, value + 1, value * 2, -value, value * 1000, value + 0.5, value // 2]
        return rng.choice([*near, *INTEGERS])
    if isinstance(value, float):
        return rng.choice([-value, value * 1e6, value * 1e-6, *FLOATS, *INTEGERS])
    if isinstance(value, str):
        return rng.choice([value + "x", value[:-1], value * 3, value.upper(), *STRINGS])
    if isinstance(value, list):
        ways = [[], value * 2, value[:-1], value[1:], value[::-1], [value], value * 500, [None]]
        return rng.choice(ways)
    return rng.choice([{}, {"nosuch": value}, [value], {**value, "": 0}, DEEP])


def alter(tree: Any, rng: Random, times: int | None = None) -> tuple[str, str]:
    """JSON text of a tree with one to three alterations, and what they were."""
    tree, notes = copy.deepcopy(tree), []
    for _ in range(times or rng.choice([1, 1, 1, 2, 3])):
        entries = _entries(tree)
        if not entries:
            break
        path, holder, key = rng.choice(entries)
        notes.append(_alter_one(holder, key, entries, rng, path))
    text = json.dumps(tree)
    if DEEP in text:
        depth = rng.choice([300, 980, 5000, 100_000])
        text = text.replace(f'"{DEEP}"', "[" * depth + "]" * depth, 1)
    return text, "; ".join(notes)


def _alter_one(holder: Any, key: Any, entries: list[Any], rng: Random, path: str) -> str:
    way = rng.random()
    if way < 0.70:
        holder[key] = hostile(holder[key], rng)
        return f"{path} = {str(holder[key])[:60]!r}"
    if way < 0.80:
        del holder[key]
        return f"{path} left out"
    if way < 0.86 and isinstance(holder, list):
        holder.insert(rng.randrange(len(holder) + 1), copy.deepcopy(holder[key]))
        return f"{path} twice"
    if way < 0.90 and isinstance(holder, dict):
        holder[rng.choice(["nosuch", "", "a\0b", "x" * 9999, "__class__"])] = rng.choice(INTEGERS)
        return f"a key beside {path}"
    if way < 0.93:
        holder[key] = DEEP
        return f"{path} nested deep"
    other, holder_2, key_2 = rng.choice(entries)
    try:
        holder[key], holder_2[key_2] = copy.deepcopy(holder_2[key_2]), copy.deepcopy(holder[key])
    except (KeyError, IndexError):  # one lay within what the other has replaced
        return f"{path} = {other}"
    return f"{path} and {other} exchanged"


def _entries(tree: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    """Every value: its path, what holds it, and its key there."""
    found: list[tuple[str, Any, Any]] = []
    keys = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in keys:
        here = f"{path}.{str(key)[:30]}"
        found.append((here, tree, key))
        if isinstance(value, (dict, list)) and len(found) < 5000:
            found += _entries(value, here)
    return found


def parses(text: str | bytes) -> bool:
    """Whether JSON can be read."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def damage(content: bytes, rng: Random, other: bytes = b"") -> tuple[bytes, str]:
    """Bytes changed without regard to what they mean."""
    data = bytearray(content)
    way = rng.choice(["flip", "flip", "flip", "cut", "insert", "repeat", "splice", "zero", "ones"])
    at = rng.randrange(len(data) or 1)
    size = min(len(data) - at, rng.choice([1, 2, 4, 16, 256]))
    if way == "flip":
        for _ in range(rng.choice([1, 1, 2, 4, 16, 64])):
            if data:
                data[rng.randrange(len(data))] = rng.randrange(256)
    elif way == "cut":
        del data[at:]
    elif way == "insert":
        data[at:at] = rng.randbytes(rng.choice([1, 4, 64, 4096]))
    elif way == "repeat":
        data[at:at] = data[at : at + size] * rng.choice([1, 2, 200])
    elif way == "splice":
        data[at:] = other[rng.randrange(len(other) or 1) :]
    else:
        data[at : at + size] = (b"\0" if way == "zero" else b"\xff") * size
    return bytes(data), f"{way} at {at}"
