"""Timing the parts of a dense bundle on this machine, all of them once in every round.

Each round has an order of its own: what a part leaves in caches and queues then slows or helps all
others alike, not always the next in the list.
"""

from __future__ import annotations

import io
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edgeprune import graph_contract, onnx_file
from edgeprune.bench.conditions import machine_versions
from edgeprune.bench.worker import PREFIX
from edgeprune.bundle import Bundle
from edgeprune.errors import BackendError, BundleError, SpecError
from edgeprune.graphs import BLOCK
from edgeprune.images import read_image
from edgeprune.manifest import Manifest
from edgeprune.progress import Progress, silent
from edgeprune.runtime import backends
from edgeprune.runtime.backend import DecoderInputs
from edgeprune.runtime.backends._ort import OrtBackend
from edgeprune.runtime.images import to_pixels
from edgeprune.runtime.tile_encoder import TileEncoder
from edgeprune.timing import Profile, Profiled, Spread, Table

SHARES = (1 / 64, 1 / 32, 1 / 16, 1 / 10, 1 / 7, 1 / 5, 1 / 4, 1 / 3, 1 / 2, 2 / 3, 5 / 6, 1)
"""Of the visual tokens or patches: where tables are measured."""


@dataclass(frozen=True)
class ProfileRequest:
    """What to time, and how often."""

    bundle: Path
    backend: str = "ort-cpu"
    text_tokens: int = 64
    rounds: int = 9
    warmup: int = 2
    threads: int | None = None
    image: Path | None = None  # that is read in each round; None: noise of the frozen size

    def __post_init__(self) -> None:
        least = {"text_tokens": PREFIX + 1, "rounds": 1, "warmup": 0}
        for name, number in least.items():
            if (found := getattr(self, name)) < number:
                raise SpecError(f"--{name.replace('_', '-')} is at least {number}; got {found}")
        if backends.find(self.backend).engines:
            raise BackendError(
                f"profile times graphs on ort-cpu or ort-cuda; engines of {self.backend} are for"
                " fixed sizes and are timed by edgeprune bench"
            )


Work = Callable[[], object]


def profile(request: ProfileRequest, report: Progress = silent) -> Profile:
    """Time a dense bundle that was exported with --profilable."""
    bundle = Bundle.open(request.bundle)
    manifest = bundle.manifest
    _check(request.bundle, manifest)
    _check_block(bundle)
    backend = OrtBackend(bundle, request.backend.removeprefix("ort-"), request.threads)
    try:
        work = _Work(bundle, backend, request)
        jobs = work.jobs()
        seconds: list[list[float]] = [[] for _ in jobs]
        parts, order = list(zip(seconds, jobs.values(), strict=True)), random.Random(0)
        total = request.warmup + request.rounds
        for number in range(total):
            order.shuffle(parts)
            for kept, job in parts:
                begin = time.perf_counter()
                job()
                if number >= request.warmup:
                    kept.append(time.perf_counter() - begin)
            report("rounds", number + 1, total)
    finally:
        backend.close()
    found = {name: _spread(kept) for name, kept in zip(jobs, seconds, strict=True)}
    return Profile(
        model=profiled(manifest),
        backend=request.backend,
        threads=request.threads,
        machine=machine_versions(),
        text_tokens=request.text_tokens,
        rounds=request.rounds,
        image=work.size,
        read=found["read", 0],
        preprocess=found["preprocess", 0],
        vision=found["vision", 0],
        prefill=_table(found, "prefill"),
        block=_table(found, "block"),
        windowed=_table(found, "windowed") if manifest.encoder.window else None,
    )


def profiled(manifest: Manifest) -> Profiled:
    """The sizes by which a profile knows its model."""
    encoder, decoder = manifest.encoder, manifest.decoder
    return Profiled(
        manifest.family,
        decoder.layers,
        decoder.width,
        decoder.mlp_width,
        manifest.prune.visual_tokens,
        encoder.blocks,
        encoder.patches,
        encoder.tiles,
        manifest.dtype,
        manifest.weights.format if manifest.weights else "float",
    )


def _check(path: Path, manifest: Manifest) -> None:
    """SpecError unless a bundle is the dense model, with a block by itself."""
    encoder, prune = manifest.encoder, manifest.prune
    if len(set(prune.counts)) > 1 or prune.counts[0] != prune.visual_tokens:
        raise SpecError(f"profile times the dense model, {path} prunes by {prune.method}; {_HOW}")
    if BLOCK not in manifest.files or encoder.kept < encoder.units:
        raise SpecError(f"{path} has no {BLOCK} of a dense encoder; {_HOW}")


def _check_block(bundle: Bundle) -> None:
    """BundleError where the graph of a block is not such as exports write."""
    file = bundle.file(BLOCK)
    try:
        graph_contract.check_nodes(bundle.manifest, onnx_file.read(file))
    except (OSError, ValueError) as error:
        raise BundleError(f"{file} is not a graph of this bundle ({error}); {_HOW}") from error


_HOW = "export it with --method none --profilable"


class _Work:
    """What is done in a round, on inputs of noise."""

    def __init__(self, bundle: Bundle, backend: OrtBackend, request: ProfileRequest) -> None:
        self.manifest, self.backend, self.text = bundle.manifest, backend, request.text_tokens
        self.rng, self.caches = np.random.default_rng(0), backend.caches()
        self.block = backend.encoder_block(BLOCK)
        self.encoder = TileEncoder(backend, self.manifest, 0)
        record = self.manifest.image
        self.pixels = self.rng.standard_normal(record.shape, np.float32)
        self.file = (
            request.image.read_bytes() if request.image else _noise(record.height, record.width)
        )
        self.image = read_image(self.file).image
        self.size = self.image.height, self.image.width

    def jobs(self) -> dict[tuple[str, int], Work]:
        """Each by its kind and its count."""
        encoder, record = self.manifest.encoder, self.manifest.image
        dense = np.array(self.manifest.prune.counts)
        found: dict[tuple[str, int], Work] = {
            ("read", 0): lambda: read_image(self.file),
            ("preprocess", 0): lambda: [
                to_pixels(self.image, record) for _ in range(encoder.shown)
            ],
            ("vision", 0): lambda: self.encoder.encode(self.pixels, dense),
        }
        for count in counts(self.manifest.prune.visual_tokens):
            found["prefill", count] = self._prefill(count)
        for count in counts(encoder.patches + encoder.extra):
            found["block", count] = self._block(1, count)
        if encoder.window:
            windows = max(1, encoder.patches // encoder.window)
            for count in counts(encoder.window):
                found["windowed", count] = self._block(windows, count)
        return found

    def _prefill(self, tokens: int) -> Work:
        record = self.manifest.decoder
        visual = self.rng.standard_normal((1, tokens, record.visual_width), np.float32)
        image = self.backend.as_image(visual, np.arange(tokens))
        ids = self.rng.integers(3, record.vocabulary, (1, self.text))
        nothing = np.zeros(record.layers, np.int64)
        inputs = DecoderInputs(
            ids[:, :PREFIX], ids[:, PREFIX:], image, 0, nothing, nothing + self.text + tokens, False
        )
        return lambda: self.backend.run(inputs, self.caches)

    def _block(self, sequences: int, tokens: int) -> Work:
        """A block of the encoder on `sequences` windows of a tile, for each tile."""
        tiles = range(self.manifest.encoder.tiles)
        width = self.manifest.encoder.width
        hidden = self.rng.standard_normal((sequences, tokens, width), np.float32)
        rows = np.tile(np.arange(tokens) % self.manifest.encoder.patches, (sequences, 1))
        return lambda: [self.block(hidden, rows) for _ in tiles]


def counts(most: int) -> list[int]:
    """Where a table is measured, rising."""
    return sorted({max(1, round(share * most)) for share in SHARES})


def _table(found: dict[tuple[str, int], Spread], kind: str) -> Table:
    own = {count: spread for (name, count), spread in found.items() if name == kind}
    return Table.of(list(own), list(own.values()))


def _spread(seconds: Sequence[float]) -> Spread:
    low, middle, high = (1e3 * float(np.quantile(seconds, q)) for q in (0.1, 0.5, 0.9))
    return Spread(middle, low, high)


def _noise(height: int, width: int) -> bytes:
    """A JPEG file of noise."""
    levels: NDArray[np.uint8] = np.random.default_rng(0).integers(
        0, 255, (height, width, 3), dtype=np.uint8
    )
    stream = io.BytesIO()
    Image.fromarray(levels).save(stream, "JPEG")
    return stream.getvalue()
