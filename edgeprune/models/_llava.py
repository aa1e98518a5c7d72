"""What the LLaVA families share: a CLIP or SigLIP tower, a projector of two layers."""

from __future__ import annotations

from typing import ClassVar

from edgeprune.models import _adapter
from edgeprune.models._encoder import EncoderConfig
from edgeprune.models._towers import clip_or_siglip, projector
from edgeprune.models._vision import ProjectorConfig


class Adapter(_adapter.Adapter):
    """Base of these families; never built itself."""

    reads_cls: ClassVar[bool] = False
    """Whether a projector of the family may read [CLS] too."""

    encoder: EncoderConfig

    def read_encoder(self) -> EncoderConfig:
        return clip_or_siglip(self.config, cls=self.reads_cls)

    def read_projector(self) -> ProjectorConfig:
        return projector(self.config, self.encoder.features)
