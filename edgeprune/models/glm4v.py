"""GLM-4.1V and GLM-4.6V-Flash: a tower like Qwen's, M-RoPE on a part of each head, norms on both
sides of a branch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

from edgeprune.models import _qwen
from edgeprune.models._decoder_config import DecoderConfig
from edgeprune.models._glu import Glu
from edgeprune.models._image_record import Reader, rounded_size
from edgeprune.models._media import IMAGE_SLOT, Media
from edgeprune.models._mrope import in_runs
from edgeprune.models._names import LLAMA, Stored, TensorNames
from edgeprune.models._nearby import Nearby
from edgeprune.models._qwen_tower import TowerConfig
from edgeprune.models._rope import partly, read_rope, whole_heads
from edgeprune.models._text import decoder_config
from edgeprune.models._towers import is_tied
from edgeprune.models._video import sampling_rate, timed_at

BEGIN, END = "<|begin_of_image|>", "<|end_of_image|>"
"""Around each pair of a video's frames, as the processor writes them."""
FRAMES = 2
"""Of a patch; the processor's bounds of pixels count each of an image's so often."""

_TOWER = {
    r"^patch\.": "patch_embed.proj.",
    r"^pre_norm\.": "post_conv_layernorm.",
    r"^position\.": "embeddings.position_embedding.",
    r"^post_norm\.": "post_layernorm.",
    r"\.attention_norm\.": ".norm1.",
    r"\.mlp_norm\.": ".norm2.",
    r"\.qkv\.": ".attn.qkv.",
    r"\.output\.": ".attn.proj.",
    r"\.mlp\.(gate|up|down)\.": r".mlp.\1_proj.",
}
_PROJECTOR = {
    r"^merge\.": "downsample.",
    r"^first\.": "merger.proj.",
    r"^norm\.": "merger.post_projection_norm.",
    r"^(gate|up|down)\.": r"merger.\1_proj.",
}
_DECODER = {
    **LLAMA,
    r"\.attention_out_norm\.": ".post_self_attn_layernorm.",
    r"\.mlp_out_norm\.": ".post_mlp_layernorm.",
    r"\.mlp\.(gate|up)_proj\.": ".mlp.gate_up_proj.",
}


class Adapter(_qwen.Adapter):
    """Rotary embedding turns adjacent numbers of the first half of a head.

    Rows of queries and keys are read in another order, in which it turns the two halves of a whole
    head, as ours does; those that are not turned have a frequency of 0. Products of queries and
    keys stay what they are.
    """

    model_types: ClassVar[tuple[str, ...]] = ("glm46v",)
    nearby: ClassVar[tuple[Nearby, ...]] = (
        Nearby(
            "GLM-4.5V and GLM-4.6V with experts",
            ("glm4v_moe",),
            decoder="a mixture of experts in place of the MLP",
        ),
    )
    sections: ClassVar[tuple[int, ...]] = (8, 12, 12)

    def config_class(self) -> Any:
        from transformers import Glm4vConfig, Glm46VConfig

        return Glm46VConfig if self._later else Glm4vConfig

    @property
    def _later(self) -> bool:
        """Whether it is a GLM-4.6V."""
        return bool(self.checkpoint.config["model_type"] == "glm46v")

    def demands(self) -> dict[str, bool]:
        vision, text = self.config.vision_config, self.config.text_config
        kind = text.rope_parameters.get("rope_type", "default")
        return {
            **super().demands(),
            f"rope_type {kind!r} in the decoder": kind == "default",
            f"merger activation {vision.hidden_act!r}": vision.hidden_act == "silu",
            "biases of attention in the vision tower": not vision.attention_bias,
            f"image_size {vision.image_size}": isinstance(vision.image_size, int),
            f"spatial_merge_size {vision.spatial_merge_size}": vision.spatial_merge_size == 2,
            f"out_hidden_size {vision.out_hidden_size} for a decoder of {text.hidden_size}": (
                vision.out_hidden_size == text.hidden_size
            ),
        }

    def axes(self) -> tuple[int, ...]:
        return self.with_still(in_runs(self._sections))

    def tower_config(self, vision: Any, rows: int, columns: int) -> TowerConfig:
        return replace(
            _qwen.tower(vision, rows, columns, vision.hidden_size, vision.out_hidden_size),
            gated=True,
            bias=False,
            eps=vision.rms_norm_eps,
            pre_norm=True,
            patch_bias=True,
            position_side=vision.image_size // vision.patch_size,
            cubic=True,
        )

    def read_media(self) -> Media:
        """A video's frames have an image's token; behind each pair stands when it was seen."""
        if self.asked.frames is None:
            return super().read_media()
        seconds = (FRAMES * pair / self._fps for pair in range(self.shown // FRAMES))
        times = (f"{s:.1f} seconds" if self._later else f"{int(s)}" for s in seconds)
        written = "".join(f"{BEGIN}{IMAGE_SLOT}{END}{time}" for time in times)
        placeholder, token = int(self.config.video_token_id), int(self.config.image_token_id)
        return Media(placeholder, token, "video", template=written)

    @property
    def _fps(self) -> float:
        """Frames a second that a video is taken to be sampled at."""
        return sampling_rate(self.checkpoint, default=2)

    def read_projector(self) -> Glu:
        width = self.config.vision_config.out_hidden_size
        return Glu(self.encoder.width, self.config.vision_config.intermediate_size, width, width)

    def read_decoder(self) -> DecoderConfig:
        text = whole_heads(self.config.text_config)
        decoder = decoder_config(text, is_tied(self.checkpoint, self.config), self.decoder_kind)
        layers = tuple(replace(layer, branch_norms=True) for layer in decoder.layers)
        rope = partly(read_rope(text, self._turned, decoder.max_positions), self._head)
        return replace(decoder, layers=layers, rope=rope, mrope=self.read_mrope())

    def tensor_names(self) -> TensorNames:
        prefixes = "model.visual.", "visual."
        return TensorNames(
            tower=_TOWER,
            tower_prefixes=prefixes,
            projector=_PROJECTOR,
            projector_prefixes=prefixes,
            decoder=_DECODER,
            decoder_prefixes=("model.language_model.", "model."),
            head=("lm_head.weight",),
        )

    def stored(self, parameter: str) -> Stored:
        found, path = super().stored(parameter), parameter.split(".")
        if path[0] != "layers":
            return found
        decoder, owner = self.decoder_config, path[-2]
        if owner in ("gate", "up"):
            start = (owner == "up") * decoder.mlp_width
            return replace(found, rows=range(start, start + decoder.mlp_width))
        if owner not in ("query", "key"):
            return found
        heads = decoder.heads if owner == "query" else decoder.kv_heads
        order = halves(self._head, self._turned)
        rows = tuple(head * self._head + row for head in range(heads) for row in order)
        return replace(found, rows=rows)

    def image_readers(self) -> Mapping[str, Reader]:
        reader: Reader = partial(rounded_size, frozen=self.frozen, times=FRAMES)
        return {"Glm4vImageProcessor": reader, "Glm46VImageProcessor": reader}

    def notes(self) -> tuple[str, ...]:
        return () if self.asked.frames is None else (timed_at(self._fps),)


def halves(size: int, turned: int) -> list[int]:
    """The numbers of a head of which adjacent ones of the first `turned` are turned together, in an
    order in which the two of each pair stand half a head apart."""
    half = (size - turned) // 2
    low = [*range(0, turned, 2), *range(turned, turned + half)]
    return [*low, *range(1, turned, 2), *range(turned + half, size)]
