"""The bundle: the folder that `export` writes and `run`, `build` and `bench` read.

    manifest.json     everything below, as JSON; paths are relative and stay inside the folder
    vision.onnx       pixels -> visual tokens
    decoder.onnx      prefill, decode and later turns in one graph
    weights.bin       the tensors of both graphs
    tokenizer.json    and the checkpoint's other text files

A bundle is written to a temporary folder beside its place and renamed, so it is whole or absent.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import Any

from edgeprune.errors import BundleError

SCHEMA = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True)
class FileRecord:
    """Size in bytes and SHA-256 of one file of a bundle."""

    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class PruneRecord:
    """What was asked and what is frozen in: r_1 ... r_L and the certificate of the schedule."""

    method: str
    cr: float
    cr_reached: float
    visual_tokens: int  # V, before any pruning
    grid: tuple[int, int]  # rows, columns of the V tokens
    counts: tuple[int, ...]  # r_1 ... r_L
    kept_outputs: tuple[str, ...]  # decoder outputs that name the kept tokens, in layer order
    options: dict[str, str] = field(default_factory=dict)
    schedule: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class DecoderRecord:
    """What the runtime needs to feed decoder.onnx; sizes are counts."""

    layers: int
    kv_heads: int
    head_size: int
    width: int
    mlp_width: int
    attention_heads: int
    vocabulary: int
    max_positions: int
    cache: str  # "in-place": present is past, written at lengths; "grow": present is longer


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """How a picture becomes pixels [1, 3, height, width]; the checkpoint's own image processor."""

    height: int
    width: int
    resize: tuple[int, int] | int | None  # (height, width), or the shortest edge, or no resizing
    resample: int  # PIL's number of the filter
    crop: tuple[int, int] | None  # (height, width) of the centre crop
    rescale: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    pad_to_square: tuple[int, int, int] | None = None  # colour of the padding, before resizing


@dataclass(frozen=True, slots=True)
class TextRecord:
    """How a prompt becomes tokens: the chat template, rendered once with {prompt} and {answer}.

    `first` holds {image} and {prompt}; `next` follows an answer and holds {prompt}.
    """

    first: str
    next: str
    system: str
    add_special_tokens: bool
    image_token_id: int
    eos_token_ids: tuple[int, ...]
    generation: dict[str, Any] = field(default_factory=dict)  # the checkpoint's sampling defaults


@dataclass(frozen=True, slots=True)
class Manifest:
    """The whole of manifest.json."""

    name: str
    model: str
    family: str
    target: str
    dialect: str
    dtype: str
    opset: int
    prune: PruneRecord
    decoder: DecoderRecord
    image: ImageRecord
    text: TextRecord
    files: dict[str, FileRecord]
    parity: dict[str, Any]
    versions: dict[str, str]
    schema: int = SCHEMA

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"


@dataclass(frozen=True, slots=True)
class Bundle:
    """An opened bundle: its folder and its manifest."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: Path | str, *, verify: bool = True) -> Bundle:
        """Read a bundle; with `verify`, check the size and the hash of every file."""
        path = Path(path)
        manifest = _read_manifest(path)
        for name, record in manifest.files.items():
            _check_file(path, name, record, hashed=verify)
        return cls(path, manifest)

    def file(self, name: str) -> Path:
        return self.path / name


def _read_manifest(path: Path) -> Manifest:
    file = path / MANIFEST
    if not file.is_file():
        raise BundleError(
            f"{path} is no bundle: it has no {MANIFEST}. Write one with: edgeprune export"
        )
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        schema = data["schema"]
    except (ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise BundleError(f"{file} is damaged ({error}); export the bundle again") from error
    if schema != SCHEMA:
        raise BundleError(
            f"{file} has schema {schema}, this edgeprune reads schema {SCHEMA}; "
            + (
                "update edgeprune"
                if isinstance(schema, int) and schema > SCHEMA
                else "export again"
            )
        )
    try:
        return _parse(data)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BundleError(f"{file} is damaged ({error}); export the bundle again") from error


def _parse(data: dict[str, Any]) -> Manifest:
    parts = {
        "prune": PruneRecord,
        "decoder": DecoderRecord,
        "image": ImageRecord,
        "text": TextRecord,
    }
    values: dict[str, Any] = {**data}
    for name, record in parts.items():
        values[name] = record(**{k: _frozen(v) for k, v in data[name].items()})
    values["files"] = {name: FileRecord(**record) for name, record in data["files"].items()}
    return Manifest(**values)


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _check_file(folder: Path, name: str, record: FileRecord, *, hashed: bool) -> None:
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\\" in name:
        raise BundleError(f"{folder / MANIFEST} names {name!r}, a path that leaves the bundle")
    file = folder / name
    if not file.resolve().is_relative_to(folder.resolve()):
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


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A temporary folder that becomes `target` when the block ends well, and vanishes otherwise."""
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield draft
        draft.chmod(0o755)
        _replace(draft, target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _replace(draft: Path, target: Path) -> None:
    if not target.exists():
        draft.rename(target)
        return
    if not (target / MANIFEST).is_file() and any(target.iterdir()):
        raise BundleError(f"{target} exists and is no bundle; choose another --output")
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
    os.rename(target, old / "bundle")
    draft.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def field_names(record: type) -> tuple[str, ...]:
    """Field names of one of the records above, for messages and tests."""
    return tuple(f.name for f in fields(record))
