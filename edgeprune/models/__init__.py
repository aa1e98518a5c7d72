"""Model families, one file each: the file name is the `model_type` of the checkpoint's config.json.

A file holds one class `Adapter`. Adding a family is adding a file.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from edgeprune.errors import ModelError
from edgeprune.models._adapter import Adapter
from edgeprune.models._checkpoint import Checkpoint, locate
from edgeprune.tiling import Size

__all__ = ["Adapter", "Checkpoint", "names", "open_model"]


def names() -> list[str]:
    """Every family, sorted; imports none of them."""
    return sorted(module.name for module in iter_modules(__path__) if module.name[0] != "_")


def open_model(model: str, revision: str | None = None, size: Size | None = None) -> Adapter:
    """The adapter of a checkpoint: a local folder, a hub id, or `demo` for the embedded model.

    `size` is that of the pictures to freeze for, None the family's default.
    """
    if model == "demo":
        from edgeprune.demo import MODEL_DIR

        model = str(MODEL_DIR)
    checkpoint = Checkpoint.open(locate(model, revision))
    family = checkpoint.config.get("model_type", "")
    if family not in names():
        raise ModelError(
            f"{model} is a {family or 'checkpoint without model_type'}; edgeprune knows:"
            f" {', '.join(names())}"
        )
    adapter: Adapter = import_module(f"{__name__}.{family}").Adapter(checkpoint, size)
    return adapter
