"""Where a bundle runs and in which numbers: the one table of dtypes, the one table of targets.

A `Lowering` is resolved once, from `--target` and `--dtype`, and handed on. Each library's own
name of a dtype is a string here, so this module imports none of them.
"""

from __future__ import annotations

from dataclasses import dataclass

from edgeprune.errors import SpecError
from edgeprune.weight_format import FLOAT, WeightFormat

FLOAT8 = (8, 9)
"""Compute capability from which on GPUs multiply floats of 8 bits."""


@dataclass(frozen=True, slots=True)
class Dtype:
    """A floating-point type that graphs compute in."""

    name: str  # as --dtype and the manifest say it
    bytes: int
    torch: str  # attribute of torch
    stored: str  # numpy's type of the same size that holds its bits; numpy has no bfloat16
    onnx: int  # TensorProto.DataType
    largest: float  # finite number


@dataclass(frozen=True, slots=True)
class Target:
    """A kind of device and engine that a bundle is exported for."""

    name: str
    dialect: str  # which operators its graphs are made of
    dtype: str  # unless another is asked for
    engines: tuple[str, ...]  # dtypes that TensorRT compiles; none: no engine is built
    topk_limit: int | None = None  # the largest K of a TopK
    token: bool = True  # whether the graph gives the likeliest token, so that logits stay on a GPU
    codes: str = "DequantizeLinear"  # the operator that reads quantised weights of products
    rows: str = "Div"  # how a quantised embedding is held: export/quantised_table.py
    integers: str = ""  # the operator of products whose inputs are rounded too; none: no product
    float8: bool = False  # whether weights and inputs may be floats of 8 bits

    @property
    def largest_code(self) -> int | None:
        """Of a weight whose product has inputs of 8 bits; None: what 8 bits hold.

        ONNX Runtime on x86 without VNNI adds two products of unsigned and signed bytes in 16 bits,
        without a word where they do not fit: 2 * 255 * 64 does.
        """
        return 64 if self.integers == "MatMulIntegerToFloat" else None

    @property
    def fused(self) -> bool:
        """Whether graphs have operators of ONNX Runtime's own that stand for several of ONNX's."""
        return self.codes == "MatMulNBits"

    @property
    def zero_points(self) -> bool:
        """Whether the operator of codes takes zero points; where TensorRT refuses them, offsets of
        blocks stand for them."""
        return self.fused


@dataclass(frozen=True, slots=True)
class Lowering:
    """How graphs and weights of one bundle are written."""

    target: Target
    dtype: Dtype
    weights: WeightFormat = FLOAT  # of products: as the dtype, or quantised

    @property
    def calibrated(self) -> bool:
        """Whether samples say how large what goes into products is."""
        return self.weights.activations and self.target.integers == "QuantizeLinear"

    @property
    def measured(self) -> bool:
        """Whether calibration samples decide anything of the weights."""
        return self.weights.measured or self.calibrated


DTYPES = {
    dtype.name: dtype
    for dtype in (
        Dtype("fp32", 4, "float32", "float32", 1, 3.4028234663852886e38),
        Dtype("fp16", 2, "float16", "float16", 10, 65504.0),
        Dtype("bf16", 2, "bfloat16", "uint16", 16, 3.3895313892515355e38),
    )
}

TENSORRT_TOPK = 3840
"""TensorRT's TopK refuses a larger K, in every version up to 11."""


def _tensorrt(name: str, dialect: str, engines: tuple[str, ...], *, float8: bool = False) -> Target:
    return Target(
        name, dialect, "fp16", engines, TENSORRT_TOPK, integers="QuantizeLinear", float8=float8
    )


TARGETS = {
    target.name: target
    for target in (
        Target(
            "cpu",
            "modern",
            "fp32",
            (),
            token=False,
            codes="MatMulNBits",
            rows="Gather",
            integers="MatMulIntegerToFloat",
        ),
        # TensorRT has no float32 kernel for its Attention operator.
        Target("cuda", "modern", "fp16", ("fp16", "bf16"), rows="Gather"),
        _tensorrt("rtx", "modern", ("fp16", "bf16"), float8=True),
        _tensorrt("jetpack7", "jetpack7", ("fp16", "bf16"), float8=True),  # Thor's GPU has it
        _tensorrt("jetpack6", "jetpack6", ("fp16", "bf16", "fp32")),
    )
}


def resolve(target: str, dtype: str | None = None, weights: str = "float") -> Lowering:
    """The lowering of a target, in the dtype asked for or in the target's own; `weights` is what
    --weights says."""
    if target not in TARGETS:
        raise SpecError(f"there is no target {target!r}; choose one of: {', '.join(TARGETS)}")
    chosen = TARGETS[target]
    name = chosen.dtype if dtype is None else dtype
    if name not in DTYPES:
        raise SpecError(f"--dtype is one of {', '.join(DTYPES)}; got {name!r}")
    return _checked(Lowering(chosen, DTYPES[name], WeightFormat.parse(weights)))


def _checked(lowering: Lowering) -> Lowering:
    """SpecError where a target has no product whose inputs are rounded as asked."""
    target, dtype = lowering.target, lowering.dtype.name
    if lowering.weights.float8 and not target.float8:
        able = ", ".join(one.name for one in TARGETS.values() if one.float8)
        raise SpecError(f"--weights fp8 is for the targets {able}; got --target {target.name}")
    if not lowering.weights.activations:
        return lowering
    if not target.integers:
        able = ", ".join(one.name for one in TARGETS.values() if one.integers)
        raise SpecError(
            f"activations=on of --weights is for the targets {able}; got --target {target.name}"
        )
    if target.integers == "MatMulIntegerToFloat" and dtype != "fp32":
        raise SpecError(
            f"activations=on of --weights computes between products in fp32 on --target"
            f" {target.name}; got --dtype {dtype}"
        )
    return lowering
