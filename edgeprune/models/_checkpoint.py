"""Reading a Hugging Face checkpoint: a local folder or a hub id, safetensors only, one tensor at a
time, so that memory does not grow with the model."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from edgeprune.errors import ModelError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
BLOCK, BLOCKS = 1 << 16, 1 << 10  # bytes of a block that is hashed, blocks of a file


def locate(model: str, revision: str | None = None) -> Path:
    """The local folder of a checkpoint; a hub id is fetched, or found in the hub's local cache."""
    folder = Path(model).expanduser()
    if folder.exists() or model.startswith((".", "/", "~")) or model.count("/") != 1:
        if not (folder / "config.json").is_file():
            raise ModelError(
                f"{model} is no checkpoint: want a folder with config.json, or a hub id owner/name"
            )
        return folder
    return _from_hub(model, revision)


def _from_hub(model: str, revision: str | None) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
    )

    wanted = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]
    try:
        with suppress(LocalEntryNotFoundError):
            folder = Path(snapshot_download(model, revision=revision, local_files_only=True))
            if _is_whole(folder):
                return folder
        HfApi().model_info(model, revision=revision, timeout=10)  # at once, before any retry
        return Path(snapshot_download(model, revision=revision, allow_patterns=wanted))
    except HFValidationError as error:
        raise ModelError(f"{model} is neither a folder nor a hub id owner/name") from error
    except HfHubHTTPError as error:
        raise ModelError(f"the hub refuses {model}: {_line(error)}") from error
    except Exception as error:
        raise ModelError(
            f"{model} is not in the local cache and the hub cannot be reached ({_line(error)});"
            " connect, or give a local folder"
        ) from error


def _is_whole(folder: Path) -> bool:
    """Whether the hub's cache has all weights: another program may have fetched a part only."""
    files = {SINGLE}
    if (folder / INDEX).is_file():
        files = set(read_json(folder / INDEX).get("weight_map", {}).values())
    return all((folder / file).is_file() for file in {"config.json", *files})


def _line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object of the checkpoint; ModelError with the file's name where it is damaged."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read ({_line(error)}); download it again") from error
    if not isinstance(data, dict):
        raise ModelError(f"{file} is not a JSON object; download it again")
    return data


@dataclass(frozen=True)
class Checkpoint:
    """A folder with config.json and safetensors; `files` maps a tensor's name to its file."""

    folder: Path
    config: dict[str, Any]
    files: dict[str, Path]

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        config = read_json(folder / "config.json")
        if (folder / INDEX).is_file():
            names = read_json(folder / INDEX).get("weight_map")
            if not isinstance(names, dict) or not names:
                raise ModelError(f"{folder / INDEX} maps no tensors to files; download it again")
            files = {name: folder / str(file) for name, file in names.items()}
            for file in sorted(set(files.values())):
                _names(file)  # a missing or cut shard is named now, not half-way
            return cls(folder, config, files)
        single = folder / SINGLE
        if not single.is_file():
            raise ModelError(
                f"{folder} has no {SINGLE} and no {INDEX}; only safetensors are read, convert it"
            )
        return cls(folder, config, dict.fromkeys(_names(single), single))

    def read(self, name: str) -> Tensor:
        """One tensor, as stored."""
        with self._opened(name) as tensors:
            tensor: Tensor = tensors.get_tensor(name)
            return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without its bytes."""
        with self._opened(name) as tensors:
            return tuple(tensors.get_slice(name).get_shape())

    @contextmanager
    def _opened(self, name: str) -> Iterator[Any]:
        """The file that holds a tensor; ModelError where the tensor cannot be read from it."""
        try:
            with safe_open(self.files[name], framework="pt") as tensors:
                yield tensors
        except (OSError, SafetensorError, KeyError) as error:
            raise ModelError(f"{self.files[name]} is damaged at {name} ({_line(error)})") from error

    def elements(self) -> int:
        """How many numbers all tensors hold."""
        return sum(math.prod(self.shape(name)) for name in self.files)

    def fingerprint(self) -> str:
        """SHA-256 over config.json and each weights file's name, size and blocks all through it."""
        digest = hashlib.sha256((self.folder / "config.json").read_bytes())
        for file in sorted(set(self.files.values())):
            digest.update(f"{file.name} {file.stat().st_size}".encode())
            for block in _blocks(file):
                digest.update(block)
        return digest.hexdigest()


def _blocks(file: Path) -> Iterator[bytes]:
    """All of a file up to 64 MiB; of a larger one, as much in a thousand blocks spread evenly.

    Training changes whole matrices and keeps names and sizes: of a large file, a change of a
    thousandth is seen wherever it is, without reading 26 GB.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        for start in range(0, size, max(BLOCK, size // BLOCKS)):
            stream.seek(start)
            yield stream.read(BLOCK)


def _names(file: Path) -> list[str]:
    if not file.is_file():
        raise ModelError(f"{file} is missing; download the checkpoint again")
    try:
        with safe_open(file, framework="pt") as tensors:
            return list(tensors.keys())
    except RuntimeError as error:
        raise ModelError(
            f"{file} cannot be mapped into memory ({_line(error)}); split it into smaller shards"
        ) from error
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"{file} is not a whole safetensors file ({_line(error)}); download it again"
        ) from error
