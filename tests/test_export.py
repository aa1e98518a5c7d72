"""Exported graphs: static, checked, named, equal to their eager reference; or not there at all."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx.external_data_helper import load_external_data_for_model

from edgeprune.bundle import Bundle
from edgeprune.calib.samples import demo_samples
from edgeprune.cli import main
from edgeprune.errors import ParityError
from edgeprune.export.exporter import ExportRequest, export
from edgeprune.models import open_model
from edgeprune.models._processor import Processor, random_prompt
from edgeprune.onnx_file import GROUP_QUERY, SKIP_NORM
from edgeprune.policies import make
from edgeprune.spec import PruneSpec, plan_from_counts
from tests.conftest import Refused
from tests.essence import essence
from tests.frozen import compared
from tests.graphs import NEVER, sized_by_data


def graphs(bundle: Path) -> list[onnx.ModelProto]:
    return [
        onnx.load(bundle / f"{name}.onnx", load_external_data=False)
        for name in ("vision", "join", "decoder")
    ]


def test_graphs_pass_the_checker_and_hold_no_data_dependent_shape(demo_utp: Path) -> None:
    for model in graphs(demo_utp):
        assert not {node.op_type for node in model.graph.node} & NEVER
        assert not sized_by_data(model.graph)
        own = {node.op_type for node in model.graph.node if node.domain}
        assert own <= {GROUP_QUERY, SKIP_NORM}, "standard operators, but for those of a CPU"
        domains = [("", 24), *([("com.microsoft", 1)] if own else [])]
        assert [(o.domain, o.version) for o in model.opset_import] == domains
    for name in ("vision", "join", "decoder"):
        onnx.checker.check_model(str(demo_utp / f"{name}.onnx"), full_check=True)


def test_every_k_is_constant_or_a_minimum_with_the_live_tokens(demo_utp: Path) -> None:
    model = graphs(demo_utp)[-1]
    makers = {output: node for node in model.graph.node for output in node.output}
    constants = {tensor.name for tensor in model.graph.initializer}
    selections = [node for node in model.graph.node if node.op_type == "TopK"]
    assert len(selections) == 2 * len(Bundle.open(demo_utp).manifest.graph.kept) - _drops(demo_utp)
    for node in selections:
        source = makers[node.input[1]]
        while source.op_type in ("Reshape", "Unsqueeze", "Cast", "Concat", "Squeeze", "Gather"):
            source = makers[source.input[0]]
        assert source.op_type == "Min", f"{node.name}: K comes from {source.op_type}"
        assert any(name in constants or makers[name].op_type == "Constant" for name in source.input)


def _drops(bundle: Path) -> int:
    """TopK nodes that sites keeping nothing do without: two each."""
    counts = Bundle.open(bundle).manifest.prune.counts
    return 2 * sum(1 for a, b in itertools.pairwise(counts) if a > b == 0)


def test_nodes_carry_the_names_of_their_modules(demo_utp: Path) -> None:
    vision, _, decoder = graphs(demo_utp)
    names = [node.name for node in decoder.graph.node]
    assert len(set(names)) == len(names)
    sites = [site.layer or 0 for site in Bundle.open(demo_utp).manifest.graph.kept]
    kept = [f"layers.{n - 1}/prune/topk" for n in sites]
    assert set(kept[:-1]) <= set(names)
    assert "layers.3/mlp.gate/matmul" in names
    assert "encoder.blocks.0/query/matmul" in {node.name for node in vision.graph.node}


def test_weights_are_stored_once_and_as_the_graph_says(demo_utp: Path) -> None:
    adapter = open_model("demo")
    model = graphs(demo_utp)[-1]
    load_external_data_for_model(model, str(demo_utp))
    found = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    stored = adapter.checkpoint.read("language_model.model.layers.5.mlp.up_proj.weight")
    np.testing.assert_array_equal(found["layers.5.mlp.up.weight"], stored.float().numpy().T)


@pytest.mark.parametrize("count", essence([50, 200], ["50"]))
def test_the_pruned_bundle_equals_its_eager_reference(count: int, demo_utp: Path) -> None:
    adapter = open_model("demo")
    counts = Bundle.open(demo_utp).manifest.prune.counts
    policy, plan = make(PruneSpec("utp", 4)), plan_from_counts(144, counts)
    prompts = [sample.prompt for sample in demo_samples(Processor(adapter), count)]
    checked = compared(demo_utp, adapter, policy, prompts, plan)
    assert checked.samples == count
    assert checked.logits <= 1e-4
    assert checked.ties <= count // 50, "ties are rare; many would hide a fault"


@pytest.mark.parametrize("cr", [1.5, 2, 8, 16])
def test_utp_reaches_the_ratio_asked_for(cr: float, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    command = ["export", "--cr", f"{cr}", "--samples", "3", "--parity", "0"]
    assert main([*command, "-o", str(bundle)]) == 0
    prune = Bundle.open(bundle).manifest.prune
    assert prune.cr_reached == pytest.approx(cr, rel=0.01)
    assert prune.counts[0] == min(144, round(4 * 144 / cr))
    assert prune.schedule is not None
    assert 0 < prune.schedule["bound"] <= prune.schedule["objective"]


@pytest.mark.parametrize("counts", [(16, 8, 1), (16, 1, 0), (2, 1, 1), (1, 1, 1)])
def test_layers_may_keep_one_token_or_none(
    counts: tuple[int, ...], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """A decode step has no visual token, whatever a layer keeps of an image's."""
    adapter = open_model(str(tiny_checkpoint))
    cr = 48 / sum(counts)
    spec, plan = PruneSpec("utp", cr), plan_from_counts(16, counts)
    processor = Processor(adapter)
    request = ExportRequest("tiny", spec, plan, tmp_path / "bundle")
    prompts = [random_prompt((1, 3, 56, 56), adapter.shape.vocabulary, seed) for seed in range(2)]
    exported = export(request, adapter, make(spec), processor, prompts)

    assert exported.manifest.parity.samples == 2


@pytest.mark.parametrize("method", ["random", "uniform"])
def test_controls_pass_parity(method: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    options = ["--model", str(tiny_checkpoint), "--method", method, "--cr", "4"]
    bundle = tmp_path / "bundle"
    assert main(["export", *options, "-o", str(bundle), "--parity", "2"]) == 0
    manifest = Bundle.open(bundle).manifest
    assert manifest.parity.samples == 2
    assert manifest.prune.counts == (4, 4, 4)


def test_half_precision_passes_parity(tiny_checkpoint: Path, tmp_path: Path) -> None:
    options = ["--model", str(tiny_checkpoint), "--method", "none", "--dtype", "fp16"]
    bundle = tmp_path / "bundle"
    assert main(["export", *options, "-o", str(bundle), "--parity", "2"]) == 0
    manifest = Bundle.open(bundle).manifest
    assert manifest.dtype == "fp16"
    assert manifest.parity.logits < 1e-4


def test_a_graph_that_disagrees_is_found_out(demo_utp: Path) -> None:
    """The reference prunes by another rule here, so kept sets or logits must differ."""
    adapter = open_model("demo")
    plan = plan_from_counts(144, Bundle.open(demo_utp).manifest.prune.counts)
    policy = make(PruneSpec("utp", 4, options={"agnostic_layers": "0"}))
    prompts = [sample.prompt for sample in demo_samples(Processor(adapter), 4)]
    with pytest.raises(ParityError, match=r"keeps other tokens .* in decoder layers\.1"):
        compared(demo_utp, adapter, policy, prompts, plan)


def test_a_bundle_tells_the_seed_that_its_tokens_were_drawn_with(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Refused
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["export", "--model", str(tiny_checkpoint), "--cr", "2", "--parity", "0", "--method"]
    for options, seed in ((["--seed", "7"], 7), (["--set", "seed=8"], 8), ([], 0)):
        assert main([*command, "random", *options]) == 0
        ending = f"-seed{seed}" if seed else ""
        assert Bundle.open(Path(f"out/tiny-random-cr2{ending}")).manifest.prune.seed == seed
    assert main([*command, "uniform", "--seed", "7"]) == 0
    assert Bundle.open(Path("out/tiny-uniform-cr2")).manifest.prune.seed is None
    assert "a whole number from 0, below 2^63; got -1" in refused(*command, "random", "--seed=-1")
