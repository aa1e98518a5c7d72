"""Reading vision towers and projectors from transformers' configs."""

from __future__ import annotations

from typing import Any

from edgeprune.errors import ModelError, SpecError, brief
from edgeprune.models._checkpoint import Checkpoint
from edgeprune.models._encoder import EncoderConfig
from edgeprune.models._layers import ACTIVATIONS
from edgeprune.models._layout import Layout
from edgeprune.models._vision import ProjectorConfig
from edgeprune.tiling import Size

CLIP, SIGLIP = "clip_vision_model", "siglip_vision_model"


def read_config(checkpoint: Checkpoint, kind: Any) -> Any:
    """A checkpoint's config.json as transformers' class of the family."""
    try:
        return kind.from_pretrained(checkpoint.folder)
    except Exception as error:  # transformers raises many kinds for a wrong config.json
        raise ModelError(
            f"{checkpoint.folder / 'config.json'} is damaged: {brief(error)}"
        ) from error


def is_tied(checkpoint: Checkpoint, config: Any) -> bool:
    """Whether embedding and output head are one tensor: the config says so and one is stored."""
    text = getattr(config.text_config, "tie_word_embeddings", False)
    ends = ("lm_head.weight", "embed_tokens.weight")
    both = all(any(name.endswith(end) for name in checkpoint.files) for end in ends)
    return bool((config.tie_word_embeddings or text) and not both)


def refuse(config: Any, demands: dict[str, bool]) -> None:
    """ModelError that names each of a config's demands which is not supported."""
    missing = [what for what, supported in demands.items() if not supported]
    if missing:
        kind = config.model_type
        raise ModelError(f"this {kind} checkpoint has {', '.join(missing)}: not supported")


def one_size(asked: Size | None, side: int) -> None:
    """SpecError where a family that takes every image in one size is asked for another."""
    if asked not in (None, (side, side)):
        raise SpecError(
            f"this model takes every image as {side} x {side} pixels, --image-size asks for"
            f" {asked}; leave it out"
        )


def patch_grid(config: Any, size: Size, step: int) -> tuple[int, int]:
    """Rows and columns of patches of an image of a frozen size."""
    if size.width % step or size.height % step:
        width, height = (max(1, round(side / step)) * step for side in (size.width, size.height))
        raise SpecError(
            f"--image-size {size.width}x{size.height}: sides of a {config.model_type} are multiples"
            f" of {step}; the nearest such size is {width}x{height}"
        )
    patch = config.vision_config.patch_size
    return size.height // patch, size.width // patch


def one_tile(config: Any, side: int) -> Layout:
    """The patches of an image of one tile, [CLS] before them where the projector reads it too."""
    return Layout.with_cls(side) if _reads_cls(config) else Layout.plain(side)


def _reads_cls(config: Any) -> bool:
    clip = config.vision_config.model_type == CLIP
    return bool(clip and config.vision_feature_select_strategy == "full")


def clip_or_siglip(config: Any, *, cls: bool = False) -> EncoderConfig:
    """The vision tower of a LLaVA-like config, cut after the last block that its projector reads.

    `cls` says whether the family's projector may read [CLS] too (strategy `full` of a CLIP tower).
    """
    vision, strategy = config.vision_config, config.vision_feature_select_strategy
    clip = vision.model_type == CLIP
    strategies = ("default", "full")[: 1 + cls] if clip else ("full",)  # nothing is to be dropped
    read = _blocks_read(config.vision_feature_layer, vision.num_hidden_layers)
    refuse(
        config,
        {
            f"a {vision.model_type} vision tower": vision.model_type in (CLIP, SIGLIP),
            f"vision_feature_layer {config.vision_feature_layer}": bool(read),
            f"vision_feature_select_strategy {strategy!r}": strategy in strategies,
            f"activation {vision.hidden_act!r}": vision.hidden_act in ACTIVATIONS,
        },
    )
    return EncoderConfig(
        blocks=max(read),
        left_out=vision.num_hidden_layers - max(read),
        joined=read if len(read) > 1 else (),
        width=vision.hidden_size,
        mlp_width=vision.intermediate_size,
        heads=vision.num_attention_heads,
        image=vision.image_size,
        patch=vision.patch_size,
        eps=vision.layer_norm_eps,
        activation=vision.hidden_act,
        cls=clip,
        patch_bias=not clip,
        pre_norm=clip,
    )


def siglip(vision: Any) -> EncoderConfig:
    """A whole SigLIP tower, whose last block's output is read behind its norm."""
    return EncoderConfig(
        blocks=vision.num_hidden_layers,
        width=vision.hidden_size,
        mlp_width=vision.intermediate_size,
        heads=vision.num_attention_heads,
        image=vision.image_size,
        patch=vision.patch_size,
        eps=vision.layer_norm_eps,
        activation=vision.hidden_act,
        cls=False,
        patch_bias=True,
        post_norm=True,
    )


def _blocks_read(layers: Any, blocks: int) -> tuple[int, ...]:
    """After how many of a tower's blocks its output is read, for one hidden state or several, the
    0th before the first block; empty where there are none such."""
    named = layers if isinstance(layers, (list, tuple)) else [layers]
    if not all(isinstance(layer, int) and -blocks - 1 <= layer <= blocks for layer in named):
        return ()
    read = tuple(layer % (blocks + 1) for layer in named)
    return read if any(read) else ()


def projector(config: Any, inputs: int, norm: bool = False) -> ProjectorConfig:
    """The two linear layers of a LLaVA-like config, from `inputs` to the decoder's width."""
    activation = config.projector_hidden_act
    refuse(config, {f"activation {activation!r}": activation in ACTIVATIONS})
    bias = getattr(config, "multimodal_projector_bias", True)
    return ProjectorConfig(inputs, config.text_config.hidden_size, activation, bias, norm)
