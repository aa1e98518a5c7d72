"""Pruning methods, one file each: the file name is the method's name on the command line.

A file holds one class `Policy`, a frozen dataclass whose fields are the method's options. Adding a
method is adding a file: listing, help and tests find it by themselves.
"""

from __future__ import annotations

from dataclasses import fields
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from edgeprune.errors import SpecError
from edgeprune.policies._policy import Policy
from edgeprune.spec import PruneSpec

__all__ = ["Policy", "make", "names"]


def names() -> list[str]:
    """Every method, sorted; imports none of them."""
    return sorted(module.name for module in iter_modules(__path__) if module.name[0] != "_")


def load(name: str) -> type[Policy]:
    """The class of one method."""
    if name not in names():
        raise SpecError(f"there is no method {name!r}; choose one of: {', '.join(names())}")
    policy: type[Policy] = import_module(f"{__name__}.{name}").Policy
    return policy


def make(spec: PruneSpec) -> Policy:
    """The policy a spec asks for, its options parsed by the type of their field's default."""
    cls = load(spec.method)
    common = {f.name for f in fields(Policy)}  # these are named last
    known = {f.name: f for f in sorted(fields(cls), key=lambda f: f.name in common)}
    values: dict[str, Any] = {"seed": spec.seed} if "seed" in known else {}
    for name, text in spec.options.items():
        if name not in known:
            options = ", ".join(known) or "none"
            raise SpecError(f"method {spec.method} has no option {name!r}; it has: {options}")
        values[name] = _parse(name, text, known[name].default)
    return cls(**values)


def seed_of(policy: Policy) -> int | None:
    """The seed of a method that draws, None of others."""
    seed: int | None = getattr(policy, "seed", None)
    return seed


def _parse(name: str, text: str, default: object) -> object:
    if isinstance(default, bool):
        if text not in ("on", "off"):
            raise SpecError(f"option {name} is on or off; got {text!r}")
        return text == "on"
    kind = type(default)
    try:
        return kind(text)  # type: ignore[call-arg]
    except ValueError as error:
        raise SpecError(f"option {name} takes a {kind.__name__}; got {text!r}") from error
