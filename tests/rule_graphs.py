"""One graph per rule of `export.rules`: a single node, first as engines take it, then broken."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from ml_dtypes import float8_e4m3fn, int4
from onnx import TensorProto, helper, numpy_helper

Ends = Mapping[str, tuple[str, Sequence[int | str]]]  # name: element type and shape

REFUSED = "-------+"  # by every TensorRT and TensorRT-RTX
DOCUMENTED = "------++"  # by TensorRT's documents, while TensorRT-RTX was seen to take it

KEYS = {"q": ("FLOAT16", (1, 2, "s", 64)), "k": ("FLOAT16", (1, 2, 32, 64))}
QKV: Ends = {**KEYS, "v": ("FLOAT16", (1, 2, 32, 64))}
CACHE: Ends = {"past": ("FLOAT16", (1, 2, 32, 64)), "new": ("FLOAT16", (1, 2, "s", 64))}
WRITE: Ends = {**CACHE, "at": ("INT64", (1,))}
ROWS: Ends = {"x": ("FLOAT16", (4, 8))}
TABLES: Ends = {"cos": ("FLOAT16", (16, 32)), "sin": ("FLOAT16", (16, 32))}


@dataclass(frozen=True)
class Case:
    """A node that is taken (`good`) and the change that breaks one rule."""

    operator: str
    says: str  # what the verdict has to say
    verdict: str  # of the broken graph, + or - in the order of rules.TARGETS
    inputs: Ends
    wires: tuple[str, ...]  # the node's inputs, empty where one is left out
    attributes: Mapping[str, Any] = field(default_factory=dict)
    outputs: tuple[str, ...] = ("y",)
    constants: Mapping[str, Any] = field(default_factory=dict)
    good: Mapping[str, Any] = field(default_factory=dict)  # fields that differ in the good graph
    opset: int = 24
    compiles: bool = True  # False: an input is a size, and engines want to know its range

    def graph(self, broken: bool) -> Any:
        """The model of one node."""
        case = self if broken else Case(**{**self.__dict__, **self.good})
        node = helper.make_node(
            case.operator, case.wires, case.outputs, name="it", **case.attributes
        )
        ends = [
            helper.make_tensor_value_info(name, getattr(TensorProto, kind), shape)
            for name, (kind, shape) in case.inputs.items()
        ]
        made = [onnx.ValueInfoProto(name=name) for name in case.outputs]
        tensors = [numpy_helper.from_array(np.array(v), n) for n, v in case.constants.items()]
        graph = helper.make_graph([node], "one", ends, made, initializer=tensors)
        opset = helper.make_opsetid("", case.opset)
        model = helper.make_model(graph, opset_imports=[opset], ir_version=10)
        return onnx.shape_inference.infer_shapes(model)  # types of the outputs


def attention(says: str, verdict: str = REFUSED, **changes: Any) -> Case:
    """Attention that is taken, but for the changes."""
    usual = {"inputs": QKV, "wires": ("q", "k", "v"), "attributes": {}, "outputs": ("y",)}
    return Case("Attention", says, verdict, **{**usual, **changes}, good=usual)


def scatter(says: str, **changes: Any) -> Case:
    usual = {
        "inputs": WRITE,
        "wires": ("past", "new", "at"),
        "attributes": {"axis": 2, "mode": "linear"},
    }
    return Case("TensorScatter", says, REFUSED, **{**usual, **changes}, good=usual)


def cases() -> Iterator[Case]:
    """One for each rule."""
    past = {"pk": ("FLOAT16", (1, 2, 8, 64)), "pv": ("FLOAT16", (1, 2, 8, 64))}
    yield attention(
        "takes no past_key", inputs={**QKV, **past}, wires=("q", "k", "v", "", "pk", "pv")
    )
    filled = {"n": ("INT64", (1,))}
    yield attention(
        "takes no nonpad_kv_seqlen",
        DOCUMENTED,
        inputs={**QKV, **filled},
        wires=(*"qkv", "", "", "", "n"),
    )
    yield attention("has one output", outputs=("y", "present_key", "present_value"))
    yield attention("takes no softcap", attributes={"softcap": 30.0})
    flat: Ends = dict.fromkeys("qkv", ("FLOAT16", (1, "s", 128)))
    sizes = {"q_num_heads": 2, "kv_num_heads": 2}
    yield attention("of four axes", DOCUMENTED, inputs=flat, attributes=sizes)
    mask = {"m": ("BOOL", (1, 1, "s", 32))}
    yield attention(
        "mask or is_causal",
        inputs={**QKV, **mask},
        wires=("q", "k", "v", "m"),
        attributes={"is_causal": 1},
    )
    wide: Ends = {name: ("FLOAT", shape) for name, (_, shape) in QKV.items()}
    yield attention("kernel for float32", inputs=wide)
    three: Ends = {"past": ("FLOAT16", (1, 32, 128)), "new": ("FLOAT16", (1, "s", 128))}
    yield scatter(
        "caches of four axes", inputs={**three, "at": WRITE["at"]}, attributes={"axis": -2}
    )
    yield scatter("along axis -2", attributes={"axis": 1, "mode": "linear"})
    yield scatter("not in a circle", attributes={"axis": 2, "mode": "circular"})
    yield Case(
        "TensorScatter",
        "an input of the graph",
        REFUSED,
        {"new": WRITE["new"], "at": WRITE["at"]},
        ("past", "new", "at"),
        {"axis": 2, "mode": "linear"},
        constants={"past": np.zeros((1, 2, 32, 64), np.float16)},
        good={"inputs": WRITE, "constants": {}},
    )
    turned: Ends = {"x": ("FLOAT16", (1, 2, "s", 64)), **TABLES}
    yield Case(
        "RotaryEmbedding",
        "positions of int64",
        DOCUMENTED,
        {**turned, "p": ("INT32", (1, "s"))},
        ("x", "cos", "sin", "p"),
        good={"inputs": {**turned, "p": ("INT64", (1, "s"))}},
    )
    yield Case(
        "ArgMax",
        "at least two axes",
        REFUSED,
        {"x": ("FLOAT16", (8,))},
        ("x",),
        {"axis": 0},
        good={"inputs": {"x": ("FLOAT16", (1, 8))}, "attributes": {"axis": 1}},
    )
    half: Ends = {"x": ("FLOAT16", (4, 8))}
    single = {"inputs": {"x": ("FLOAT", (4, 8))}}
    yield Case("Softmax", "in float16", "++++++++", half, ("x",), good=single, opset=18)
    yield from _selection()
    yield from _sizes()
    yield from _outputs()
    yield from _quantised()
    yield from _rounding()


def _selection() -> Iterator[Case]:
    chosen = {"k": np.array([2], np.int64)}
    top = {"operator": "TopK", "wires": ("x", "k"), "outputs": ("y", "indices")}
    yield Case(
        says="sorted values",
        verdict=DOCUMENTED,
        inputs=ROWS,
        attributes={"sorted": 0},
        constants=chosen,
        good={"attributes": {}},
        **top,
    )
    yield Case(
        says="at most 3840",
        verdict=REFUSED,
        inputs={"x": ("FLOAT16", (1, 5000))},
        constants={"k": np.array([4000], np.int64)},
        good={"constants": chosen},
        **top,
    )
    scattered = {
        "operator": "ScatterND",
        "inputs": {**ROWS, "i": ("INT64", (2, 1)), "u": ("FLOAT16", (2, 8))},
        "wires": ("x", "i", "u"),
        "good": {"attributes": {}},
        "opset": 18,
    }
    none, added = {"reduction": "none"}, {"reduction": "add"}
    yield Case(says="not even none", verdict="--++++++", attributes=none, **scattered)
    yield Case(says="other than none", verdict=REFUSED, attributes=added, **scattered)
    yield Case(
        "OneHot",
        "constant depth",
        DOCUMENTED,
        {"x": ("INT64", (4,)), "d": ("INT64", ()), "w": ("FLOAT16", (2,))},
        ("x", "d", "w"),
        good={
            "inputs": {"x": ("INT64", (4,)), "w": ("FLOAT16", (2,))},
            "constants": {"d": np.array(4, np.int64)},
        },
        opset=18,
        compiles=False,
    )


def _sizes() -> Iterator[Case]:
    """Axes and exponents that some versions want as constants, or of some type."""
    axis = np.array([0], np.int64)
    for operator, verdict in (("Unsqueeze", "-+++++-+"), ("ReduceSum", REFUSED)):
        yield Case(
            operator,
            "constant axes",
            verdict,
            {**ROWS, "a": ("INT64", (1,))},
            ("x", "a"),
            good={"inputs": ROWS, "constants": {"a": axis}},
            opset=18,
        )
    yield Case(
        "CumSum",
        "constant axis",
        "--++++++",
        {**ROWS, "a": ("INT64", ())},
        ("x", "a"),
        good={"inputs": ROWS, "constants": {"a": np.array(0, np.int64)}},
        opset=18,
        compiles=False,
    )
    pads = {"p": np.array([0, 1], np.int64)}
    yield Case(
        "Pad",
        "no axes",
        "-+++++++",
        ROWS,
        ("x", "p", "", "a"),
        constants={**pads, "a": axis},
        good={"wires": ("x", "p"), "constants": {"p": np.array([0, 0, 1, 1], np.int64)}},
        opset=18,
    )
    for says, inputs in (
        ("integer exponent", {"x": ("FLOAT", (4,)), "e": ("INT64", (4,))}),
        ("integer base", {"x": ("INT64", (4,)), "e": ("FLOAT", (4,))}),
    ):
        good = {"inputs": {"x": ("FLOAT", (4,)), "e": ("FLOAT", (4,))}}
        yield Case("Pow", says, "--++++++", inputs, ("x", "e"), good=good, opset=18)


def _quantised() -> Iterator[Case]:
    def weight(kind: Any, *shape: int, block: int = 32, axis: int = 0) -> dict[str, Any]:
        scales = list(shape)
        scales[axis] = -(-scales[axis] // block)
        return {"w": np.ones(shape, kind), "s": np.ones(scales, np.float16)}

    blocks, four = {"axis": 0, "block_size": 32}, weight(int4, 64, 32)
    usual = {"inputs": {}, "wires": ("w", "s"), "attributes": blocks, "constants": four}
    for says, verdict, changes in (
        (
            "no zero point",
            REFUSED,
            {"wires": ("w", "s", "z"), "constants": {**four, "z": np.ones((2, 32), int4)}},
        ),
        ("that divide the axis", REFUSED, {"constants": weight(int4, 80, 32)}),
        (
            "of two axes",
            "-+++++++",
            {
                "attributes": {"axis": 1, "block_size": 32},
                "constants": weight(int4, 1, 64, 32, axis=1),
            },
        ),
        ("last axis is even", DOCUMENTED, {"constants": weight(int4, 64, 33)}),
        ("no blocks of int8", DOCUMENTED, {"constants": weight(np.int8, 64, 32)}),
    ):
        yield Case("DequantizeLinear", says, verdict, **{**usual, **changes}, good=usual, opset=22)


def _rounding() -> Iterator[Case]:
    """Activations are rounded to codes of 8 bits."""
    scale, zero = {"s": np.array(0.5, np.float16)}, {"z": np.array(0, np.int8)}
    usual = {"inputs": ROWS, "wires": ("x", "s", "z"), "constants": {**scale, **zero}}
    given = {"inputs": {**ROWS, "s": ("FLOAT16", ())}, "constants": zero}
    unsigned = {"constants": {**scale, "z": np.array(0, np.uint8)}}
    float8 = {"constants": {**scale, "z": np.array(0, float8_e4m3fn)}}
    for says, verdict, changes in (
        ("a constant scale", DOCUMENTED, given),
        ("no uint8", DOCUMENTED, unsigned),
        ("capability 8.9", "--++++++", float8),
    ):
        yield Case("QuantizeLinear", says, verdict, **{**usual, **changes}, good=usual, opset=22)


def _outputs() -> Iterator[Case]:
    weight = {"w": np.ones(8, np.float16)}
    yield Case(
        "LayerNormalization",
        "has one output",
        REFUSED,
        ROWS,
        ("x", "w"),
        outputs=("y", "mean"),
        constants=weight,
        good={"outputs": ("y",)},
        opset=18,
    )
    yield Case(
        "MaxPool",
        "has one output",
        REFUSED,
        {"x": ("FLOAT16", (1, 1, 8, 8))},
        ("x",),
        {"kernel_shape": [2, 2]},
        outputs=("y", "indices"),
        good={"outputs": ("y",)},
        opset=18,
    )
