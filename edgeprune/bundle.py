"""The bundle: the folder that `export` writes and `run`, `build` and `bench` read.

    manifest.json     everything below, as JSON; paths are relative and stay inside the folder
    vision.onnx       pixels -> visual tokens
    decoder.onnx      prefill, decode and later turns in one graph
    weights.bin       the tensors of both graphs
    tokenizer.json    and the checkpoint's other text files

A bundle is written in a hidden folder beside its place and renamed, so it is whole or absent.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path, PurePosixPath
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from edgeprune.errors import BundleError, SpecError
from edgeprune.files import replaced
from edgeprune.spec import Plan, Stage
from edgeprune.tiling import Tiling

SCHEMA = 2
MANIFEST = "manifest.json"
QUICK = 256 << 20
"""Files up to so many bytes are hashed whenever a bundle is opened."""
NEEDED = ("vision.onnx", "decoder.onnx", "weights.bin", "tokenizer.json")


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
    stages: tuple[Stage, ...]  # where tokens leave, in the order in which they meet them
    options: dict[str, str] = field(default_factory=dict)
    schedule: dict[str, Any] | None = None

    @property
    def kept_outputs(self) -> tuple[str, ...]:
        """Outputs of decoder.onnx that say whose places the survivors take, in layer order."""
        return self.plan.kept_outputs

    @property
    def encoded(self) -> int:
        """Visual tokens between the two graphs: r_1, or more where the text prunes too."""
        return self.plan.encoded

    @property
    def plan(self) -> Plan:
        """The sizes that were frozen in."""
        return Plan(self.visual_tokens, len(self.counts), self.stages)


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
    span: int | None = None  # positions that a picture takes under M-RoPE, and then the decoder
    # has an input `places`: int64 [visual], which of the V tokens it is given; None: one each


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """How a picture becomes pixels [tiles, 3, height, width]; the checkpoint's own processor."""

    height: int
    width: int
    resize: tuple[int, int] | int | None  # (height, width), or the shortest edge, or no resizing
    resample: int  # PIL's number of the filter
    crop: tuple[int, int] | None  # (height, width) of the centre crop
    rescale: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    pad_to_square: tuple[int, int, int] | None = None  # colour of the padding, before resizing
    tiling: Tiling | None = None  # cut into tiles of height x width, which are pixels [tiles, ...]
    step: int | None = None  # the model takes any multiple of so many pixels, the bundle one size
    pictures: int = 1  # in a prompt
    frames: int | None = None  # of a video, in place of pictures

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the pixels."""
        tiles = self.tiling.tiles if self.tiling else 1
        return tiles * (self.frames or self.pictures), 3, self.height, self.width


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
    generation: dict[str, int | float] = field(default_factory=dict)  # defaults of Sampling
    around_image: tuple[str, str] = ("", "")  # text before and after the picture's tokens


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

    @property
    def span(self) -> int:
        """Positions that a picture takes: as many as tokens enter layer 1, fewer under M-RoPE."""
        return self.prune.counts[0] if self.decoder.span is None else self.decoder.span

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"


@dataclass(frozen=True, slots=True)
class Bundle:
    """An opened bundle: its folder and its manifest."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: Path | str, *, verify: bool | None = None) -> Bundle:
        """Read a bundle and check every file's size, and its hash.

        Hashing 14 GB at every start would cost a device ten seconds, so `verify` None hashes files
        up to QUICK bytes only; True hashes all, False none.
        """
        path = Path(path)
        manifest = _read_manifest(path)
        for name, record in manifest.files.items():
            try:
                hashed = record.bytes <= QUICK if verify is None else verify
                _check_file(path, name, record, hashed=hashed)
            except OSError as error:
                raise BundleError(
                    f"{path / name} cannot be read ({error.strerror}); copy the bundle again"
                ) from error
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
    except KeyError as error:
        raise BundleError(f"{file} names no schema; export the bundle again") from error
    except (OSError, ValueError, TypeError, RecursionError) as error:
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
        manifest: Manifest = _typed(Manifest, data, "manifest")
        _check_manifest(manifest)
    except (TypeError, ValueError, SpecError) as error:
        raise BundleError(f"{file} is damaged ({error}); export the bundle again") from error
    return manifest


def _typed(kind: Any, value: Any, place: str) -> Any:
    """A JSON value as the type that a record declares for it; TypeError names the place."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is UnionType:
        for option in inner:
            with suppress(TypeError):
                return _typed(option, value, place)
    elif is_dataclass(kind) and isinstance(value, dict):
        hints = get_type_hints(kind)
        parts = {k: _typed(hints.get(k, Any), v, f"{place}.{k}") for k, v in value.items()}
        return kind(**parts)  # type: ignore[operator]  # TypeError where a field lacks
    elif origin is tuple and isinstance(value, list):
        kinds = inner[:1] * len(value) if inner[-1] is ... else inner
        if len(kinds) == len(value):
            return tuple(_typed(k, v, place) for k, v in zip(kinds, value, strict=True))
    elif origin is Literal and value in inner:
        return value
    elif origin is dict and isinstance(value, dict):
        return {k: _typed(inner[1], v, f"{place}.{k}") for k, v in value.items()}
    elif kind is Any or type(value) is kind or (kind is float and type(value) is int):
        return value
    raise TypeError(f"{place} cannot be {json.dumps(value)[:40]}")


def _check_manifest(manifest: Manifest) -> None:
    """ValueError where the parts of a manifest contradict each other or lack something."""
    prune, layers = manifest.prune, manifest.decoder.layers
    if not prune.counts or len(prune.counts) != layers:
        raise ValueError(f"{len(prune.counts)} token counts for {layers} layers")
    if prune.plan.counts != prune.counts:
        raise ValueError("the stages give other token counts")
    if absent := [name for name in NEEDED if name not in manifest.files]:
        raise ValueError(f"files lacks {', '.join(absent)}")


def _check_file(folder: Path, name: str, record: FileRecord, *, hashed: bool) -> None:
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\\" in name or "\0" in name:
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


def check_target(target: Path) -> None:
    """BundleError, before any work, unless a bundle may be written at `target`."""
    if target.name in ("", ".."):  # a draft beside it would lie within it
        raise BundleError(
            f"a bundle is a new folder, {target} has no name of its own; choose another --output,"
            f" such as {target / 'bundle'}"
        )
    if target.exists() and not target.is_dir():
        raise BundleError(f"{target} is a file, a bundle is a folder; choose another --output")
    if target.is_dir() and any(target.iterdir()) and not _is_bundle(target):
        raise BundleError(f"{target} exists and is no bundle; choose another --output")
    place = next(folder for folder in target.absolute().parents if folder.exists())
    if not (place.is_dir() and os.access(place, os.W_OK)):
        raise BundleError(f"nothing can be written in {place}; choose another --output")


def _is_bundle(folder: Path) -> bool:
    """Whether a folder may be replaced: many programs have a manifest.json, few these as well."""
    return all((folder / name).is_file() for name in (MANIFEST, "vision.onnx", "decoder.onnx"))


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A new folder that becomes the bundle `target` when the block ends well, or vanishes."""
    check_target(target)
    with replaced(target) as draft:
        yield draft
        check_target(target)  # again: minutes have passed
