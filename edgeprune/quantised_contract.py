"""What nodes that read quantised weights may be: their sizes have to fit each other.

An engine reads codes by what the node's attributes say of them. Where these contradict the tensors
it would read past their end, so nothing is left to the engine.
"""

from __future__ import annotations

from collections.abc import Sequence

from edgeprune.lowering import DTYPES
from edgeprune.onnx_file import FUSED, INTEGERS, Quantised, Value

BLOCKS = (16, 32, 64, 128, 256)
"""Inputs that may share a scale."""
FUSED_ATTRIBUTES = {"K", "N", "bits", "block_size", "accuracy_level"}
LEVELS = range(5)
"""Of accuracy, 0 that of the activations' dtype."""
ROUNDED = ("uint8", "int8", "fp8")
"""Types to which the tensors of a call are rounded."""


def check_quantised(node: Quantised) -> None:
    """ValueError where a node's codes, scales and attributes do not fit each other."""
    if node.operator == "QuantizeLinear" or (
        node.operator == "DequantizeLinear" and len(node.inputs) == 3
    ):
        _check_rounding(node)
    elif node.operator == INTEGERS:
        _check_integers(node)
    else:
        _check_codes(node)


def _check_codes(node: Quantised) -> None:
    """Weights whose products have inputs of floats."""
    read = list(node.inputs)
    if node.operator == FUSED:
        _, *read = node.inputs or (None,)
    if len(read) not in ((2, 3) if node.operator == FUSED else (2,)):
        raise ValueError(f"{node.operator} {node.name} has not the inputs that exports write")
    codes, scales, *zeros = read
    if codes is None or scales is None or None in zeros:
        raise ValueError(f"{node.operator} {node.name} reads what is no constant")
    wanted = (_fused if node.operator == FUSED else _dequantised)(node, codes)
    found = codes.dtype, codes.sizes, scales.sizes
    if found != wanted or scales.dtype not in DTYPES:
        raise ValueError(
            f"{node.operator} {node.name} has codes {codes} and scales {scales}, want"
            f" {Value('', *wanted[:2])} and {Value('', 'floats', wanted[2])}"
        )
    for zero in zeros:
        _check_zeros(node, zero, scales)


def _check_rounding(node: Quantised) -> None:
    """What rounds a tensor of a call, or reads what was rounded: one scale and zero point."""
    if node.inputs and node.inputs[0] is not None:
        raise ValueError(f"{node.operator} {node.name} has not the inputs that exports write")
    _require(node, [None, Value("scale", "", ()), Value("zero point", "", ())])
    zero = node.inputs[2]
    if zero is None or zero.dtype not in ROUNDED:
        raise ValueError(f"{node.operator} {node.name} gives {zero}, which no export asks for")


def _check_integers(node: Quantised) -> None:
    """Codes int8 [K, N] and one scale an output; one scale and one zero point of the inputs."""
    codes = node.inputs[1] if len(node.inputs) > 1 else None
    inputs, outputs = _matrix(node, codes or Value("codes", "nothing", ()))
    one, middle = Value("scale", "fp32", ()), Value("zero point", "uint8", ())
    weights, scales = Value("codes", "int8", (inputs, outputs)), Value("scales", "fp32", (outputs,))
    _require(node, [None, weights, one, scales, middle])


def _require(node: Quantised, wanted: Sequence[Value | None]) -> None:
    """ValueError unless a node reads constants of these types and sizes, and has no attributes.

    None stands for what is computed; an empty type for floats, or what is looked at apart.
    """
    if node.attributes or len(node.inputs) != len(wanted):
        raise ValueError(f"{node.operator} {node.name} is not as exports write it")
    for found, value in zip(node.inputs, wanted, strict=True):
        if value is None:
            continue
        if (
            found is None
            or found.sizes != value.sizes
            or found.dtype != (value.dtype or found.dtype)
        ):
            raise ValueError(
                f"{node.operator} {node.name} has the {value.name} {found or 'computed'}, want"
                f" {value}"
            )


def _check_zeros(node: Quantised, zeros: Value | None, scales: Value) -> None:
    """One zero point for each scale, packed as codes are along the blocks."""
    outputs, blocks = scales.sizes
    wanted = (outputs, -(-int(blocks or 0) * node.attributes["bits"] // 8))
    if zeros is None or (zeros.dtype, zeros.sizes) != ("uint8", wanted):
        raise ValueError(
            f"{FUSED} {node.name} has zero points {zeros}, want {Value('', 'uint8', wanted)}"
        )


Wanted = tuple[str, tuple[int, ...], tuple[int, ...]]  # type and sizes of codes, sizes of scales


def _dequantised(node: Quantised, codes: Value) -> Wanted:
    """Codes [K, N], and scales [K / block, N] or one a column [N]."""
    inputs, outputs = _matrix(node, codes)
    block = node.attributes.get("block_size", 0)
    axis = node.attributes.get("axis", 1)
    if set(node.attributes) - {"axis", "block_size"} or axis != (0 if block else 1):
        raise ValueError(f"DequantizeLinear {node.name} has attributes that no export writes")
    if block and (block not in BLOCKS or inputs % block):
        raise ValueError(f"DequantizeLinear {node.name} has blocks of {block} in {inputs} inputs")
    kind = codes.dtype if codes.dtype in ("int4", "int8", "fp8") else "int4, int8 or fp8"
    scales = (inputs // block, outputs) if block else (outputs,)
    return kind, (inputs, outputs), scales


def _matrix(node: Quantised, codes: Value) -> tuple[int, int]:
    if len(codes.sizes) != 2 or not all(isinstance(n, int) and n > 0 for n in codes.sizes):
        raise ValueError(f"{node.operator} {node.name} has codes {codes}, want a matrix")
    inputs, outputs = codes.sizes
    return int(inputs), int(outputs)


def _fused(node: Quantised, codes: Value) -> Wanted:
    """Codes [N, blocks, bytes of a block], scales [N, blocks]."""
    found = node.attributes
    inputs, outputs, bits, block, level = (
        found.get(name, 0) for name in ("K", "N", "bits", "block_size", "accuracy_level")
    )
    sound = min(inputs, outputs) > 0 and bits in (4, 8) and block in BLOCKS and level in LEVELS
    if not sound or set(found) - FUSED_ATTRIBUTES:
        raise ValueError(f"{FUSED} {node.name} has attributes that no export writes")
    blocks = -(-inputs // block)
    return "uint8", (outputs, blocks, block * bits // 8), (outputs, blocks)
