"""A LoRA adapter in a checkpoint's folder, merged into the weights as they are read: W + s B A.

It is what peft writes: `adapter_config.json` and `adapter_model.safetensors`. transformers applies
such an adapter where it loads the folder. The factor s is alpha / r, or alpha / sqrt(r) where the
configuration says `use_rslora` (Kalajdzievski 2023, arXiv 2312.03732). An adapter may also hold
whole tensors (`modules_to_save`, biases), which replace the checkpoint's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from edgeprune.errors import EdgepruneError, ModelError, brief
from edgeprune.models._format import check_stored
from edgeprune.models._stored import TensorFiles, read_json, read_text, tensors_of

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MERGE = "merge it first, with merge_and_unload() of peft, and export the merged model"

_DECIDED = {
    *("peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision"),
    *("peft_version", "inference_mode", "r", "lora_alpha", "lora_dropout", "use_rslora", "bias"),
    *("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform"),
    *("layers_pattern", "rank_pattern", "alpha_pattern", "init_lora_weights", "runtime_config"),
    *("megatron_config", "megatron_core", "qalora_group_size", "ensure_weight_tying"),
    *("fan_in_fan_out", "eva_config"),
}
"""Fields of a configuration that are used here, or that change nothing in a finished adapter."""
_STARTS = (None, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights`, beside true and false, that leave the base weights as they are."""

_FACTOR = re.compile(r"(.+)\.lora_(?:embedding_)?([AB])(?:\.default)?(?:\.weight)?$")
_WHOLE = re.compile(r"\.base_layer\.|\.modules_to_save\.(?:default\.)?")

Alphas = tuple[tuple[re.Pattern[str], float], ...]


@dataclass(frozen=True)
class Lora(TensorFiles):
    """What an adapter adds to the tensors of its base, by their names there."""

    config: Mapping[str, Any] = field(default_factory=dict)
    factors: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # tensor: A, B
    whole: Mapping[str, str] = field(default_factory=dict)  # tensor: what replaces it
    alphas: Alphas = ()

    @classmethod
    def open(cls, folder: Path) -> Lora | None:
        """The adapter of a folder, or None; ModelError where it cannot be merged exactly."""
        if not (folder / CONFIG).is_file():
            return None
        config = read_json(folder / CONFIG)
        _refuse(folder / CONFIG, config)
        if not (folder / WEIGHTS).is_file():
            raise ModelError(
                f"{folder / CONFIG} stands without {WEIGHTS}; download the adapter again (of"
                " adapters, only safetensors are read)"
            )
        tensors = TensorFiles(tensors_of([folder / WEIGHTS]))
        factors, whole = _sorted(folder / WEIGHTS, tensors)
        return cls(tensors.files, config, factors, whole, _alphas(folder / CONFIG, config))

    @property
    def changes(self) -> set[str]:
        """Names of the tensors that it changes, as it names them."""
        return {*self.factors, *self.whole}

    def changed_name(self, names: Iterable[str]) -> str:
        """The one of several names of a tensor under which the adapter changes it; else empty."""
        return next((name for name in names if name in self.factors or name in self.whole), "")

    def merged(self, name: str, base: Tensor) -> Tensor:
        """A tensor of the base as the adapter changes it, in float32."""
        if name in self.whole:
            base = self._fitting(name, self.read(self.whole[name]), base)
        if name not in self.factors:
            return base
        names = self.factors[name]
        first, second = (self.read(names[factor]).float() for factor in "AB")
        product = second.flatten(1) @ first.flatten(1)  # of a convolution too: B has 1 x 1 kernels
        if "lora_embedding_" in names["A"]:
            product = product.T  # A is [r, vocabulary], B [width, r]
        kernel = tuple(first.shape[2:])
        change = self._fitting(name, product.reshape(len(product), -1, *kernel), base)
        return base.float() + self._scale(name.removesuffix(".weight"), len(first)) * change

    def _scale(self, module: str, rank: int) -> float:
        alpha = next(alpha for pattern, alpha in self.alphas if pattern.match(module))
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def _fitting(self, name: str, tensor: Tensor, base: Tensor) -> Tensor:
        if tensor.shape != base.shape:
            raise ModelError(
                f"{WEIGHTS} makes {name} {list(tensor.shape)}, the checkpoint has"
                f" {list(base.shape)}; the adapter is of another model"
            )
        return tensor

    def __str__(self) -> str:
        """What was merged, for people."""
        parts = [f"{len(self.factors)} products of rank {self.config.get('r')}"]
        parts += [f"{len(self.whole)} whole tensors"] if self.whole else []
        return f"the LoRA adapter ({', '.join(parts)}) is merged into the weights"


def _sorted(file: Path, tensors: TensorFiles) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """An adapter's tensors by what they change: pairs of factors, and whole tensors."""
    factors, whole = dict[str, dict[str, str]](), dict[str, str]()
    for name in tensors.files:
        check_stored(file, name, tensors.dtype(name), ())
        tensor = name.removeprefix("base_model.model.")
        if match := _FACTOR.match(tensor):
            factors.setdefault(f"{match[1]}.weight", {})[match[2]] = name
        elif "lora_" in tensor or "trainable_tokens" in tensor:
            raise ModelError(f"{file} holds {name}, which is not supported; {MERGE}")
        else:
            whole[_WHOLE.sub(".", tensor)] = name
    if lone := [tensor for tensor, pair in factors.items() if len(pair) != 2]:
        raise ModelError(f"{file} has one of two factors of {lone[0]} only; {MERGE}")
    return factors, whole


def _refuse(file: Path, config: Mapping[str, Any]) -> None:
    """ModelError where an adapter is no LoRA, or of a kind that W + s B A does not describe."""
    if (kind := config.get("peft_type")) != "LORA":
        raise ModelError(f"{file} is an adapter of type {kind}, only LORA is merged here; {MERGE}")
    start = config.get("init_lora_weights")
    if not isinstance(start, bool) and start not in _STARTS:
        raise ModelError(
            f"{file} says init_lora_weights {start!r}, with which training changed the base weights"
            f" too; {MERGE}"
        )
    for name, value in config.items():
        if name not in _DECIDED and value not in (None, False, [], {}):
            raise ModelError(f"{file} says {name} {value!r}, which is not supported; {MERGE}")


def _alphas(file: Path, config: Mapping[str, Any]) -> Alphas:
    """The alpha of a module is that of the first pattern that its name matches, as in peft."""
    try:
        patterns = (config.get("alpha_pattern") or {}).items()
        named = [(re.compile(rf"(.*\.)?({key})$"), float(alpha)) for key, alpha in patterns]
        return *named, (re.compile(""), float(config.get("lora_alpha", 8)))
    except (AttributeError, TypeError, ValueError, re.error) as error:
        raise ModelError(
            f"{file}: lora_alpha or alpha_pattern is wrong ({brief(error)})"
        ) from error


TEXTS = ("tokenizer.json", "preprocessor_config.json", "processor_config.json")
"""Files that say what a model is shown, beside the chat template."""


def base_of(folder: Path, locate: Callable[[str, str | None], Path]) -> Path:
    """The checkpoint that an adapter without weights beside it is for, as its configuration says.

    ModelError where there is none such, or where the adapter brings a tokenizer, a chat template or
    settings of images that differ from the base's: then it is not clear which are meant.
    """
    config = read_json(folder / CONFIG)
    name = str(config.get("base_model_name_or_path") or "")
    together = (
        f"copy the base's files into {folder}, without replacing those that are there (cp -n), and"
        " export that folder"
    )
    try:
        base = locate(name, config.get("revision"))
    except EdgepruneError as error:
        raise ModelError(f"{folder} is an adapter of {name!r}: {error}; or {together}") from error
    if (base / CONFIG).is_file():
        raise ModelError(f"{folder} is an adapter of {base}, which is or has one itself; {MERGE}")
    own = [file for file in TEXTS if (folder / file).is_file()]
    if other := [file for file in own if _json(folder / file) != _json(base / file)]:
        raise ModelError(f"{folder / other[0]} differs from that of its base {base}; {together}")
    if _template(folder) not in ("", _template(base)):
        raise ModelError(f"the chat template in {folder} differs from its base's; {together}")
    return base


def _json(file: Path) -> dict[str, Any] | None:
    return read_json(file) if file.is_file() else None


def _template(folder: Path) -> str:
    """The chat template of a folder, wherever it stands; empty where there is none."""
    if (folder / "chat_template.jinja").is_file():
        return read_text(folder / "chat_template.jinja")
    for name in ("chat_template.json", "tokenizer_config.json"):
        if template := (_json(folder / name) or {}).get("chat_template"):
            return str(template)
    return ""
