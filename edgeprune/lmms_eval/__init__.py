"""Bundles as a model of lmms-eval: `python -m lmms_eval --model edgeprune --model_args bundle=B`.

lmms-eval finds it by an entry point of the group `lmms_eval.models` (see `pyproject.toml`), which
names `manifest`. Nothing of lmms-eval is imported before it asks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest


def manifest() -> ModelManifest:
    """What lmms-eval registers: the model's name and its class."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("edgeprune", simple_class_path="edgeprune.lmms_eval.model.EdgepruneModel")
