"""Pixtral 12B as transformers has it: a LLaVA whose tower takes images of any size."""

from __future__ import annotations

from typing import Any, ClassVar

from edgeprune.models import _pixtral
from edgeprune.models._towers import projector
from edgeprune.models._vision import ProjectorConfig


class Adapter(_pixtral.Adapter):
    """Every patch is a token."""

    model_types: ClassVar[tuple[str, ...]] = ("llava",)
    towers: ClassVar[tuple[str, ...]] = ("pixtral",)

    def config_class(self) -> Any:
        from transformers import LlavaConfig

        return LlavaConfig

    def demands(self) -> dict[str, bool]:
        strategy = self.config.vision_feature_select_strategy
        return {
            **super().demands(),
            f"vision_feature_select_strategy {strategy!r}": strategy == "full",
        }

    def read_projector(self) -> ProjectorConfig:
        return projector(self.config, self.encoder.width)
