"""The bundle: the folder that `export` writes and `run`, `build` and `bench` read.

    manifest.json     what `manifest.py` says, as JSON; paths are relative and stay inside
    vision.onnx       the encoder, for one tile
    vision_delta.onnx the same for some of its patches, where the bundle was exported with --delta
    join.onnx         what it gave for all tiles -> visual tokens
    decoder.onnx      prefill, decode and later turns in one graph
    weights.bin       the tensors of all graphs
    tokenizer.json    and the checkpoint's other text files

A bundle is written in a hidden folder beside its place and renamed, so it is whole or absent.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from edgeprune import contract, graph_contract, onnx_file
from edgeprune.errors import BundleError, SpecError
from edgeprune.files import obstacle, real, replaced
from edgeprune.graphs import DECODER, VISION
from edgeprune.manifest import SCHEMA, FileRecord, Manifest
from edgeprune.records import build, is_utf8, parse

ENGINES, ENGINE_RECORD = "engines", "engine.json"
MANIFEST = "manifest.json"
QUICK = 256 << 20
"""Files up to so many bytes are hashed whenever a bundle is opened."""
MANIFEST_BYTES = 16 << 20
"""A longer manifest is not read: hundreds of layers take some 100 kB."""
NEEDED = ("weights.bin", "tokenizer.json")
"""Files of a bundle beside its graphs."""


@dataclass(frozen=True, slots=True)
class Bundle:
    """An opened bundle: its folder and its manifest."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: Path | str, *, verify: bool | None = None) -> Bundle:
        """Read a bundle; check every file's size, and its hash, and that the graphs are its own.

        Hashing 14 GB at every start would cost a device ten seconds, so `verify` None hashes files
        up to QUICK bytes only; True hashes all, False none. Where there are engines the weights may
        be missing: `has_weights`.
        """
        path = Path(path)
        manifest = read_manifest(path)
        for name, record in manifest.files.items():
            if name == graph_contract.WEIGHTS and _is_dropped(path):
                continue
            try:
                hashed = record.bytes <= QUICK if verify is None else verify
                _check_file(path, name, record, hashed=hashed)
            except OSError as error:
                raise BundleError(
                    f"{path / name} cannot be read ({error.strerror}); copy the bundle again"
                ) from error
        for name in manifest.graph_names:
            try:
                graph_contract.check_graph(manifest, name, onnx_file.read(path / name))
            except (OSError, ValueError) as error:
                raise BundleError(
                    f"{path / name} is not the graph of {MANIFEST} ({error}); export it again"
                ) from error
        return cls(path, manifest)

    def file(self, name: str) -> Path:
        return self.path / name

    @property
    def has_weights(self) -> bool:
        """Whether the graphs can be loaded; engines hold weights of their own."""
        return not _is_dropped(self.path)

    def drop_weights(self) -> None:
        """Remove the weights of a bundle that has engines."""
        self.file(graph_contract.WEIGHTS).unlink(missing_ok=True)

    def require_weights(self, work: str) -> None:
        """BundleError where `work` needs weights that were removed once engines were built."""
        if not self.has_weights:
            raise BundleError(
                f"{self.path} has engines and no {graph_contract.WEIGHTS}, which {work} needs; copy"
                " that file back or export the bundle again"
            )


def _is_dropped(folder: Path) -> bool:
    """Whether the weights were removed after engines were built."""
    there = os.path.lexists(folder / graph_contract.WEIGHTS)
    return not there and any((folder / ENGINES).glob(f"*/{ENGINE_RECORD}"))


def read_manifest(path: Path) -> Manifest:
    """The manifest of a bundle's folder, checked by itself; BundleError where it is damaged."""
    file = path / MANIFEST
    if not is_utf8(str(path)):
        raise BundleError(f"the name of {path} is not UTF-8, which engines want; rename the folder")
    if not file.is_file():
        raise BundleError(
            f"{path} is no bundle: it has no {MANIFEST}. Write one with: edgeprune export"
        )
    try:
        data = parse(_read(file))
        schema = data["schema"]
    except KeyError as error:
        raise BundleError(f"{file} names no schema; export the bundle again") from error
    except (OSError, ValueError, TypeError) as error:
        raise BundleError(f"{file} is damaged ({error}); export the bundle again") from error
    if schema != SCHEMA:
        newer = isinstance(schema, int) and schema > SCHEMA
        raise BundleError(
            f"{file} has schema {str(schema)[:20]}, this edgeprune reads schema {SCHEMA}; "
            + ("update edgeprune" if newer else "export again")
        )
    try:
        manifest: Manifest = build(Manifest, data, "manifest")
        if absent := [
            name for name in (*manifest.graph_names, *NEEDED) if name not in manifest.files
        ]:
            raise ValueError(f"files lacks {', '.join(absent)}")
        contract.check_sizes(manifest)
        graph_contract.check_signature(manifest)
    except (TypeError, ValueError, SpecError) as error:
        raise BundleError(f"{file} is damaged ({error}); export the bundle again") from error
    return manifest


def _read(file: Path) -> str:
    """The text of a manifest; ValueError where it is longer than any."""
    if (size := file.stat().st_size) > MANIFEST_BYTES:
        raise ValueError(f"it has {size:,} bytes, at most {MANIFEST_BYTES:,} are read")
    return file.read_text(encoding="utf-8")


def _check_file(folder: Path, name: str, record: FileRecord, *, hashed: bool) -> None:
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\\" in name or "\0" in name:
        raise BundleError(f"{folder / MANIFEST} names {name!r}, a path that leaves the bundle")
    file = folder / name
    if not real(file).is_relative_to(real(folder)):
        raise BundleError(f"{file} is a link that leaves the bundle; copy the file in its place")
    if not file.is_file():
        raise BundleError(f"{file} is missing; copy the whole bundle or export it again")
    size = file.stat().st_size
    if size != record.bytes:
        raise BundleError(
            f"{file} has {size:,} bytes, the manifest says {record.bytes:,}; copy or export again"
        )
    if hashed and sha256(file) != record.sha256:
        raise BundleError(f"{file} was altered: its hash is not the manifest's; export it again")


def sha256(file: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with file.open("rb") as stream:
        digest = hashlib.sha256()
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def record_files(folder: Path) -> dict[str, FileRecord]:
    """Size and hash of every file in a folder that is about to become a bundle."""
    files = sorted(f for f in folder.rglob("*") if f.is_file() and f.name != MANIFEST)
    return {
        f.relative_to(folder).as_posix(): FileRecord(f.stat().st_size, sha256(f)) for f in files
    }


def check_target(target: Path) -> None:
    """BundleError, before any work, unless a bundle may be written at `target`."""
    if target.name in ("", ".."):  # a draft beside it would lie within it
        raise BundleError(
            f"a bundle is a new folder, {target} has no name of its own; choose another --output,"
            f" such as {target / 'bundle'}"
        )
    if why := obstacle(target):
        raise BundleError(f"{target} cannot be written: {why}; choose another --output")
    if os.path.lexists(target) and not target.is_dir():
        kind = "a link that leads nowhere" if target.is_symlink() else "a file"
        raise BundleError(f"{target} is {kind}, a bundle is a folder; choose another --output")
    if target.is_dir() and any(target.iterdir()) and not _is_bundle(target):
        raise BundleError(f"{target} exists and is no bundle; choose another --output")


def _is_bundle(folder: Path) -> bool:
    """Whether a folder may be replaced: many programs have a manifest.json, few these as well."""
    return all((folder / name).is_file() for name in (MANIFEST, VISION, DECODER))


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A new folder that becomes the bundle `target` when the block ends well, or vanishes."""
    check_target(target)
    with replaced(target) as draft:
        yield draft
        check_target(target)  # again: minutes have passed
