"""What config.json and the stored dtypes say of the form of the weights: known, or refused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from edgeprune.errors import ModelError
from edgeprune.models._stored import read_json

FLOATS = ("F64", "F32", "F16", "BF16")
"""Stored dtypes that are read."""
CONVERT = (
    "convert it with convert_llava_weights_to_hf.py of transformers 4 (llava_next and"
    " llava_onevision have one each), or take a converted one, such as llava-hf/llava-1.5-7b-hf"
)
UNWRAP = "a model inside peft; save what merge_and_unload() returns, and export that"
QUANTISED = (
    "quantised in a way that config.json does not tell (quantization_config); download the"
    " checkpoint again, or export the float one that it was made from"
)


PARAMS = "params.json"
"""The config of Mistral's own layout."""


def check_layout(model: str, folder: Path) -> None:
    """ModelError where a folder holds a model in Mistral's own layout alone: params.json,
    consolidated.safetensors and tekken.json."""
    if (folder / "config.json").is_file() or not (folder / PARAMS).is_file():
        return
    vision = read_json(folder / PARAMS).get("vision_encoder")
    if not isinstance(vision, dict):
        where = "and it says of no vision_encoder: edgeprune exports models that see images"
    elif "spatial_merge_size" in vision:
        where = (
            "take the other files of its repository on the hub, which hold the same model:"
            " config.json, model*.safetensors, tokenizer.json and the settings of the processor"
        )
    else:
        where = "of Pixtral 12B take mistral-community/pixtral-12b, which is the same model"
    raise ModelError(
        f"{model} has Mistral's own layout ({PARAMS}, no config.json), which is not read; {where}"
    )


def check_format(folder: Path, config: Mapping[str, Any]) -> None:
    """ModelError where config.json tells of weights in a form that is not read."""
    if (where := _authors(config)) is not None:
        raise ModelError(
            f"{folder} has the layout of the LLaVA authors' code ({where} in config.json);"
            f" {CONVERT}"
        )
    if name := config.get("transformers_weights"):
        raise ModelError(
            f"{folder / 'config.json'} keeps its weights in {name!r} (transformers_weights), which"
            " is not read; write it anew with save_pretrained"
        )


def check_stored(file: Path, name: str, dtype: str, leaves: Iterable[str]) -> None:
    """ModelError where a weight is no float, or stands beside what tells how to read it.

    `leaves` are all that is stored of its module, such as `weight` and `weight_scale`.
    """
    if dtype not in FLOATS:
        raise ModelError(f"{file}: {name} is stored as {dtype}: {QUANTISED}")
    if name.endswith(".weight"):
        for leaf in leaves:
            if leaf not in ("weight", "bias"):
                raise ModelError(f"{file}: {name} stands beside {leaf}: {QUANTISED}")


def why_missing(names: Iterable[str], stored: Iterable[str]) -> str:
    """Why none of several names of a weight is stored, by what is stored in its place."""
    modules = tuple(name.removesuffix("weight").removesuffix("bias") for name in names)
    for name in stored:
        if "mm_projector" in name:
            return f"it holds {name}, of the LLaVA authors' layout: {CONVERT}"
        if name.startswith(modules) and name.rpartition(".")[2] not in ("weight", "bias"):
            return f"it holds {name} in its place: {QUANTISED}"
        if is_wrapped(name):
            return f"it holds {name}: {UNWRAP}"
    return "its weights are incomplete or of another family"


def is_wrapped(name: str) -> bool:
    """Whether a tensor is one of a model inside peft, as it is stored without merging."""
    return any(mark in name for mark in (".base_layer.", ".lora_", ".modules_to_save."))


def _authors(config: Mapping[str, Any]) -> str | None:
    """The field by which a config.json of the LLaVA authors' own code is known."""
    if config.get("vision_config"):
        return None
    return next((key for key in ("mm_vision_tower", "mm_projector_type") if key in config), None)
