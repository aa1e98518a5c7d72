"""What TensorRT, TensorRT-RTX and ONNX Runtime take, by version: data, each with its source.

`OPERATORS` says which operators TensorRT's parser knows and for which element types, `ADDED` since
when, `RULES` what a known operator may not have. A version None stands for: no version known. Tests
ask TensorRT-RTX itself about one graph per rule; what is said of TensorRT is from its documents.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from edgeprune.export import _quantised_rules
from edgeprune.export._graph import Graph, Node, attribute
from edgeprune.export._rule import (
    NEVER,
    Rule,
    Since,
    Version,
    computed,
    given,
    is_set,
    rank_not,
    returned,
    typed,
)

OPS_10 = "onnx-tensorrt docs/operators.md of TensorRT 10.0"
OPS_10_15 = "onnx-tensorrt docs/operators.md of TensorRT 10.15"
CHANGES = "onnx-tensorrt docs/Changelog.md, TensorRT"
GUIDE = "TensorRT documentation, Working with Transformers"
NOTES = "TensorRT release notes"
SEEN = "seen with tensorrt-rtx 1.7.1"
ORT = "ONNX Runtime documentation, Compatibility"
SEEN_ORT = "seen with onnxruntime 1.22.1, 1.23.2, 1.24.4, 1.25.1, 1.29.0, 1.30.0, 1.31.1"


@dataclass(frozen=True)
class Target:
    """One version that a bundle may be meant for; `names` are what --target takes."""

    names: tuple[str, ...]
    title: str
    engine: str  # trt, rtx or ort
    version: Version
    gpu: Version | None = None  # compute capability of the only devices that have it


@dataclass(frozen=True)
class Untried:
    """Graphs of an opset, in versions of an engine before some version."""

    engine: str
    before: Version
    opset: int
    message: str
    source: str


ORIN = (8, 7)

TARGETS = (
    Target(("trt-10.3", "jetpack6"), "TensorRT 10.3 (JetPack 6.2)", "trt", (10, 3), ORIN),
    Target(("trt-10.7",), "TensorRT 10.7 (newest for JetPack 6)", "trt", (10, 7), ORIN),
    Target(("trt-10.13",), "TensorRT 10.13 (JetPack 7.0, 7.1)", "trt", (10, 13)),
    Target(("trt-10.16", "jetpack7"), "TensorRT 10.16 (JetPack 7.2)", "trt", (10, 16)),
    Target(("trt-11.0",), "TensorRT 11.0", "trt", (11, 0)),
    Target(("trt-11.5",), "TensorRT 11.5", "trt", (11, 5)),
    Target(("trt-rtx-1.7", "rtx"), "TensorRT-RTX 1.7", "rtx", (1, 7)),
    Target(("ort-1.31", "cpu", "cuda"), "ONNX Runtime 1.31", "ort", (1, 31)),
)

OPSETS: Mapping[str, tuple[tuple[Version, int, str], ...]] = {
    "trt": (
        ((10, 0), 21, f"{OPS_10}; onnx-tensorrt 10.1, ModelImporter.cpp"),
        ((10, 6), 22, f"{CHANGES} 10.6: ONNX 1.17"),
        ((10, 11), 23, f"{CHANGES} 10.11: ONNX 1.18"),
        ((10, 15), 24, OPS_10_15),
        ((11, 5), 25, f"{NOTES} 11.5"),
    ),
    "rtx": (((1, 7), 24, SEEN),),
    "ort": (
        ((1, 18), 21, f"{ORT}: 1.18 has ONNX 1.16, IR version 10"),
        ((1, 24), 24, SEEN_ORT),
    ),
}
"""The newest opset that a version takes, from that version on."""

UNTRIED = (
    Untried(
        "trt",
        before=(10, 6),
        opset=21,
        message="opset 21 is untried: documented to 20, while the parser refuses no opset and is"
        " built with ONNX 1.16, which has 21",
        source=f"{OPS_10}; onnx-tensorrt 10.1, ModelImporter.cpp",
    ),
)
"""What a version should take, and was never seen to."""

# Element types: f float32, float16 and bfloat16 (a lone h: float32 and float16), i int32, l int64,
# b bool, u uint8, 4 int4, 8 int8, 3 float8 (e4m3). From OPS_10_15; an operator that is listed there
# as unsupported has none.
_TYPES = {
    "fil": """
        Abs Add ArgMax ArgMin DepthToSpace Div Equal Greater GreaterOrEqual IsNaN Less LessOrEqual
        Max Mean Min Mod Mul Neg Pad Pow Range ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp
        ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Scatter
        ScatterElements ScatterND Shrink Sign SpaceToDepth Sub Sum TopK
    """,
    "f": """
        Acos Acosh Asin Asinh Atan Atanh Attention AveragePool BatchNormalization Ceil Celu Clip
        Conv ConvTranspose Cos Cosh CumSum Dropout Einsum Elu Erf Exp Floor GRU Gelu Gemm
        GlobalAveragePool GlobalLpPool GlobalMaxPool GroupNormalization HardSigmoid HardSwish
        Hardmax ImageScaler InstanceNormalization IsInf LRN LSTM LayerNormalization LeakyRelu Log
        LogSoftmax LpNormalization LpPool MatMul MaxPool MeanVarianceNormalization PRelu
        ParametricSoftplus QuantizeLinear RMSNormalization RNN RandomNormal RandomNormalLike
        RandomUniform RandomUniformLike Reciprocal Resize RotaryEmbedding Round ScaledTanh Scan
        Selu Sigmoid Sin Sinh Softmax Softplus Softsign Sqrt Swish Tan Tanh ThresholdedRelu Upsample
    """,
    "filb": """
        Concat Expand EyeLike Flatten Gather GatherElements GatherND Identity If Loop OneHot Reshape
        ReverseSequence Shape Size Slice Split Squeeze Tile Transpose Trilu Unsqueeze Where
    """,
    "filbu": "Cast CastLike Constant ConstantOfShape",
    "348": "DequantizeLinear",
    "fi": "TensorScatter",
    "b": "And Not Or Xor",
    "h": "DeformConv GridSample Mish NonMaxSuppression NonZero RoiAlign STFT",
    "il": "BlackmanWindow HammingWindow HannWindow",
}
OPERATORS: Mapping[str, str] = {
    name: types for types, names in _TYPES.items() for name in names.split()
}
"""What TensorRT's parser knows and the element types that it takes (`_TYPES` has the letters)."""

ADDED: Mapping[str, tuple[Since, str]] = {
    "DeformConv": ({"trt": (10, 1)}, f"{CHANGES} 10.1"),
    "BlackmanWindow": ({"trt": (10, 4)}, f"{CHANGES} 10.4"),
    "HammingWindow": ({"trt": (10, 4)}, f"{CHANGES} 10.4"),
    "HannWindow": ({"trt": (10, 4)}, f"{CHANGES} 10.4"),
    "STFT": ({"trt": (10, 5)}, f"{CHANGES} 10.5"),
    "Attention": ({"trt": (10, 14)}, f"{CHANGES} 10.14"),
    "RotaryEmbedding": ({"trt": (10, 15)}, f"{CHANGES} 10.15"),
    "RMSNormalization": ({"trt": (10, 15)}, f"{CHANGES} 10.15"),
    "TensorScatter": ({"trt": (10, 15), "ort": (1, 25)}, f"{CHANGES} 10.15; {SEEN_ORT}"),
    "Swish": ({"trt": (11, 0)}, f"{NOTES} 11.0"),
}
"""Operators that TensorRT 10.0 did not know, by the version that brought them."""

REDUCTIONS = tuple(name for name in OPERATORS if name.startswith("Reduce"))


def _other_axis(graph: Graph, node: Node) -> bool:
    """Whether it is not the one before the last; caches have four axes."""
    return attribute(node, "axis", -2) not in (-2, 2)


FLOAT32, INT32, INT64, FLOAT16 = 1, 6, 7, 10  # TensorProto.DataType

RULES: tuple[Rule, ...] = (
    Rule(("Attention",), "takes no past_key, past_value", given(4, 5), NEVER, OPS_10_15),
    Rule(
        ("Attention",),
        "takes no nonpad_kv_seqlen",
        given(6),
        {"trt": None},
        f"{OPS_10_15}, and of 11.2",
    ),
    Rule(
        ("Attention",),
        "has one output: no present_key, present_value, qk_matmul_output",
        returned(1, 2, 3),
        NEVER,
        OPS_10_15,
    ),
    Rule(("Attention",), "takes no softcap", is_set("softcap", 0.0), NEVER, OPS_10_15),
    Rule(
        ("Attention",),
        "takes queries, keys, values and masks of four axes",
        rank_not(4, 0, 1, 2, 3),
        {"trt": None},
        OPS_10_15,
    ),
    Rule(
        ("Attention",),
        "takes a mask or is_causal, not both",
        lambda graph, node: bool(graph.given(node, 3)) and attribute(node, "is_causal", 0) == 1,
        NEVER,
        f"{GUIDE}: setCausal cannot be used together with setMask",
    ),
    Rule(
        ("Attention",),
        "has no fused kernel for float32",
        typed(0, FLOAT32),
        NEVER,
        f"edgeprune build takes fp16 and bf16; {SEEN}",
    ),
    Rule(
        ("Softmax", "Attention"),
        "gives wrong numbers in float16 on a CPU",
        typed(0, FLOAT16),
        {"ort": (1, 30)},
        SEEN_ORT,
    ),
    Rule(("TensorScatter",), "takes caches of four axes", rank_not(4, 0, 1), NEVER, OPS_10_15),
    Rule(("TensorScatter",), "writes along axis -2", _other_axis, NEVER, OPS_10_15),
    Rule(
        ("TensorScatter",),
        "writes linearly, not in a circle",
        is_set("mode", b"linear"),
        NEVER,
        f"{GUIDE}: only kLINEAR is supported",
    ),
    Rule(
        ("TensorScatter",),
        "writes into an input of the graph",
        lambda graph, node: graph.given(node, 0) not in graph.inputs,
        NEVER,
        f"{GUIDE}: the cache is a network input and output at one address",
    ),
    Rule(
        ("RotaryEmbedding",), "takes positions of int64", typed(3, INT32), {"trt": None}, OPS_10_15
    ),
    Rule(
        ("ArgMax", "ArgMin"),
        "takes at least two axes",
        lambda graph, node: graph.rank(graph.given(node, 0)) in (0, 1),
        NEVER,
        SEEN,
    ),
    Rule(("TopK",), "returns sorted values", is_set("sorted", 1), {"trt": None}, OPS_10_15),
    Rule(
        ("TopK",),
        "selects at most 3840",
        lambda graph, node: (graph.most(graph.given(node, 1)) or 0) > 3840,
        NEVER,
        f"TensorRT operator reference, TopK: k <= 3840; {SEEN}",
    ),
    Rule(
        ("ScatterND",),
        "takes no attribute reduction, not even none",
        lambda graph, node: attribute(node, "reduction") is not None,
        {"trt": (10, 9)},
        f"onnxOpImporters.cpp of TensorRT 10.1, {CHANGES} 10.9",
    ),
    Rule(
        ("ScatterND",),
        "takes no reduction other than none",
        is_set("reduction", b"none"),
        NEVER,
        OPS_10_15,
    ),
    Rule(("Pad",), "takes no axes", given(3), {"trt": (10, 4)}, f"{CHANGES} 10.4"),
    Rule(
        ("Squeeze", "Unsqueeze"),
        "takes constant axes",
        computed(1),
        {"trt": (10, 7), "rtx": None},
        f"{CHANGES} 10.7; {SEEN}",
    ),
    Rule(("CumSum",), "takes a constant axis", computed(1), {"trt": (10, 8)}, f"{CHANGES} 10.8"),
    Rule(
        ("Pow",),
        "takes no integer exponent",
        typed(1, INT32, INT64),
        {"trt": (10, 8)},
        f"{CHANGES} 10.8",
    ),
    Rule(
        ("Pow",),
        "takes no integer base",
        typed(0, INT32, INT64),
        {"trt": (10, 12)},
        f"{CHANGES} 10.12",
    ),
    Rule(REDUCTIONS, "takes constant axes", computed(1), NEVER, OPS_10_15),
    Rule(("OneHot",), "takes a constant depth", computed(1), {"trt": None}, OPS_10_15),
    Rule(("LayerNormalization",), "has one output: Y", returned(1, 2), NEVER, OPS_10_15),
    Rule(("MaxPool",), "has one output: no indices", returned(1), NEVER, OPS_10_15),
    *_quantised_rules.RULES,
)
