"""Asking the parsers that are installed here whether they take a bundle's graphs.

Each is asked in a process of its own: TensorRT's parsers were seen to die of graphs that are not
what they seem.

    python -m edgeprune.runtime.parsers trt-rtx BUNDLE
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from edgeprune import memory
from edgeprune.bundle import Bundle
from edgeprune.errors import BackendError
from edgeprune.graphs import DECODER
from edgeprune.runtime import trt as seam
from edgeprune.runtime.onnx_dims import with_sizes

SPARE = 64
"""Text tokens that the caches hold for the question; a parser wants a number."""

SECONDS = 600
"""A parser that takes longer is given up. One reads 14 GB of weights in some tens of seconds."""


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
    installed = [b for b, module in seam.MODULES.items() if importlib.util.find_spec(module)]
    return [answer for backend in installed for answer in _asked(backend, bundle)]


def _asked(backend: str, bundle: Bundle) -> Iterator[Parser]:
    """What one parser says; nothing where its library cannot be loaded."""
    command = [sys.executable, "-m", "edgeprune.runtime.parsers", backend, str(bundle.path)]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, timeout=SECONDS, check=False)
        said, died = done.stdout, f"its parser died of this bundle (exit code {done.returncode})"
    except subprocess.TimeoutExpired as error:
        said, died = error.stdout or b"", f"its parser gave no answer in {SECONDS} s"
    answers = [Parser(**json.loads(line)) for line in said.splitlines()]
    if len(answers) == 1:
        yield replace(answers[0], refusal=died)
    yield from answers[1:]


def main() -> None:
    """Print what a parser is, then its answer; nothing where its library cannot be loaded."""
    backend, path = sys.argv[1:]
    bundle = Bundle.open(path, verify=False)
    try:
        trt = seam.load(backend)
    except BackendError:
        return
    engine, version = backend.removeprefix("trt-"), str(trt.__version__)
    parser = Parser(engine, f"{seam.TITLES[backend]} {version}", version, True, "")
    print(json.dumps(asdict(parser)), flush=True)  # all that is known of one that dies
    asked, refusal = answer(trt, bundle)
    print(json.dumps(asdict(replace(parser, asked=asked, refusal=refusal))), flush=True)


def answer(trt: Any, bundle: Bundle) -> tuple[bool, str]:
    """Whether a parser could be asked, and what it refuses or why it could not."""
    if not bundle.has_weights:
        return False, "weights.bin was removed once engines were built"
    weights = bundle.file("weights.bin").stat().st_size  # the parser reads them
    if weights > (available := memory.available_bytes() or weights):
        return False, f"{weights / 1e9:.1f} GB of weights, {available / 1e9:.1f} GB are free"
    logger = seam.quiet_logger(trt)
    try:
        builder = trt.Builder(logger)
    except (RuntimeError, TypeError) as error:  # TensorRT's builder wants a GPU
        return False, logger.errors[-1] if logger.errors else str(error)
    wrong = []
    for name in bundle.manifest.graph_names:
        network = builder.create_network(seam.strongly_typed(trt))
        parser = trt.OnnxParser(network, logger)
        try:
            graph = _fixed(bundle, name)
        except ValueError as error:
            return False, f"{name} is damaged ({error}); export it again"
        if not parser.parse(graph, str(bundle.file(name))):
            wrong.append(f"{name}: {seam.refusals(parser)}")
    return True, "; ".join(wrong)


def _fixed(bundle: Bundle, name: str) -> bytes:
    """A graph with caches of some length, where they are written in place; ValueError where its
    bytes are no graph."""
    manifest, data = bundle.manifest, bundle.file(name).read_bytes()
    if name != DECODER or manifest.decoder.cache == "grow":
        return data
    counts = manifest.widest.counts
    sizes = {f"capacity.{n}": counts[n] + SPARE for n in manifest.graph.cached_layers}
    return with_sizes(data, sizes)


if __name__ == "__main__":
    main()
