"""Operators of ONNX Runtime's own that stand for several of ONNX's, for a float32 decoder on a CPU.

`GroupQueryAttention` writes a layer's cache in place and attends to the slots that are filled; the
kernel of ONNX's Attention goes through all slots, and wants heads in front of tokens. A sum and the
norm that reads it are one `SkipSimplifiedLayerNormalization`.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes import common

from edgeprune.onnx_file import GROUP_QUERY, MICROSOFT, SKIP_NORM

SWAPPED = (0, 2, 1, 3)
"""The transposition between [1, heads, tokens, head] and [1, tokens, heads, head]."""
MULTIPLE = 8
"""GroupQueryAttention takes heads whose size is a multiple of this."""
SETTINGS = {"is_causal", "scale"}
"""Attributes of Attention that GroupQueryAttention has too, or means."""


def fuse(model: ir.Model, kept: str) -> None:
    """Rewrite a decoder's graph in place; what has a name that begins with `kept` is no part of a
    norm, since the graph can be cut there."""
    graph, filled = model.graph, _Filled(model.graph)
    for node in [one for one in graph if one.op_type == "Attention"]:
        if (cached := _Cached.of(node)) is not None:
            cached.fuse(graph, filled)
    for node in [one for one in graph if one.op_type == "RMSNormalization"]:
        _fuse_norm(graph, node, kept)
    common.RemoveUnusedNodesPass()(model)
    if any(node.domain == MICROSOFT for node in graph):
        graph.opset_imports[MICROSOFT] = 1


class _Filled:
    """How many slots of each cache are filled, int32, as GroupQueryAttention wants it."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph, self._made = graph, dict[ir.Value, tuple[ir.Value, ir.Value]]()

    def of(self, end: ir.Value, before: ir.Node) -> list[ir.Value]:
        """The index of a cache's last filled slot, and the number of filled slots: each [1]."""
        part = end.producer()
        if part is None or part.op_type != "Slice" or part.inputs[0] is None:
            return list(self._counted(end))
        found = list[ir.Value]()
        for name, every in zip(("last", "filled"), self._counted(part.inputs[0]), strict=True):
            node = ir.node("Slice", [every, *part.inputs[1:]], name=f"{before.name}/{name}")
            self._graph.insert_before(before, node)
            found.append(_like(node.outputs[0], end, every.dtype))
        return found

    def _counted(self, value: ir.Value) -> tuple[ir.Value, ir.Value]:
        """One less than counts, and these, int32; made once."""
        if value not in self._made:
            maker, one = value.producer(), ir.tensor([1], dtype=ir.DataType.INT32)
            assert maker is not None  # lengths after the call are computed
            cast = ir.node("Cast", [value], {"to": ir.DataType.INT32}, name=f"{maker.name}/int32")
            step = ir.node("Constant", [], {"value": one}, name=f"{maker.name}/one")
            last = ir.node("Sub", [*cast.outputs, *step.outputs], name=f"{maker.name}/last")
            self._graph.insert_after(maker, [cast, step, last])
            made = (_like(node.outputs[0], value, ir.DataType.INT32) for node in (last, cast))
            self._made[value] = next(made), next(made)
        return self._made[value]


@dataclass(frozen=True)
class _Cached:
    """Attention over a cache that the call has written, where each token sees all slots up to its
    own."""

    attention: ir.Node
    keys: ir.Node  # what writes them
    values: ir.Node
    end: ir.Value  # int64 [1], slots that are filled
    heads: int
    kv_heads: int
    size: int

    @classmethod
    def of(cls, attention: ir.Node) -> _Cached | None:
        """None where the one operator would do something else."""
        query, key, value, *rest = attention.inputs
        causal = attention.attributes.get("is_causal")
        if causal is None or causal.as_int() != 1 or not set(attention.attributes) <= SETTINGS:
            return None
        if len(rest) != 4 or any(one is not None for one in rest[:3]) or rest[3] is None:
            return None
        keys, values = _write_of(key), _write_of(value)
        if keys is None or values is None or query is None or key is None:
            return None
        (heads, size), kv_heads = _sizes(query), _sizes(key)[0]
        if size % MULTIPLE:
            return None
        return cls(attention, keys, values, rest[3], heads, kv_heads, size)

    def fuse(self, graph: ir.Graph, filled: _Filled) -> None:
        """Replace the three nodes by one."""
        old, given = self.attention, list[ir.Value]()
        new = (old.inputs[0], self.keys.inputs[1], self.values.inputs[1])
        for value in new:
            assert value is not None
            given.append(_flat(graph, value, old))
        given += [write.inputs[0] for write in (self.keys, self.values)]  # type: ignore[misc]
        sizes = {"num_heads": self.heads, "kv_num_heads": self.kv_heads}
        if (scale := old.attributes.get("scale")) is not None:
            sizes["scale"] = scale.as_float()  # type: ignore[assignment]
        inputs = [*given, *filled.of(self.end, old)]
        name = "/".join([*(old.name or "").split("/")[:-1], GROUP_QUERY.lower()])
        made = ir.node(GROUP_QUERY, inputs, sizes, domain=MICROSOFT, num_outputs=3, name=name)
        graph.insert_before(old, made)
        mixed, *present = made.outputs
        _like(mixed, given[0])
        mixed.name = f"{name}/mixed"
        for write, value in zip((self.keys, self.values), present, strict=True):
            _take_place(value, write.outputs[0])
        self._hand_on(graph, mixed)

    def _hand_on(self, graph: ir.Graph, mixed: ir.Value) -> None:
        """Give what was mixed [1, tokens, heads * head] to those who read it head by head."""
        old = self.attention
        swap = _only_user(old.outputs[0])
        join = _only_user(swap.outputs[0]) if swap is not None and _swaps(swap) else None
        if join is not None and join.op_type == "Reshape" and self._joins(join.outputs[0]):
            _take_place(mixed, join.outputs[0])
            return
        split = _reshape(graph, mixed, [1, -1, self.heads, self.size], old)
        swapped = ir.node("Transpose", [split], {"perm": SWAPPED}, name=f"{old.name}/heads")
        graph.insert_before(old, swapped)
        _take_place(swapped.outputs[0], old.outputs[0])

    def _joins(self, value: ir.Value) -> bool:
        """Whether a value has all heads of a token side by side."""
        sizes = _shape(value) or []
        return len(sizes) == 3 and sizes[2] == self.heads * self.size


def _flat(graph: ir.Graph, value: ir.Value, before: ir.Node) -> ir.Value:
    """Heads of a token side by side: [1, heads, tokens, head] -> [1, tokens, heads * head]."""
    heads, size = _sizes(value)
    node = value.producer()
    if node is not None and _swaps(node):
        split = node.inputs[0].producer() if node.inputs[0] is not None else None
        whole = split.inputs[0] if split is not None and split.op_type == "Reshape" else None
        if whole is not None and (_shape(whole) or [])[2:] == [heads * size]:
            return whole
    if node is not None and node.op_type == "RotaryEmbedding" and not node.attributes:
        assert node.inputs[0] is not None
        inputs = [_flat(graph, node.inputs[0], node), *node.inputs[1:]]
        turned = ir.node("RotaryEmbedding", inputs, {"num_heads": heads}, name=f"{node.name}/flat")
        graph.insert_before(node, turned)
        return _like(turned.outputs[0], inputs[0])
    swapped = ir.node("Transpose", [value], {"perm": SWAPPED}, name=f"{before.name}/tokens")
    graph.insert_before(before, swapped)
    tokens = value.shape[2] if value.shape is not None else None
    swapped.outputs[0].shape, swapped.outputs[0].type = (
        ir.Shape([1, tokens, heads, size]),
        value.type,
    )
    return _reshape(graph, swapped.outputs[0], [1, -1, heads * size], before)


def _fuse_norm(graph: ir.Graph, norm: ir.Node, kept: str) -> None:
    """Let one node add and norm, where a norm reads the sum of two tensors of one shape."""
    read, weight = norm.inputs
    total = read.producer() if read is not None else None
    if total is None or total.op_type != "Add" or read is None or weight is None:
        return
    first, second = total.inputs
    if first is None or second is None or _shape(first) is None:
        return
    if (read.name or "").startswith(kept):
        return
    if _shape(first) != _shape(second) or "axis" in norm.attributes:
        return
    settings = {"epsilon": norm.attributes["epsilon"].as_float()}
    inputs = [first, second, weight]
    made = ir.node(
        SKIP_NORM, inputs, settings, domain=MICROSOFT, num_outputs=4, name=f"{norm.name}/sum"
    )
    graph.insert_before(total, made)
    normed, mean, deviation, summed = made.outputs
    mean.name = deviation.name = ""
    _take_place(normed, norm.outputs[0])
    _take_place(summed, read)


def _write_of(cache: ir.Value | None) -> ir.Node | None:
    """What writes a cache that attention alone reads; None where that is not so."""
    node = cache.producer() if cache is not None else None
    if cache is None or node is None or node.op_type != "TensorScatter":
        return None
    if node.attributes["axis"].as_int() != 2 or node.attributes["mode"].as_string() != "linear":
        return None
    return node if _only_user(cache) is not None else None


def _only_user(value: ir.Value) -> ir.Node | None:
    users = list(value.uses())
    return users[0][0] if len(users) == 1 else None


def _swaps(node: ir.Node) -> bool:
    return node.op_type == "Transpose" and node.attributes["perm"].as_ints() == SWAPPED


def _sizes(heads: ir.Value) -> tuple[int, int]:
    """Heads, and the size of one, of [1, heads, tokens, head]."""
    assert heads.shape is not None
    _, count, _, size = heads.shape
    assert isinstance(count, int) and isinstance(size, int)
    return count, size


def _shape(value: ir.Value) -> list[int | str | None] | None:
    """Sizes; of an open one its name."""
    if value.shape is None:
        return None
    return [size if isinstance(size, int) else size.value for size in value.shape]


def _like(value: ir.Value, other: ir.Value | None, dtype: ir.DataType | None = None) -> ir.Value:
    """A value with the shape of another one, and its dtype unless another is given."""
    assert other is not None
    value.shape, value.type = other.shape, other.type if dtype is None else ir.TensorType(dtype)
    return value


def _reshape(graph: ir.Graph, value: ir.Value, sizes: list[int], before: ir.Node) -> ir.Value:
    """A value in another shape, whose open size is the number of tokens."""
    wanted = ir.node("Constant", [], {"value": ir.tensor(sizes)}, name=f"{before.name}/sizes")
    node = ir.node("Reshape", [value, wanted.outputs[0]], name=f"{before.name}/reshape")
    graph.insert_before(before, [wanted, node])
    tokens = value.shape[1] if value.shape is not None else None
    node.outputs[0].shape = ir.Shape([size if size > 0 else tokens for size in sizes])
    node.outputs[0].type = value.type
    return node.outputs[0]


def _take_place(value: ir.Value, other: ir.Value) -> None:
    """Let a value be read wherever another one was, under its name."""
    name = other.name
    _like(value, other)
    ir.convenience.replace_all_uses_with(other, value, replace_graph_outputs=True)
    other.name, value.name = f"{name}/before", name
