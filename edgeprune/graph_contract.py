"""What a bundle's graphs may be: looked at before an engine sees them, whenever a bundle is opened.

A bundle may come from anybody. What holds here the runtime takes for granted: the signature that
the manifest lists is that of its sizes, and that of the graphs; operators only compute; weights lie
in no file but the bundle's own.
"""

from __future__ import annotations

from collections.abc import Sequence

from edgeprune.graphs import DECODER, DELTA, JOIN, KNOWN, SIGNALS, VISION, TensorRecord
from edgeprune.lowering import TARGETS
from edgeprune.manifest import Manifest
from edgeprune.onnx_file import GROUP_QUERY, SKIP_NORM, OnnxFile, Value
from edgeprune.quantised_contract import check_quantised

WEIGHTS = "weights.bin"
_OPERATORS = """
    Abs Add And ArgMax ArgMin Attention AveragePool Cast CastLike Ceil Clip Concat Constant
    ConstantOfShape Conv Cos CumSum DequantizeLinear Div Einsum Equal Erf Exp Expand EyeLike
    Flatten Floor Gather GatherElements GatherND Gelu Gemm GlobalAveragePool Greater
    GreaterOrEqual Identity IsInf IsNaN LayerNormalization Less LessOrEqual Log LogSoftmax
    MatMul Max MaxPool Mean Min Mod Mul Neg Not OneHot Or Pad Pow QuantizeLinear
    RMSNormalization Range Reciprocal ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax
    ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Reshape Resize
    RotaryEmbedding Round ScatterElements ScatterND Shape Sigmoid Sign Sin Size Slice Softmax
    Softplus Split Sqrt Squeeze Sub Sum Swish Tanh TensorScatter Tile TopK Transpose Trilu
    Unsqueeze Where Xor
"""
OPERATORS = frozenset(_OPERATORS.split())
"""What a graph may be made of: what exports write, and its like. Nothing loops, calls or draws."""

STATE = "fp32"
"""The element type of what linear attention keeps, whatever that of the graph."""
Sizes = tuple[int | str, ...]  # a size that is open until the graph runs has a name
End = tuple[str, int | None, int | None]  # role, layer, tile
Ends = dict[End, tuple[str, Sizes]]  # element type, sizes


def check_signature(manifest: Manifest) -> None:
    """ValueError where the inputs and outputs that a manifest lists contradict its sizes."""
    names = manifest.graph_names
    if sorted(manifest.graphs) != sorted(names):
        raise ValueError(f"graphs are {', '.join(names)}, not {', '.join(manifest.graphs)}")
    makers = {VISION: _vision, DELTA: _delta, JOIN: _join, DECODER: _decoder}
    for name in names:
        graph, ends = manifest.graphs[name], makers[name](manifest)
        for found, wanted in zip((graph.inputs, graph.outputs), ends, strict=True):
            _check_ends(f"{name} lists", found, wanted)


def check_nodes(manifest: Manifest, graph: OnnxFile) -> None:
    """ValueError where a graph holds what no graph of a bundle needs."""
    target = TARGETS[manifest.target]
    own = {target.codes, target.integers, *((GROUP_QUERY, SKIP_NORM) if target.fused else ())}
    if strange := graph.operators - OPERATORS - own:
        raise ValueError(f"it has the operator {min(strange)}, which no bundle needs")
    if outside := graph.files - {WEIGHTS}:
        raise ValueError(f"it has weights in {min(outside)!r}, not in {WEIGHTS}")
    if graph.opset != manifest.opset:
        raise ValueError(f"its opset is {graph.opset}, the manifest says {manifest.opset}")
    for node in graph.quantised:
        check_quantised(node)


def check_graph(manifest: Manifest, name: str, graph: OnnxFile) -> None:
    """ValueError where a graph is not the graph of the manifest."""
    check_nodes(manifest, graph)
    record = manifest.graphs[name]
    for listed, found in ((record.inputs, graph.inputs), (record.outputs, graph.outputs)):
        wanted = [Value(tensor.name, tensor.dtype, tensor.dims) for tensor in listed]
        for one, other in zip(found, wanted, strict=False):
            if one != other:
                raise ValueError(f"it has {one.name}: {one}, the manifest {other.name}: {other}")
        if len(found) != len(wanted):
            more = max(found, tuple(wanted), key=len)
            odd = more[min(len(found), len(wanted))]
            raise ValueError(f"it or the manifest lacks {odd.name}")


def _check_ends(title: str, found: Sequence[TensorRecord], wanted: Ends) -> None:
    """ValueError unless tensors are of the roles, types and sizes that they have to be."""
    if len({tensor.name for tensor in found}) != len(found):
        raise ValueError(f"{title} two tensors of one name")
    left = dict(wanted)
    for tensor in found:
        end = tensor.role, tensor.layer, tensor.tile
        if end not in left:
            raise ValueError(f"{title} {tensor.name} as {_role(*end)}")
        dtype, sizes = left.pop(end)
        if (tensor.dtype, tensor.dims) != (dtype, sizes):
            shown, right = Value("", tensor.dtype, tensor.dims), Value("", dtype, sizes)
            raise ValueError(f"{title} {tensor.name} as {shown}, its sizes say {right}")
    if left:
        raise ValueError(f"{title} no {_role(*next(iter(left)))}")


def _role(role: str, layer: int | None, tile: int | None) -> str:
    where = {"layer": layer, "tile": tile}
    return role + "".join(f" of {what} {n}" for what, n in where.items() if n is not None)


def _vision(manifest: Manifest) -> tuple[Ends, Ends]:
    """One tile, or the frames that are encoded as one; what it gives no size of a manifest says."""
    count, *size = manifest.image.shape
    if count % manifest.encoder.tiles:
        raise ValueError(f"{count} images or frames are not {manifest.encoder.tiles} equal parts")
    frames = count // manifest.encoder.tiles
    inputs: Ends = {("pixels", None, None): (manifest.dtype, (frames, *size))}
    return inputs, _signals(manifest) | _block_caches(manifest, "present")


def _signals(manifest: Manifest) -> Ends:
    """What the encoder gives for a tile."""
    found: Ends = {}
    for tensor in manifest.graphs[VISION].outputs:
        if manifest.encoder.delta is not None and tensor.role.startswith("present_"):
            continue
        if tensor.role not in SIGNALS or any(isinstance(dim, str) for dim in tensor.dims):
            raise ValueError(f"{VISION} gives {tensor.name}, {tensor.role} of no fixed size")
        found[tensor.role, None, None] = tensor.dtype, tensor.dims
    if ("features", None, None) not in found:
        raise ValueError(f"{VISION} gives no features")
    return found


def _block_caches(manifest: Manifest, prefix: str) -> Ends:
    """Keys and values of the encoder's blocks, where frames are not always encoded as a whole."""
    encoder = manifest.encoder
    if (delta := encoder.delta) is None:
        return {}
    sizes = 1, delta.heads, encoder.patches + encoder.extra, encoder.width // delta.heads
    blocks = range(1, encoder.blocks + 1)
    return {
        (f"{prefix}_{kind}", block, None): (manifest.dtype, sizes)
        for block in blocks
        for kind in ("key", "value")
    }


def _delta(manifest: Manifest) -> tuple[Ends, Ends]:
    signals, delta = _signals(manifest), manifest.encoder.delta
    assert delta is not None  # else there is no such graph
    inputs: Ends = {
        ("patches", None, None): (manifest.dtype, (delta.patches, 3, delta.patch, delta.patch)),
        ("patch_indices", None, None): ("int64", (delta.patches,)),
    }
    for (role, _, _), found in signals.items():
        if role in KNOWN:
            inputs[f"previous_{role}", None, None] = found
    inputs |= _block_caches(manifest, "past")
    return inputs, signals | _block_caches(manifest, "present")


def _join(manifest: Manifest) -> tuple[Ends, Ends]:
    element, encoded, signals = manifest.dtype, _encoded(manifest), _signals(manifest)
    tiles = range(1, manifest.encoder.tiles + 1)
    inputs: Ends = {
        (role, None, tile): found for (role, _, _), found in signals.items() for tile in tiles
    }
    if isinstance(encoded, str):
        inputs["counts", None, None] = "int64", (manifest.decoder.layers,)
    outputs: Ends = {
        ("visual", None, None): (element, (1, encoded, manifest.decoder.visual_width)),
        ("visual_indices", None, None): ("int64", (encoded,)),
    }
    return inputs, outputs


def _encoded(manifest: Manifest) -> int | str:
    """How many visual tokens leave the vision side; open where join.onnx takes the counts."""
    counted = manifest.ratios and manifest.prune.plan.behind_encoder()
    return "visual" if counted else manifest.prune.encoded


def _decoder(manifest: Manifest) -> tuple[Ends, Ends]:
    record, element = manifest.decoder, manifest.dtype
    inputs: Ends = {
        ("prefix_ids", None, None): ("int64", (1, "prefix")),
        ("visual", None, None): (element, (1, "visual", record.visual_width)),
        ("text_ids", None, None): ("int64", (1, "text")),
        ("position", None, None): ("int64", (1,)),
        ("lengths", None, None): ("int64", (record.layers,)),
    }
    if manifest.graphs[DECODER].input("visual_indices") is not None:  # where tokens keep places
        inputs["visual_indices", None, None] = "int64", ("visual",)
    if manifest.ratios:
        inputs["counts", None, None] = "int64", (record.layers,)
    outputs: Ends = {("logits", None, None): (element, (1, 1, record.vocabulary))}
    if TARGETS[manifest.target].token:
        outputs["token", None, None] = "int64", (1, 1)
    for stage in manifest.widest.in_decoder:
        sizes: Sizes = (f"kept.{stage.layer}" if stage.survivors else 0,)
        outputs["kept", stage.layer, None] = "int64", sizes
    before, after = ("past", "present") if record.cache == "grow" else ("capacity", "capacity")
    for layer in range(1, record.layers + 1):
        for ends, name, slots in ((inputs, "past", before), (outputs, "present", after)):
            if layer in record.convolutions:
                ends[f"{name}_state", layer, None] = (
                    element,
                    (1, record.kernel - 1, record.channels),
                )
                if record.linear is not None:
                    matrices = 1, *record.linear.matrices
                    ends[f"{name}_recurrent_state", layer, None] = STATE, matrices
                continue
            for kind in ("key", "value"):
                sizes = 1, record.kv_heads, f"{slots}.{layer - 1}", record.head_size
                ends[f"{name}_{kind}", layer, None] = element, sizes
    return inputs, outputs
