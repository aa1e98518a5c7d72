"""`check` on a bundle: one graph broken per rule, asked of the table and of TensorRT-RTX itself."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from edgeprune.bundle import Bundle
from edgeprune.cli import main
from edgeprune.export._graph import Graph
from edgeprune.export._rule import Version
from edgeprune.export.check import check_graph, check_model, find
from edgeprune.export.rules import OPSETS, RULES, TARGETS
from edgeprune.runtime import parsers
from edgeprune.runtime import trt as seam
from tests.conftest import Refused
from tests.hostile import edit_graph
from tests.rule_graphs import Case, cases

CASES = {f"{case.operator} {case.says}": case for case in cases()}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def verdict(model: Any) -> str:
    """+ or - for every target."""
    return "".join("-+"[found.accepted] for found in check_model(model))


def broken(case: Case) -> list[Any]:
    """The rules that a case is about."""
    return [r for r in RULES if case.operator in r.operators and case.says in r.message]


def test_every_rule_has_a_graph_that_breaks_it() -> None:
    covered = [rule for case in CASES.values() for rule in broken(case)]
    assert sorted(rule.message for rule in covered) == sorted(rule.message for rule in RULES)
    assert all(rule.source for rule in RULES)


@each_case
def test_a_graph_that_breaks_one_rule(case: Case) -> None:
    assert verdict(case.graph(broken=True)) == case.verdict
    good = dict(zip((t.names[0] for t in TARGETS), verdict(case.graph(broken=False)), strict=True))
    assert all(good[name] == "+" for name in ("trt-11.5", "trt-rtx-1.7", "ort-1.31"))
    (problem,) = (p for p in find(Graph.of(case.graph(broken=True))) if case.says in p.message)
    assert problem.node == f"it ({case.operator})"
    assert problem.source


@each_case
def test_tensorrt_rtx_says_what_the_table_says(case: Case) -> None:
    """It parses and compiles what the table calls accepted, and refuses the rest."""
    if sys.platform != "linux":
        pytest.importorskip("tensorrt_rtx")
    trt = seam.load("trt-rtx")
    assert compiles(trt, case.graph(broken=False), case)
    if not any(rule.source.startswith("edgeprune build") for rule in broken(case)):
        assert compiles(trt, case.graph(broken=True), case) == (case.verdict[-2] == "+")


def compiles(trt: Any, model: Any, case: Case) -> bool:
    logger = seam.quiet_logger(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(seam.strongly_typed(trt))
    parser = trt.OnnxParser(network, logger)
    for value in (*model.graph.input, *model.graph.output):
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param:
                size.dim_value = 16
    if not parser.parse(model.SerializeToString()):
        return False
    seam.let_fall_back(trt, network)
    config = builder.create_builder_config()
    watch = seam.monitor(trt, "", lambda step, done, total: None)
    return not case.compiles or seam.compiled(builder, network, config, watch) is not None


def one_node(operator: str, kind: int, opset: int, domain: str = "") -> Any:
    node = helper.make_node(operator, ["x"], ["y"], name="it", domain=domain)
    ends = [helper.make_tensor_value_info(name, kind, (4, 4)) for name in "xy"]
    graph = helper.make_graph([node], "one", ends[:1], ends[1:])
    opsets = [helper.make_opsetid(name, opset) for name in {"", domain}]
    return helper.make_model(graph, opset_imports=opsets)


@pytest.mark.parametrize(
    ("opset", "first"),
    [
        (18, (10, 0)),
        (21, (10, 0)),
        (22, (10, 6)),
        (23, (10, 11)),
        (24, (10, 15)),
        (25, (11, 5)),
        (26, None),
    ],
)
def test_opsets_by_version(opset: int, first: Version | None) -> None:
    found = check_model(one_node("Abs", TensorProto.FLOAT16, opset))
    for one in (v for v in found if v.target.engine == "trt"):
        assert one.first == first
        assert one.accepted == (first is not None and one.target.version >= first)
    assert set(OPSETS) == {target.engine for target in TARGETS}


@pytest.mark.parametrize(
    ("operator", "kind", "domain", "says", "verdict_is"),
    [
        ("Det", TensorProto.FLOAT, "", "Det is no operator that the parser knows", "-------+"),
        ("Gelu", TensorProto.FLOAT, "com.microsoft", "com.microsoft.Gelu is no", "-------+"),
        ("Abs", TensorProto.UINT8, "", "Abs takes no uint8", "-------+"),
        ("Mish", TensorProto.BFLOAT16, "", "Mish takes no bfloat16", "-------+"),
        ("HannWindow", TensorProto.INT64, "", "HannWindow is not known yet", "-+++++++"),
    ],
)
def test_operators_and_element_types(
    operator: str, kind: int, domain: str, says: str, verdict_is: str
) -> None:
    model = one_node(operator, kind, 18, domain)
    assert verdict(model) == verdict_is
    assert any(says in problem.message for problem in check_model(model)[0].problems)


def test_branches_are_looked_into() -> None:
    model = one_node("Abs", TensorProto.FLOAT, 18)
    branches = {}
    for branch, operator in [("then_branch", "Det"), ("else_branch", "Abs")]:
        out = helper.make_tensor_value_info(branch, TensorProto.FLOAT, None)
        node = helper.make_node(operator, ["x"], [branch], name=f"in {branch}")
        branches[branch] = helper.make_graph([node], branch, [], [out])
    del model.graph.node[:]
    model.graph.node.append(helper.make_node("If", ["asked"], ["y"], name="if", **branches))
    model.graph.initializer.append(helper.make_tensor("asked", TensorProto.BOOL, [], [True]))
    assert verdict(model) == "-------+"
    assert {p.node for v in check_model(model) for p in v.problems} == {"in then_branch (Det)"}


def test_weights_are_not_read(tiny_jetpack7: Path, tmp_path: Path) -> None:
    for name in ("vision.onnx", "join.onnx", "decoder.onnx"):
        alone = tmp_path / name
        alone.write_bytes((tiny_jetpack7 / name).read_bytes())
        assert [v.accepted for v in check_graph(alone)] == [False] * 3 + [True] * 5


def test_a_bundle_and_its_targets(tiny_jetpack7: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(tiny_jetpack7), "--target", "jetpack7", "--target", "rtx"]) == 0
    capsys.readouterr()
    assert main(["check", str(tiny_jetpack7), "--target", "jetpack6"]) == 1
    out = capsys.readouterr().out
    assert "layers.0/tensorscatter (TensorScatter) and 5 more" in out
    assert "(TensorRT before 10.15)" in out
    assert "takes all graphs" in out
    assert main(["check", str(tiny_jetpack7), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    accepted = {row["names"][0]: row["accepted"] for row in record["targets"]}
    assert [name for name, yes in accepted.items() if not yes] == [
        "trt-10.3",
        "trt-10.7",
        "trt-10.13",
    ]
    assert record["refused"] == []


def test_a_bundle_for_the_cpu_is_for_no_tensorrt(
    tiny_jetpack7: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = tmp_path / "b"
    shutil.copytree(tiny_jetpack7, bundle)
    edit_graph(bundle, "decoder.onnx", lambda model: model.graph.output.pop(1))  # `token`
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["graphs"]["decoder.onnx"]["outputs"].pop(1)
    (bundle / "manifest.json").write_text(json.dumps(manifest | {"target": "cpu"}))
    assert main(["check", str(bundle), "--target", "rtx"]) == 1
    assert "no output `token`" in capsys.readouterr().out
    assert main(["check", str(bundle), "--target", "cpu"]) == 0


def test_an_installed_parser_has_a_say(
    tiny_jetpack7: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = [("rtx", "1.7.1.1", True, "no such layer"), ("trt", "10.16.0", False, "no GPU")]
    found = [parsers.Parser(e, f"{e} {v}", v, asked, why) for e, v, asked, why in answers]
    monkeypatch.setattr(parsers, "ask", lambda bundle: found)
    assert main(["check", str(tiny_jetpack7), "--target", "jetpack7"]) == 0
    assert "trt 10.16.0, asked here: could not be asked: no GPU" in capsys.readouterr().out
    assert main(["check", str(tiny_jetpack7), "--target", "rtx"]) == 1
    assert "rtx 1.7.1.1 itself: no such layer" in capsys.readouterr().out


def test_a_parser_is_not_asked_where_weights_do_not_fit(
    tiny_jetpack7: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if sys.platform != "linux":
        pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr("edgeprune.memory.available_bytes", lambda: 1000)
    asked, refusal = parsers.answer(seam.load("trt-rtx"), Bundle.open(tiny_jetpack7))
    assert not asked and "are free" in refusal


def test_a_parser_that_dies_of_a_graph_is_told(
    tiny_jetpack7: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """TensorRT-RTX 1.7.1's is ended by SIGSEGV where k of a TopK is a list that the graph makes."""
    if sys.platform != "linux":
        pytest.importorskip("tensorrt_rtx")

    def swap(model: Any) -> None:
        tops = [node for node in model.graph.node if node.op_type == "TopK"]
        tops[1].input[:] = reversed(tops[1].input)

    bundle = Path(shutil.copytree(tiny_jetpack7, tmp_path / "bundle"))
    edit_graph(bundle, "decoder.onnx", swap)
    assert main(["check", str(bundle), "--target", "jetpack7"]) == 0
    said = capsys.readouterr().out.splitlines()[-1]
    assert (
        said.startswith("TensorRT-RTX ") and "its parser died of this bundle (exit code -" in said
    )
    assert main(["check", str(tiny_jetpack7)]) == 0
    assert capsys.readouterr().out.endswith(", asked here: takes all graphs\n")


def test_what_check_refuses(
    copy_bundle: Callable[[], Path], tiny_jetpack7: Path, refused: Refused
) -> None:
    assert "jetpack6" in refused("check", tiny_jetpack7, "--target", "jetpack5")
    assert "name one" in refused("check", "--target", "rtx")
    assert "together" in refused("check", "--memory")
    assert "together" in refused("check", "--model", "demo")
    damaged = copy_bundle() / "decoder.onnx"
    damaged.write_bytes(b"\xff" * damaged.stat().st_size)
    assert "decoder.onnx" in refused("check", damaged.parent)


def graph_of(nodes: list[Any], tensors: Sequence[Any] = ()) -> Any:
    """A model from x [4, 4] and k [1] to y."""
    ends = [helper.make_tensor_value_info("x", TensorProto.FLOAT, (4, 4))]
    ends.append(helper.make_tensor_value_info("k", TensorProto.INT64, (1,)))
    out = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    graph = helper.make_graph(nodes, "hostile", ends, out, initializer=tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])


def chain(operator: str, length: int, first: str) -> list[Any]:
    """`length` nodes, each of the one before, twice; their last value is `last`."""
    names = [first, *(f"v{n}" for n in range(length - 1)), "last"]
    return [helper.make_node(operator, [name, name], [after]) for name, after in pairwise(names)]


def topk(size: str) -> Any:
    return helper.make_node("TopK", ["x", size], ["y", "at"], name="it")


def beside(location: str) -> Any:
    tensor = TensorProto(name="size", data_type=TensorProto.INT64, dims=[1])
    tensor.data_location = TensorProto.EXTERNAL
    for key, text in (("location", location), ("offset", "0"), ("length", "8")):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, text
    return tensor


def untyped(model: Any) -> Any:
    model.graph.node[0].attribute.add(name="to")
    return model


def of_type(model: Any, number: int) -> Any:
    model.graph.input[0].type.tensor_type.elem_type = number
    return model


SIZE = helper.make_tensor("k0", TensorProto.INT64, [1], [5000])
HOSTILE: dict[str, tuple[Any, str]] = {
    "doubled": (graph_of([*chain("Add", 4000, "k0"), topk("last")], [SIZE]), ""),
    "deep": (graph_of([*chain("Min", 4000, "k0"), topk("last")], [SIZE]), "at most 3840"),
    "cycle": (
        graph_of([helper.make_node("Min", ["last", "k"], ["last"]), topk("last")]),
        "",
    ),
    "constant without a value": (
        graph_of([helper.make_node("Constant", [], ["c"]), topk("c")]),
        "",
    ),
    "constant without an output": (
        graph_of([helper.make_node("Constant", [], [], value=SIZE), topk("k")]),
        "",
    ),
    "no outputs": (graph_of([helper.make_node("Det", ["x"], [])]), "node 0 (Det)"),
    "nothing at all": (graph_of([onnx.NodeProto()]), "node 0 ()"),
    "unknown type": (of_type(graph_of([topk("k")]), 99), "TopK takes no element type 99"),
    "attribute without a type": (untyped(graph_of([helper.make_node("Cast", ["x"], ["y"])])), ""),
    "sizes of no size": (
        graph_of([topk("k0")], [TensorProto(name="k0", data_type=7, dims=[1], raw_data=b"abc")]),
        "",
    ),
    "sizes without end": (
        graph_of([topk("k0")], [TensorProto(name="k0", data_type=7, dims=[1 << 40])]),
        "",
    ),
    "endless outputs": (
        graph_of([helper.make_node("Split", ["x"], ["y"], num_outputs=1 << 62)]),
        "",
    ),
    "negative sizes": (
        graph_of([topk("k0")], [TensorProto(name="k0", data_type=7, dims=[-1])]),
        "",
    ),
}


@pytest.mark.parametrize(("model", "says"), HOSTILE.values(), ids=HOSTILE.keys())
def test_a_file_of_any_origin(
    model: Any, says: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A verdict, at once; what TensorRT's tables say of it where there is something to say."""
    (tmp_path / "any.onnx").write_bytes(model.SerializeToString())
    assert main(["check", str(tmp_path / "any.onnx")]) == 0
    out, err = capfd.readouterr()
    assert "ONNX Runtime 1.31" in out and says in out and not err


def test_a_size_in_another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is read where it lies beside the graph, and nowhere else."""
    (graphs := tmp_path / "graphs").mkdir()
    for folder in (tmp_path, graphs):
        (folder / "size.bin").write_bytes((5000).to_bytes(8, "little"))
    (graphs / "link.bin").symlink_to(tmp_path / "size.bin")
    monkeypatch.chdir(tmp_path)
    told = {}
    for location in ("size.bin", "../size.bin", str(tmp_path / "size.bin"), "link.bin", "no", "\0"):
        (file := graphs / "any.onnx").write_bytes(
            graph_of([topk("size")], [beside(location)]).SerializeToString()
        )
        told[location] = any("3840" in p.message for v in check_graph(file) for p in v.problems)
    assert [location for location, found in told.items() if found] == ["size.bin"]


@pytest.mark.parametrize("data", [b"", b"text", b"\x08\x01", b"\xff" * 99], ids=range(4))
def test_a_file_that_is_no_model(data: bytes, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "any.onnx").write_bytes(data)
    assert "any.onnx is no ONNX model (" in refused("check", tmp_path / "any.onnx")
