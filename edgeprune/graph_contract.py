"""What a bundle's graphs may be: looked at before an engine sees them, whenever a bundle is opened.

A bundle may come from anybody. What holds here the runtime takes for granted: names, sizes and
element types of inputs and outputs are the manifest's; operators only compute; weights lie in no
file but the bundle's own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeprune.onnx_file import OnnxFile, Value

if TYPE_CHECKING:
    from edgeprune.bundle import Manifest

WEIGHTS = "weights.bin"
GRAPHS = VISION, DECODER = "vision.onnx", "decoder.onnx"
_OPERATORS = """
    Abs Add And ArgMax ArgMin Attention AveragePool Cast Ceil Clip Concat Constant
    ConstantOfShape Conv Cos CumSum DequantizeLinear Div Einsum Equal Erf Exp Expand EyeLike
    Flatten Floor Gather GatherElements GatherND Gelu Gemm Greater GreaterOrEqual Identity IsInf
    IsNaN LayerNormalization Less LessOrEqual Log LogSoftmax MatMul Max Mean Min Mod Mul Neg Not
    OneHot Or Pad Pow QuantizeLinear RMSNormalization Range Reciprocal ReduceL1 ReduceL2
    ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu
    Reshape RotaryEmbedding Round ScatterElements ScatterND Shape Sigmoid Sign Sin Size Slice
    Softmax Softplus Split Sqrt Squeeze Sub Sum Swish Tanh TensorScatter Tile TopK Transpose
    Trilu Unsqueeze Where Xor
"""
OPERATORS = frozenset(_OPERATORS.split())
"""What a graph may be made of: what exports write, and its like. Nothing loops, calls or draws."""

Sizes = tuple[int | None, ...]  # None: open, known when the graph runs
Ends = dict[str, tuple[str, Sizes]]  # element type and sizes, by name


def check_graph(manifest: Manifest, name: str, graph: OnnxFile) -> None:
    """ValueError where `vision.onnx` or `decoder.onnx` is not the graph of the manifest."""
    if strange := graph.operators - OPERATORS:
        raise ValueError(f"it has the operator {min(strange)}, which no bundle needs")
    if outside := graph.files - {WEIGHTS}:
        raise ValueError(f"it has weights in {min(outside)!r}, not in {WEIGHTS}")
    if graph.opset != manifest.opset:
        raise ValueError(f"its opset is {graph.opset}, the manifest says {manifest.opset}")
    inputs, outputs = _vision(manifest) if name == VISION else _decoder_ends(manifest)
    for kind, wanted, found in (
        ("input", inputs, graph.inputs),
        ("output", outputs, graph.outputs),
    ):
        names = [value.name for value in found]
        if sorted(names) != sorted(wanted):
            odd = {*names} ^ {*wanted} or {one for one in names if names.count(one) > 1}
            raise ValueError(f"its {kind}s differ from the manifest's in {min(odd)!r}")
        for value in found:
            _check_end(kind, value, *wanted[value.name])


def _vision(manifest: Manifest) -> tuple[Ends, Ends]:
    element, encoded = manifest.dtype, manifest.prune.encoded
    outputs: Ends = {
        "visual": (element, (1, encoded, manifest.decoder.width)),
        "kept": ("int64", (encoded,)),
    }
    return {"pixels": (element, manifest.image.shape)}, outputs


def _decoder_ends(manifest: Manifest) -> tuple[Ends, Ends]:
    record, element = manifest.decoder, manifest.dtype
    inputs: Ends = {
        "prefix_ids": ("int64", (1, None)),
        "visual": (element, (1, None, record.width)),
        "text_ids": ("int64", (1, None)),
        "position": ("int64", (1,)),
        "lengths": ("int64", (record.layers,)),
    }
    if record.span is not None:
        inputs["places"] = ("int64", (None,))
    outputs: Ends = {"logits": (element, (1, 1, record.vocabulary))}
    if manifest.target != "cpu":
        outputs["token"] = ("int64", (1, 1))
    stages = [stage for stage in manifest.prune.stages if stage.in_decoder]
    for kept, stage in zip(manifest.prune.kept_outputs, stages, strict=True):
        outputs[kept] = "int64", (None if stage.survivors else 0,)
    cache = element, (1, record.kv_heads, None, record.head_size)
    for layer in range(record.layers):
        for kind in ("key", "value"):
            inputs[f"past_{kind}.{layer}"] = outputs[f"present_{kind}.{layer}"] = cache
    return inputs, outputs


def _check_end(kind: str, value: Value, dtype: str, sizes: Sizes) -> None:
    fits = len(value.sizes) == len(sizes) and all(
        isinstance(found, str) if wanted is None else found == wanted
        for found, wanted in zip(value.sizes, sizes, strict=False)
    )
    if value.dtype != dtype or not fits:
        wanted = f"{dtype} [{', '.join('any' if size is None else str(size) for size in sizes)}]"
        raise ValueError(f"its {kind} {value.name} is {value}, the manifest says {wanted}")
