"""Quantised checkpoints made of float ones, by packers that are written without those read here.

Each packs word by word as its library's documents and packers do: plain loops over Python ints.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

SINGLE = "model.safetensors"
LINEARS = re.compile(r"language_model\.model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj\.weight$")
"""What quantisers of vision-language models convert: not the tower, the projector, the head."""


@dataclass(frozen=True)
class Codes:
    """A weight [N, K] in codes from 0 up: (q - z) * s, a scale for each group of inputs."""

    q: Tensor  # int64 [N, K]
    z: Tensor  # int64 [N, G]
    s: Tensor  # float16 [N, G]
    bits: int

    @classmethod
    def of(cls, weight: Tensor, bits: int, group: int, *, symmetric: bool = False) -> Codes:
        """Rounded to the nearest code."""
        top, blocks = (1 << bits) - 1, weight.float().unflatten(1, (-1, group))
        if symmetric:
            s = blocks.abs().amax(-1) / (top // 2)
            z = torch.full(s.shape, (top + 1) // 2)
        else:
            low, high = blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)
            s = (high - low) / top
            z = (-low / s).round().long().clamp(1, top)  # 0 cannot be stored in GPTQ's version 1
        s = s.half()
        q = (blocks / s.float()[..., None] + z[..., None]).round().long().clamp(0, top)
        return cls(q.flatten(1), z, s, bits)

    def floats(self) -> Tensor:
        """float32 [N, K]."""
        blocks = self.q.unflatten(1, (self.s.shape[1], -1)) - self.z[..., None]
        return (blocks * self.s.float()[..., None]).flatten(1)


def words(rows: Tensor, bits: int) -> Tensor:
    """Codes of each row packed from the lowest bits up, across words: [r, n] -> int32 [r, w]."""
    return torch.tensor([_line(row, bits) for row in rows.tolist()], dtype=torch.int32)


def _line(codes: list[int], bits: int) -> list[int]:
    whole = 0
    for number, code in enumerate(codes):
        whole |= code << (bits * number)
    count = -(-len(codes) * bits // 32)
    found = [(whole >> (32 * word)) & 0xFFFFFFFF for word in range(count)]
    return [word - (1 << 32) if word >> 31 else word for word in found]


def awq(codes: Codes) -> dict[str, Tensor]:
    """Of each 8 columns, the even ones stand before the odd ones."""

    def packed(matrix: Tensor) -> Tensor:
        order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
        return words(matrix.unflatten(1, (-1, 8))[..., order].flatten(1), 4)

    return {
        "qweight": packed(codes.q.T),
        "qzeros": packed(codes.z.T),
        "scales": codes.s.T.contiguous(),
    }


def gptq(codes: Codes, *, less: int = 1) -> dict[str, Tensor]:
    """`less` 1 is version 1 of the format, 0 version 2."""
    inputs, groups = codes.q.shape[1], codes.s.shape[1]
    return {
        "qweight": words(codes.q, codes.bits).T.contiguous(),
        "qzeros": words(codes.z.T - less, codes.bits),
        "scales": codes.s.T.contiguous(),
        "g_idx": torch.tensor([i // (inputs // groups) for i in range(inputs)], dtype=torch.int32),
    }


def pack(
    folder: Path,
    to: Path,
    scheme: Mapping[str, Any],
    packed: Callable[[Tensor], tuple[dict[str, Tensor], Tensor]],
    linears: re.Pattern[str] = LINEARS,
) -> tuple[Path, Path]:
    """Two copies of a checkpoint: with its linears packed, and with the floats that they mean.

    `packed` gives the tensors of a weight by their names below the module, and its floats.
    """
    quantised, floats = (Path(shutil.copytree(folder, to / name)) for name in ("packed", "floats"))
    stored, meant = dict[str, Tensor](), dict[str, Tensor]()
    for name, tensor in load_file(folder / SINGLE).items():
        if not linears.search(name):
            stored[name] = meant[name] = tensor
            continue
        leaves, meant[name] = packed(tensor)
        meant[name] = meant[name].contiguous()
        module = name.removesuffix("weight")
        stored |= {module + leaf: part.contiguous() for leaf, part in leaves.items()}
    save_file(stored, quantised / SINGLE, {"format": "pt"})
    save_file(meant, floats / SINGLE, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = dict(scheme)
    (quantised / "config.json").write_text(json.dumps(config))
    return quantised, floats
