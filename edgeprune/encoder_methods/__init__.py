"""Methods that shorten the vision encoder, one file each: the file name is the method's name.

A file holds one class `Method`, a frozen dataclass whose fields are the options of `--encoder`.
Listing, help and tests find it by themselves.
"""

from __future__ import annotations

from dataclasses import fields
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from edgeprune.encoder_methods._method import EncoderMethod
from edgeprune.errors import SpecError

__all__ = ["AUTO", "DENSE", "EncoderMethod", "make", "names"]

DENSE = "dense"
"""What --encoder says where every patch goes through every block."""
AUTO = "auto"
"""What it says where the best within a budget is looked for."""


def names() -> list[str]:
    """Every method, sorted; imports none of them."""
    return sorted(module.name for module in iter_modules(__path__) if module.name[0] != "_")


def load(name: str) -> type[EncoderMethod]:
    """The class of one method."""
    method: type[EncoderMethod] = import_module(f"{__name__}.{name}").Method
    return method


def make(text: str) -> EncoderMethod | None:
    """The method that `--encoder exit:at=8:keep=0.5` asks for; None for `dense`."""
    name, *options = text.split(":")
    if text == AUTO:
        raise SpecError(
            "--encoder auto is chosen together with the decoder's counts by export and plan alone"
        )
    if name == DENSE and not options:
        return None
    if name not in names():
        known = ", ".join([DENSE, *names()])
        raise SpecError(f"--encoder has no method {name!r}; choose one of: {known}")
    cls = load(name)
    defaults = {field.name: field.default for field in fields(cls)}
    values = dict[str, Any]()
    for option in options:
        key, equals, value = option.partition("=")
        if not equals or key not in defaults:
            known = ", ".join(f"{known}=" for known in defaults)
            raise SpecError(f"--encoder {name} takes {known} with colons between; got {option!r}")
        if key in values:
            raise SpecError(f"--encoder {text} gives {key} twice; give it once")
        kind = type(defaults[key])
        try:
            values[key] = kind(value)  # type: ignore[misc]
        except ValueError as error:
            raise SpecError(
                f"--encoder {name}:{key}= takes a {kind.__name__}; got {value!r}"
            ) from error
    return cls(**values)
