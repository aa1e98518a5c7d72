"""One layer's attention on a cache of int8 beside one of float32, in ONNX Runtime on a CPU.

    python -m benchmarks.int8_caches --heads 14 --kv-heads 2 --head 64 --capacity 1024 --new 1

All caches are written in place (one buffer for past and present). In ONNX's own operators
(TensorScatter, Attention) that of int8 has a scale a token and head beside it: new keys and values
are rounded (QuantizeLinear), what the cache holds is dequantised as a whole (DequantizeLinear, one
block a row) in front of Attention, which takes floats alone. ONNX Runtime's GroupQueryAttention
reads codes itself; its scales, one a channel, are fixed before, here by the largest of the cache.
Prints nodes after ONNX Runtime's fusions, bytes of the caches, milliseconds of a call in turn, and
the largest difference from Attention on float32.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

KINDS = {np.dtype(np.float32): TensorProto.FLOAT, np.dtype(np.int8): TensorProto.INT8}
Array = NDArray[Any]


def written(kind: str, *, int8: bool) -> list[Any]:
    """Nodes that write new keys or values into a cache, and give it in floats as `KIND_all`."""
    if not int8:
        given = [f"past_{kind}", kind, "start"]
        return [helper.make_node("TensorScatter", given, [f"{kind}_all"], axis=2)]
    node, made = helper.make_node, dict[str, str]()
    for name in ("size", "most", "step", "scale", "codes", "present", "scales"):
        made[name] = f"{kind}_{name}"
    blocks = {"axis": 3}
    return [
        node("Abs", [kind], [made["size"]]),
        node("ReduceMax", [made["size"], "axis"], [made["most"]], keepdims=1),
        node("Mul", [made["most"], "unit"], [made["step"]]),
        node("Max", [made["step"], "tiny"], [made["scale"]]),
        node("QuantizeLinear", [kind, made["scale"]], [made["codes"]], output_dtype=3, **blocks),
        node("TensorScatter", [f"past_{kind}", made["codes"], "start"], [made["present"]], axis=2),
        node(
            "TensorScatter",
            [f"past_{kind}_scale", made["scale"], "start"],
            [made["scales"]],
            axis=2,
        ),
        node("DequantizeLinear", [made["present"], made["scales"]], [f"{kind}_all"], **blocks),
    ]


def own_graph(shape: argparse.Namespace, *, int8: bool) -> Any:
    """As `graph`, with ONNX Runtime's operator: query, key, value [1, new, heads * head], last and
    filled int32 [1], with int8 scales [kv heads, head]."""
    info, kind = helper.make_tensor_value_info, TensorProto.INT8 if int8 else TensorProto.FLOAT
    sizes = {"query": shape.heads, "key": shape.kv_heads, "value": shape.kv_heads}
    inputs = [info(n, TensorProto.FLOAT, [1, shape.new, h * shape.head]) for n, h in sizes.items()]
    inputs += [info(name, TensorProto.INT32, [1]) for name in ("last", "filled")]
    rows = [1, shape.kv_heads, shape.capacity, shape.head]
    inputs += [info(f"past_{name}", kind, rows) for name in ("key", "value")]
    read = [*sizes, "past_key", "past_value", "last", "filled"]
    settings: dict[str, Any] = {"num_heads": shape.heads, "kv_num_heads": shape.kv_heads}
    if int8:
        scales = ["key_scale", "value_scale"]
        inputs += [info(n, TensorProto.FLOAT, [shape.kv_heads, shape.head]) for n in scales]
        read += [*[""] * 5, *scales]
        settings |= {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL"}
        settings["kv_cache_bit_width"] = 8
    made = ["mixed", "key_present", "value_present"]
    node = helper.make_node("GroupQueryAttention", read, made, domain="com.microsoft", **settings)
    outputs = [info(made[0], TensorProto.FLOAT, None), *(info(n, kind, None) for n in made[1:])]
    return _model(helper.make_graph([node], "layer", inputs, outputs))


def _model(graph: Any) -> Any:
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def graph(shape: argparse.Namespace, *, int8: bool) -> Any:
    """query, key, value [1, heads, new, head], start, end [1] and caches -> mixed, and caches."""
    sizes = {"query": shape.heads, "key": shape.kv_heads, "value": shape.kv_heads}
    info = helper.make_tensor_value_info
    inputs = [info(n, TensorProto.FLOAT, [1, h, shape.new, shape.head]) for n, h in sizes.items()]
    inputs += [info(name, TensorProto.INT64, [1]) for name in ("start", "end")]
    outputs = [info("mixed", TensorProto.FLOAT, None)]
    nodes = [*written("key", int8=int8), *written("value", int8=int8)]
    read = ["query", "key_all", "value_all", "", "", "", "end"]
    nodes.append(helper.make_node("Attention", read, ["mixed"], is_causal=1))
    rows, kind = (
        [1, shape.kv_heads, shape.capacity],
        TensorProto.INT8 if int8 else TensorProto.FLOAT,
    )
    for name in ("key", "value"):
        inputs.append(info(f"past_{name}", kind, [*rows, shape.head]))
        outputs.append(info(f"{name}_present" if int8 else f"{name}_all", kind, None))
        if int8:
            inputs.append(info(f"past_{name}_scale", TensorProto.FLOAT, [*rows, 1]))
            outputs.append(info(f"{name}_scales", TensorProto.FLOAT, None))
            for node in nodes:
                if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
                    ends = {a.name for a in node.attribute}
                    if "block_size" not in ends:
                        node.attribute.append(helper.make_attribute("block_size", shape.head))
    small = {"axis": np.array([-1]), "unit": np.float32(1 / 127), "tiny": np.float32(1e-30)}
    tensors = [numpy_helper.from_array(np.asarray(v), k) for k, v in small.items()]
    return _model(helper.make_graph(nodes, "layer", inputs, outputs, tensors))


class Layer:
    """A session whose caches are bound once: past and present are one buffer."""

    def __init__(self, shape: argparse.Namespace, *, int8: bool, own: bool = False) -> None:
        model = (own_graph if own else graph)(shape, int8=int8)
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = shape.threads, 3
        with TemporaryDirectory() as folder:
            file = Path(folder) / "optimised.onnx"
            options.optimized_model_filepath = str(file)
            self.session = ort.InferenceSession(
                model.SerializeToString(), options, ["CPUExecutionProvider"]
            )
            self.nodes = Counter(node.op_type for node in onnx.load(file).graph.node)
        self.binding, self.caches = self.session.io_binding(), list[Any]()
        rng, filled = np.random.default_rng(0), shape.capacity - shape.new
        for name, heads in (
            ("query", shape.heads),
            ("key", shape.kv_heads),
            ("value", shape.kv_heads),
        ):
            given = rng.standard_normal((1, heads, shape.new, shape.head), np.float32)
            self._bind(name, given.swapaxes(1, 2).reshape(1, shape.new, -1) if own else given)
        ends = np.array([filled]), np.array([shape.capacity])
        if own:
            ends = np.array([shape.capacity - 1], np.int32), ends[1].astype(np.int32)
        for name, end in zip(("last", "filled") if own else ("start", "end"), ends, strict=True):
            self._bind(name, end)
        rows = (1, shape.kv_heads, shape.capacity, shape.head)
        for name in ("key", "value"):
            held = rng.standard_normal(rows, np.float32)
            held[:, :, filled:] = 0
            if not int8:
                self._cache(f"past_{name}", f"{name}_{'present' if own else 'all'}", held)
                continue
            axes = (0, 2) if own else 3
            scale = np.maximum(np.abs(held).max(axes, keepdims=True) / 127, np.float32(1e-30))
            if own and not filled:  # nothing is cached: by what is drawn so
                scale = np.full_like(scale, 4 / 127)
            codes = np.round(held / scale).astype(np.int8)
            self._cache(f"past_{name}", f"{name}_present", codes)
            if own:
                self._bind(f"{name}_scale", scale[0, :, 0].astype(np.float32))
            else:
                self._cache(f"past_{name}_scale", f"{name}_scales", scale.astype(np.float32))
        self.binding.bind_output("mixed")

    @property
    def bytes(self) -> int:
        return sum(value.numpy().nbytes for value in self.caches)

    def run(self) -> Array:
        self.session.run_with_iobinding(self.binding)
        found: Array = self.binding.get_outputs()[-1].numpy()
        return found  # [1, heads, new, head], or [1, new, heads * head]

    def _bind(self, name: str, array: Array) -> Any:
        value = ort.OrtValue.ortvalue_from_numpy(array)
        self.binding.bind_ortvalue_input(name, value)
        return value

    def _cache(self, past: str, present: str, array: Array) -> None:
        value = self._bind(past, array)
        self.binding.bind_ortvalue_output(present, value)
        self.caches.append(value)


def main() -> None:
    parser = argparse.ArgumentParser(description="A cache of int8 beside one of float32.")
    for name, usual in (
        ("heads", 14),
        ("kv-heads", 2),
        ("head", 64),
        ("capacity", 1024),
        ("new", 1),
        ("threads", 2),
        ("rounds", 50),
    ):
        parser.add_argument(f"--{name}", type=int, default=usual)
    shape = parser.parse_args()
    layers = {
        f"{operator}, {kind}": Layer(shape, int8=kind == "int8", own=operator != "Attention")
        for operator in ("Attention", "GroupQueryAttention")
        for kind in ("float32", "int8")
    }
    seconds: dict[str, list[float]] = {name: [] for name in layers}
    for number in range(-5, shape.rounds):
        for name, layer in layers.items():
            start = time.perf_counter()
            layer.run()
            if number >= 0:
                seconds[name].append(time.perf_counter() - start)
    for name, layer in layers.items():
        nodes = ", ".join(f"{count} {kind}" for kind, count in sorted(layer.nodes.items()))
        spent, least = 1000 * statistics.median(seconds[name]), 1000 * min(seconds[name])
        told = f"{spent:.3f} ms (least {least:.3f})"
        print(f"{name}: {layer.bytes / 1e6:.2f} MB, {told}; {nodes}")
    wanted, *others = (_by_token(layer.run(), shape) for layer in layers.values())
    for name, found in zip([*layers][1:], others, strict=True):
        apart = np.abs(found - wanted).max() / np.abs(wanted).max()
        print(f"{name}: largest difference {apart:.1e}")


def _by_token(mixed: Array, shape: argparse.Namespace) -> Array:
    """[1, new, heads * head]."""
    if mixed.ndim == 4:
        mixed = mixed.swapaxes(1, 2)
    return mixed.reshape(1, shape.new, -1)


if __name__ == "__main__":
    main()
