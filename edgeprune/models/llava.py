"""LLaVA 1.5: CLIP or SigLIP vision tower, two-layer projector, LLaMA-like decoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from edgeprune.models import _llava
from edgeprune.models._family import Elsewhere
from edgeprune.models._image_record import Reader, padded, plain
from edgeprune.models._layout import Layout
from edgeprune.models._media import Media, Turns
from edgeprune.models._nearby import Nearby
from edgeprune.models._towers import CLIP, SIGLIP, one_size, one_tile

TURNS = Turns("USER: {image}\n{prompt} ASSISTANT:", "USER: {prompt} ASSISTANT:", "LLaVA-1.5")
"""As the published template writes them; older checkpoints have none."""


TAKEN = "gemma", "granite", "llama", "mistral", "qwen2", "qwen3"
"""Kinds of decoders that are found behind such a tower."""


class Adapter(_llava.Adapter):
    builds: ClassVar[tuple[str, ...]] = (CLIP, SIGLIP, *TAKEN)
    nearby: ClassVar[tuple[Nearby, ...]] = (
        Nearby(
            "ViP-LLaVA",
            ("vipllava",),
            projector="a norm over the features of several blocks",
        ),
        Nearby(
            "DeepSeek-VL 1.3B",
            ("deepseek_vl",),
            tower="SigLIP read behind its last norm",
            processor="padding to a square of its own",
        ),
        Nearby(
            "DeepSeek-VL 7B",
            ("deepseek_vl_hybrid",),
            tower="SAM's beside SigLIP, for a second, larger view",
        ),
        Nearby(
            "Janus",
            ("janus",),
            tower="one of its own",
            processor="padding to a square of its own",
        ),
        Nearby(
            "Florence-2",
            ("florence2",),
            tower="DaViT",
            decoder="an encoder in front of it (BART)",
        ),
        Nearby(
            "Llama 3.2 Vision",
            ("mllama",),
            tower="one of its own",
            decoder="layers that attend to the image beside the text",
        ),
        Nearby(
            "Chameleon",
            ("chameleon",),
            tower="a VQ-GAN, which makes tokens of the vocabulary",
            decoder="norms of queries and keys with weights for each head",
        ),
        Nearby(
            "Emu3",
            ("emu3",),
            tower="a VQ-GAN, which makes tokens of the vocabulary",
        ),
        Nearby(
            "Fuyu",
            ("fuyu",),
            tower="none: the decoder reads patches",
            decoder="Persimmon",
        ),
    )
    elsewhere: ClassVar[tuple[Elsewhere, ...]] = (
        Elsewhere("Moondream 2", "HfMoondream", "llava"),
        Elsewhere("Molmo", "MolmoForCausalLM", "llava"),
    )
    reads_cls: ClassVar[bool] = True

    def config_class(self) -> Any:
        from transformers import LlavaConfig

        return LlavaConfig

    def read_media(self) -> Media:
        return Media.of_images(self.config, self.asked.images, assumed=TURNS)

    def read_layout(self) -> Layout:
        one_size(self.asked.size, self.encoder.image)
        return one_tile(self.config, self.encoder.side).chained(self.between)

    def image_readers(self) -> Mapping[str, Reader]:
        return {
            "CLIPImageProcessor": plain,
            "LlavaImageProcessor": padded,
            "SiglipImageProcessor": plain,
        }
