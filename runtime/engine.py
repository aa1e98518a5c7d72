"""An engine: a bundle's weights and compiled graphs, once, for any number of dialogues."""

from __future__ import annotations

import threading
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeprune.bundle import Bundle
from edgeprune.errors import CapacityError, SessionError, SpecError
from edgeprune.runtime import backends, media
from edgeprune.runtime.backend import Backend, Caches, DecoderInputs, EncodedImage, Ids, Output
from edgeprune.runtime.frames import DeltaOptions, FrameEncoder
from edgeprune.runtime.media import Shown
from edgeprune.runtime.sequence import CLOSED, Sequence
from edgeprune.runtime.text import Prompter
from edgeprune.runtime.tile_encoder import TileEncoder
from edgeprune.tiling import TILE_MEMORY_MB


class Engine:
    """Weights, compiled graphs and limits of one bundle on one backend.

    Any thread may use it; it runs one call at a time, and the others wait. What belongs to a
    dialogue is in its `Sequence`. As a context manager it is closed at the end of the block.
    """

    def __init__(
        self, bundle: Bundle, backend: Backend[Any], tile_memory_mb: int = TILE_MEMORY_MB
    ) -> None:
        self.bundle, self.manifest, self.backend = bundle, bundle.manifest, backend
        self._encoder = TileEncoder(backend, bundle.manifest, tile_memory_mb)
        self._lock, self._closed = threading.Lock(), False

    @classmethod
    def open(
        cls,
        path: Path | str,
        backend: str = "ort-cpu",
        *,
        threads: int | None = None,
        verify: bool | None = None,
        tile_memory_mb: int = TILE_MEMORY_MB,
    ) -> Engine:
        """Open a bundle on a backend of `backends.NAMES`; `verify` as in Bundle.open.

        `tile_memory_mb` is for what the encoder gave for tiles and frames: those whose pixels come
        again are not encoded again. With 0 every tile is.
        """
        backends.find(backend)
        if tile_memory_mb < 0:
            raise SpecError(f"--tile-memory is a number of megabytes from 0; got {tile_memory_mb}")
        bundle = Bundle.open(path, verify=verify)
        return cls(bundle, backends.make(bundle, backend, threads), tile_memory_mb)

    @cached_property
    def prompter(self) -> Prompter:
        """The tokenizer and the conversation template; read when they are first needed."""
        return Prompter(self.bundle.file("tokenizer.json"), self.manifest.text)

    @cached_property
    def visual_ids(self) -> Ids:
        """What an image's tokens are to transformers: [n]."""
        return np.repeat(*np.array(self.manifest.text.visual_ids, np.int64).T)

    def sequence(self) -> Sequence:
        """A new dialogue, with caches of its own."""
        with self._lock:
            self._check()
            caches = self.backend.caches()
        return Sequence(self, caches)

    def encode_image(self, shown: Shown, cr: float | None = None) -> EncodedImage:
        """An image, several, or a video, as the bundle takes them; any sequence may read it.

        `cr` is one of the bundle's ratios, None the default; SpecError where it has no such.
        """
        prepared = media.prepare(shown, self.manifest.image)
        return self.encode_pixels(prepared.pixels, prepared.warnings, cr)

    def encode_pixels(
        self,
        pixels: NDArray[np.float32],
        warnings: tuple[str, ...] = (),
        cr: float | None = None,
    ) -> EncodedImage:
        """As `encode_image`, from what `media.prepare` gives."""
        manifest = self.manifest.at(cr)
        counts = np.array(manifest.prune.counts)
        with self._lock:
            self._check()
            image = self._encoder.encode(pixels, counts)
            return replace(image, warnings=warnings, engine=self, manifest=manifest)

    def camera(self, options: DeltaOptions) -> FrameEncoder:
        """What encodes the frames of one fixed camera, of each only what changed; SpecError unless
        the bundle was exported with --delta."""
        with self._lock:
            self._check()
            return FrameEncoder(self.backend, self.manifest, options)

    def encode_frame(
        self,
        camera: FrameEncoder,
        pixels: NDArray[np.float32],
        warnings: tuple[str, ...] = (),
        cr: float | None = None,
    ) -> EncodedImage:
        """As `encode_pixels`, of the next frame of a camera of this engine."""
        manifest = self.manifest.at(cr)
        with self._lock:
            self._check()
            image = camera.encode(pixels, np.array(manifest.prune.counts))
            return replace(image, warnings=warnings, engine=self, manifest=manifest)

    def forget_tiles(self) -> None:
        """Every tile is encoded again, as if none had been seen."""
        with self._lock:
            self._encoder.forget()

    def run(self, inputs: DecoderInputs, caches: Caches) -> Output:
        """One call of the decoder, for a sequence."""
        if inputs.image is not None:
            self.check_own(inputs.image)
        with self._lock:
            self._check(caches)
            return self.backend.run(inputs, caches)

    def check_own(self, image: EncodedImage) -> None:
        """SessionError unless this engine encoded the image."""
        if image.engine is not self:
            raise SessionError("the image was encoded by another engine; encode it with this one")

    def copy(self, caches: Caches, lengths: Ids) -> Caches:
        """Caches that hold the same tokens, for a sequence."""
        with self._lock:
            self._check(caches)
            copied: Caches = self.backend.copy(caches, lengths)
            return copied

    def free(self, caches: Caches) -> None:
        """Give caches back, once no call is running; closing has done so already."""
        with self._lock:
            if not self._closed:
                caches.close()

    def close(self) -> None:
        """Free weights, graphs and all caches, once no call is running; sequences then end."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._encoder.forget()
                self.backend.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def room(self, position: int, held: int, text: int, span: int, wanted: int | None) -> int:
        """How many tokens may be said once `text` tokens, and an image that takes `span` positions,
        are read at `position`, where the caches hold `held` tokens of text; at most `wanted`.

        CapacityError where there is no room for one, or for as many as are wanted.
        """
        most, capacity = self.manifest.decoder.max_positions, self.backend.text_capacity
        taken = position + text + span
        if taken >= most:
            raise CapacityError(
                f"the dialogue takes {taken} positions (the image's included) and needs room for"
                f" an answer, the model has {most} positions; shorten the prompt"
            )
        room, left = most - taken, f"positions left of {most}"
        if capacity is not None:
            if held + text >= capacity:
                raise CapacityError(
                    f"the dialogue has {held + text} tokens of text and needs room for an answer,"
                    f" the engines' caches hold {capacity}; shorten the prompt, or build with a"
                    " larger --text-capacity"
                )
            if capacity - held - text < room:
                room, left = capacity - held - text, f"tokens left of --text-capacity {capacity}"
        if wanted is not None and wanted > room:
            raise CapacityError(
                f"--max-new-tokens {wanted} is more than the {room} {left}; ask for fewer"
            )
        return room

    def _check(self, caches: Caches | None = None) -> None:
        """SessionError where engine or caches were closed before a call had its turn."""
        if self._closed:
            raise SessionError("this engine is closed; open the bundle again")
        if caches is not None and caches.closed:
            raise SessionError(CLOSED)
