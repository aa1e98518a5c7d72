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


def compressed(codes: Codes, *, zeros: bool) -> dict[str, Tensor]:
    """compressed-tensors, packed."""
    found = {
        "weight_packed": words(codes.q, codes.bits),
        "weight_scale": codes.s,
        "weight_shape": torch.tensor(codes.q.shape),
    }
    if zeros:
        found["weight_zero_point"] = words(codes.z.T, codes.bits).T
    return found


def integers(codes: Codes, *, zeros: bool) -> dict[str, Tensor]:
    """compressed-tensors, a byte a code."""
    middle = 1 << (codes.bits - 1)
    found = {"weight": (codes.q - middle).to(torch.int8), "weight_scale": codes.s}
    return found | ({"weight_zero_point": (codes.z - middle).to(torch.int8)} if zeros else {})


def float8(weight: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and floats, with a scale for each block of rows x columns."""
    grid = -(-len(weight) // rows), -(-weight.shape[1] // columns)
    codes, scales = torch.empty_like(weight, dtype=torch.float8_e4m3fn), torch.empty(grid)
    floats = torch.empty_like(weight, dtype=torch.float32)
    for i in range(grid[0]):
        for j in range(grid[1]):
            at = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
            scales[i, j] = weight[at].abs().max() / 448
            codes[at] = (weight[at] / scales[i, j]).to(codes.dtype)
            floats[at] = codes[at].float() * scales[i, j]
    return codes, scales, floats


def int8_by_output(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """bitsandbytes with 8 bits."""
    largest = weight.float().abs().amax(1)
    codes = (weight * 127 / largest[:, None]).round().to(torch.int8)
    leaves = {"weight": codes, "SCB": largest, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return leaves, codes.float() * (largest / 127)[:, None]


BLOCK, NESTED = 64, 4
FP4 = [
    0.0,
    0.0625,
    8.0,
    12.0,
    4.0,
    6.0,
    2.0,
    3.0,
    0.0,
    -0.0625,
    -8.0,
    -12.0,
    -4.0,
    -6.0,
    -2.0,
    -3.0,
]
NF4 = [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
    *(0.7229568362236023, 1.0),
]


def four_bit_floats(
    weight: Tensor, kind: str = "nf4", *, nested: bool = False
) -> tuple[dict[str, Tensor], Tensor]:
    """bitsandbytes with 4 bits, in blocks of 64 numbers; with `nested` 4 scales share one."""
    table = torch.tensor(NF4) if kind == "nf4" else torch.tensor(FP4) / 12
    flat = weight.float().flatten()
    scales = torch.stack([block.abs().max() for block in flat.split(BLOCK)])
    state = {"quant_type": kind, "blocksize": BLOCK, "dtype": "float32"}
    state |= {"shape": list(weight.shape)}
    leaves = {"weight.quant_map": table, "weight.absmax": scales}
    if nested:
        offset, steps = float(scales.mean()), torch.linspace(-1, 1, 256)
        groups = (scales - offset).split(NESTED)
        largest = torch.stack([group.abs().max() for group in groups])
        codes = [_nearest(g / m, steps) for g, m in zip(groups, largest, strict=True)]
        means = zip(codes, largest, strict=True)
        scales = torch.cat([steps[code] * m for code, m in means]) + offset
        leaves |= {"weight.absmax": torch.cat(codes).to(torch.uint8)}
        leaves |= {"weight.nested_absmax": largest, "weight.nested_quant_map": steps}
        state |= {"nested_blocksize": NESTED, "nested_dtype": "float32", "nested_offset": offset}
    each = [_nearest(b / s, table) for b, s in zip(flat.split(BLOCK), scales, strict=True)]
    floats = torch.cat([table[code] * s for code, s in zip(each, scales, strict=True)])
    pairs = torch.cat(each).tolist()
    octets = [16 * a + b for a, b in zip(pairs[::2], pairs[1::2], strict=True)]
    leaves["weight"] = torch.tensor(octets, dtype=torch.uint8)[:, None]
    text = list(json.dumps(state).encode())
    leaves[f"weight.quant_state.bitsandbytes__{kind}"] = torch.tensor(text, dtype=torch.uint8)
    return leaves, floats.view(weight.shape)


def _nearest(values: Tensor, table: Tensor) -> Tensor:
    return (values[:, None] - table).abs().argmin(1)


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
