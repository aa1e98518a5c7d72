"""A bundle's engines: only such as were built from its graphs, for this machine, and unaltered.

An engine is code, so it is read only where its hash is the recorded one. The record lies beside it:
the hash finds damage, not malice. Delete engines/ of a bundle from others and build your own.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeprune.bundle import Bundle, sha256
from edgeprune.errors import BackendError

ENGINES, RECORD = "engines", "engine.json"
GRAPHS = ("vision.onnx", "decoder.onnx", "weights.bin")
NEEDED = (
    *("backend", "version", "dtype", "graphs", "compute", "gpu"),
    *("text_capacity", "capacities"),
)


@dataclass(frozen=True)
class Engines:
    """A folder of engines and what engine.json says of it."""

    folder: Path
    record: dict[str, Any]

    def file(self, name: str) -> Path:
        return self.folder / f"{name}.engine"


@dataclass(frozen=True)
class Machine:
    """What an engine has to fit: a backend's version, and the GPU's compute capability."""

    backend: str
    title: str
    version: str
    compute: str  # such as sm_87


def find(bundle: Bundle, machine: Machine) -> Engines:
    """The engines to run here, of several those that hold the most text.

    BackendError says why there are none and how to build them.
    """
    command = f"build them here: edgeprune build {bundle.path} --backend {machine.backend}"
    found = [read(f.parent) for f in sorted((bundle.path / ENGINES).glob(f"*/{RECORD}"))]
    ours = [e for e in found if e is not None and e.record["backend"] == machine.backend]
    ours.sort(key=lambda e: e.record["text_capacity"], reverse=True)
    reasons = []
    for engines in ours:
        wrong = unfit(engines, bundle, machine)
        if not wrong:
            return engines
        reasons.append(f"{engines.folder.name} {wrong}")
    if reasons:
        raise BackendError(f"no engine of {bundle.path} can run: {'; '.join(reasons)}; {command}")
    raise BackendError(f"{bundle.path} has no engines for {machine.title}; {command}")


def read(folder: Path) -> Engines | None:
    """A folder whose record can be read, or None."""
    try:
        record: dict[str, Any] = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        [engine["sha256"] for engine in (record["engines"][n] for n in ("vision", "decoder"))]
        [record[name] for name in NEEDED]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return Engines(folder, record)


def whole(engines: Engines) -> bool:
    """Whether every engine's bytes are those that were built."""
    try:
        kept = {name: sha256(engines.file(name)) for name in engines.record["engines"]}
    except OSError:
        return False
    return all(kept[name] == e["sha256"] for name, e in engines.record["engines"].items())


def graphs(bundle: Bundle) -> dict[str, str]:
    """Hashes of all that an engine is made of."""
    return {name: bundle.manifest.files[name].sha256 for name in GRAPHS}


def _plain(compute: str) -> str:
    return compute.lower().replace("_", "")


def unfit(engines: Engines, bundle: Bundle, machine: Machine) -> str:
    """Why engines may not run here, or nothing; what is quick to see is looked at first."""
    record = engines.record
    if record["graphs"] != graphs(bundle) or record["dtype"] != bundle.manifest.dtype:
        return "was built from other graphs"
    if record["version"] != machine.version:
        return f"was built with {machine.title} {record['version']}, this is {machine.version}"
    made_for = [str(name) for name in record["compute"] or [record["gpu"]] if name]
    if made_for and _plain(machine.compute) not in map(_plain, made_for):
        return f"was built for {', '.join(made_for)}, this GPU is {machine.compute}"
    if not whole(engines):
        return "was altered since it was built"
    return ""
