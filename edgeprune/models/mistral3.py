"""Ministral 3 and Mistral Small 3.1 and 3.2: Pixtral's tower, its patches merged 2 x 2."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor, nn

from edgeprune.models import _pixtral
from edgeprune.models._layers import ACTIVATIONS, Linear
from edgeprune.models._names import TensorNames
from edgeprune.models._ops import TorchOps, cast
from edgeprune.models._qwen_tower import TowerConfig


class Adapter(_pixtral.Adapter):
    """The projector begins with a norm over each patch, which is the last of the tower here.

    Ministral 3 scales queries beyond the positions that it was first trained with; a dialogue ends
    before that.
    """

    builds: ClassVar[tuple[str, ...]] = ("pixtral", "ministral3")

    @property
    def merge(self) -> int:
        return int(self.config.spatial_merge_size)

    def config_class(self) -> Any:
        from transformers import Mistral3Config

        return Mistral3Config

    def demands(self) -> dict[str, bool]:
        activation = self.config.projector_hidden_act
        return {**super().demands(), f"activation {activation!r}": activation in ACTIVATIONS}

    def read_encoder(self) -> TowerConfig:
        eps = self.config.text_config.rms_norm_eps
        return replace(super().read_encoder(), post_norm=True, post_eps=eps)

    def read_projector(self) -> Projector:
        return Projector(
            self.merge**2,
            self.encoder.width,
            self.config.text_config.hidden_size,
            self.config.projector_hidden_act,
            self.config.multimodal_projector_bias,
        )

    def tensor_names(self) -> TensorNames:
        table = {
            r"^merging\.": "patch_merger.merging_layer.",
            r"^first\.": "linear_1.",
            r"^second\.": "linear_2.",
        }
        return replace(super().tensor_names(), projector=table)

    def names(self, parameter: str) -> tuple[str, ...]:
        if not parameter.startswith("encoder.post_norm."):
            return super().names(parameter)
        return self.tensor_names().of(parameter.replace("encoder.post_norm", "projector.norm"))


@dataclass(frozen=True, slots=True)
class Projector:
    """Patches of a token become one of their width, then two linear layers."""

    patches: int  # of a token
    width: int
    output: int
    activation: str
    bias: bool

    def build(self, ops: TorchOps) -> nn.Module:
        return _Projector(self, ops)


class _Projector(nn.Module):
    def __init__(self, config: Projector, ops: TorchOps) -> None:
        super().__init__()
        self.config = config
        self.merging = Linear(config.patches * config.width, config.width, ops)
        self.first = Linear(config.width, config.output, ops, config.bias)
        self.second = Linear(config.output, config.output, ops, config.bias)

    def forward(self, features: Tensor) -> Tensor:
        """The merging weight wants the patches of a token beside each other in each channel."""
        config = self.config
        split = features.view(*features.shape[:-1], config.patches, config.width)
        merged = self.merging(split.transpose(-1, -2).flatten(-2))
        projected: Tensor = self.second(ACTIVATIONS[config.activation](self.first(merged)))
        return cast(projected, self.second.weight.dtype)
