"""How checkpoints store quantised weights, one file each, found by their files.

A file holds a class `Format`, which reads one value of `quant_method` in config.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

from edgeprune.errors import ModelError
from edgeprune.models._stored_formats._format import FLOAT, StoredFormat

KEYS = "quantization_config", "compression_config"


def names() -> list[str]:
    """Every format, sorted; imports none of them."""
    return sorted(module.name for module in iter_modules(__path__) if module.name[0] != "_")


def load(name: str) -> type[StoredFormat]:
    """The class of a format, by the name of its file."""
    found: type[StoredFormat] = import_module(f"{__name__}.{name}").Format
    return found


def format_of(file: Path, config: Mapping[str, Any]) -> StoredFormat | None:
    """The format that a config.json tells of, in itself or in one of its parts; None: floats.

    ModelError where it is none that is known here, or where the file tells of two.
    """
    parts = config, *(value for value in config.values() if isinstance(value, Mapping))
    told = [(key, part[key]) for part in parts for key in KEYS if part.get(key)]
    if not told:
        return None
    (key, scheme), *others = told
    if any(other != scheme for _, other in others):
        raise ModelError(f"{file} tells of two quantisations that differ; {FLOAT}")
    method = _method(scheme)
    for name in names():
        if method == load(name).method:
            return load(name).parse(file, scheme)
    known = ", ".join(load(name).method for name in names())
    raise ModelError(f"{file}: {key} {_told(scheme)}, which is not read; read are {known}; {FLOAT}")


def _method(scheme: Any) -> Any:
    """How a quantisation calls itself; bitsandbytes did not always."""
    if not isinstance(scheme, Mapping):
        return None
    name = scheme.get("quant_method") or scheme.get("quant_algo")
    if not name and (scheme.get("load_in_4bit") or scheme.get("load_in_8bit")):
        return "bitsandbytes"
    return name


def _told(scheme: Any) -> str:
    """The same for people: `says quant_method 'hqq', 4 bits`."""
    if not isinstance(scheme, Mapping):
        return f"is {scheme!r}"
    bits = scheme.get("bits") or scheme.get("w_bit")
    return f"says quant_method {_method(scheme)!r}" + (f", {bits} bits" if bits else "")
