"""Gemma 3 4B and larger, and MedGemma on them: SigLIP, its patches averaged, one linear layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from edgeprune.manifest import ImageRecord
from edgeprune.models import _adapter
from edgeprune.models._decoder_config import DecoderConfig, Rescale
from edgeprune.models._encoder import ACTIVATIONS, EncoderConfig
from edgeprune.models._gemma import BRANCH_NORMS, gemma3
from edgeprune.models._image_record import Reader, plain, unsupported
from edgeprune.models._layers import RMSNorm
from edgeprune.models._layout import Layout
from edgeprune.models._media import IMAGE_SLOT, Media
from edgeprune.models._names import TensorNames
from edgeprune.models._nearby import Nearby
from edgeprune.models._ops import TorchOps, cast
from edgeprune.models._text import decoder_config
from edgeprune.models._towers import SIGLIP, is_tied, one_size, siglip


class Adapter(_adapter.Adapter):
    """Visual tokens of one image see each other, later ones too."""

    nearby: ClassVar[tuple[Nearby, ...]] = (
        Nearby(
            "Gemma 3n and Gemma 4 E2B, E4B",
            ("gemma3n", "gemma4"),
            tower="one of their own",
            decoder="keys that layers share, inputs of each layer by token",
        ),
    )
    encoder: EncoderConfig

    def config_class(self) -> Any:
        from transformers import Gemma3Config

        return Gemma3Config

    def demands(self) -> dict[str, bool]:
        vision, text = self.config.vision_config, self.config.text_config
        tokens = self.config.mm_tokens_per_image
        side, patches = math.isqrt(tokens), vision.image_size // vision.patch_size
        return {
            f"a {vision.model_type} vision tower": vision.model_type == SIGLIP,
            f"activation {vision.hidden_act!r}": vision.hidden_act in ACTIVATIONS,
            f"{tokens} tokens of {patches} x {patches} patches": side**2 == tokens > 0
            and patches % side == 0,
            "attention to later text": not text.use_bidirectional_attention,
            f"a cap of {text.final_logit_softcapping} of logits": not text.final_logit_softcapping,
        }

    def read_encoder(self) -> EncoderConfig:
        return siglip(self.config.vision_config)

    def read_media(self) -> Media:
        """The template writes the token that begins an image; the image stands behind it."""
        start, end = self.config.boi_token_index, self.config.eoi_token_index
        around = (str(self.chat.tokenizer.convert_ids_to_tokens(token)) for token in (start, end))
        written = IMAGE_SLOT.join(around)
        token, template = int(self.config.image_token_id), f"\n\n{written}\n\n"
        return Media(start, token, count=self.asked.images, template=template)

    def read_layout(self) -> Layout:
        one_size(self.asked.size, self.encoder.image)
        merge = self.encoder.side // math.isqrt(self.config.mm_tokens_per_image)
        return Layout.plain(self.encoder.side, merge, pool="mean").chained(self.between)

    def read_projector(self) -> Projector:
        vision, text = self.config.vision_config, self.config.text_config
        return Projector(vision.hidden_size, text.hidden_size, vision.layer_norm_eps)

    def read_decoder(self) -> DecoderConfig:
        tied = is_tied(self.checkpoint, self.config)
        decoder = decoder_config(self.config.text_config, tied, gemma3)
        own = Rescale(r"projector\.norm\.", offset=1.0)
        images = self.vision_config.layout.image_of if self.asked.images > 1 else ()
        return replace(decoder, rescaled=(own, *decoder.rescaled), image_of=images)

    def tensor_names(self) -> TensorNames:
        return TensorNames(
            projector={r"^weight$": "mm_input_projection_weight", r"^norm\.": "mm_soft_emb_norm."},
            decoder=BRANCH_NORMS,
        )

    def image_readers(self) -> Mapping[str, Reader]:
        return {"Gemma3ImageProcessor": whole}


@dataclass(frozen=True, slots=True)
class Projector:
    """An RMS norm and one linear layer without bias."""

    inputs: int
    output: int
    eps: float

    def build(self, ops: TorchOps) -> nn.Module:
        return _Projector(self, ops)


class _Projector(nn.Module):
    def __init__(self, config: Projector, ops: TorchOps) -> None:
        super().__init__()
        self.ops = ops
        self.norm = RMSNorm(config.inputs, config.eps, ops)
        self.weight = nn.Parameter(torch.empty(config.inputs, config.output))  # as it is stored

    def forward(self, features: Tensor) -> Tensor:
        return self.ops.linear(cast(self.norm(features), self.weight.dtype), self.weight)


def whole(processor: Any) -> ImageRecord:
    """Of a processor that shows an image as one view."""
    if processor.do_pan_and_scan:
        raise unsupported("do_pan_and_scan", True, "False")
    return plain(processor)
