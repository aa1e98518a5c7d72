"""`check` on a bundle: one graph broken per rule, asked of the table and of TensorRT-RTX itself."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from onnx import TensorProto, helper

from edgeprune.cli import main
from edgeprune.export._graph import Graph
from edgeprune.export.check import check_graph, check_model, find
from edgeprune.export.rules import OPSETS, RULES, TARGETS, Version
from edgeprune.runtime import parsers
from edgeprune.runtime import trt as seam
from tests.conftest import Refused
from tests.rule_graphs import Case, cases

CASES = {f"{case.operator} {case.says}": case for case in cases()}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def verdict(model: Any) -> str:
    """+ or - for every target."""
    return "".join("-+"[found.accepted] for found in check_model(model))


def broken(case: Case) -> list[Any]:
    """The rules that a case is about."""
    return [r for r in RULES if case.operator in r.operators and case.says in r.says]


def test_every_rule_has_a_graph_that_breaks_it() -> None:
    covered = [rule for case in CASES.values() for rule in broken(case)]
    assert sorted(rule.says for rule in covered) == sorted(rule.says for rule in RULES)
    assert all(rule.source for rule in RULES)


@each_case
def test_a_graph_that_breaks_one_rule(case: Case) -> None:
    assert verdict(case.graph(broken=True)) == case.verdict
    good = dict(zip((t.names[0] for t in TARGETS), verdict(case.graph(broken=False)), strict=True))
    assert all(good[name] == "+" for name in ("trt-11.5", "trt-rtx-1.7", "ort-1.31"))
    (problem,) = (p for p in find(Graph.of(case.graph(broken=True))) if case.says in p.says)
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
    [(18, (10, 0)), (21, (10, 6)), (23, (10, 11)), (24, (10, 15)), (25, (11, 5)), (26, None)],
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
    assert any(says in problem.says for problem in check_model(model)[0].problems)


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
    for name in ("vision.onnx", "decoder.onnx"):
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
    assert "takes both graphs" in out
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
    manifest = json.loads((bundle / "manifest.json").read_text())
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
    from edgeprune.bundle import Bundle

    monkeypatch.setattr("edgeprune.memory.available_bytes", lambda: 1000)
    for parser in parsers.ask(Bundle.open(tiny_jetpack7)):
        assert not parser.asked
        assert "are free" in parser.refusal


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
