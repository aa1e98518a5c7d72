"""config.json of a family that transformers does not implement, in the fields that steps read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from edgeprune.errors import ModelError, brief
from edgeprune.models._checkpoint import Checkpoint


@dataclass
class OwnConfig:
    """What all steps ask of transformers' configs."""

    model_type: str
    text_config: Any  # of transformers, of the nearest decoder
    vision_config: Any  # as config.json has it
    image_token_id: int
    tie_word_embeddings: bool = False


def translated(checkpoint: Checkpoint, read: Callable[[dict[str, Any]], OwnConfig]) -> OwnConfig:
    """What `read` makes of config.json; ModelError where that lacks a field or has a wrong one."""
    try:
        return read(checkpoint.config)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        file = checkpoint.folder / "config.json"
        why = f"it has no {error}" if isinstance(error, KeyError) else brief(error)
        raise ModelError(f"{file} is damaged: {why}") from error
