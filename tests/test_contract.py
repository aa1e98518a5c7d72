"""Bundles from strangers: their hashes are right, their graphs and tokenizers are not."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from edgeprune import onnx_file
from edgeprune.bundle import Bundle
from edgeprune.errors import BundleError
from edgeprune.graph_contract import DECODER, JOIN, OPERATORS, VISION
from edgeprune.protobuf import block
from tests.conftest import Refused
from tests.hostile import edit_graph, end, replace_file, set_size
from tests.test_errors_bundle import QUESTION

Copy = Callable[[], Path]


def value(name: str, kind: int = TensorProto.FLOAT, sizes: Any = (1,)) -> Any:
    return helper.make_tensor_value_info(name, kind, sizes)


def body() -> Any:
    return helper.make_graph([], "body", [], [value("logits")])


def outside(location: str) -> Any:
    """A tensor whose bytes lie in another file."""
    tensor = TensorProto(name="stolen", data_type=TensorProto.FLOAT, dims=[4])
    tensor.data_location = TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", location
    return tensor


def add_node(*arguments: Any, **options: Any) -> Callable[[Any], object]:
    node = helper.make_node(*arguments, **options)
    return lambda model: model.graph.node.append(node)


def add_weight(location: str) -> Callable[[Any], object]:
    return lambda model: model.graph.initializer.append(outside(location))


def function(model: Any) -> None:
    opsets = [helper.make_opsetid("", 24)]
    node = helper.make_node("Abs", ["x"], ["y"])
    model.functions.append(helper.make_function("mine", "F", ["x"], ["y"], [node], opsets))


GRAPHS: dict[str, tuple[str, Callable[[Any], object], str]] = {
    "if": (
        DECODER,
        add_node("If", ["x"], ["y"], then_branch=body(), else_branch=body()),
        "bodies of control flow",
    ),
    "loop": (DECODER, add_node("Loop", ["x"], ["y"], body=body()), "bodies of control flow"),
    "scan": (VISION, add_node("Scan", ["x"], ["y"], body=body()), "bodies of control flow"),
    "loop without a body": (
        DECODER,
        add_node("Loop", ["x"], ["y"]),
        "operator Loop, which no bundle needs",
    ),
    "chance": (DECODER, add_node("RandomNormal", [], ["y"], shape=[1]), "RandomNormal"),
    "domain": (
        DECODER,
        add_node("Gelu", ["x"], ["y"], domain="com.microsoft"),
        "the operator com.microsoft.Gelu",
    ),
    "domains": (
        DECODER,
        lambda m: m.opset_import.append(helper.make_opsetid("com.microsoft", 1)),
        "operators of several domains",
    ),
    "a node without outputs": (
        DECODER,
        lambda m: m.graph.node[5].ClearField("output"),
        "without outputs",
    ),
    "functions": (DECODER, function, "it has functions"),
    "training": (VISION, lambda m: m.training_info.add(), "it has training"),
    "sparse": (
        VISION,
        lambda m: m.graph.sparse_initializer.append(onnx.SparseTensorProto()),
        "it has sparse tensors",
    ),
    "unlisted file": (VISION, add_weight("secret.bin"), "weights in 'secret.bin', not in weights"),
    "listed file": (DECODER, add_weight("tokenizer.json"), "weights in 'tokenizer.json'"),
    "parent": (DECODER, add_weight("../weights.bin"), "weights in '../weights.bin'"),
    "absolute": (DECODER, add_weight("/etc/passwd"), "weights in '/etc/passwd'"),
    "an address": (DECODER, add_weight("*/_ORT_MEM_ADDR_/*"), "weights in '*/_ORT_MEM_ADDR_/*'"),
    "a constant's file": (
        DECODER,
        add_node("Constant", [], ["y"], value=outside("secret.bin")),
        "weights in 'secret.bin'",
    ),
    "two files": (
        DECODER,
        lambda m: m.graph.initializer.append(
            TensorProto.FromString(
                outside("weights.bin").SerializeToString() + outside("b").SerializeToString()
            )
        ),
        "'stolen', which lies in no one file",
    ),
    "opset": (VISION, lambda m: setattr(m.opset_import[0], "version", 23), "opset is 23, the"),
    "no input": (DECODER, lambda m: m.graph.input.pop(), "it or the manifest lacks past_value.2"),
    "more outputs": (
        DECODER,
        lambda m: m.graph.output.append(value("more")),
        "it or the manifest lacks more",
    ),
    "an output twice": (
        VISION,
        lambda m: m.graph.output.append(m.graph.output[0]),
        "it or the manifest lacks features",
    ),
    "vocabulary": (
        DECODER,
        set_size("output", "logits", 2, 1 << 40),
        "logits: fp32 [1, 1, 1099511627776], the manifest logits: fp32 [1, 1, 66]",
    ),
    "pixels": (
        VISION,
        set_size("input", "pixels", 0, 1000),
        "pixels: fp32 [1000, 3, 56, 56], the manifest pixels: fp32 [1, 3, 56, 56]",
    ),
    "frozen": (
        DECODER,
        set_size("input", "text_ids", 1, 7),
        "it has text_ids: int64 [1, 7], the manifest text_ids: int64 [1, text]",
    ),
    "type": (
        JOIN,
        lambda m: setattr(end("output", "visual_indices")(m).type.tensor_type, "elem_type", 8),
        "it has visual_indices: type 8 [16], the manifest visual_indices: int64 [16]",
    ),
}


@pytest.mark.parametrize(("name", "change", "says"), GRAPHS.values(), ids=GRAPHS.keys())
def test_a_graph_that_no_export_writes(
    name: str,
    change: Callable[[Any], object],
    says: str,
    copy_bundle: Copy,
    refused: Refused,
) -> None:
    edit_graph(bundle := copy_bundle(), name, change)
    (bundle / "secret.bin").write_bytes(bytes(16))
    line = refused("run", bundle, *QUESTION)
    assert f"{bundle / name} is not the graph of manifest.json (" in line and says in line, line
    assert line.endswith("export it again\n")


def test_no_command_opens_such_a_graph(copy_bundle: Copy, refused: Refused) -> None:
    name, change, says = GRAPHS["loop"]
    edit_graph(bundle := copy_bundle(), name, change)
    for command in ("check", "bench", "build"):
        assert says in refused(command, bundle)


def graph_of(data: bytes) -> bytes:
    return onnx.ModelProto.FromString(data).graph.SerializeToString()


BYTES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda data: b"", "it is empty"),
    "cut": (lambda data: data[: len(data) // 2], "is cut off"),
    "text": (lambda data: b"no graph at all", "is not the graph of"),
    "two graphs": (lambda data: data + block(7, graph_of(data)), "a model has its field 7 twice"),
    "a group": (lambda data: data + b"\x0b\x0c", "starts no protobuf field"),
    "another field": (lambda data: data + block(99, b""), "field 99 of wire type 2"),
    "another type": (lambda data: data + b"\x38\x01", "field 7 of wire type 0"),
    "no text": (lambda data: data + block(8, block(1, b"\xff")), "is not the graph of"),
    "endless number": (lambda data: data + b"\x08" + b"\xff" * 20, "has no end"),
    "longer than all": (lambda data: data + b"\x12\xff\xff\xff\xff\xff\xff\xff\x7f", "is cut off"),
}


@pytest.mark.parametrize(("change", "says"), BYTES.values(), ids=BYTES.keys())
def test_bytes_that_are_no_graph(
    change: Callable[[bytes], bytes], says: str, copy_bundle: Copy, refused: Refused
) -> None:
    bundle = copy_bundle()
    replace_file(bundle, VISION, change((bundle / VISION).read_bytes()))
    assert says in refused("run", bundle, *QUESTION)


def test_a_graph_of_endless_nodes(
    copy_bundle: Copy, monkeypatch: pytest.MonkeyPatch, refused: Refused
) -> None:
    monkeypatch.setattr(onnx_file, "FIELDS", 10_000)
    bundle = copy_bundle()
    data = (bundle / VISION).read_bytes()
    model = onnx.ModelProto.FromString(data)
    model.graph.node.extend([onnx.NodeProto()] * 20_000)
    replace_file(bundle, VISION, model.SerializeToString())
    assert "it has more than 10,000 fields" in refused("run", bundle, *QUESTION)


def test_what_an_export_writes_is_what_is_read(tiny_jetpack7: Path, tiny_bundle: Path) -> None:
    """The reader sees what the onnx package sees."""
    for file in [
        bundle / name for bundle in (tiny_jetpack7, tiny_bundle) for name in (VISION, DECODER)
    ]:
        graph, model = onnx_file.read(file), onnx.load(file, load_external_data=False)
        allowed = OPERATORS | {onnx_file.GROUP_QUERY, onnx_file.SKIP_NORM}
        assert graph.operators == {node.op_type for node in model.graph.node} <= allowed
        assert graph.opset == model.opset_import[0].version
        assert graph.files == {"weights.bin"}
        for ends, values in (
            (graph.inputs, model.graph.input),
            (graph.outputs, model.graph.output),
        ):
            assert [end.name for end in ends] == [found.name for found in values]
            for one, found in zip(ends, values, strict=True):
                dims = found.type.tensor_type.shape.dim
                assert one.sizes == tuple(d.dim_value or d.dim_param for d in dims)


def test_a_hard_link_is_a_file_like_any_other(copy_bundle: Copy, tmp_path: Path) -> None:
    """It cannot be told from a copy; its size and hash are checked as a copy's are."""
    weights = copy_bundle() / "weights.bin"
    os.link(weights, tmp_path / "elsewhere")
    Bundle.open(weights.parent, verify=True)
    with (tmp_path / "elsewhere").open("r+b") as stream:
        stream.write(b"altered")
    with pytest.raises(BundleError, match="was altered"):
        Bundle.open(weights.parent)
