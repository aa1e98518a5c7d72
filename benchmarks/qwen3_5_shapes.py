"""Qwen3.5 in published sizes: of the 2B and the 4B none were at hand.

python -m benchmarks.published qwen3.5-0.8b checkpoints/qwen3.5-0.8b
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.qwen3_shapes import (
    TEXT,
    Qwen3Shape,
    attention,
    ends,
    mlp_and_norms,
    vision_tensors,
)
from benchmarks.qwen_shapes import Sizes
from edgeprune.tiling import Size

INTERVAL = 4
"""The last of so many layers has attention."""


@dataclass(frozen=True)
class Qwen35Shape(Qwen3Shape):
    """With linear attention in most layers."""

    head: int = 256
    vocabulary: int = 248320
    deepstack: tuple[int, ...] = ()
    key_heads: int = 16  # of linear attention
    value_heads: int = 32
    linear_head: int = 128
    kernel: int = 4

    def config(self, tokens: dict[str, int], dtype: str) -> dict[str, Any]:
        """As transformers 5 writes it."""
        found = super().config(tokens, dtype)
        text, vision = found["text_config"], found["vision_config"]
        del text["rope_scaling"], text["rope_theta"], vision["deepstack_visual_indexes"]
        kinds = ("full_attention", "linear_attention")
        text |= {
            "model_type": "qwen3_5_text",
            "layer_types": [kinds[(n + 1) % INTERVAL > 0] for n in range(self.layers)],
            "full_attention_interval": INTERVAL,
            "linear_num_key_heads": self.key_heads,
            "linear_num_value_heads": self.value_heads,
            "linear_key_head_dim": self.linear_head,
            "linear_value_head_dim": self.linear_head,
            "linear_conv_kernel_dim": self.kernel,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000000,
                "partial_rotary_factor": 0.25,
                "mrope_section": [11, 11, 10],
                "mrope_interleaved": True,
            },
        }
        vision["model_type"] = "qwen3_5_vision"
        return {
            **found,
            "architectures": ["Qwen3_5ForConditionalGeneration"],
            "model_type": "qwen3_5",
            "transformers_version": "5.2.0",
        }

    def tensors(self) -> Sizes:
        yield from ends(self)
        for layer in range(self.layers):
            prefix = f"{TEXT}layers.{layer}."
            if (layer + 1) % INTERVAL:
                yield from self._linear_attention(f"{prefix}linear_attn.")
            else:
                yield from attention(self, prefix, gates=self.heads * self.head)
            yield from mlp_and_norms(self, prefix)
        yield from vision_tensors(self)

    def _linear_attention(self, prefix: str) -> Sizes:
        inner = self.value_heads * self.linear_head
        channels = 2 * self.key_heads * self.linear_head + inner
        for name, size in (("qkv", channels), ("z", inner)):
            yield f"{prefix}in_proj_{name}.weight", (size, self.width)
        for name in ("a", "b"):
            yield f"{prefix}in_proj_{name}.weight", (self.value_heads, self.width)
        yield f"{prefix}conv1d.weight", (channels, 1, self.kernel)
        for name in ("A_log", "dt_bias"):
            yield f"{prefix}{name}", (self.value_heads,)
        yield f"{prefix}norm.weight", (self.linear_head,)
        yield f"{prefix}out_proj.weight", (self.width, inner)


QWEN35_SHAPES = {
    "qwen3.5-0.8b": Qwen35Shape(
        24,
        1024,
        3584,
        8,
        2,
        value_heads=16,
        blocks=12,
        vision_width=768,
        vision_mlp=3072,
        vision_heads=12,
        size=Size(480, 640),
    ),
    "qwen3.5-9b": Qwen35Shape(
        32,
        4096,
        12288,
        16,
        4,
        tied=False,
        blocks=27,
        vision_width=1152,
        vision_mlp=4304,
        size=Size(480, 640),
    ),
}
"""Images of 640 x 480 are 300 visual tokens."""
