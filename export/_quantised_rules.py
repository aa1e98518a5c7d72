"""What engines want of DequantizeLinear, the operator that reads quantised weights."""

from __future__ import annotations

from onnx import TensorProto

from edgeprune.export._graph import Graph, Node, attribute
from edgeprune.export._rule import NEVER, Rule, computed, is_zero, typed
from edgeprune.lowering import FLOAT8

READER, WRITER = ("DequantizeLinear",), ("QuantizeLinear",)
HEADER = "NvInfer.h, class IDequantizeLayer, of TensorRT"
IMPORTER = "onnx-tensorrt of TensorRT 10.1, onnxOpImporters.cpp"
SEEN = "seen with tensorrt-rtx 1.7.1"
NEWER = ".".join(map(str, FLOAT8))


def _is_int4(graph: Graph, node: Node) -> bool:
    return bool(graph.types.get(graph.given(node, 0)) == TensorProto.INT4)


def _is_blocked(node: Node) -> bool:
    return bool(attribute(node, "block_size", 0))


def _has_part_block(graph: Graph, node: Node) -> bool:
    """Whether the last block of an axis is shorter than the others."""
    shape, block = graph.shapes.get(graph.given(node, 0)), attribute(node, "block_size", 0)
    if not shape or not block:
        return False
    axis = attribute(node, "axis", 1)
    size = shape[axis] if -len(shape) <= axis < len(shape) else None
    return isinstance(size, int) and size % block != 0


def _is_odd(graph: Graph, node: Node) -> bool:
    shape = graph.shapes.get(graph.given(node, 0))
    last = shape[-1] if shape else None
    return _is_int4(graph, node) and isinstance(last, int) and last % 2 == 1


RULES = (
    Rule(
        (*WRITER, *READER),
        "takes no zero point other than 0",
        lambda graph, node: not is_zero(graph, graph.given(node, 2)),
        NEVER,
        f"{HEADER} 10.3 to 11.1; {SEEN}",
    ),
    Rule(
        WRITER,
        "takes a constant scale",
        computed(1),
        {"trt": None},
        "NvInfer.h, class IQuantizeLayer, of TensorRT: the scale is a build-time constant",
    ),
    Rule(
        WRITER,
        "gives int8 or float8, no uint8",
        typed(2, TensorProto.UINT8),
        {"trt": None},
        f"{IMPORTER}: uint8 is read as int8, with a warning",
    ),
    Rule(
        (*WRITER, *READER),
        f"has float8 on GPUs of compute capability {NEWER} and above; a Jetson Orin has 8.7",
        lambda graph, node: (
            graph.types.get(graph.given(node, 2 if node.op_type in WRITER else 0))
            == TensorProto.FLOAT8E4M3FN
        ),
        {},
        f"TensorRT support matrix; {SEEN}: sm_75, 80 and 86 are refused",
        gpu=FLOAT8,
    ),
    Rule(
        READER,
        "takes blocks that divide the axis",
        _has_part_block,
        NEVER,
        f"{IMPORTER}; {SEEN}",
    ),
    Rule(
        READER,
        "takes blocks of int4 in weights of two axes",
        lambda graph, node: (
            _is_blocked(node)
            and _is_int4(graph, node)
            and graph.rank(graph.given(node, 0)) not in (None, 2)
        ),
        {"trt": (10, 7)},
        f"{HEADER} 10.3 to 10.7",
    ),
    Rule(
        READER,
        "takes int4 whose last axis is even",
        _is_odd,
        {"trt": None},
        IMPORTER,
    ),
    Rule(
        READER,
        "takes no blocks of int8: one scale a channel",
        lambda graph, node: (
            _is_blocked(node) and graph.types.get(graph.given(node, 0)) == TensorProto.INT8
        ),
        {"trt": None},
        f"{HEADER} 10.3 to 11.1: blocks are of int4, since 10.13 of float4 and float8 too",
    ),
)
