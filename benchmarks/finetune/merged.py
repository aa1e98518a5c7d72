"""A checkpoint with some tensors changed, which export takes as any other."""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn

from edgeprune.errors import ModelError
from edgeprune.files import replaced
from edgeprune.models import Adapter
from edgeprune.models._weight_source import Source


def check(adapter: Adapter) -> None:
    """ModelError where tensors could not be written back as they are stored."""
    if adapter.checkpoint.packed is not None or adapter.checkpoint.lora is not None:
        raise ModelError(
            f"{adapter.checkpoint.folder} is quantised or has an adapter; fine-tune the float"
            " checkpoint that it was made from"
        )


def write(
    adapter: Adapter, changed: Mapping[nn.Module, Mapping[str, Tensor]], output: Path
) -> Path:
    """The checkpoint's folder once more, with parameters of the modules changed."""
    checkpoint, tensors = adapter.checkpoint, dict[str, Tensor]()
    for module, parameters in changed.items():
        sources = adapter.sources(module)
        for name, parameter in parameters.items():
            for tensor, value in _stored(adapter, sources[name], parameter, tensors).items():
                tensors[tensor] = value
    by_file = defaultdict[Path, list[str]](list)
    for name, file in checkpoint.files.items():
        by_file[file].append(name)
    with replaced(output) as draft:
        for file in checkpoint.folder.iterdir():
            if file.is_file() and file not in by_file:
                shutil.copyfile(file, draft / file.name)
        for file, names in by_file.items():
            found = {name: tensors.get(name, checkpoint.read(name)) for name in names}
            save_file(found, draft / file.name, metadata={"format": "pt"})
    return output


def _stored(
    adapter: Adapter, source: Source, parameter: Tensor, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The stored tensors of a parameter, given those that others have changed already: one tensor
    may hold several."""
    checkpoint, stored = adapter.checkpoint, source.stored
    value = parameter.t() if source.transposed else parameter
    value = (value.reshape(source.shape) - stored.offset) / stored.factor
    found, start = dict[str, Tensor](), 0
    for name in source.names:
        whole = tensors.get(name, checkpoint.read(name)).clone()
        if stored.rows:
            whole[list(stored.rows)] = value.to(whole.dtype)
        else:
            count = whole.numel() // max(1, value[0].numel()) if value.dim() else 1
            part = value[start : start + count] if len(source.names) > 1 else value
            whole = part.reshape(whole.shape).to(whole.dtype).contiguous()
            start += count
        found[name] = whole
    return found
