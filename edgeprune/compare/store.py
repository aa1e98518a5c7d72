"""Results on disk, each under a key: the hash of all that decided it. Written whole or not at all.

A file that was made under another key, or that is damaged, counts as absent and is written anew.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any

import edgeprune
from edgeprune.files import write_whole


def key_of(*parts: object) -> str:
    """One hash over whatever JSON can hold."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def source(*packages: ModuleType) -> str:
    """One hash over the source of packages, and of the modules beside them that all share."""
    digest = hashlib.sha256()
    files = [sorted(Path(package.__path__[0]).rglob("*.py")) for package in packages]
    for file in chain(sorted(Path(edgeprune.__file__).parent.glob("*.py")), *files):
        digest.update(file.read_bytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Store:
    """A folder of such files."""

    folder: Path

    def read(self, name: str, key: str) -> dict[str, Any] | None:
        """What was written under that name and key, None where nothing was."""
        try:
            record = json.loads(self._file(name).read_text(encoding="utf-8"))
            found: dict[str, Any] | None = record["content"] if record["key"] == key else None
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None
        return found

    def write(self, name: str, key: str, content: dict[str, Any]) -> None:
        write_whole(self._file(name), json.dumps({"key": key, "content": content}).encode())

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.json"
