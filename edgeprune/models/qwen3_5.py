"""Qwen3.5: Qwen3-VL's tower, and a decoder with linear attention in three layers of four."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from edgeprune.models import qwen3_vl
from edgeprune.models._decoder_config import DecoderConfig, LayerConfig, Rescale
from edgeprune.models._mrope import interleaved
from edgeprune.models._names import LLAMA, Stored, TensorNames
from edgeprune.models._nearby import Nearby
from edgeprune.models._rope import FULL, partly, read_rope, whole_heads
from edgeprune.models._text import decoder_config
from edgeprune.models._towers import is_tied
from edgeprune.spec import LinearAttention

LINEAR = "linear_attention"
"""Among `layer_types` of a text config, a layer with the gated delta rule."""
POSITIONS = 32768
"""Of a dialogue, at most: published configs say 262,144, of which rotary tables and the chunks of
linear attention would have to be made."""
_DECODER = {
    **LLAMA,
    r"\.attention\.gate\.": ".self_attn.q_proj.",
    r"\.linear_norm\.": ".input_layernorm.",
    r"\.linear\.input\.": ".linear_attn.in_proj_qkv.",
    r"\.linear\.weight$": ".linear_attn.conv1d.weight",
    r"\.linear\.beta\.": ".linear_attn.in_proj_b.",
    r"\.linear\.decay\.": ".linear_attn.in_proj_a.",
    r"\.linear\.decay_bias$": ".linear_attn.dt_bias",
    r"\.linear\.rate$": ".linear_attn.A_log",
    r"\.linear\.norm\.": ".linear_attn.norm.",
    r"\.linear\.gate\.": ".linear_attn.in_proj_z.",
    r"\.linear\.output\.": ".linear_attn.out_proj.",
}


class Adapter(qwen3_vl.Adapter):
    """Rotary embedding turns the first quarter of each head, its halves.

    Rows of queries and keys, and weights of their norms, are read in an order in which that is the
    rotary embedding of a whole head, as ours is; pairs that are not turned have a frequency of 0.
    """

    nearby: ClassVar[tuple[Nearby, ...]] = (
        Nearby(
            "Qwen3.5 with experts",
            ("qwen3_5_moe",),
            decoder="a mixture of experts in place of the MLP",
        ),
        Nearby(
            "MiniCPM-V 4.6",
            ("minicpmv4_6",),
            tower="SigLIP with a merger between its blocks",
            projector="a second merger",
            processor="its own tiles",
        ),
    )
    sections: ClassVar[tuple[int, ...]] = (11, 11, 10)
    layer_types: ClassVar[frozenset[str]] = frozenset({FULL, LINEAR})

    def config_class(self) -> Any:
        from transformers import Qwen3_5Config

        return Qwen3_5Config

    def demands(self) -> dict[str, bool]:
        text = self.config.text_config
        kind = text.rope_parameters.get("rope_type", "default")
        heads = text.linear_num_value_heads, text.linear_num_key_heads
        return {
            **super().demands(),
            f"rope_type {kind!r} in the decoder": kind == "default",
            f"activation {text.hidden_act!r} in the decoder": text.hidden_act == "silu",
            f"linear_conv_kernel_dim {text.linear_conv_kernel_dim}": (
                text.linear_conv_kernel_dim > 1
            ),
            f"{heads[0]} value heads for {heads[1]} key heads": heads[0] % heads[1] == 0,
            f"layer_types {text.layer_types}": len(text.layer_types) == text.num_hidden_layers,
        }

    @property
    def _middle(self) -> tuple[int, ...]:
        return ()

    def axes(self) -> tuple[int, ...]:
        return self.with_still(interleaved(self._sections))

    def read_decoder(self) -> DecoderConfig:
        text = whole_heads(self.config.text_config)
        text.max_position_embeddings = min(text.max_position_embeddings, POSITIONS)
        decoder = decoder_config(text, is_tied(self.checkpoint, self.config), qwen3_5)
        rope = partly(read_rope(text, self._turned, decoder.max_positions), self._head)
        return replace(decoder, rope=rope, mrope=self.read_mrope())

    def tensor_names(self) -> TensorNames:
        return replace(super().tensor_names(), decoder=_DECODER)

    def stored(self, parameter: str) -> Stored:
        """A row of queries and one of gates is stored for each number of a head, head by head."""
        found, path = super().stored(parameter), parameter.split(".")
        if path[0] != "layers" or path[2] != "attention":
            return found
        size, heads, order = self._head, self.decoder_config.heads, self._order
        rows = {
            "query": [2 * size * head + row for head in range(heads) for row in order],
            "gate": [2 * size * head + size + row for head in range(heads) for row in range(size)],
            "key": [
                size * head + row for head in range(self.decoder_config.kv_heads) for row in order
            ],
            "query_norm": order,
            "key_norm": order,
        }
        return replace(found, rows=tuple(rows.get(path[3], ())))

    @property
    def _order(self) -> list[int]:
        """The numbers of a head, of which the two of a pair stand half a head apart."""
        half, rest = self._turned // 2, (self._head - self._turned) // 2
        first, later = range(half), range(half, 2 * half)
        return [
            *(*first, *range(2 * half, 2 * half + rest)),
            *(*later, *range(2 * half + rest, self._head)),
        ]

    def is_spare(self, name: str) -> bool:
        """Of a layer that guesses tokens ahead, which only training and other runtimes use."""
        return name.startswith("mtp.") or super().is_spare(name)


def qwen3_5(text: Any, decoder: DecoderConfig) -> DecoderConfig:
    """Norms whose weights are stored less 1, an output gate of attention, and linear attention."""
    linear = LinearAttention(
        text.linear_num_key_heads,
        text.linear_num_value_heads,
        text.linear_key_head_dim,
        text.linear_value_head_dim,
    )
    bias = text.attention_bias
    layers: dict[str, LayerConfig] = {
        FULL: replace(
            decoder.layers[0], qk_norm=True, output_gate=True, qkv_bias=bias, output_bias=bias
        ),
        LINEAR: replace(decoder.layers[0], kernel=text.linear_conv_kernel_dim, linear=linear),
    }
    return replace(
        decoder,
        layers=tuple(layers[kind] for kind in text.layer_types),
        rescaled=(Rescale(r"(layers\.\d+\.(\w+\.)?\w+_norm|norm)\.", offset=1.0),),
    )
