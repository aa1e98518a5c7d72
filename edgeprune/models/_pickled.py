"""Weights in PyTorch's pickle files, written anew as safetensors.

A pickle is a program, which may do anything when Python runs it. Here none is run: torch's
weights-only reader knows tensors and containers alone, and refuses a file that names anything else.
"""

from __future__ import annotations

import json
import pickle
import re
import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from edgeprune.errors import ModelError, SpecError
from edgeprune.files import obstacle, replaced
from edgeprune.models._checkpoint import INDEX, SINGLE
from edgeprune.models._stored import line
from edgeprune.progress import Progress, silent

BESIDE = ("*.json", "*.jinja", "*.tiktoken", "*.txt", "*.model")
"""Files of a checkpoint that are copied; code is not."""


@dataclass(frozen=True)
class Converted:
    """What was written."""

    folder: Path
    files: int
    tensors: int
    bytes: int


def convert(folder: Path, output: Path, report: Progress = silent) -> Converted:
    """Write a checkpoint with pickled weights as one with safetensors; the whole or nothing.

    One file is in memory at a time. ModelError where a file is damaged, or holds more than tensors.
    """
    pickles = _pickles(folder)
    _check_output(output)
    need, free = sum(file.stat().st_size for file in pickles), _free(output)
    if need > free:
        raise SpecError(
            f"{output} needs {need / 1e6:,.1f} MB of disk, {free / 1e6:,.1f} MB are free; choose"
            " another --output"
        )
    with replaced(output) as draft:
        weights = dict[str, str]()
        for number, file in enumerate(pickles, start=1):
            report("files", number - 1, len(pickles))
            name = SINGLE
            if len(pickles) > 1:
                name = f"model-{number:05}-of-{len(pickles):05}.safetensors"
            tensors = read_pickle(file)
            if twice := sorted(weights.keys() & tensors.keys()):
                raise ModelError(f"{file} holds {twice[0]}, and so does a file before it")
            save_file(_apart(tensors), draft / name, metadata={"format": "pt"})
            weights |= dict.fromkeys(tensors, name)
        if len(pickles) > 1:
            table = {"metadata": {}, "weight_map": weights}
            (draft / INDEX).write_text(json.dumps(table), encoding="utf-8")
        for file in sorted(found for pattern in BESIDE for found in folder.glob(pattern)):
            if file.is_file() and not file.name.endswith(".index.json"):
                shutil.copyfile(file, draft / file.name)
        size = sum(file.stat().st_size for file in draft.iterdir())
    return Converted(output, len(pickles), len(weights), size)


def read_pickle(file: Path) -> dict[str, Tensor]:
    """The tensors of one file, mapped into memory; nothing that the file names is called."""
    try:
        mapped = zipfile.is_zipfile(file)  # the form since PyTorch 1.6
        found: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{file} holds more than tensors, or is damaged ({_why(error)}); nothing of it was run."
            " Take the weights from somebody you trust"
        ) from error
    except Exception as error:  # torch raises many kinds for a damaged file
        raise ModelError(f"{file} is damaged ({line(error)}); download it again") from error
    plain = isinstance(found, dict) and all(
        isinstance(name, str) and isinstance(tensor, Tensor) and tensor.layout == torch.strided
        for name, tensor in found.items()
    )
    if not plain or not found:
        raise ModelError(f"{file} is no table of tensors by name; convert it where it was made")
    return dict(found)


def _pickles(folder: Path) -> list[Path]:
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} is no checkpoint: want a folder with config.json")
    found = sorted(folder.glob("pytorch_model*.bin"))
    if not found:
        raise ModelError(f"{folder} has no pytorch_model*.bin; there is nothing to convert")
    index = folder / "pytorch_model.bin.index.json"
    if index.is_file():
        try:
            named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise ModelError(f"{index} cannot be read; download it again") from error
        if lost := sorted(named - {file.name for file in found}):
            raise ModelError(f"{folder / str(lost[0])} is missing; download the checkpoint again")
    return found


def _check_output(output: Path) -> None:
    if why := obstacle(output):
        raise SpecError(f"{output} cannot be written: {why}; choose another --output")
    if output.exists():
        raise SpecError(f"{output} exists; remove it, or choose another --output")


def _free(output: Path) -> int:
    parent = next(folder for folder in output.absolute().parents if folder.exists())
    return shutil.disk_usage(parent).free


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that share no memory: a safetensors file has each by itself."""
    found, seen = dict[str, Tensor](), set[int]()
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        whole = storage.nbytes() == tensor.nbytes and tensor.is_contiguous()
        alone = whole and storage.data_ptr() not in seen
        found[name] = tensor.detach() if alone else tensor.detach().clone().contiguous()
        seen.add(storage.data_ptr())
    return found


def _why(error: Exception) -> str:
    """What the reader met, of a message that tells how to run it all the same."""
    named = re.search(r"GLOBAL (\S+)", str(error))
    return f"it names {named[1]}" if named else "it is no table of tensors"
