"""Asking the parsers that are installed here whether they take a bundle's graphs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from edgeprune import memory
from edgeprune.bundle import Bundle
from edgeprune.errors import BackendError, BundleError
from edgeprune.runtime import trt as seam
from edgeprune.runtime._static import with_sizes

SPARE = 64
"""Text tokens that the caches hold for the question; a parser wants a number."""


@dataclass(frozen=True)
class Parser:
    """An installed parser's answer; `refusal` is empty where it takes all."""

    engine: str  # trt or rtx
    title: str
    version: str
    asked: bool
    refusal: str


def ask(bundle: Bundle) -> list[Parser]:
    """What TensorRT and TensorRT-RTX say, where they are installed."""
    found = []
    for backend, title in seam.TITLES.items():
        try:
            trt = seam.load(backend)
        except BackendError:
            continue
        asked, refusal = _answer(trt, bundle)
        engine, version = backend.removeprefix("trt-"), str(trt.__version__)
        found.append(Parser(engine, f"{title} {version}", version, asked, refusal))
    return found


def _answer(trt: Any, bundle: Bundle) -> tuple[bool, str]:
    """Whether a parser could be asked, and what it refuses or why it could not."""
    weights = bundle.file("weights.bin").stat().st_size  # the parser reads them
    if weights > (available := memory.available_bytes() or weights):
        return False, f"{weights / 1e9:.1f} GB of weights, {available / 1e9:.1f} GB are free"
    logger = seam.quiet_logger(trt)
    try:
        builder = trt.Builder(logger)
    except (RuntimeError, TypeError) as error:  # TensorRT's builder wants a GPU
        return False, logger.errors[-1] if logger.errors else str(error)
    wrong = []
    for name in ("vision.onnx", "decoder.onnx"):
        network = builder.create_network(seam.strongly_typed(trt))
        parser = trt.OnnxParser(network, logger)
        if not parser.parse(_fixed(bundle, name), str(bundle.file(name))):
            wrong.append(f"{name}: {seam.refusals(parser)}")
    return True, "; ".join(wrong)


def _fixed(bundle: Bundle, name: str) -> bytes:
    """A graph with caches of some length, where they are written in place."""
    manifest, data = bundle.manifest, bundle.file(name).read_bytes()
    if name == "vision.onnx" or manifest.decoder.cache == "grow":
        return data
    sizes = {f"capacity.{n}": count + SPARE for n, count in enumerate(manifest.prune.counts)}
    try:
        return with_sizes(data, sizes)
    except ValueError as error:
        raise BundleError(f"{bundle.file(name)} is damaged ({error}); export it again") from error
