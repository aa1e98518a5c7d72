"""The seam between an engine and an inference library.

A backend holds compiled graphs. What belongs to one dialogue (its KV caches) or to one image (its
visual tokens) is an object that the backend makes and is handed back at each call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from edgeprune.errors import BackendError
from edgeprune.manifest import Manifest

Ids = NDArray[np.int64]

NOT_FINITE = (
    "the decoder returned logits that are not finite, so the answer ends here; try another image"
    " or prompt, or export again with --keep-fp32 auto, --dtype bf16 or --dtype fp32"
)


@dataclass(frozen=True, eq=False)
class EncodedTile:
    """What vision.onnx made of a tile; any number of images may have it."""

    signals: Mapping[str, Any]  # by role, wherever the backend keeps them
    caches: Mapping[tuple[str, int], Any] | None = None  # keys and values of the blocks, by
    # `TensorRecord.cached`; None: not asked for
    holder: object = None  # while it lives, the backend keeps the memory for this tile


@dataclass(frozen=True, eq=False)
class ChangedPatches:
    """K of the N patches of a tile."""

    pixels: NDArray[np.float32]  # [K, 3, patch, patch]
    indices: Ids  # [K], rising, in reading order


@dataclass(frozen=True, eq=False)
class EncodedImage:
    """What join.onnx made of an image's tiles; it can be read by any sequence of the engine."""

    visual: Any  # [1, encoded, width], wherever the backend keeps it
    indices: Any  # int64 [encoded], likewise: what `kept` says
    kept: Ids  # indices of the encoder's survivors among the V tokens; V: [CLS]
    warnings: tuple[str, ...] = ()  # of the image, such as that its shape is not the bundle's
    engine: object = None  # that encoded it
    holder: object = None  # while it lives, the backend keeps the memory for this image
    manifest: Manifest | None = None  # of the bundle at the ratio at which it was encoded
    tiles_encoded: int = 0  # of its tiles or frames; the others were known
    patches_encoded: int | None = None  # of its patches, where frames are not always whole


@dataclass(frozen=True)
class DecoderInputs:
    """One call of the decoder: ids [1, P] and [1, T], an image between them or none, and where
    they go in the caches."""

    prefix_ids: Ids
    text_ids: Ids
    image: EncodedImage | None
    position: int  # of the first token of this call
    lengths: Ids  # [layers], tokens in each layer's cache before the call
    filled: Ids  # [layers], and after it
    logits: bool = True  # whether logits are wanted, not the likeliest token alone
    counts: Ids | None = None  # [layers], r_1 ... r_L of the image, for graphs that take them

    @property
    def is_step(self) -> bool:
        """Whether this is one decode step: a single token behind others."""
        alone = self.image is None and self.prefix_ids.size == 0 and self.text_ids.size == 1
        return alone and self.position > 0


@dataclass(frozen=True)
class Output:
    """What a call gives."""

    likeliest: int  # next token, of equal ones the first; -1 where logits are not finite
    kept: tuple[Ids, ...] = ()  # at each pruning site, of the tokens alive there; no image: none
    logits: NDArray[Any] | None = None  # of the last token, [vocabulary]; None unless asked for

    @property
    def token(self) -> int:
        """The likeliest next token; BackendError unless logits are finite."""
        if self.likeliest < 0:
            raise BackendError(NOT_FINITE)
        return self.likeliest


def likeliest(logits: NDArray[Any]) -> int:
    """What `Output.likeliest` is: -1 where any logit is infinite or not a number."""
    return int(logits.argmax()) if np.isfinite(logits).all() else -1


@dataclass(frozen=True)
class Kind:
    """What a caller knows of a backend before a bundle is opened on it."""

    dtypes: tuple[str, ...]  # of bundles that it runs
    gpu: bool
    engines: bool  # runs what `edgeprune build` made, not the graphs themselves


class Caches(Protocol):
    """Keys and values of one dialogue, on one backend; batch 1."""

    closed: bool  # whether they were given back

    def bytes(self) -> int:
        """Bytes that they take now."""
        ...

    def close(self) -> None:
        """Give them back; the last call."""
        ...


C = TypeVar("C", bound=Caches)


class Backend(Protocol[C]):
    """Compiled graphs on one device; one call at a time."""

    name: str
    text_capacity: int | None  # tokens of text that caches hold; None: as many as it takes
    build_seconds: float | None  # that engines took to build; None where nothing is built

    def encode_tile(self, pixels: NDArray[np.float32], *, caches: bool = False) -> EncodedTile:
        """Run vision.onnx: [frames, 3, H, W]; with `caches`, where the bundle has them, for
        `encode_changed`."""
        ...

    def encode_changed(self, tile: EncodedTile, changed: ChangedPatches) -> EncodedTile:
        """Run vision_delta.onnx: a tile with caches, of which some patches changed. Nobody reads
        the caches of `tile` after that, nor after an error: they may have been written."""
        ...

    def join(self, tiles: Sequence[EncodedTile], counts: Ids | None = None) -> EncodedImage:
        """Run join.onnx on all tiles of an image; `counts` r_1 ... r_L where it takes them."""
        ...

    def caches(self) -> C:
        """Caches for one more dialogue."""
        ...

    def copy(self, caches: C, lengths: Ids) -> C:
        """Further caches that hold the same `lengths` tokens in each layer."""
        ...

    def run(self, inputs: DecoderInputs, caches: C) -> Output:
        """Prefill, a later turn, or one decode step; CapacityError, before any work, where the
        caches cannot hold it."""
        ...

    def close(self) -> None:
        """Free graphs and memory at once; the last call."""
        ...


class FakeCaches:
    """Caches that hold nothing."""

    closed = False

    def bytes(self) -> int:
        return 0

    def close(self) -> None:
        pass


class FakeBackend:
    """Answers from a script of token ids, and remembers what it was asked."""

    name = "fake"
    text_capacity: int | None = None
    build_seconds: float | None = None

    def __init__(self, script: Sequence[int], vocabulary: int, visual_tokens: int) -> None:
        self.script, self.vocabulary, self.visual = list(script), vocabulary, visual_tokens
        self.calls: list[DecoderInputs] = []

    def encode_tile(self, pixels: NDArray[np.float32], *, caches: bool = False) -> EncodedTile:
        return EncodedTile({}, {} if caches else None)

    def encode_changed(self, tile: EncodedTile, changed: ChangedPatches) -> EncodedTile:
        return EncodedTile({}, {})

    def join(self, tiles: Sequence[EncodedTile], counts: Ids | None = None) -> EncodedImage:
        return EncodedImage(None, None, np.arange(self.visual))

    def caches(self) -> FakeCaches:
        return FakeCaches()

    def copy(self, caches: FakeCaches, lengths: Ids) -> FakeCaches:
        return FakeCaches()

    def run(self, inputs: DecoderInputs, caches: FakeCaches) -> Output:
        token = self.script[min(len(self.calls), len(self.script) - 1)]
        self.calls.append(inputs)
        logits = np.zeros(self.vocabulary, np.float32)
        logits[token] = 1
        return Output(token, (), logits if inputs.logits else None)

    def close(self) -> None:
        pass
