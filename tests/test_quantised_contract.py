"""Bundles from strangers whose quantised weights contradict what their nodes say of them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from onnx import TensorProto, helper

from edgeprune.graph_contract import DECODER, VISION
from tests.conftest import Refused
from tests.frozen import frozen
from tests.hostile import edit_graph
from tests.test_errors_bundle import QUESTION

Edit = Callable[[Any], object]
NAME = "layers.1.mlp.down.weight"


@pytest.fixture(scope="module")
def bundles(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("quantised")
    return {
        name: frozen(
            folder / name,
            "none",
            model=tiny_checkpoint,
            target=target,
            dtype=dtype,
            weights=weights,
        )
        for name, target, dtype, weights in (
            ("cpu", "cpu", "fp32", "int4"),
            ("rtx", "rtx", "fp16", "int4"),
            ("integers", "cpu", "fp32", "int8:activations=on"),
        )
    }


def node(model: Any) -> Any:
    """The node that reads one weight's codes."""
    return next(node for node in model.graph.node if NAME in node.input)


def tensor(model: Any, name: str = NAME) -> Any:
    return next(tensor for tensor in model.graph.initializer if tensor.name == name)


def says(name: str, value: int) -> Edit:
    """An attribute of another value."""

    def edit(model: Any) -> None:
        found = node(model)
        kept = [entry for entry in found.attribute if entry.name != name]
        del found.attribute[:]
        found.attribute.extend([*kept, helper.make_attribute(name, value)])

    return edit


def sized(*dims: int, name: str = NAME) -> Edit:
    return lambda model: tensor(model, name).dims.__setitem__(slice(None), dims)


def typed(kind: int, name: str = NAME) -> Edit:
    return lambda model: setattr(tensor(model, name), "data_type", kind)


ATTRIBUTES = "has attributes that no export writes"
SCALE = f"{NAME}/scale"
MIDDLE = "integers/uint8/128"
CASES: dict[str, tuple[str, Edit, str]] = {
    "more inputs": ("cpu", says("K", 1 << 40), "has codes uint8 [64, 3, 16] and scales"),
    "more outputs": ("cpu", says("N", 1 << 40), "want uint8 [1099511627776, 3, 16] and"),
    "no inputs": ("cpu", says("K", 0), ATTRIBUTES),
    "negative": ("cpu", says("N", -64), ATTRIBUTES),
    "three bits": ("cpu", says("bits", 3), ATTRIBUTES),
    "odd block": ("cpu", says("block_size", 24), ATTRIBUTES),
    "other block": ("cpu", says("block_size", 16), "want"),
    "level": ("cpu", says("accuracy_level", 9), ATTRIBUTES),
    "unknown attribute": ("cpu", says("weight_prepacked", 1), ATTRIBUTES),
    "fewer codes": ("cpu", sized(64, 1, 16), "want"),
    "signed codes": ("cpu", typed(TensorProto.INT8), "want"),
    "fewer scales": ("cpu", sized(64, 1, name=SCALE), "want"),
    "whole scales": ("cpu", typed(TensorProto.INT64, name=SCALE), "want"),
    "zero points": (
        "cpu",
        lambda m: node(m).input.append(SCALE),
        "has zero points fp32 [64, 3], want uint8 [64, 2]",
    ),
    "no scales": ("cpu", lambda m: node(m).input.pop(), "has not the inputs that exports write"),
    "codes of an input": (
        "cpu",
        lambda m: node(m).input.__setitem__(1, "position"),
        "reads what is no constant",
    ),
    "a name twice": (
        "cpu",
        lambda m: m.graph.initializer.append(tensor(m)),
        "two tensors of one name",
    ),
    "another operator": (
        "cpu",
        lambda m: setattr(node(m), "op_type", "MatMulBnb4"),
        "it has the operator com.microsoft.MatMulBnb4",
    ),
    "another version": (
        "cpu",
        lambda m: setattr(m.opset_import[-1], "version", 2),
        "operators of several domains",
    ),
    "integers: more codes": ("integers", sized(96, 32), "scales fp32 [64], want"),
    "integers: three axes": ("integers", sized(1, 96, 64), "want a matrix"),
    "integers: unsigned": ("integers", typed(TensorProto.UINT8), "uint8 [96, 64], want"),
    "integers: fewer scales": ("integers", sized(32, name=SCALE), "scales fp32 [32], want"),
    "integers: half scales": (
        "integers",
        typed(TensorProto.FLOAT16, name=SCALE),
        "scales fp16 [64], want",
    ),
    "integers: no zero point": ("integers", lambda m: node(m).input.pop(), "not as exports write"),
    "integers: attribute": ("integers", says("K", 3), "not as exports write"),
    "integers: many zero points": (
        "integers",
        sized(1, name=MIDDLE),
        "zero point uint8 [1], want []",
    ),
    "integers: rounded to int8": ("integers", typed(TensorProto.INT8, name=MIDDLE), "int8"),
    "DQ: more codes": ("rtx", sized(1 << 20, 64), "want"),
    "DQ: three axes": ("rtx", sized(1, 96, 64), "want a matrix"),
    "DQ: floats": ("rtx", typed(TensorProto.FLOAT16), "want int4, int8 or fp8"),
    "DQ: fewer scales": ("rtx", sized(1, 64, name=SCALE), "want"),
    "DQ: block": ("rtx", says("block_size", 64), "has blocks of 64 in 96 inputs"),
    "DQ: no block": ("rtx", says("block_size", 0), ATTRIBUTES),
    "DQ: axis": ("rtx", says("axis", 1), ATTRIBUTES),
    "DQ: type": ("rtx", says("output_dtype", 1), ATTRIBUTES),
    "DQ: zero points": (
        "rtx",
        lambda m: node(m).input.append(SCALE),
        "has not the inputs that exports write",
    ),
}


@pytest.mark.parametrize(("target", "change", "why"), CASES.values(), ids=CASES.keys())
def test_codes_that_do_not_fit_are_refused(
    target: str,
    change: Edit,
    why: str,
    bundles: dict[str, Path],
    tmp_path: Path,
    refused: Refused,
) -> None:
    bundle = Path(shutil.copytree(bundles[target], tmp_path / "bundle"))
    edit_graph(bundle, DECODER, change)
    line = refused("run", bundle, *QUESTION)
    assert f"{bundle / DECODER} is not the graph of manifest.json (" in line and why in line, line


def test_the_operator_of_onnx_runtime_is_for_a_cpu_alone(
    bundles: dict[str, Path], tmp_path: Path, refused: Refused
) -> None:
    bundle = Path(shutil.copytree(bundles["rtx"], tmp_path / "bundle"))

    def fuse(model: Any) -> None:
        model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
        model.graph.node.append(
            helper.make_node("MatMulNBits", ["pixels"], ["y"], domain="com.microsoft")
        )

    edit_graph(bundle, VISION, fuse)
    assert "operator MatMulNBits, which no bundle needs" in refused("run", bundle, *QUESTION)
