"""Finds and reads what a report is made of: files are known by what they hold, not by their names.

What is there and cannot be read is kept with the reason, so that a report can say what it lacks.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgeprune.bench.bench import BenchResult
from edgeprune.bundle import MANIFEST, read_manifest
from edgeprune.compare.results import Comparison
from edgeprune.errors import BundleError, InputError
from edgeprune.files import real
from edgeprune.manifest import Manifest
from edgeprune.records import parse
from edgeprune.report.evaluation import Evaluation

MOST_BYTES = 16 << 20
"""A longer file is none of ours: thousands of rounds take some megabytes."""
PASSED_OVER = ("tokenizer.json",)
"""Large, and of no interest."""
KINDS: dict[str, frozenset[str]] = {
    "bundle": frozenset({"schema", "prune", "decoder"}),
    "compare": frozenset({"setup", "cells", "out_of_reach"}),
    "bench": frozenset({"rows", "absent", "agreements", "machine"}),
    "lmms-eval": frozenset({"results", "configs", "n-samples"}),
}
"""By kind of file, keys that only such a file has together."""


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file that was read."""

    name: str  # as reached from the folders that were given
    kind: str
    sha256: str


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A file that could not be read, and why."""

    name: str
    why: str


@dataclass
class Sources:
    """All that was found; each list is in the order of the files' names."""

    files: list[SourceFile] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    bundles: list[Manifest] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    timings: list[BenchResult] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)


def read(folders: Sequence[Path]) -> Sources:
    """All below the folders; InputError where one is no folder, or where nothing is found."""
    found = Sources()
    known = set[Path]()
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"{folder} is no folder; name folders with bundles or results")
        for file in _files(folder):
            if (path := real(file)) not in known:
                known.add(path)
                _take(found, file, str(Path(folder.name, file.relative_to(folder))))
    if not (found.files or found.left_out):
        named = ", ".join(map(str, folders))
        raise InputError(
            f"there is no {MANIFEST} and no result of bench, compare or lmms-eval below {named};"
            " write one with: edgeprune bench --json FILE, or edgeprune compare -o FOLDER"
        )
    return found


def _files(folder: Path) -> Iterator[Path]:
    """JSON files, those in hidden folders left out; links to folders are not followed."""
    for path, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if name.endswith(".json") and not name.startswith(".") and name not in PASSED_OVER:
                yield Path(path, name)


def _take(found: Sources, file: Path, name: str) -> None:
    try:
        if (size := file.stat().st_size) > MOST_BYTES:
            raise ValueError(f"it has {size:,} bytes, at most {MOST_BYTES:,} are read")
        data = file.read_bytes()
        text = data.decode()
        kind = _kind(parse(text))
        if kind:
            _READERS[kind](found, file, text)
            found.files.append(SourceFile(name, kind, hashlib.sha256(data).hexdigest()))
    except (OSError, ValueError, TypeError, KeyError, BundleError) as error:
        found.left_out.append(LeftOut(name, " ".join(str(error).split())))


def _kind(content: Any) -> str:
    keys = content.keys() if isinstance(content, dict) else set()
    return next((kind for kind, own in KINDS.items() if own <= keys), "")


def _bundle(found: Sources, file: Path, text: str) -> None:
    if file.name != MANIFEST:
        raise ValueError(f"a bundle's manifest is called {MANIFEST}")
    found.bundles.append(read_manifest(file.parent))


def _comparison(found: Sources, file: Path, text: str) -> None:
    read = Comparison.from_json(text)
    if type(read.setup.get("questions")) is not int or type(read.setup.get("model")) is not str:
        raise ValueError("its setup does not say which model was asked how many questions")
    found.comparisons.append(read)


def _timing(found: Sources, file: Path, text: str) -> None:
    found.timings.append(BenchResult.from_json(text))


def _evaluation(found: Sources, file: Path, text: str) -> None:
    found.evaluations.append(Evaluation.from_json(text))


_READERS: dict[str, Callable[[Sources, Path, str], None]] = {
    "bundle": _bundle,
    "compare": _comparison,
    "bench": _timing,
    "lmms-eval": _evaluation,
}
