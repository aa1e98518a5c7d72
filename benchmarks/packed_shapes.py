"""Sizes of published checkpoints whose decoders are quantised with AWQ."""

from __future__ import annotations

from typing import Any

Sizes = dict[str, tuple[int, ...]]

BITS, GROUP = 4, 128
AWQ: dict[str, Any] = {
    "quant_method": "awq",
    "bits": BITS,
    "group_size": GROUP,
    "zero_point": True,
    "version": "gemm",
    "modules_to_not_convert": ["visual"],
}
"""`quantization_config` of Qwen2.5-VL-7B-Instruct-AWQ."""


def packed(sizes: Sizes) -> tuple[Sizes, set[str]]:
    """The tensors of a checkpoint with its decoder's products in AWQ's layout, and the names of
    those that are int32."""
    found, words = Sizes(), set[str]()
    for name, size in sizes.items():
        module = name.removesuffix(".weight")
        if not module.endswith("_proj") or "layers" not in module or module == name:
            found[name] = size
            continue
        outputs, inputs = size
        found[f"{module}.qweight"] = inputs, outputs * BITS // 32
        found[f"{module}.qzeros"] = inputs // GROUP, outputs * BITS // 32
        found[f"{module}.scales"] = inputs // GROUP, outputs
        words |= {f"{module}.qweight", f"{module}.qzeros"}
    return found, words
