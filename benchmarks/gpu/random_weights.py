"""Bundles without their weights: a few megabytes travel, random weights are made on the spot.

`empty` takes weights.bin out of a bundle that was exported from a checkpoint of zeros and notes
what was in it: tables and other constants keep their bytes, all else is to be random, codes of
quantised weights too. `fill` writes
weights.bin again, with numpy alone, so that a device without torch can do it. Equal notes of two
bundles mean equal weights; the file is then linked, not written again.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from edgeprune.bundle import MANIFEST, read_manifest, sha256
from edgeprune.files import write_whole
from edgeprune.graph_contract import WEIGHTS
from edgeprune.graphs import GRAPHS
from edgeprune.lowering import DTYPES
from edgeprune.manifest import FileRecord
from edgeprune.runtime.dtypes import to_stored

NOTES, KEPT = "weights.json", "weights.kept"
BLOCK = 1 << 25
"""Random numbers drawn once; each tensor is a piece of them, from an offset of its own."""


CODES = "codes"
"""In place of a dtype: bytes of codes of 4 or 8 bits, every one as likely as another."""
DEVIATION = {"int4": 4.6, "int8": 74.0}
"""Standard deviation of such codes."""


@dataclass(frozen=True)
class Piece:
    """One tensor of weights.bin: `count` numbers of a dtype, or bytes of another type.

    `spread` is their standard deviation; 0: all are `value`; None: bytes are kept.
    """

    offset: int
    count: int
    dtype: str
    spread: float | None
    value: float = 1.0


def empty(bundle: Path) -> None:
    """Take out weights.bin; its notes and its constants stay."""
    pieces = sorted(_pieces(bundle), key=lambda piece: piece.offset)
    weights = np.memmap(bundle / WEIGHTS, np.uint8, "r")
    with (bundle / KEPT).open("wb") as kept:
        for piece in pieces:
            if piece.spread is None:
                kept.write(weights[piece.offset : piece.offset + _bytes(piece)].tobytes())
    notes = {"bytes": weights.size, "pieces": [list(asdict(piece).values()) for piece in pieces]}
    (bundle / NOTES).write_text(json.dumps(notes) + "\n")
    del weights
    (bundle / WEIGHTS).unlink()


def _pieces(bundle: Path) -> list[Piece]:
    """The tensors of all graphs that lie in weights.bin."""
    import onnx

    weights = np.memmap(bundle / WEIGHTS, np.uint8, "r")
    names = {dtype.onnx: dtype.name for dtype in DTYPES.values()}
    kinds = {onnx.TensorProto.INT4: "int4", onnx.TensorProto.INT8: "int8"}
    found = dict[int, Piece]()
    for graph in GRAPHS:
        stored = onnx.load(bundle / graph, load_external_data=False).graph.initializer
        codes = {t.name: t for t in stored if t.data_type in kinds}
        for tensor in stored:
            where = {entry.key: entry.value for entry in tensor.external_data}
            if "offset" not in where:
                continue
            offset, length = int(where["offset"]), int(where["length"])
            dtype, dims = names.get(tensor.data_type, "uint8"), list(tensor.dims)
            count = length // (DTYPES[dtype].bytes if dtype in DTYPES else 1)
            coded = codes.get(tensor.name.removesuffix("/scale"))
            if tensor.name in codes:
                piece = Piece(offset, count, CODES, 1.0)
            elif coded is not None:
                unit = DEVIATION[kinds[coded.data_type]] * math.sqrt(coded.dims[0])
                piece = Piece(offset, count, dtype, 0.0, 1 / unit)
            elif dtype in DTYPES and not weights[offset : offset + length].any():
                piece = Piece(offset, count, dtype, _spread(tensor.name, dims))
            else:
                piece = Piece(offset, count, dtype, None)
            found[offset] = piece
    return list(found.values())


def _spread(name: str, dims: list[int]) -> float:
    """That of a weight [inputs, outputs] of unit gain; 0 for the weight of a norm."""
    if len(dims) < 2:
        return 0.0 if "norm" in name and name.endswith("weight") else 0.02
    table = "embed" in name or "position" in name
    return 0.02 if table else 1 / math.sqrt(math.prod(dims) / max(dims[-1], 1))


def _bytes(piece: Piece) -> int:
    return piece.count * (DTYPES[piece.dtype].bytes if piece.dtype in DTYPES else 1)


def fill(bundle: Path, seed: int = 0) -> None:
    """Write weights.bin of a bundle without one; a twin beside it shares its file."""
    if (bundle / WEIGHTS).is_file():
        return
    text = (bundle / NOTES).read_text()
    for twin in sorted(bundle.parent.iterdir()):
        if (twin / WEIGHTS).is_file() and _same(twin, bundle, text):
            os.link(twin / WEIGHTS, bundle / WEIGHTS)
            return
    notes: dict[str, Any] = json.loads(text)
    draft = bundle / (WEIGHTS + ".draft")
    with draft.open("wb") as stream, (bundle / KEPT).open("rb") as kept:
        stream.truncate(notes["bytes"])
        _write(stream, kept, [Piece(*piece) for piece in notes["pieces"]], seed)
    draft.rename(bundle / WEIGHTS)


def seal(bundle: Path) -> None:
    """Note the hash of the weights in the manifest: engines are built of verified files."""
    manifest, weights = read_manifest(bundle), bundle / WEIGHTS
    record = FileRecord(weights.stat().st_size, sha256(weights))
    if manifest.files[WEIGHTS] != record:
        sealed = replace(manifest, files={**manifest.files, WEIGHTS: record})
        write_whole(bundle / MANIFEST, sealed.to_json().encode())


def _same(one: Path, other: Path, text: str) -> bool:
    notes = one / NOTES
    return (
        notes.is_file()
        and notes.read_text() == text
        and (one / KEPT).read_bytes() == (other / KEPT).read_bytes()
    )


def _write(stream: BinaryIO, kept: BinaryIO, pieces: list[Piece], seed: int) -> None:
    rng = np.random.default_rng(seed)
    drawn = rng.standard_normal(BLOCK, np.float32)
    codes = rng.integers(0, 256, BLOCK, np.uint8)
    blocks = dict[tuple[str, float], NDArray[Any]]()
    for piece in pieces:
        stream.seek(piece.offset)
        if piece.spread is None:
            stream.write(kept.read(_bytes(piece)))
        elif piece.dtype == CODES:
            _repeat(stream, codes, piece.count, int(rng.integers(BLOCK)))
        elif piece.spread == 0:
            equal = np.full(piece.count, piece.value, np.float32)
            stream.write(to_stored(equal, piece.dtype).data)
        else:
            key = piece.dtype, piece.spread
            if key not in blocks:
                blocks[key] = to_stored(drawn * np.float32(piece.spread), piece.dtype)
            _repeat(stream, blocks[key], piece.count, int(rng.integers(BLOCK)))


def _repeat(stream: BinaryIO, block: NDArray[Any], count: int, start: int) -> None:
    """So many numbers of a block, from an offset on, repeated."""
    while count:
        part = block[start : start + count]
        stream.write(part.data)
        count, start = count - part.size, 0
