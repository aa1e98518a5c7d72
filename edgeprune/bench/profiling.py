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

from edgeprune.bench.conditions import machine_versions
from edgeprune.bench.parts import EXPORT, Job, Parts, Work, counts, title
from edgeprune.bench.worker import PREFIX
from edgeprune.bundle import Bundle
from edgeprune.errors import BackendError, CapacityError, SpecError
from edgeprune.graphs import DECODER_SITE, ENCODER_SITE, LAYER
from edgeprune.images import read_image
from edgeprune.manifest import Manifest
from edgeprune.progress import Progress, silent
from edgeprune.runtime import backends
from edgeprune.runtime.backend import DecoderInputs, EncodedImage
from edgeprune.runtime.backends._ort import OrtBackend
from edgeprune.runtime.images import to_pixels
from edgeprune.runtime.tile_encoder import TileEncoder
from edgeprune.timing import KindTimes, Profile, Profiled, Spread, Table


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
        asked = {"text": self.text_tokens, "rounds": self.rounds, "warmup": self.warmup}
        least = {"text": PREFIX + 1, "rounds": 1, "warmup": 0}
        for name, number in least.items():
            if asked[name] < number:
                raise SpecError(f"--{name} is at least {number}; got {asked[name]}")
        if backends.find(self.backend).engines:
            raise BackendError(
                f"profile times graphs on ort-cpu or ort-cuda; engines of {self.backend} are for"
                " fixed sizes and are timed by edgeprune bench"
            )


def profile(request: ProfileRequest, report: Progress = silent) -> Profile:
    """Time a dense bundle that was exported with --profilable."""
    bundle = Bundle.open(request.bundle)
    manifest, prune = bundle.manifest, bundle.manifest.prune
    if len(set(prune.counts)) > 1 or prune.counts[0] != prune.visual_tokens:
        raise SpecError(
            f"profile times the dense model, {bundle.path} prunes by {prune.method}; {EXPORT}"
        )
    _check_positions(bundle, request)
    backend = OrtBackend(bundle, request.backend.removeprefix("ort-"), request.threads)
    try:
        work = _Work(bundle, backend, request)
        seconds = _rounds(request, work.jobs(), report)
    finally:
        backend.close()
    found = {name: _spread(kept) for name, kept in seconds.items()}
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
        whole=found["whole", 0],
        choices=_by_kind(manifest, found, ENCODER_SITE),
        sites=_by_kind(manifest, found, DECODER_SITE),
        layers=_by_kind(manifest, found, LAYER),
        windowed=_table(found, "windowed") if manifest.encoder.window else None,
    )


def _check_positions(bundle: Bundle, request: ProfileRequest) -> None:
    """CapacityError where image and text are longer than the model takes."""
    record, text = bundle.manifest.decoder, request.text_tokens
    if record.image_positions + text > record.max_positions:
        raise CapacityError(
            f"{bundle.path} has {record.max_positions} positions, {record.image_positions} of them"
            f" for the image; --text is at most {record.max_positions - record.image_positions};"
            f" got {text}"
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


def _rounds(
    request: ProfileRequest, jobs: dict[Job, Callable[[], Work]], report: Progress
) -> dict[Job, list[float]]:
    """Seconds of each job in each counted round."""
    seconds: dict[Job, list[float]] = {name: [] for name in jobs}
    parts, order = list(jobs.items()), random.Random(0)
    total = request.warmup + request.rounds
    for number in range(total):
        order.shuffle(parts)
        for name, ready in parts:
            work = ready()
            begin = time.perf_counter()
            work()
            if number >= request.warmup:
                seconds[name].append(time.perf_counter() - begin)
        report("rounds", number + 1, total)
    return seconds


class _Work:
    """What is done in a round, on inputs of noise."""

    def __init__(self, bundle: Bundle, backend: OrtBackend, request: ProfileRequest) -> None:
        self.manifest, self.backend, self.text = bundle.manifest, backend, request.text_tokens
        self.rng, self.caches = np.random.default_rng(0), backend.caches()
        self.parts = Parts(bundle, backend, self.text)
        self.encoder = TileEncoder(backend, self.manifest, 0)
        record = self.manifest.image
        self.pixels = self.rng.standard_normal(record.shape, np.float32)
        self.file = (
            request.image.read_bytes() if request.image else _noise(record.height, record.width)
        )
        self.image = read_image(self.file).image
        self.size = self.image.height, self.image.width

    def jobs(self) -> dict[Job, Callable[[], Work]]:
        """Each by its kind and its count, with what makes it ready."""
        plain: dict[Job, Work] = {
            ("read", 0): lambda: read_image(self.file),
            ("preprocess", 0): self._preprocess,
            ("vision", 0): self._encode,
            ("whole", 0): self._whole(),
        }
        for count in counts(self.manifest.prune.visual_tokens):
            plain["prefill", count] = self._prefill(count)
        return {name: _as_it_is(work) for name, work in plain.items()} | dict(self.parts.jobs())

    def _preprocess(self) -> None:
        for _ in range(self.manifest.encoder.shown):
            to_pixels(self.image, self.manifest.image)

    def _encode(self) -> EncodedImage:
        return self.encoder.encode(self.pixels, np.array(self.manifest.prune.counts))

    def _whole(self) -> Work:
        """All of a first token, one after the other."""
        tokens = self.manifest.prune.visual_tokens
        ids = self._ids()

        def run() -> None:
            read_image(self.file)
            self._preprocess()
            self.backend.run(self._inputs(ids, self._encode(), tokens), self.caches)

        return run

    def _prefill(self, tokens: int) -> Work:
        record = self.manifest.decoder
        visual = self.rng.standard_normal((1, tokens, record.visual_width), np.float32)
        inputs = self._inputs(self._ids(), self.backend.as_image(visual, np.arange(tokens)), tokens)
        return lambda: self.backend.run(inputs, self.caches)

    def _ids(self) -> NDArray[np.int64]:
        return self.rng.integers(3, self.manifest.decoder.vocabulary, (1, self.text))

    def _inputs(self, ids: NDArray[np.int64], image: EncodedImage, tokens: int) -> DecoderInputs:
        nothing = np.zeros(self.manifest.decoder.layers, np.int64)
        filled = nothing + self.text + tokens
        return DecoderInputs(ids[:, :PREFIX], ids[:, PREFIX:], image, 0, nothing, filled, False)


def _as_it_is(work: Work) -> Callable[[], Work]:
    """Of a job that needs nothing to be ready."""
    return lambda: work


def _table(found: dict[Job, Spread], kind: str) -> Table:
    own = {count: spread for (name, count), spread in found.items() if name == kind}
    return Table.of(list(own), list(own.values()))


def _by_kind(manifest: Manifest, found: dict[Job, Spread], component: str) -> tuple[KindTimes, ...]:
    """Tables of one component of the model, one for each kind of it."""
    kinds = {one.kind: title(one) for one in manifest.parts if one.component == component}
    return tuple(KindTimes(kind, _table(found, name)) for kind, name in kinds.items())


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
