"""Make quantised.safetensors: small weights packed and unpacked by the libraries themselves.

    python -m venv other && other/bin/pip install autoawq==0.2.9 gptqmodel==7.7.0 \
        compressed-tensors==0.20.0 bitsandbytes==0.50.2 'transformers>=5.20' torch
    other/bin/python tests/vectors/make_quantised.py

Of each case the file holds `CASE.NAME`, the tensors that the library stores for one weight
[32, 64], and `CASE.floats`, the weight that it computes with. Its metadata holds each case's
`quantization_config`, as JSON. The libraries are not needed by tests.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

FILE = Path(__file__).with_name("quantised.safetensors")
OUTPUTS, INPUTS, GROUP = 32, 64, 16
Case = tuple[str, dict[str, Any], dict[str, Tensor], Tensor]


def weight() -> Tensor:
    """Rows of different sizes, none about 0, so that zero points and scales differ."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.rand(OUTPUTS, 1, generator=generator) + 0.1
    shift = torch.randn(OUTPUTS, 1, generator=generator) * 0.3
    return (torch.randn(OUTPUTS, INPUTS, generator=generator) + shift) * rows


def grid(symmetric: bool, bits: int = 4) -> tuple[Tensor, Tensor]:
    """Scales and zero points of each group, [N, K / g]."""
    top, blocks = (1 << bits) - 1, weight().unflatten(1, (-1, GROUP))
    if symmetric:
        scales = blocks.abs().amax(-1) / (top // 2)
        return scales.half().float(), torch.full(scales.shape, (top + 1) // 2)
    low, high = blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)
    scales = ((high - low) / top).half().float()
    return scales, (-low / scales).round().clamp(1, top).int()


def on_grid(scales: Tensor, zeros: Tensor, bits: int = 4) -> nn.Linear:
    """The weight rounded to codes, as a quantiser hands it to a packer."""
    linear = nn.Linear(INPUTS, OUTPUTS, bias=False)
    blocks = weight().unflatten(1, (-1, GROUP))
    codes = (blocks / scales[..., None] + zeros[..., None]).round().clamp(0, (1 << bits) - 1)
    linear.weight.data = ((codes - zeros[..., None]) * scales[..., None]).flatten(1)
    return linear


def hollow(name: str, *below: str) -> None:
    """Let modules of a package be imported without what its __init__ files import."""
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.origin is not None, f"install {name}"
    for path in ("", *below):
        full = ".".join(part for part in (name, path) if part)
        module = types.ModuleType(full)
        module.__path__ = [str(Path(spec.origin).parent / path.replace(".", "/"))]
        sys.modules[full] = module


class Absent(types.ModuleType):
    """A module that is imported and not used."""

    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def awq() -> Iterator[Case]:
    """AutoAWQ's packer and its own unpacker."""
    hollow("awq", "utils", "modules", "modules.linear")
    from awq.modules.linear.gemm import WQLinear_GEMM
    from awq.utils.packing_utils import dequantize_gemm

    scales, zeros = grid(symmetric=False)
    linear = on_grid(scales, zeros)
    packed = WQLinear_GEMM.from_linear(linear, 4, GROUP, False, scales.T, zeros.T)
    parts = {name: getattr(packed, name).cpu() for name in ("qweight", "qzeros", "scales")}
    floats = dequantize_gemm(parts["qweight"], parts["qzeros"], parts["scales"], 4, GROUP)
    scheme = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True}
    yield "awq", {**scheme, "version": "gemm"}, parts, floats.T


def gptq() -> Iterator[Case]:
    """GPTQModel's packer and its own unpacker, in both versions of the format."""
    for name in ("datasets", "pyarrow"):
        if importlib.util.find_spec(name) is None:
            sys.modules[name] = Absent(name)
            sys.modules[name].__spec__ = importlib.machinery.ModuleSpec(name, None)
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    for name, bits, symmetric in (
        ("gptq", 4, False),
        ("gptq symmetric", 4, True),
        ("gptq of 8 bits", 8, True),
    ):
        scales, zeros = grid(symmetric, bits)
        packed = TorchLinear(bits, GROUP, symmetric, False, INPUTS, OUTPUTS)
        groups = torch.arange(INPUTS, dtype=torch.int32) // GROUP
        packed.pack_original(on_grid(scales, zeros, bits), scales, zeros, groups)
        packed.qzero_format(2)
        packed.post_init()
        packed.eval()
        floats = TorchLinear.dequantize_weight(packed).T
        scheme = {"quant_method": "gptq", "bits": bits, "group_size": GROUP, "sym": symmetric}
        scheme |= {"desc_act": False}
        for version in ("gptq_v2", "gptq"):
            if version == "gptq":
                config = types.SimpleNamespace(bits=bits, pack_dtype=torch.int32)
                convert_gptq_v2_to_v1_format_module(packed, config)
            names = "qweight", "qzeros", "scales", "g_idx"
            parts = {part: getattr(packed, part).clone() for part in names}
            label = name if version == "gptq" else f"{name}, version 2"
            yield label, {**scheme, "checkpoint_format": version}, parts, floats


def compressed() -> Iterator[Case]:
    """The compressors of compressed-tensors."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    group = {"num_bits": 4, "strategy": "group", "group_size": GROUP}
    floats = {"num_bits": 8, "type": "float"}
    cases: dict[str, tuple[str, dict[str, Any]]] = {
        "packed": ("pack-quantized", group),
        "packed asymmetric": ("pack-quantized", {**group, "symmetric": False}),
        "packed 8 bits": ("pack-quantized", {"num_bits": 8, "strategy": "channel"}),
        "int8": ("int-quantized", {"num_bits": 8, "strategy": "channel"}),
        "int8 asymmetric": (
            "int-quantized",
            {"num_bits": 8, "strategy": "channel", "symmetric": False},
        ),
        "float8": ("float-quantized", {**floats, "strategy": "tensor"}),
        "float8 by output": ("float-quantized", {**floats, "strategy": "channel"}),
        "float8 in blocks": (
            "float-quantized",
            {**floats, "strategy": "block", "block_structure": [8, 32]},
        ),
    }
    for name, (form, told) in cases.items():
        args = QuantizationArgs(**told)
        scheme = QuantizationScheme(targets=["Linear"], weights=args)
        shape = {
            "group": (OUTPUTS, 1, -1, GROUP),
            "channel": (OUTPUTS, 1, 1, INPUTS),
            "tensor": (1, OUTPUTS, 1, INPUTS),
            "block": (-1, 8, INPUTS // 32, 32),
        }[told["strategy"]]
        blocks = weight().reshape(shape)
        scales, zeros = calculate_qparams(blocks.amin((1, 3)), blocks.amax((1, 3)), args)
        if told["strategy"] == "tensor":
            scales = scales.reshape(1)
        state = {"weight": weight(), "weight_scale": scales}
        if args.type == "int":
            state["weight_zero_point"] = zeros.round().to(torch.int8)
        library = BaseCompressor.get_value_from_registry(form)
        parts = library.compress(state, scheme)
        dumped = {"weights": json.loads(args.model_dump_json()), "targets": ["Linear"]}
        config = {"quant_method": "compressed-tensors", "format": form}
        config |= {"quantization_status": "compressed", "config_groups": {"group_0": dumped}}
        yield name, config, parts, library.decompress(parts, scheme)["weight"]


def bitsandbytes() -> Iterator[Case]:
    """The layers of bitsandbytes, as their state dicts are saved."""
    import bitsandbytes as bnb

    base = {"quant_method": "bitsandbytes", "llm_int8_threshold": 6.0}
    for name, kind, nested in (
        ("nf4", "nf4", False),
        ("nf4 nested", "nf4", True),
        ("fp4", "fp4", False),
    ):
        layer = bnb.nn.Linear4bit(
            INPUTS, OUTPUTS, False, quant_type=kind, compress_statistics=nested
        )
        layer.weight = bnb.nn.Params4bit(weight(), quant_type=kind, compress_statistics=nested)
        layer = layer.to("cpu")
        floats = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        yield name, {**base, "load_in_4bit": True}, dict(layer.state_dict()), floats
    layer = bnb.nn.Linear8bitLt(INPUTS, OUTPUTS, False, has_fp16_weights=False)
    layer.weight = bnb.nn.Int8Params(weight(), requires_grad=False, has_fp16_weights=False)
    layer = layer.to("cpu")
    parts = dict(layer.state_dict())
    floats = bnb.functional.int8_vectorwise_dequant(parts["weight"], parts["SCB"])
    yield "bitsandbytes of 8 bits", {**base, "load_in_8bit": True}, parts, floats


def fine_grained() -> Iterator[Case]:
    """The quantiser of transformers."""
    from transformers import FineGrainedFP8Config
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

    for name, scales in (("fine-grained float8", "float"), ("powers of two", "ue8m0")):
        config = FineGrainedFP8Config(weight_block_size=(8, 32), scale_fmt=scales)
        quantizer = types.SimpleNamespace(quantization_config=config)
        stored = Fp8Quantize(quantizer).convert({"weight": weight()})
        parts = {key.lstrip("."): tensor for key, tensor in stored.items()}
        parts = {"weight": parts["weight"], "weight_scale_inv": parts["weight_scale_inv"]}
        back = Fp8Dequantize(quantizer)._dequantize_one(*parts.values(), torch.float32)
        scheme = {"quant_method": "fp8", "weight_block_size": [8, 32], "scale_fmt": scales}
        yield name, scheme, parts, back


def main() -> None:
    tensors, schemes = dict[str, Tensor](), dict[str, str]()
    for make in (awq, gptq, compressed, bitsandbytes, fine_grained):
        for name, scheme, parts, floats in make():
            schemes[name] = json.dumps(scheme)
            tensors |= {f"{name}.{part}": t.detach().contiguous() for part, t in parts.items()}
            tensors[f"{name}.floats"] = floats.detach().contiguous().clone()
            print(name, {part: tuple(t.shape) for part, t in parts.items()}, floats.dtype)
    save_file(tensors, FILE, schemes)


if __name__ == "__main__":
    main()
