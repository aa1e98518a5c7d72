"""Reading a Hugging Face checkpoint: a local folder or a hub id, safetensors only, one tensor at a
time, so that memory does not grow with the model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from edgeprune.errors import ModelError, SpecError
from edgeprune.models._format import PARAMS, check_layout
from edgeprune.models._lora import CONFIG, WEIGHTS, Lora
from edgeprune.models._quantised import QuantizedWeight
from edgeprune.models._stored import TensorFiles, line, read_json, tensors_of
from edgeprune.models._stored_formats import format_of
from edgeprune.models._stored_formats._packed import Packed, PackedWeight

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
BLOCK, BLOCKS = 1 << 16, 1 << 10  # bytes of a block that is hashed, blocks of a file


Check = Callable[[dict[str, Any]], object]
"""Of a config.json; ModelError where the checkpoint is not supported."""


def locate(model: str, revision: str | None = None, check: Check | None = None) -> Path:
    """The local folder of a checkpoint or an adapter; a hub id is fetched, or found in the hub's
    local cache. What `check` refuses is not fetched."""
    folder = Path(model).expanduser()
    if folder.exists() or model.startswith((".", "/", "~")) or model.count("/") != 1:
        check_layout(model, folder)
        if not any((folder / file).is_file() for file in ("config.json", CONFIG)):
            raise ModelError(
                f"{model} is no checkpoint: want a folder with config.json, or a hub id owner/name"
            )
        if revision is not None:
            raise SpecError(f"--revision is one of a hub id's, {model} is a folder; leave it out")
        return folder
    return _from_hub(model, revision, check)


WANTED = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "merges.txt", "*.tiktoken"]
"""Files of a checkpoint that are fetched."""
UNWANTED = ["consolidated*"]
"""Among them, the same weights in Mistral's own layout."""


def _from_hub(model: str, revision: str | None, check: Check | None) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    with _hub(model):
        with suppress(LocalEntryNotFoundError):
            folder = Path(snapshot_download(model, revision=revision, local_files_only=True))
            if _is_whole(folder):
                return folder
        HfApi().model_info(model, revision=revision, timeout=10)  # at once, before any retry
        patterns = ["config.json", PARAMS]
        first = Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
    check_layout(model, first)
    if check is not None and (first / "config.json").is_file():
        check(read_json(first / "config.json"))
    with _hub(model):
        asked: dict[str, Any] = {"allow_patterns": WANTED, "ignore_patterns": UNWANTED}
        return Path(snapshot_download(model, revision=revision, **asked))


@contextmanager
def _hub(model: str) -> Iterator[None]:
    """ModelError where the hub does not give what is asked for here."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        yield
    except HFValidationError as error:
        raise ModelError(f"{model} is neither a folder nor a hub id owner/name") from error
    except HfHubHTTPError as error:
        raise ModelError(f"the hub refuses {model}: {line(error)}") from error
    except Exception as error:
        raise ModelError(
            f"{model} is not in the local cache and the hub cannot be reached ({line(error)});"
            " connect, or give a local folder"
        ) from error


def _is_whole(folder: Path) -> bool:
    """Whether the hub's cache has all weights: another program may have fetched a part only."""
    if not (folder / "config.json").is_file() and (folder / CONFIG).is_file():
        return (folder / WEIGHTS).is_file()
    files = {SINGLE}
    if not (folder / SINGLE).is_file() and (folder / INDEX).is_file():
        files = set(read_json(folder / INDEX).get("weight_map", {}).values())
    return all((folder / file).is_file() for file in {"config.json", *files})


@dataclass(frozen=True)
class Checkpoint(TensorFiles):
    """A folder with config.json and safetensors, and the LoRA adapter beside them if any.

    A quantised weight stands in `files` under the name that it would have as floats, and is read
    as the floats that its codes mean.
    """

    folder: Path
    config: dict[str, Any]
    lora: Lora | None = None
    packed: Packed | None = None  # where weights are quantised
    tokenizer: Path | None = None  # the folder of another's tokenizer, where that is used

    @property
    def text_folder(self) -> Path:
        """Where the tokenizer is."""
        return self.tokenizer or self.folder

    @classmethod
    def open(
        cls, folder: Path, adapter: Path | None = None, tokenizer: Path | None = None
    ) -> Checkpoint:
        """A folder's checkpoint, with the adapter in it or in a folder of its own."""
        config, file = read_json(folder / "config.json"), folder / "config.json"
        form, files, packed = format_of(file, config), _weights(folder), None
        if form is not None:
            packed = Packed.of(file, form, files)
            files = packed.as_floats(files)
        return cls(files, folder, config, Lora.open(adapter or folder), packed, tokenizer)

    def read(self, name: str) -> Tensor:
        """One tensor as stored, a quantised weight in float32."""
        weight = self._packed(name)
        return weight.dequantised() if weight else super().read(name)

    def check(self, name: str) -> None:
        """ModelError where a quantised weight is not of the form that config.json tells of. Its
        shape has to be that of the model."""
        if weight := self._packed(name):
            weight.form.check(weight.parts)

    def is_empty_bias(self, name: str) -> bool:
        """Whether a tensor is the bias of zeros that some quantisers store with every weight."""
        module, _, leaf = name.rpartition(".")
        weight = self._packed(f"{module}.weight")
        if leaf != "bias" or weight is None or self.shape(name) != weight.shape[:1]:
            return False
        return not bool(self.read(name).any())

    def quantized(self, name: str) -> QuantizedWeight | None:
        """A quantised weight in codes [K, N]; None where it is stored in floats of any form."""
        weight = self._packed(name)
        return weight.quantized() if weight else None

    def input_scale(self, name: str) -> float | None:
        """What the inputs of a quantised weight's product are divided by before they are rounded;
        None where the checkpoint does not say."""
        weight = self._packed(name)
        return weight.form.input_scale(weight.parts) if weight else None

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, of a quantised weight that of its floats."""
        weight = self._packed(name)
        return weight.shape if weight else super().shape(name)

    def dtype(self, name: str) -> str:
        """A tensor's dtype as safetensors names it, of a quantised weight that of its floats."""
        return "F32" if self._packed(name) else super().dtype(name)

    def _packed(self, name: str) -> PackedWeight | None:
        return self.packed.weights.get(name) if self.packed else None

    @cached_property
    def leaves(self) -> dict[str, list[str]]:
        """What is stored of each module: `q_proj` of a layer has `weight`, and maybe `bias`."""
        found: dict[str, list[str]] = {}
        for name in self.files:
            module, _, leaf = name.rpartition(".")
            found.setdefault(module, []).append(leaf)
        return found

    def fingerprint(self) -> str:
        """SHA-256 over config.json and each weights file's name, size and blocks all through it;
        the same of an adapter."""
        digest = hashlib.sha256((self.folder / "config.json").read_bytes())
        if self.lora is not None:
            digest.update(json.dumps(self.lora.config).encode())
        files = {*self.files.values(), *(self.lora.files.values() if self.lora else ())}
        files |= self.packed.files if self.packed else set()
        for file in sorted(files):
            digest.update(f"{file.name} {file.stat().st_size}".encode())
            for block in fingerprint_blocks(file):
                digest.update(block)
        return digest.hexdigest()


def fingerprint_blocks(file: Path) -> Iterator[bytes]:
    """All of a file up to 64 MiB; of a larger one, as much in a thousand blocks spread evenly.

    Training changes whole matrices and keeps names and sizes: of a large file, a change of a
    thousandth is seen wherever it is, without reading 26 GB.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        for start in range(0, size, max(BLOCK, size // BLOCKS)):
            stream.seek(start)
            yield stream.read(BLOCK)


def _weights(folder: Path) -> dict[str, Path]:
    """The file of each tensor; as transformers does, an index beside a single file is not read."""
    if (folder / SINGLE).is_file():
        return tensors_of([folder / SINGLE])
    if not (folder / INDEX).is_file():
        raise ModelError(f"{folder} has no {SINGLE} and no {INDEX}; {_instead(folder)}")
    names = read_json(folder / INDEX).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ModelError(f"{folder / INDEX} maps no tensors to files; download it again")
    shards = sorted(set(map(str, names.values())))
    if astray := [shard for shard in shards if Path(shard).name != shard]:
        raise ModelError(f"{folder / INDEX} names {astray[0]}, a file outside of the folder")
    found = tensors_of([folder / shard for shard in shards])
    if lost := [name for name in names if name not in found]:
        raise ModelError(
            f"{folder / str(names[lost[0]])} is damaged at {lost[0]} (only the index has it);"
            " download it again"
        )
    return found


def _instead(folder: Path) -> str:
    """What to do where there are no weights in the form that is read."""
    if any(folder.glob("pytorch_model*.bin")):
        return (
            "only safetensors are read, not pickles (pytorch_model*.bin): write them as safetensors"
            f" with edgeprune convert {folder}"
        )
    if (folder / "pytorch_model.bin.index.json").is_file():
        return (
            "only safetensors are read, this checkpoint has pickles (pytorch_model*.bin): download"
            " them into a folder of yours, and write them as safetensors with edgeprune convert"
        )
    if any(folder.glob("consolidated*.safetensors")):
        return (
            "consolidated.safetensors is Mistral's own layout, which is not read: download"
            " model*.safetensors of the same repository"
        )
    others = [f.name for f in sorted(folder.iterdir()) if f.suffix in (".safetensors", ".gguf")]
    found = f" (found {others[0]})" if others else ""
    return f"only safetensors of these names are read{found}: download or convert the checkpoint"
