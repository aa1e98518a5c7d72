"""One layer's attention on a cache of int8 beside one of float32, in ONNX Runtime on a CPU.

    python -m benchmarks.int8_caches --heads 14 --kv-heads 2 --head 64 --capacity 1024 --new 1

Both caches are written in place (TensorScatter, one buffer for past and present). That of int8 has
a scale a token and head beside it: new keys and values are rounded (QuantizeLinear), what the cache
holds is dequantised as a whole (DequantizeLinear, one block a row) in front of Attention, which
takes floats alone. Prints nodes after ONNX Runtime's fusions, bytes of the caches, milliseconds of
a call in turn, and the largest difference of the results.
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
    made = helper.make_graph(nodes, "layer", inputs, outputs, tensors)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 24)], ir_version=10)


class Layer:
    """A session whose caches are bound once: past and present are one buffer."""

    def __init__(self, shape: argparse.Namespace, *, int8: bool) -> None:
        model = graph(shape, int8=int8)
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
            self._bind(name, rng.standard_normal((1, heads, shape.new, shape.head), np.float32))
        self._bind("start", np.array([filled]))
        self._bind("end", np.array([shape.capacity]))
        rows = (1, shape.kv_heads, shape.capacity, shape.head)
        for name in ("key", "value"):
            held = rng.standard_normal(rows, np.float32)
            held[:, :, filled:] = 0
            if not int8:
                self._cache(f"past_{name}", f"{name}_all", held)
                continue
            scale = np.maximum(np.abs(held).max(-1, keepdims=True) / 127, np.float32(1e-30))
            codes = np.round(held / scale).astype(np.int8)
            self._cache(f"past_{name}", f"{name}_present", codes)
            self._cache(f"past_{name}_scale", f"{name}_scales", scale.astype(np.float32))
        self.binding.bind_output("mixed")

    @property
    def bytes(self) -> int:
        return sum(value.numpy().nbytes for value in self.caches)

    def run(self) -> Array:
        self.session.run_with_iobinding(self.binding)
        found: Array = self.binding.get_outputs()[-1].numpy()
        return found

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
    layers = {name: Layer(shape, int8=name == "int8") for name in ("float32", "int8")}
    seconds: dict[str, list[float]] = {name: [] for name in layers}
    for number in range(-5, shape.rounds):
        for name, layer in layers.items():
            start = time.perf_counter()
            layer.run()
            if number >= 0:
                seconds[name].append(time.perf_counter() - start)
    for name, layer in layers.items():
        nodes = ", ".join(f"{count} {kind}" for kind, count in sorted(layer.nodes.items()))
        spent = 1000 * statistics.median(seconds[name])
        print(f"{name}: {layer.bytes / 1e6:.2f} MB, {spent:.3f} ms; {nodes}")
    wanted, found = (layer.run() for layer in layers.values())
    print(f"largest difference {np.abs(found - wanted).max() / np.abs(wanted).max():.1e}")


if __name__ == "__main__":
    main()
