"""Finds a bundle's engines: built from its graphs, for this machine, and not altered.

An engine is code, so it is read only where its hash is the recorded one. The record lies beside it:
the hash finds damage, but not an attack. Delete engines/ in a bundle from others, and build your
own.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from edgeprune.bundle import ENGINE_RECORD, ENGINES, Bundle, sha256
from edgeprune.errors import BackendError
from edgeprune.graph_contract import WEIGHTS
from edgeprune.graphs import GRAPHS
from edgeprune.manifest import Hash, Manifest
from edgeprune.records import Amount, Between, Bytes, Count, build, parse

RECORD = ENGINE_RECORD

Range = tuple[Amount, Amount, Amount]  # least, usual, most
Counts = tuple[tuple[Amount, ...], tuple[Amount, ...], tuple[Amount, ...]]  # of every layer


@dataclass(frozen=True)
class _EngineRecord:
    """What engine.json says of one engine, as far as it is used."""

    bytes: Bytes
    sha256: Hash
    seconds: Annotated[float, Between(0, 1e9)]
    profiles: dict[str, dict[str, Range | Counts]]


@dataclass(frozen=True)
class _Record:
    """The whole of engine.json, as far as it is used."""

    backend: str
    version: str
    dtype: str
    compute: tuple[str, ...]
    gpu: str | None
    text_capacity: Count
    capacities: tuple[Count, ...]
    graphs: dict[str, str]
    engines: dict[str, _EngineRecord]


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
        record: dict[str, Any] = parse((folder / RECORD).read_text(encoding="utf-8"))
        read = build(_Record, record, RECORD)
        [read.engines["decoder"].profiles["prefill"][name] for name in ("prefix", "text")]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return Engines(folder, record) if {*map(_name, GRAPHS)} <= {*read.engines} else None


def whole(engines: Engines) -> bool:
    """Whether every engine's bytes are those that were built."""
    try:
        kept = {name: sha256(engines.file(name)) for name in engines.record["engines"]}
    except OSError:
        return False
    return all(kept[name] == e["sha256"] for name, e in engines.record["engines"].items())


def names(manifest: Manifest) -> tuple[str, ...]:
    """Of a bundle's engines, in the order in which they run."""
    return tuple(map(_name, manifest.graph_names))


def sources(manifest: Manifest) -> tuple[str, ...]:
    """Files that engines are made of."""
    return *manifest.graph_names, WEIGHTS


def _name(graph: str) -> str:
    return graph.removesuffix(".onnx")


def graphs(bundle: Bundle) -> dict[str, str]:
    """Hashes of all that an engine is made of."""
    return {name: bundle.manifest.files[name].sha256 for name in sources(bundle.manifest)}


def _plain(compute: str) -> str:
    return compute.lower().replace("_", "")


def unfit(engines: Engines, bundle: Bundle, machine: Machine) -> str:
    """Why engines may not run here, or nothing; what is quick to see is looked at first."""
    record = engines.record
    same = record["graphs"] == graphs(bundle) and record["dtype"] == bundle.manifest.dtype
    same = same and {*record["engines"]} == {*names(bundle.manifest)}
    if not same or len(record["capacities"]) != bundle.manifest.decoder.layers:
        return "was built from other graphs"
    if record["version"] != machine.version:
        return f"was built with {machine.title} {record['version']}, this is {machine.version}"
    made_for = [str(name) for name in record["compute"] or [record["gpu"]] if name]
    if made_for and _plain(machine.compute) not in map(_plain, made_for):
        return f"was built for {', '.join(made_for)}, this GPU is {machine.compute}"
    if not whole(engines):
        return "was altered since it was built"
    return ""
