"""LLaVA 1.5: CLIP vision tower, two-layer projector, LLaMA decoder."""

from __future__ import annotations

from typing import Any

from torch import nn

from edgeprune.errors import ModelError
from edgeprune.models import _adapter
from edgeprune.models._checkpoint import Checkpoint
from edgeprune.models._clip import ACTIVATIONS, Vision, VisionConfig
from edgeprune.models._decoder import Decoder, DecoderConfig
from edgeprune.models._names import CLIP, LLAMA, translate
from edgeprune.models._ops import TorchOps
from edgeprune.models._rope import inverse_frequencies
from edgeprune.policies import Policy
from edgeprune.spec import ModelShape, Plan


class Adapter(_adapter.Adapter):
    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        from transformers import LlavaConfig

        try:
            config = LlavaConfig.from_pretrained(checkpoint.folder)
        except Exception as error:  # transformers raises many kinds for a wrong config.json
            raise ModelError(f"{checkpoint.folder / 'config.json'} is damaged: {error}") from error
        _refuse(config)
        self.config = config
        self.vision_config = _vision_config(config)
        self.decoder_config = _decoder_config(config.text_config)

    @property
    def shape(self) -> ModelShape:
        rows, columns = self.vision_config.grid
        decoder = self.decoder_config
        return ModelShape(
            family="llava",
            visual_tokens=rows * columns,
            grid=(rows, columns),
            layers=decoder.layers,
            width=decoder.width,
            mlp_width=decoder.mlp_width,
            attention_heads=decoder.heads,
            kv_heads=decoder.kv_heads,
            head_size=decoder.head_size,
            vocabulary=decoder.vocabulary,
            max_positions=decoder.max_positions,
            has_cls=True,
        )

    @property
    def image_token_id(self) -> int:
        return int(self.config.image_token_id)

    @property
    def image_side(self) -> int:
        return self.vision_config.image

    def vision(self, policy: Policy, plan: Plan, ops: TorchOps | None = None) -> nn.Module:
        return Vision(self.vision_config, policy, plan, ops)

    def decoder(self, policy: Policy, plan: Plan, ops: TorchOps | None = None) -> Decoder:
        return Decoder(self.decoder_config, policy, plan, ops)

    def names(self, parameter: str) -> tuple[str, ...]:
        owner = parameter.partition(".")[0]
        if owner == "head":
            return "lm_head.weight", "language_model.lm_head.weight"
        if owner in ("first", "second"):
            leaf = parameter.rpartition(".")[2]
            stem = f"multi_modal_projector.linear_{1 if owner == 'first' else 2}.{leaf}"
            return stem, f"model.{stem}"
        if owner in ("embedding", "layers", "norm"):
            stem = translate(parameter, LLAMA)
            return tuple(f"{place}{stem}" for place in _TEXT)
        stem = translate(parameter, CLIP)
        return tuple(f"{place}{stem}" for place in _TOWER)


# transformers has written LLaVA under several stems over the years; all are read.
_TEXT = ("language_model.model.", "model.language_model.", "language_model.")
_TOWER = (
    "vision_tower.vision_model.",
    "model.vision_tower.vision_model.",
    "vision_tower.",
    "model.vision_tower.",
)


def _vision_config(config: Any) -> VisionConfig:
    vision, layer = config.vision_config, config.vision_feature_layer
    return VisionConfig(
        blocks=layer if layer >= 0 else vision.num_hidden_layers + 1 + layer,
        width=vision.hidden_size,
        mlp_width=vision.intermediate_size,
        heads=vision.num_attention_heads,
        image=vision.image_size,
        patch=vision.patch_size,
        eps=vision.layer_norm_eps,
        activation=vision.hidden_act,
        projector_activation=config.projector_hidden_act,
        projector_bias=config.multimodal_projector_bias,
        output=config.text_config.hidden_size,
    )


def _decoder_config(text: Any) -> DecoderConfig:
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return DecoderConfig(
        layers=text.num_hidden_layers,
        width=text.hidden_size,
        mlp_width=text.intermediate_size,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        head_size=head_size,
        vocabulary=text.vocab_size,
        eps=text.rms_norm_eps,
        max_positions=text.max_position_embeddings,
        inverse_frequencies=inverse_frequencies(text, head_size),
        tied=text.tie_word_embeddings,
        qkv_bias=text.attention_bias,
        output_bias=text.attention_bias,
        mlp_bias=text.mlp_bias,
    )


def _refuse(config: Any) -> None:
    """Name what a LLaVA config asks for and this adapter does not do."""
    vision, text = config.vision_config, config.text_config
    demands = {
        f"a {vision.model_type} vision tower": vision.model_type == "clip_vision_model",
        f"a {text.model_type} decoder": text.model_type == "llama",
        f"vision_feature_layer {config.vision_feature_layer}": isinstance(
            config.vision_feature_layer, int
        ),
        f"vision_feature_select_strategy {config.vision_feature_select_strategy!r}": (
            config.vision_feature_select_strategy == "default"
        ),
        f"activation {vision.hidden_act!r}": vision.hidden_act in ACTIVATIONS,
        f"activation {config.projector_hidden_act!r}": config.projector_hidden_act in ACTIVATIONS,
        f"activation {text.hidden_act!r} in the decoder": text.hidden_act == "silu",
    }
    missing = [what for what, supported in demands.items() if not supported]
    if missing:
        raise ModelError(f"this LLaVA checkpoint has {', '.join(missing)}: not supported")
