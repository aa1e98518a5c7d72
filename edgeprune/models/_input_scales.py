"""How large the inputs of products are, where a quantised checkpoint says so itself."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from edgeprune.errors import ExportError
from edgeprune.models._adapter import Adapter
from edgeprune.models._quantised import FLOAT8_LARGEST
from edgeprune.models._weight_source import Source


def own_peaks(adapter: Adapter) -> dict[str, float]:
    """By the parameter of each product whose inputs `adapter.weights` rounds to float8, the largest
    input that the checkpoint's scale for it holds; empty where one of them has none. ExportError
    where a graph of the dtype cannot hold such a scale."""
    assert adapter.weights is not None
    rounded = {name for name, form in adapter.weights.forms.items() if form.activations}
    found = {name: scale * FLOAT8_LARGEST for name, scale in _scales(adapter, rounded)}
    return found if found.keys() == rounded else {}


def _scales(adapter: Adapter, names: set[str]) -> Iterator[tuple[str, float]]:
    assert adapter.weights is not None
    for module in adapter.empty_modules():
        for name, source in adapter.sources(module).items():
            if name in names and _is_whole(source):
                scale = adapter.checkpoint.input_scale(source.names[0])
                if scale is not None:
                    _check_fits(source.names[0], scale, adapter.weights.scales)
                    yield name, scale


def _check_fits(weight: str, scale: float, dtype: torch.dtype) -> None:
    if not 0 < float(torch.tensor(scale).to(dtype)) < math.inf:
        raise ExportError(
            f"the checkpoint divides the inputs of {weight} by {scale:g} before they are rounded,"
            f" which does not fit {str(dtype).removeprefix('torch.')}; export with --dtype bf16 or"
            " fp32"
        )


def _is_whole(source: Source) -> bool:
    """Whether a parameter is one stored tensor that nothing changes."""
    return len(source.names) == 1 and not any(source.changes)
