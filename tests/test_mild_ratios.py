"""Ratios so mild that a site drops or merges a token or two, of images of few tokens.

Sizes at such sites are 1 in a prefill and 0 in a decode step, which a tracer takes for constants.
Parity prefills, decodes and asks again, so an export that succeeds was right in all three.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TINY
from PIL import Image
from torch import Tensor, nn
from torch.export import Dim

from benchmarks.shapes import write
from edgeprune import policies
from edgeprune.bundle import Bundle
from edgeprune.cli import main
from edgeprune.errors import ExportError, ParityError, SpecError
from edgeprune.export.assumptions import check_sizes
from edgeprune.export.dialogue import Graphs
from edgeprune.making import make
from edgeprune.models import open_model
from edgeprune.models._eager import Eager
from edgeprune.models._processor import random_prompt
from edgeprune.policies._sizes import least
from edgeprune.recipe import Recipe
from edgeprune.runtime import Session
from edgeprune.runtime.sampling import Sampling
from edgeprune.spec import Plan, PruneSpec

RATIOS = 1.02, 1.1, 1.2, 1.3
VTW = 1.2, 4 / 3, 1.5
"""Of VTW, which drops all tokens after one of 3, 4 or 6 layers."""


def small(folder: Path, side: int, layers: int = 3) -> Path:
    """A checkpoint whose images have side x side tokens."""
    return write(replace(TINY, image=14 * side, layers=layers), folder / f"{side}x{layers}")


@pytest.mark.parametrize(("cr", "side"), [(1.02, 4), (1.3, 2)])
def test_a_site_that_merges_one_token_decodes_and_answers_twice(
    cr: float, side: int, tmp_path: Path
) -> None:
    model, bundle = small(tmp_path, side), tmp_path / "bundle"
    command = ["export", "--model", model, "--method", "sparsevlm", "-o", bundle]
    assert main([str(word) for word in [*command, "--cr", cr, "--parity", 2]]) == 0
    with Session.open(bundle) as session:
        sites = [stage for stage in session.manifest.prune.stages if stage.in_decoder]
        assert 1 in [stage.merged for stage in sites]
        few = Sampling(max_new_tokens=3)
        first = session.ask(Image.new("RGB", (56, 56), "teal"), "what is this ?", few)
        second = session.follow_up("and this ?", few)
    assert len(first.ids) == len(second.ids) == 3
    assert [len(kept) for kept in first.layer_kept] == [stage.survivors for stage in sites]


class Difference(nn.Module):
    """Multiplies by as many tokens as lie between two counts, taken apart or as one size."""

    def __init__(self, *, apart: bool) -> None:
        super().__init__()
        self.apart = apart

    def forward(self, tokens: Tensor) -> Tensor:
        live = tokens.shape[0]
        few, more = least(3, live), least(4, live)
        part = tokens[few:more] if self.apart else tokens.narrow(0, few, least(1, live))
        return part @ tokens.T


@pytest.mark.parametrize("apart", [True, False])
def test_a_size_that_the_tracer_froze_is_told(apart: bool) -> None:
    """Of 6 tokens and of none, as in a decode step."""
    shapes = ({0: Dim.DYNAMIC},)
    example = (torch.zeros(6, 8),)
    program = torch.export.export(Difference(apart=apart), example, dynamic_shapes=shapes)
    check_sizes(program, [{("tokens", 0): 6}])
    if apart:
        with pytest.raises(
            ExportError, match=r"froze a size of the graph .* tokens 0; nothing was"
        ):
            check_sizes(program, [{("tokens", 0): 6}, {("tokens", 0): 0}])
    else:
        check_sizes(program, [{("tokens", 0): 0}])


def test_what_onnx_runtime_says_of_a_graph_is_one_line_of_ours(
    copy_bundle: Callable[[], Path], tiny_checkpoint: Path
) -> None:
    """Of a graph that it cannot run with what it is given, and of one that it cannot load."""
    bundle, adapter = copy_bundle(), open_model(str(tiny_checkpoint))
    eager = Eager(adapter, policies.make(PruneSpec("none")), Plan(16, 3))
    records = Bundle.open(bundle).manifest.graphs
    graphs = Graphs(bundle, records, eager)
    with pytest.raises(
        ParityError, match=r"(?s)cannot run an exported graph .* nothing was written"
    ):
        graphs.outcomes([random_prompt((1, 3, 42, 42), 66, 0)])
    (bundle / "decoder.onnx").write_bytes(b"no graph")
    with pytest.raises(ParityError, match="cannot load an exported graph"):
        Graphs(bundle, records, eager)


@pytest.mark.slow
@pytest.mark.parametrize(("side", "layers"), [(2, 3), (3, 4), (4, 3), (5, 6), (8, 4)])
@pytest.mark.parametrize("method", [name for name in policies.names() if name != "none"])
def test_every_method_at_mild_ratios_on_few_tokens(
    method: str, side: int, layers: int, tmp_path: Path
) -> None:
    """Each export is compared with the eager reference in prefill, decode and a second turn."""
    model, planned, done = small(tmp_path, side, layers), set[Plan](), 0
    options = {"utr": "off"} if method == "utp" else {}  # the schedule of a calibration is no size
    target = "jetpack6" if side == 3 else "cpu"  # where a cache grows, too
    for cr in VTW if method == "vtw" else RATIOS:
        spec = PruneSpec(method, cr, options=options)
        try:
            plan = policies.make(spec).plan(open_model(str(model)).shape, cr)
            if plan in planned or not plan.stages:
                continue
            planned.add(plan)
            recipe = Recipe(spec, tmp_path / f"{cr}", str(model), target=target, dtype="fp32")
            exported = make(replace(recipe, parity=2))
        except SpecError:
            continue  # a ratio that this method cannot reach with so few tokens or layers
        record = exported.manifest.parity
        assert record.samples == 2 and record.ties == 0
        done += 1
    assert done, "no ratio was compared"
