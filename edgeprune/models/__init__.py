"""Model families, one file each: the file name is the `model_type` of the checkpoint's config.json.

A file holds one class `Adapter`, which answers the steps of `_family.py`. Families are found by
their files.
"""

from __future__ import annotations

from functools import partial
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

from edgeprune.errors import ModelError
from edgeprune.models._adapter import Adapter
from edgeprune.models._checkpoint import Checkpoint, locate
from edgeprune.models._family import Elsewhere
from edgeprune.models._format import check_format
from edgeprune.models._lora import base_of
from edgeprune.models._media import InputOptions
from edgeprune.models._nearby import Nearby, parts
from edgeprune.models._stored import read_json
from edgeprune.models._text import DECODERS
from edgeprune.tiling import Size

__all__ = ["Adapter", "Checkpoint", "elsewhere", "load", "names", "nearby", "open_model"]


def names() -> list[str]:
    """Every family, sorted; imports none of them."""
    return sorted(module.name for module in iter_modules(__path__) if module.name[0] != "_")


def load(name: str) -> type[Adapter]:
    """The class of a family, by the name of its file."""
    found: type[Adapter] = import_module(f"{__name__}.{name}").Adapter
    return found


def elsewhere() -> list[Elsewhere]:
    """Checkpoints that transformers does not implement, each with its nearest family."""
    own = (vars(load(name)).get("elsewhere", ()) for name in names())  # none of a base's
    return [other for rows in own for other in rows]


def nearby() -> list[tuple[str, Nearby]]:
    """Models of transformers that are not supported, each behind its nearest family."""
    own = ((name, vars(load(name)).get("nearby", ())) for name in names())  # none of a base's
    return [(name, near) for name, rows in own for near in rows]


def open_model(
    model: str,
    revision: str | None = None,
    *,
    size: Size | None = None,
    images: int = 1,
    frames: int | None = None,
    tiles: int | None = None,
    tokenizer: Path | None = None,
) -> Adapter:
    """The adapter of a checkpoint: a local folder, a hub id, or `demo` for the embedded model.

    `size` is that of the images to freeze for, `images` their number in a prompt, `frames` that
    of a video in their place, `tiles` the tiles of an image that are encoded beside the view of the
    whole; None is the family's default. `tokenizer` is a folder whose tokenizer is used in place of
    the checkpoint's own.
    """
    asked = InputOptions(size, images, frames, tiles)
    if model == "demo":
        from edgeprune.demo import MODEL_DIR

        model = str(MODEL_DIR)
    folder, lora = locate(model, revision, partial(_family_of, model)), None
    if not (folder / "config.json").is_file():
        folder, lora = base_of(folder, locate), folder
    config = read_json(folder / "config.json")
    check_format(folder, config)
    family = _family_of(model, config)
    if tokenizer is not None and not tokenizer.is_dir():
        raise ModelError(f"--tokenizer is a folder with a tokenizer; {tokenizer} is none")
    checkpoint = Checkpoint.open(folder, lora, tokenizer)
    try:
        adapter = family(checkpoint, asked)
        visual, positions = adapter.shape.visual_tokens, adapter.shape.max_positions
        _ = adapter.all_notes  # weights that are missing, or mean something else, are named now
    except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).partition("\n")[0][:200]
        raise ModelError(
            f"{folder / 'config.json'} describes no model that can be built ({reason}); compare it"
            " with the published one"
        ) from error
    if visual >= positions:
        raise ModelError(
            f"an image of this size has {visual} visual tokens, the decoder takes {positions} (or"
            " attends to no more); choose a smaller --image-size"
        )
    return adapter


ENDS = "vision", "text"
"""Of the types of parts of a family's own."""


def _built() -> dict[str, tuple[str, ...]]:
    """By each type of tower or decoder, the families that build it, first that with most types."""
    found, families = dict[str, tuple[str, ...]](), [(name, load(name)) for name in names()]
    for name, family in sorted(families, key=lambda one: -len(vars(one[1]).get("builds", ()))):
        own = (f"{kind}_{part}" for kind in (name, *family.model_types) for part in ENDS)
        for kind in (*own, *vars(family).get("builds", ())):
            found[kind] = (*found.get(kind, ()), name)
    return found


def _family_of(model: str, config: dict[str, Any]) -> type[Adapter]:
    """The class here that reads a checkpoint; ModelError names the nearest where there is none."""
    kind = str(config.get("model_type") or "")
    vision = config.get("vision_config")
    tower = vision.get("model_type") if isinstance(vision, dict) else None
    for found in map(load, names()):
        if tower in found.towers and kind in found.model_types:
            return found
    if kind in names():
        return load(kind)
    listed = config.get("architectures")
    named = {one for one in listed if isinstance(one, str)} if isinstance(listed, list) else set()
    for found in map(load, names()):
        if kind in found.model_types or (not kind and named & set(found.architectures)):
            return found
    for other in elsewhere():
        if other.architecture in named:
            raise ModelError(
                f"{model} is {other.name}, whose code is in the checkpoint and not in transformers;"
                f" the nearest family that edgeprune knows is {other.nearest}"
            )
    for family, near in nearby():
        if kind in near.model_types:
            raise ModelError(
                f"{model} is a {kind} ({near.name}), which is not supported; the nearest family is"
                f" {family}, and what is missing is: {near.missing}"
            )
    told = [parts(config, _built())]
    if config.get("auto_map"):
        told.append("it names code of its own (auto_map), which is never run")
    if kind in DECODERS and not config.get("vision_config"):
        told.append("it is a language model and sees no images")
    raise ModelError(
        f"{model} is a {kind or 'checkpoint without model_type'}; edgeprune knows:"
        f" {', '.join(names())}" + "".join(f"; {one}" for one in told if one)
    )
