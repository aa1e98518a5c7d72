"""The language model in training: frozen weights, LoRA factors beside them, a fast forward pass.

The weights of one matrix are stacked over the layers, so that all factors of a step are merged with
one batched product per matrix: W + (alpha / r) B A. The forward pass computes what transformers'
LlamaForCausalLM computes, with float32 residuals and matrix products in `Decoder.dtype`.

A sequence is an image's prefix and then a number of slots, a question with its answer each. A slot
sees the prefix and itself alone, and its positions follow those of the prefix: every question is
read exactly as if it were the only one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PARTS = {name: ("self_attn" if name[0] in "qkvo" else "mlp") for name in MATRICES}
BLOCK = 32  # weights that share a scale, in both formats of 4 and 8 bits


@dataclass
class Decoder:
    """Frozen weights of a LLaMA decoder; matrices float [layers, out, in], stacked over layers."""

    embed: Tensor  # [vocabulary, width], also the output layer
    matrices: dict[str, Tensor]
    norms: Tensor  # [layers, 2, width]: before attention, before the MLP
    last_norm: Tensor  # [width]
    heads: int
    kv_heads: int
    theta: float
    epsilon: float
    dtype: torch.dtype = torch.float32  # of the matrix products

    @property
    def width(self) -> int:
        return int(self.embed.shape[1])

    def to(self, device: torch.device, dtype: torch.dtype) -> Decoder:
        """The same weights on a device, matrix products in `dtype`."""
        matrices = {name: w.to(device) for name, w in self.matrices.items()}
        rest = (t.to(device) for t in (self.norms, self.last_norm))
        return Decoder(self.embed.to(device), matrices, *rest, self.heads, self.kv_heads,
                       self.theta, self.epsilon, dtype)  # fmt: skip


def unpacked(pieces: list[Path]) -> Decoder:
    """The decoder from the pieces that `pack` writes."""
    stored: dict[str, Tensor] = {}
    for piece in pieces:
        stored |= load_file(piece)
    heads, kv_heads, theta, epsilon = stored["settings"].tolist()
    matrices = {name: widened(stored[name]) for name in MATRICES}
    return Decoder(widened(stored["embed"]), matrices, stored["norms"], stored["last_norm"],
                   int(heads), int(kv_heads), theta, epsilon)  # fmt: skip


def widened(packed: Tensor) -> Tensor:
    """float32 weights of GGUF blocks of 32, uint8 [..., bytes]: Q4_1 (20 bytes) or Q8_0 (34).

    Q4_1: scale and least value in float16, then the low and the high half bytes. Q8_0: scale in
    float16, then int8.
    """
    *rows, width = packed.shape
    raw = packed.numpy()
    if width % 34 == 0 and width % 20 != 0:
        blocks = raw.reshape(-1, 34)
        scale = blocks[:, :2].copy().view(np.float16).astype(np.float32)
        values = scale * blocks[:, 2:].copy().view(np.int8)
    else:
        blocks = raw.reshape(-1, 20)
        ends = blocks[:, :4].copy().view(np.float16).astype(np.float32)
        halves = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], 1)
        values = ends[:, :1] * halves + ends[:, 1:]
    return torch.from_numpy(values.astype(np.float32)).reshape(*rows, -1)


def stacked(model: Any) -> Decoder:
    """The decoder of a transformers LlamaForCausalLM (or of LLaVA's `language_model`)."""
    body = getattr(model, "model", model)
    layers, config = body.layers, body.config
    matrices = {
        name: torch.stack([getattr(getattr(layer, PARTS[name]), name).weight for layer in layers])
        for name in MATRICES
    }
    norms = [[x.input_layernorm.weight, x.post_attention_layernorm.weight] for x in layers]
    return Decoder(
        body.embed_tokens.weight.detach().float(),
        {name: w.detach().float() for name, w in matrices.items()},
        torch.stack([torch.stack(pair) for pair in norms]).detach().float(),
        body.norm.weight.detach().float(),
        config.num_attention_heads,
        config.num_key_value_heads,
        float(config.rope_parameters["rope_theta"]),
        float(config.rms_norm_eps),
    )


class Lora(nn.Module):
    """Factors A [layers, r, in] and B [layers, out, r] of every matrix."""

    def __init__(self, decoder: Decoder, rank: int, alpha: float, seed: int = 0) -> None:
        super().__init__()
        self.rank, self.alpha = rank, alpha
        generator = torch.Generator().manual_seed(seed)
        for name, weight in decoder.matrices.items():
            layers, rows, columns = weight.shape
            first = torch.randn(layers, rank, columns, generator=generator) * columns**-0.5
            self.register_parameter(f"{name}_A", nn.Parameter(first))
            self.register_parameter(f"{name}_B", nn.Parameter(torch.zeros(layers, rows, rank)))

    def merged(self, decoder: Decoder) -> list[tuple[Tensor, ...]]:
        """Per layer: query-key-value, output, gate-up and down weights in the decoder's dtype."""
        whole = {}
        for name, weight in decoder.matrices.items():
            a, b = self.get_parameter(f"{name}_A"), self.get_parameter(f"{name}_B")
            sum_ = torch.baddbmm(weight, b, a, alpha=self.alpha / self.rank)
            whole[name] = sum_.to(decoder.dtype)
        qkv = torch.cat([whole[f"{x}_proj"] for x in "qkv"], 1)
        gate_up = torch.cat([whole["gate_proj"], whole["up_proj"]], 1)
        parts = qkv, whole["o_proj"], gate_up, whole["down_proj"]
        return list(zip(*(part.unbind(0) for part in parts), strict=True))

    def state(self, prefix: str = "base_model.model.model.language_model") -> dict[str, Tensor]:
        """The factors by peft's names, float16, one pair per layer and matrix."""
        tensors = {}
        for name in MATRICES:
            for factor in "AB":
                stack = self.get_parameter(f"{name}_{factor}").detach().to("cpu", torch.float16)
                for i, tensor in enumerate(stack):
                    key = f"{prefix}.layers.{i}.{PARTS[name]}.{name}.lora_{factor}.weight"
                    tensors[key] = tensor.contiguous()
        return tensors

    def config(self) -> dict[str, Any]:
        """peft's adapter_config.json."""
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": None,
            "inference_mode": True,
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": False,
            "init_lora_weights": True,
            "target_modules": list(MATRICES),
        }


@dataclass(frozen=True)
class Layout:
    """Lengths of a sequence: the image's prefix, then `slots` questions of `slot` tokens each."""

    prefix: int
    slots: int
    slot: int

    @property
    def text(self) -> int:
        """Tokens after the prefix, filled up so that the whole length is a multiple of 8."""
        wanted = self.slots * self.slot
        return wanted + -(self.prefix + wanted) % 8

    def mask(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """What is added to the scores of text [text, prefix + text]: 0 or -inf."""
        place = torch.arange(self.text, device=device)
        same = place[:, None] // self.slot == place[None] // self.slot
        sees = same & (place[:, None] >= place[None])
        sees = F.pad(sees, (self.prefix, 0), value=True)
        return torch.zeros(sees.shape, device=device, dtype=dtype).masked_fill(~sees, -torch.inf)

    def positions(self, device: torch.device) -> Tensor:
        """Position of every token [prefix + text]."""
        slots = torch.arange(self.text, device=device) % self.slot + self.prefix
        return torch.cat([torch.arange(self.prefix, device=device), slots])


def _rms(x: Tensor, weight: Tensor, decoder: Decoder) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, decoder.epsilon).to(decoder.dtype)


def _attend(x: Tensor, weight: Tensor, decoder: Decoder, layout: Layout,
            turn: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:  # fmt: skip
    """Heads' outputs [batch, length, heads * size] of normed states."""
    batch, length, _ = x.shape
    heads, kv = decoder.heads, decoder.kv_heads
    size = weight.shape[0] // (heads + 2 * kv)
    y = F.linear(x, weight).view(batch, length, heads + 2 * kv, size).transpose(1, 2)
    qk, v = y[:, : heads + kv], y[:, heads + kv :]
    cos, sin = turn
    half = torch.cat([-qk[..., size // 2 :], qk[..., : size // 2]], -1)
    qk = qk * cos + half * sin
    q = qk[:, :heads]
    k, v = (t.repeat_interleave(heads // kv, 1) for t in (qk[:, heads:], v))
    n = layout.prefix
    first = F.scaled_dot_product_attention(q[:, :, :n], k[:, :, :n], v[:, :, :n], is_causal=True)
    second = F.scaled_dot_product_attention(q[:, :, n:], k, v, attn_mask=mask)
    return torch.cat([first, second], 2).transpose(1, 2).reshape(batch, length, heads * size)


def states(decoder: Decoder, weights: list[tuple[Tensor, ...]], embeds: Tensor,
           layout: Layout) -> Tensor:  # fmt: skip
    """Final normed states, float32 [batch, length, width], of embeddings of that shape."""
    size = weights[0][0].shape[0] // (decoder.heads + 2 * decoder.kv_heads)
    steps = torch.arange(0, size, 2, device=embeds.device) / size
    angles = layout.positions(embeds.device)[:, None] * decoder.theta**-steps
    angles = torch.cat([angles, angles], -1)
    turn = angles.cos().to(decoder.dtype), angles.sin().to(decoder.dtype)
    mask = layout.mask(embeds.device, decoder.dtype)
    x = embeds
    for (qkv, out, gate_up, down), norms in zip(weights, decoder.norms, strict=True):
        y = _attend(_rms(x, norms[0], decoder), qkv, decoder, layout, turn, mask)
        x = x + F.linear(y, out)
        gate, up = F.linear(_rms(x, norms[1], decoder), gate_up).chunk(2, -1)
        x = x + F.linear(F.silu(gate) * up, down)
    return F.rms_norm(x, (decoder.width,), decoder.last_norm, decoder.epsilon)


def logits(decoder: Decoder, states: Tensor) -> Tensor:
    """Scores of every token, float32 [n, vocabulary], of states [n, width]."""
    return F.linear(states.to(decoder.dtype), decoder.embed.to(decoder.dtype)).float()


def adapter_tensors(stored: Mapping[str, Tensor], lora: Lora) -> None:
    """Load the factors that `Lora.state` gave."""
    with torch.no_grad():
        for key, tensor in stored.items():
            *_, layer, _, name, factor, _ = key.split(".")
            lora.get_parameter(f"{name}_{factor[-1]}")[int(layer)] = tensor.float()
