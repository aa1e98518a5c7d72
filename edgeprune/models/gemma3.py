"""Gemma 3 4B and larger, and MedGemma on them: SigLIP, its patches averaged, one linear layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from edgeprune.errors import SpecError
from edgeprune.manifest import ImageRecord
from edgeprune.models import _adapter
from edgeprune.models._decoder_config import DecoderConfig, Rescale
from edgeprune.models._encoder import EncoderConfig
from edgeprune.models._gemma import BRANCH_NORMS, gemma3
from edgeprune.models._image_record import Reader, count, image_settings, plain, unsupported
from edgeprune.models._layers import ACTIVATIONS, RMSNorm
from edgeprune.models._layout import Layout
from edgeprune.models._media import IMAGE_SLOT, Media, Takes
from edgeprune.models._names import TensorNames
from edgeprune.models._nearby import Nearby
from edgeprune.models._ops import TorchOps, cast
from edgeprune.models._text import decoder_config
from edgeprune.models._towers import SIGLIP, is_tied, siglip
from edgeprune.tiling import CropRule, Tiling

PAN = "do_pan_and_scan"
WHOLE, CROPS = "Here is the original image ", " and here are some crops to help you see better "
"""What the processor writes before the view of the whole image, and before its crops."""
RULE = {
    "pan_and_scan_min_ratio_to_activate": 1.2,
    "pan_and_scan_min_crop_size": 256,
    "pan_and_scan_max_num_crops": 4,
}
"""Settings of pan and scan where the image processor's are null, as published."""


class Adapter(_adapter.Adapter):
    """Visual tokens of one view see each other, later ones too.

    An image is one view, or with --image-size a view of it all and then crops of it (pan and scan),
    which transformers makes where it is asked for them.
    """

    builds: ClassVar[tuple[str, ...]] = (SIGLIP,)
    nearby: ClassVar[tuple[Nearby, ...]] = (
        Nearby(
            "Gemma 3n and Gemma 4 E2B, E4B",
            ("gemma3n", "gemma4"),
            tower="one of their own",
            decoder="keys that layers share, inputs of each layer by token",
        ),
    )
    takes: ClassVar[Takes] = Takes(all_tiles="")
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

    @property
    def _settings(self) -> dict[str, Any]:
        """Of pan and scan, by their names."""
        given = image_settings(self.checkpoint.folder)
        return {n: usual if given.get(n) is None else given[n] for n, usual in RULE.items()}

    def read_tiling(self) -> Tiling | None:
        """The crops of an image of the size that is asked for; None: one view."""
        size, tile = self.asked.size, self.encoder.image
        if size in (None, (tile, tile)):
            return None
        rule = crop_rule(self._settings)
        rows, columns = rule.grid(size)
        if rows * columns == 1:
            raise SpecError(
                f"--image-size {size.width}x{size.height}: pan and scan cuts images that are"
                f" {rule.ratio:g} times as long as wide, or more, into crops of {rule.least} pixels"
                f" or more; images of this size are one view of {tile} x {tile}: leave it out"
            )
        tokens = math.isqrt(self.config.mm_tokens_per_image)
        return Tiling("crop", rows, columns, *size, tile, tokens, "first", crops=rule)

    def read_media(self) -> Media:
        """The template writes the token that begins an image; the image stands behind it."""
        start, end = self.config.boi_token_index, self.config.eoi_token_index
        around = (str(self.chat.tokenizer.convert_ids_to_tokens(token)) for token in (start, end))
        written = IMAGE_SLOT.join(around)
        token, template = int(self.config.image_token_id), f"\n\n{written}\n\n"
        if self.tiling is not None:
            crops = self.tiling.tiles - 1
            template = f"{WHOLE}{template}{CROPS}{' '.join([template] * crops)}"
        return Media(start, token, count=self.asked.images, template=template)

    def read_layout(self) -> Layout:
        merge = self.encoder.side // math.isqrt(self.config.mm_tokens_per_image)
        return Layout.plain(self.encoder.side, merge, pool="mean").chained(self.between)

    def read_projector(self) -> Projector:
        vision, text = self.config.vision_config, self.config.text_config
        return Projector(vision.hidden_size, text.hidden_size, vision.layer_norm_eps)

    def read_decoder(self) -> DecoderConfig:
        tied = is_tied(self.checkpoint, self.config)
        decoder = decoder_config(self.config.text_config, tied, gemma3)
        own = Rescale(r"projector\.norm\.", offset=1.0)
        layout = self.vision_config.layout
        images = layout.image_of if layout.tiles > 1 else ()
        return replace(decoder, rescaled=(own, *decoder.rescaled), image_of=images)

    def tensor_names(self) -> TensorNames:
        return TensorNames(
            projector={r"^weight$": "mm_input_projection_weight", r"^norm\.": "mm_soft_emb_norm."},
            decoder=BRANCH_NORMS,
        )

    def image_readers(self) -> Mapping[str, Reader]:
        reader: Reader = plain
        if self.tiling is not None:
            reader = partial(panned, tiling=self.tiling)
        return {"Gemma3ImageProcessor": reader}

    def image_processor(self, own: Callable[[], Any]) -> Any:
        processor = own()
        processor.do_pan_and_scan = self.tiling is not None
        for name, value in self._settings.items():
            setattr(processor, name, value)
        return processor

    def notes(self) -> tuple[str, ...]:
        if self.tiling is not None or not image_settings(self.checkpoint.folder).get(PAN):
            return ()
        return (
            f"an image is one view: {PAN} of the image processor's settings is not read, and"
            " transformers does not read it either; --image-size WxH of your images turns it on",
        )


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


def crop_rule(settings: Mapping[str, Any]) -> CropRule:
    """Settings of pan and scan as a rule; ModelError where they are no numbers that it may have."""
    ratio, least, most = (settings[name] for name in RULE)
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 1 <= ratio <= 1e4:
        raise unsupported("pan_and_scan_min_ratio_to_activate", ratio, "a ratio of 1 or more")
    if count("pan_and_scan_max_num_crops", most) < 2:
        raise unsupported("pan_and_scan_max_num_crops", most, "2 crops or more")
    return CropRule(float(ratio), count("pan_and_scan_min_crop_size", least), most)


def panned(processor: Any, tiling: Tiling) -> ImageRecord:
    """Of a processor that squeezes an image and each of its crops to one size."""
    view = plain(processor)
    if view.resize != (tiling.tile, tiling.tile) or view.crop is not None:
        wanted = f"the encoder's {tiling.tile} pixels a side"
        raise unsupported("size", processor.size, wanted)
    return replace(view, resize=None, tiling=tiling)
