"""PaliGemma 1 and 2: SigLIP, one linear layer, and a prompt whose tokens all see each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor, nn

from edgeprune.errors import ModelError
from edgeprune.models import _adapter
from edgeprune.models._decoder_config import DecoderConfig
from edgeprune.models._encoder import EncoderConfig
from edgeprune.models._gemma import BRANCH_NORMS, gemma2
from edgeprune.models._image_record import Reader, plain
from edgeprune.models._layers import ACTIVATIONS, Linear
from edgeprune.models._layout import Layout
from edgeprune.models._media import Media, Turns
from edgeprune.models._names import LLAMA, TensorNames
from edgeprune.models._ops import TorchOps, cast
from edgeprune.models._text import decoder_config
from edgeprune.models._towers import SIGLIP, is_tied, one_size, siglip


class Adapter(_adapter.Adapter):
    """Images, question and the text around them see each other; what is generated sees the past.

    transformers numbers positions from 1 here. Attention depends on distances, so ours start at 0.
    """

    builds: ClassVar[tuple[str, ...]] = (SIGLIP, "gemma", "gemma2")
    encoder: EncoderConfig

    def config_class(self) -> Any:
        from transformers import PaliGemmaConfig

        return PaliGemmaConfig

    def demands(self) -> dict[str, bool]:
        vision, text = self.config.vision_config, self.config.text_config
        output = vision.projection_dim
        return {
            f"a {vision.model_type} vision tower": vision.model_type == SIGLIP,
            f"activation {vision.hidden_act!r}": vision.hidden_act in ACTIVATIONS,
            f"projection_dim {output} for a decoder of {text.hidden_size}": (
                output == text.hidden_size
            ),
            "a causal prompt": bool(text.use_bidirectional_attention),
        }

    def read_encoder(self) -> EncoderConfig:
        return siglip(self.config.vision_config)

    def read_media(self) -> Media:
        """There is no chat template: the processor writes images, [BOS], a prompt, a newline."""
        bos = self.chat.tokenizer.bos_token
        if not bos:
            raise ModelError(
                f"{self.checkpoint.text_folder} has a tokenizer without bos_token, which prompts of"
                " PaliGemma begin with; add it to tokenizer_config.json"
            )
        turns = Turns(f"{{image}}{bos}{{prompt}}\n", "{prompt}\n", "PaliGemma")
        token = int(self.config.image_token_id)
        return Media(token, token, count=self.asked.images, assumed=turns)

    def read_layout(self) -> Layout:
        one_size(self.asked.size, self.encoder.image)
        return Layout.plain(self.encoder.side).chained(self.between)

    def read_projector(self) -> Projector:
        return Projector(self.encoder.width, self.config.text_config.hidden_size)

    def read_decoder(self) -> DecoderConfig:
        text, tied = self.config.text_config, is_tied(self.checkpoint, self.config)
        own = gemma2 if text.model_type == "gemma2" else None
        return replace(decoder_config(text, tied, own), sees="prompt")

    def tensor_names(self) -> TensorNames:
        normed = self.decoder_config.layers[0].branch_norms
        return TensorNames(projector={}, decoder=BRANCH_NORMS if normed else LLAMA)

    def image_readers(self) -> Mapping[str, Reader]:
        return {"SiglipImageProcessor": plain}


@dataclass(frozen=True, slots=True)
class Projector:
    """One linear layer with a bias."""

    inputs: int
    output: int

    def build(self, ops: TorchOps) -> nn.Module:
        return _Projector(self, ops)


class _Projector(nn.Module):
    def __init__(self, config: Projector, ops: TorchOps) -> None:
        super().__init__()
        self.linear = Linear(config.inputs, config.output, ops, bias=True)

    def forward(self, features: Tensor) -> Tensor:
        return cast(self.linear(features), self.linear.weight.dtype)
