"""Timing the parts of a model that a dense bundle has as graphs of their own.

A block of the encoder, a layer of the decoder, and what chooses tokens: an encoder site and a
decoder site. Blocks and layers are timed right after a run of the same, since in a model they
follow each other. A site stands alone among them, and is timed after other work: its code and its
inputs have to come from memory then, which takes several times as long as its operators by
themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from edgeprune import graph_contract, onnx_file
from edgeprune.bench.worker import PREFIX
from edgeprune.bundle import Bundle
from edgeprune.errors import BundleError, SpecError
from edgeprune.graphs import BLOCK, DECODER_SITE, ENCODER_SITE, PartRecord
from edgeprune.manifest import Manifest
from edgeprune.runtime.backends._ort import OrtBackend

Work = Callable[[], object]
Job = tuple[str, int]
"""What is timed, and with how many tokens."""
SHARES = (1 / 64, 1 / 32, 1 / 16, 1 / 10, 1 / 7, 1 / 5, 1 / 4, 1 / 3, 1 / 2, 2 / 3, 5 / 6, 1)
"""Of the visual tokens or patches: where tables are measured."""
EXPORT = "export it with --method none --profilable"
SLOTS = 64
"""Caches that are written in place hold a multiple of so many tokens."""


def counts(most: int) -> list[int]:
    """Where a table is measured, rising."""
    return sorted({max(1, round(share * most)) for share in SHARES})


def title(part: PartRecord) -> str:
    """Names a table of times."""
    return f"{part.component} {part.kind}"


class Parts:
    """All of a dense bundle's, on one backend."""

    def __init__(self, bundle: Bundle, backend: OrtBackend, text: int) -> None:
        """BundleError, SpecError where the bundle holds none, or others than exports write."""
        self.manifest, self.text = bundle.manifest, text
        _check(bundle)
        self.block = backend.part(BLOCK)
        self.parts = [(part, backend.part(part.file)) for part in self.manifest.parts]

    def jobs(self) -> Iterator[tuple[Job, Callable[[], Work]]]:
        """Each with what makes it ready; only what that gives is timed."""
        encoder, visual = self.manifest.encoder, self.manifest.prune.visual_tokens
        for count in counts(encoder.patches + encoder.extra):
            yield ("block", count), self._block(1, count)
        if encoder.window:
            windows = max(1, encoder.patches // encoder.window)
            for count in counts(encoder.window):
                yield ("windowed", count), self._block(windows, count)
        for number, (part, _) in enumerate(self.parts):
            if part.component == ENCODER_SITE:
                yield (title(part), part.kept), self._encoder_site(number)
            else:
                is_site = part.component == DECODER_SITE
                ready = self._decoder_site if is_site else self._layer
                for count in counts(visual):
                    yield (title(part), count), ready(number, count)

    def _block(self, sequences: int, tokens: int) -> Callable[[], Work]:
        """A block of the encoder on `sequences` windows of a tile, for each tile."""
        rows = np.tile(np.arange(tokens) % self.manifest.encoder.patches, (sequences, 1))
        sizes = {"sequences": sequences, "patches": tokens}
        return lambda: self._for_each_tile(self.block.ready(sizes, {"rows": rows}, again=True))

    def _encoder_site(self, number: int) -> Callable[[], Work]:
        """What an encoder site does, for each tile."""
        _, graph = self.parts[number]
        return lambda: self._for_each_tile(graph.ready({}, {}))

    def _for_each_tile(self, work: Work) -> Work:
        tiles = range(self.manifest.encoder.tiles)
        return lambda: [work() for _ in tiles]

    def _decoder_site(self, number: int, visual: int) -> Callable[[], Work]:
        """A decoder site behind which half of the tokens go on."""
        _, graph = self.parts[number]
        after, tokens = self.text - PREFIX, visual + self.text
        sizes = {"prefix": PREFIX, "visual": visual, "text": after}
        ids = {
            "positions": np.arange(tokens)[None],
            "anchor": np.array([PREFIX + visual // 2]),
            "prefix_ids": np.zeros((1, PREFIX), np.int64),
            "visual_indices": np.arange(visual),
            "text_ids": np.zeros((1, after), np.int64),
            "count": np.array([max(1, visual // 2)]),
        }
        return lambda: graph.ready(sizes | {"tokens": tokens, "rows": tokens}, ids)

    def _layer(self, number: int, visual: int) -> Callable[[], Work]:
        """A layer in a prefill."""
        _, graph = self.parts[number]
        tokens, in_place = visual + self.text, self.manifest.decoder.cache == "in-place"
        slots = tokens + -tokens % SLOTS if in_place else 0
        sizes = {"tokens": tokens, "rows": tokens, "slots": slots}
        ids = {
            "positions": np.arange(tokens)[None],
            "start": np.zeros(1, np.int64),
            "end": np.array([tokens]),
        }
        return lambda: graph.ready(sizes, ids, again=True, in_place=in_place)


def _check(bundle: Bundle) -> None:
    """SpecError where a bundle has no parts, BundleError where they are not such as exports
    write."""
    manifest, path = bundle.manifest, bundle.path
    if BLOCK not in manifest.files or not _is_dense(manifest):
        raise SpecError(f"{path} has no {BLOCK} of a dense encoder; {EXPORT}")
    for name in (BLOCK, *(part.file for part in manifest.parts)):
        file = bundle.file(name)
        try:
            graph_contract.check_nodes(manifest, onnx_file.read(file))
        except (OSError, ValueError) as error:
            raise BundleError(
                f"{file} is not a graph of this bundle ({error}); {EXPORT}"
            ) from error


def _is_dense(manifest: Manifest) -> bool:
    return manifest.encoder.kept >= manifest.encoder.units
