"""The gated delta rule in plain operators: no loop, and no operator of one engine alone.

How many tokens a call has is open. They are cut into as few chunks as hold 64 tokens, all equally
long, so a decode step is one chunk of one token. Within a chunk the unit lower triangular system is
inverted by halves: from the inverses of blocks of 1, 2, 4 ... 32 tokens on the diagonal come those
of twice as many by two products. From chunk to chunk the state goes through an affine map. The
first chunk reads it as it is. The maps of the others are composed in log2(n) steps, step s with the
map s chunks before; where there are not so many chunks, a step has nothing to do.

Tracing leaves one node of a domain of our own for each layer; `lower_rules` writes it out.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from edgeprune.models._delta_rule import CHUNK

DOMAIN, OPERATOR = "edgeprune", "GatedDeltaRule"
END = np.iinfo(np.int64).max
"""Of a slice that has no end."""


def emit_rule(*rule: Tensor) -> tuple[Tensor, Tensor]:
    """One node that stands for the rule while a module is traced."""
    query, _, value, _, _, state = rule
    _, heads, _, keys = query.shape
    read, after = torch.onnx.ops.symbolic_multi_out(
        f"{DOMAIN}::{OPERATOR}",
        list(rule),
        {"heads": heads, "keys": keys, "values": value.shape[-1]},
        dtypes=(value.dtype, state.dtype),
        shapes=(value.shape, state.shape),
        version=1,
    )
    return read, after


def lower_rules(model: ir.Model, most: int) -> None:
    """Write the rules of a traced graph out, for calls of at most so many tokens."""
    constants = _Constants()
    for node in [node for node in model.graph if node.domain == DOMAIN]:
        writer = _Writer(node, constants, most)
        made = writer.read_and_state()
        model.graph.insert_before(node, writer.tape.nodes)
        for old, new in zip(node.outputs, made, strict=True):
            new.shape, new.type = old.shape, old.type
            ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        model.graph.remove(node, safe=True)
    if constants.tape.nodes:
        model.graph.insert_before(model.graph[0], constants.tape.nodes)
    model.graph.opset_imports.pop(DOMAIN, None)


class _Constants:
    """Those of all layers, each once."""

    def __init__(self) -> None:
        self.tape, self._made = ir.tape.Tape(), dict[tuple[object, ...], ir.Value]()

    def value(self, array: NDArray[Any]) -> ir.Value:
        key = array.dtype, array.shape, array.tobytes()
        if key not in self._made:
            self._made[key] = self.tape.op("Constant", [], {"value": ir.tensor(array)})
        return self._made[key]


@dataclass(frozen=True)
class _Chunks:
    """The tokens of a call in chunks: [1, heads, chunks, tokens, ...]."""

    query: ir.Value
    key: ir.Value
    value: ir.Value
    decay: ir.Value  # [..., 1], as the rate
    rate: ir.Value
    length: ir.Value  # int64 [1], tokens of a chunk
    later: ir.Value  # int64 [1], chunks behind the first


@dataclass(frozen=True)
class _Solved:
    """What a chunk's tokens write, as far as it does not hang on the state before the chunk."""

    written: ir.Value  # [..., tokens, value]
    undone: ir.Value  # [..., tokens, key]: times the state before, that is less
    left: ir.Value  # [..., key, tokens], keys as they count at the chunk's end
    kept: ir.Value  # [..., 1, 1], of the state before


class _Writer:
    """Writes one rule."""

    def __init__(self, node: ir.Node, constants: _Constants, most: int) -> None:
        self.tape, self.inputs, self._props = ir.tape.Tape(), node.inputs, node.metadata_props
        self.constants = constants
        self.heads, self.keys, self.values = (
            node.attributes[name].as_int() for name in ("heads", "keys", "values")
        )
        later = -(-most // CHUNK) - 1  # chunks behind the first
        self.steps = max(0, later - 1).bit_length()

    def read_and_state(self) -> tuple[ir.Value, ir.Value]:
        """What is read [1, heads, S, value], and the state after the tokens."""
        state = self.op("Unsqueeze", self.inputs[5], self.ints(2))
        chunks = self.chunked()
        lower = self.mask(np.tri(CHUNK), chunks.length)
        total = self.op("ReduceSum", self.op("Mul", lower, self.turned(chunks.decay)), self.ints(4))
        rows = self.op("Mul", chunks.decay, self.mask(np.tri(CHUNK, k=-1), chunks.length))
        apart = self.op("MatMul", lower, rows)  # sums from one token to another, no differences
        between = self.op("Mul", self.op("Exp", apart), lower)
        solved = self.solved(chunks, total, between)
        before, after = self.states(solved, state, chunks.later)
        undone = self.op("MatMul", solved.undone, before)
        written = self.op("Sub", solved.written, undone)
        near = self.op("Mul", self.op("MatMul", chunks.query, self.turned(chunks.key)), between)
        far = self.op("Mul", chunks.query, self.op("Exp", total))
        read = self.op("Add", self.op("MatMul", far, before), self.op("MatMul", near, written))
        flat = self.op("Reshape", read, self.ints(1, self.heads, -1, self.values))
        return self.cut(flat, 0, self.count, axis=2), after

    @cached_property
    def count(self) -> ir.Value:
        """Tokens of the call: int64 [1]."""
        return self.op("Shape", self.inputs[0], start=2, end=3)

    def chunked(self) -> _Chunks:
        """The tokens in chunks, those of zeros behind the last: they change no state."""
        one, count = self.ints(1), self.count
        chunks = self.op("Div", self.op("Add", count, self.ints(CHUNK - 1)), self.ints(CHUNK))
        length = self.op("Div", self.op("Sub", self.op("Add", count, chunks), one), chunks)
        more = self.op("Sub", self.op("Mul", chunks, length), count)
        last = self.ints(-1)
        rates = (self.op("Unsqueeze", value, last) for value in self.inputs[3:5])
        packed = self.op("Concat", *self.inputs[:3], *rates, axis=-1)
        pads = self.op("Concat", self.ints(*(0,) * 6), more, self.ints(0), axis=0)
        sizes = self.keys, self.keys, self.values, 1, 1
        ends = self.ints(1, self.heads), self.ints(sum(sizes))
        shape = self.op("Concat", ends[0], chunks, length, ends[1], axis=0)
        whole = self.op("Reshape", self.op("Pad", packed, pads), shape)
        query, key, value, decay, rate = self.split(whole, sizes)
        later = self.op("Sub", chunks, one)
        return _Chunks(query, key, value, decay, rate, length, later)

    def solved(self, chunks: _Chunks, total: ir.Value, between: ir.Value) -> _Solved:
        """The triangular system of every chunk, solved for values and for keys."""
        weighed = self.op("Mul", chunks.key, chunks.rate)
        products = self.op("MatMul", weighed, self.turned(chunks.key))
        inverse = self.inverse(self.op("Mul", products, between), chunks.length)
        wanted = self.op("Mul", chunks.value, chunks.rate)
        since = self.op("Mul", weighed, self.op("Exp", total))
        right = self.op("Concat", wanted, since, axis=-1)
        found = self.op("MatMul", inverse, right)
        written, undone = self.split(found, (self.values, self.keys))
        last = self.cut(between, -1, END, axis=3)
        left = self.op("Mul", self.turned(chunks.key), last)
        kept = self.op("Exp", self.op("ReduceSum", chunks.decay, self.ints(3)))
        return _Solved(written, undone, left, kept)

    def inverse(self, system: ir.Value, length: ir.Value) -> ir.Value:
        """Of the unit lower triangular matrices whose other numbers are the system's."""
        found, rows = self.mask(np.eye(CHUNK), length), np.arange(CHUNK)
        size = 1
        while size < CHUNK:
            blocks, pairs = rows // size, rows // (2 * size)
            off = (pairs[:, None] == pairs) & (blocks[:, None] > blocks)
            part = self.op("Mul", system, self.mask(off, length))
            if size > 1:
                part = self.op("MatMul", self.op("MatMul", found, part), found)
            found, size = self.op("Sub", found, part), 2 * size
        return found

    def states(
        self, solved: _Solved, state: ir.Value, later: ir.Value
    ) -> tuple[ir.Value, ir.Value]:
        """The state before each chunk, [1, heads, chunks, key, value], and that after the last,
        [1, heads, key, value]."""
        first = [self.cut(x, 0, 1) for x in (solved.written, solved.undone, solved.left)]
        written = self.op("Sub", first[0], self.op("MatMul", first[1], state))
        kept = self.op("Mul", self.cut(solved.kept, 0, 1), state)
        second = self.op("Add", kept, self.op("MatMul", first[2], written))
        maps = self.composed(solved)
        turned, added = self.split(maps, (self.keys, self.values))
        ends = self.ints(1, self.heads), self.ints(self.keys, self.values)
        shape = self.op("Concat", ends[0], later, ends[1], axis=0)
        repeated = self.op("Expand", second, shape)  # a MatMul takes no 1 for 0
        others = self.op("Add", self.op("MatMul", turned, repeated), added)
        every = self.op("Concat", state, second, others, axis=2)
        last = self.op("Squeeze", self.cut(every, -1, END), self.ints(2))
        return self.cut(every, 0, -1), last

    def composed(self, solved: _Solved) -> ir.Value:
        """For each chunk but the first, what all from the second to it make of a state: a matrix
        [key, key] before it and one [key, value] added, side by side."""
        written, undone, left, kept = (
            self.cut(x, 1, END) for x in (solved.written, solved.undone, solved.left, solved.kept)
        )
        unit = self.constant(np.eye(self.keys))
        turned = self.op("Sub", self.op("Mul", kept, unit), self.op("MatMul", left, undone))
        found = self.op("Concat", turned, self.op("MatMul", left, written), axis=-1)
        added = self.constant(np.repeat([0.0, 1.0], [self.keys, self.values]))
        for step in (1 << number for number in range(self.steps)):
            later = self.cut(found, step, END)
            turned = self.cut(later, 0, self.keys, axis=4)
            moved = self.op("MatMul", turned, self.cut(found, 0, -step))
            made = self.op("Add", moved, self.op("Mul", later, added))
            found = self.op("Concat", self.cut(found, 0, step), made, axis=2)
        return found

    def op(self, operator: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        return self.tape.op(operator, inputs, attributes, metadata_props=dict(self._props))

    def constant(self, values: ArrayLike) -> ir.Value:
        return self.constants.value(np.asarray(values, np.float32))

    def ints(self, *values: int) -> ir.Value:
        return self.constants.value(np.array(values, np.int64))

    def mask(self, values: ArrayLike, length: ir.Value) -> ir.Value:
        """The first rows and columns of a matrix of zeros and ones for whole chunks."""
        ends = self.op("Concat", length, length, axis=0)
        return self.op("Slice", self.constant(values), self.ints(0, 0), ends, self.ints(0, 1))

    def cut(self, x: ir.Value, start: int, end: int | ir.Value, axis: int = 2) -> ir.Value:
        to = end if isinstance(end, ir.Value) else self.ints(end)
        return self.op("Slice", x, self.ints(start), to, self.ints(axis))

    def split(self, x: ir.Value, sizes: tuple[int, ...]) -> list[ir.Value]:
        """Along the last axis."""
        props = dict(self._props)
        found = self.tape.op_multi_out(
            "Split",
            [x, self.ints(*sizes)],
            {"axis": -1},
            num_outputs=len(sizes),
            metadata_props=props,
        )
        return list(found)

    def turned(self, x: ir.Value) -> ir.Value:
        """The last two of five axes the other way."""
        return self.op("Transpose", x, perm=[0, 1, 2, 4, 3])
