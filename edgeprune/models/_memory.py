"""Whether eager work on a checkpoint fits in this machine's memory."""

from __future__ import annotations

from collections import defaultdict

from edgeprune.errors import ModelError
from edgeprune.memory import available_bytes
from edgeprune.models._activations import BOUND
from edgeprune.models._adapter import Adapter
from edgeprune.models._stages import WINDOW
from edgeprune.models._streamed import part_of

PROCESS = 600_000_000
"""Bytes of a process that has imported torch and transformers."""
READING = 6
"""Bytes of each number of a tensor being read: as stored in 2, and not yet transposed in 4."""
IN_GRAPH = 13
"""Bytes of each weight of a window in ONNX Runtime, as seen: as stored, widened, laid out anew, and
what is copied on the way."""
CONTEXT = 500_000_000
"""Bytes of a device that its libraries take before any tensor."""
TEXT = 64
"""Tokens of a sample's text that an estimate counts."""


def check_memory(need: int, work: str, otherwise: str) -> None:
    """ModelError, before anything slow, where work that needs so many bytes would not fit."""
    available = available_bytes()
    if available is not None and need > available:
        raise ModelError(
            f"{work} needs {need / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB is free;"
            f" {otherwise}"
        )


def check_device(adapter: Adapter, work: str) -> None:
    """ModelError where the device has no room for a window of layers and one sample in it."""
    execution = adapter.execution
    free = execution.free_bytes()
    sizes = [sum(part) for part in _parts(adapter).values()]
    window = 4 * max(*sizes, min(sum(sizes), WINDOW // 4))
    need = CONTEXT + window + _work(adapter, (adapter.shape.layers - 1) * TEXT)
    if free is not None and need > free:
        raise ModelError(
            f"{work} needs {need / 1e9:.1f} GB on {execution.device}, {free / 1e9:.1f} GB is free;"
            " free some there, or use --device cpu"
        )


def layerwise_bytes(adapter: Adapter, samples: int) -> int:
    """Bytes of float32 calibration at its peak: the process, the largest part of the model with the
    tensor being read, the activations that stay in memory, and one sample's work in a layer."""
    shape, parts = adapter.shape, _parts(adapter)
    parts.pop("head", None)  # calibration needs no logits
    largest = max(4 * sum(sizes) + READING * max(sizes) for sizes in parts.values())
    work = _work(adapter, max(shape.visual_tokens + TEXT, (shape.layers - 1) * TEXT))
    return PROCESS + largest + min(activation_bytes(adapter, samples), BOUND) + work


def activation_bytes(adapter: Adapter, samples: int) -> int:
    """Bytes of what float32 calibration keeps of its samples between two layers, at most."""
    shape = adapter.shape
    alone = (shape.layers - 1) * TEXT  # tokens of the text-only continuations
    tokens = shape.visual_tokens + TEXT
    return 4 * shape.width * (tokens + shape.visual_tokens + alone) * samples


def sensitivity_bytes(adapter: Adapter, samples: int) -> int:
    """Bytes of measuring what groups of products lose, at its peak: as calibration, and of one
    layer the codes of 4 bits, in a byte each, with the floats of a group of its products."""
    layers = [sum(one) for name, one in _parts(adapter).items() if name.startswith("layers.")]
    return layerwise_bytes(adapter, samples) + 4 * max(layers)


def parity_bytes(adapter: Adapter, samples: int) -> int:
    """Bytes of a parity check at its peak, likewise: ONNX Runtime takes more for a window of the
    graph than the reference takes for its layers."""
    shape, sizes = adapter.shape, [sum(part) for part in _parts(adapter).values()]
    window = max(*sizes, min(sum(sizes), WINDOW // 4))
    tokens = shape.visual_tokens + TEXT
    kept = 2 * 4 * shape.width * (2 * tokens + shape.visual_tokens) * samples  # of two engines
    return PROCESS + IN_GRAPH * window + min(kept, BOUND) + _work(adapter, tokens)


def _parts(adapter: Adapter) -> dict[str, list[int]]:
    """How many numbers each parameter has, of each part that is in memory as a whole."""
    parts = defaultdict[str, list[int]](list)
    for module in adapter.empty_modules():
        for name, parameter in module.named_parameters():
            parts[part_of(name)].append(parameter.numel())
    return parts


def _work(adapter: Adapter, tokens: int) -> int:
    """Bytes of so many tokens, or of an image, within a layer."""
    shape, encoder = adapter.shape, adapter.vision_config.encoder
    tiles, _, height, width = adapter.pixels
    patches = tiles * (height // encoder.patch) * (width // encoder.patch)
    return 4 * max(
        tokens * (8 * shape.width + 3 * shape.mlp_width),
        patches * (8 * encoder.width + 3 * encoder.mlp_width),
    )
