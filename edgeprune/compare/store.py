"""Results on disk, each under a key: the hash of all that decided it. Written whole or not at all.

A file that was made under another key, or that is damaged, counts as absent and is written anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from edgeprune.errors import SpecError


def key_of(*parts: object) -> str:
    """One hash over whatever JSON can hold."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def installed(package: str) -> str:
    """A package's version; onnxruntime's is its module's, whichever package brought that."""
    if package == "onnxruntime":
        import onnxruntime

        return str(onnxruntime.__version__)
    return version(package)


@dataclass(frozen=True)
class Store:
    """A folder of such files."""

    folder: Path

    def read(self, name: str, key: str) -> dict[str, Any] | None:
        """What was written under that name and key, None where nothing was."""
        try:
            record = json.loads(self._file(name).read_text(encoding="utf-8"))
            found: dict[str, Any] | None = record["content"] if record["key"] == key else None
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return found

    def write(self, name: str, key: str, content: dict[str, Any]) -> None:
        write_whole(self._file(name), json.dumps({"key": key, "content": content}).encode())

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.json"


def write_whole(file: Path, data: bytes) -> None:
    """Write a file whole or not at all; SpecError where it cannot be."""
    draft = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
        draft = Path(name)
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
        draft.chmod(0o644)  # mkstemp's are their owner's alone
        draft.replace(file)
    except OSError as error:
        raise SpecError(f"{file} cannot be written ({error.strerror or error})") from error
    finally:
        if draft is not None:
            with suppress(OSError):
                draft.unlink()
