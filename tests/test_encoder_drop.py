"""Patches that leave the encoder for good: which tokens are left, and what is pruned of these."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.shapes import write
from edgeprune import encoder_methods, policies
from edgeprune.bundle import Bundle
from edgeprune.calib.schedule import read_schedule
from edgeprune.cli import main
from edgeprune.encoder_methods._choices import SiteSignals
from edgeprune.errors import ScheduleError, SpecError
from edgeprune.models import Adapter, open_model
from edgeprune.models._layout import Layout
from edgeprune.models._vision import Vision
from edgeprune.policies import make
from edgeprune.spec import ModelShape, PruneSpec, Stage, check_cr
from tests.conftest import Refused
from tests.encoder_sites import STAYS, TOWERS, bundle, site_of
from tests.essence import essence
from tests.tiny import TINY

DROP = "drop:at=1:keep=0.5"
ALWAYS = ("qwen2_5_vl", "qwen3_vl", "llava_next")  # windows; middle blocks; tiles read in turns
DROPPING = [name for name in TOWERS if name not in STAYS]


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint with three blocks in its tower, of which two are run."""
    return write(replace(TINY, vision_layers=3), tmp_path_factory.mktemp("deep") / "tiny")


def seen(adapter: Adapter, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Visual tokens [1, n, width] and their indices among the V."""
    policy = make(PruneSpec("none"))
    with torch.device("meta"):
        vision = adapter.vision(policy, policy.unpruned(adapter.shape))
    loaded = adapter.load(vision)
    assert isinstance(loaded, Vision)
    visual, indices, _ = loaded(pixels)
    return visual, indices


@pytest.mark.parametrize("name", essence(DROPPING, ALWAYS))
def test_what_is_left_is_what_an_exit_lets_go_on(name: str, tmp_path: Path) -> None:
    """With an exit of the same choice, tokens of the patches that go on are the same, in the same
    places; where patches are averaged an exit chooses single ones, so nothing leaves there."""
    adapter = TOWERS[name](tmp_path / "tiny")
    pixels = torch.randn(adapter.pixels, generator=torch.Generator().manual_seed(0))
    averaged = adapter.vision_config.layout.pool == "mean"
    joint = [(0, "diverse:windows=joint")] if name == "qwen2_5_vl" else []
    for at, by in ((0, "diverse"), (1, "diverse"), (1, "pixels"), *joint):
        method = f":at={at}:keep=0.4:by={by}"
        site = site_of(adapter, f"drop{method}")
        ours = adapter.with_encoder(site)
        if averaged:
            ours = adapter.with_encoder(replace(site, method=_All(at=at, keep=0.4, by=by)))
            whole, every = seen(adapter, pixels)
        else:
            whole, every = seen(adapter.with_encoder(site_of(adapter, f"exit{method}")), pixels)
        visual, indices = seen(ours, pixels)
        assert len(every) == adapter.shape.visual_tokens
        assert len(indices) == (len(every) if averaged else ours.shape.after_encoder)
        assert bool((indices.diff() > 0).all())
        assert set(adapter.vision_config.layout.fixed) <= set(indices.tolist())
        wanted = whole.index_select(1, indices)
        assert torch.allclose(visual, wanted, atol=1e-4 * float(whole.abs().max()))


class _All(encoder_methods.load("drop")):  # type: ignore[misc]
    """Keeps every unit."""

    def kept(self, units: int) -> int:
        return units

    def choose(self, signals: SiteSignals) -> Tensor:
        return torch.ones(signals.hidden.shape[:2])


@pytest.mark.parametrize("name", essence(DROPPING, ("qwen3_vl",)))
def test_every_tower_equals_its_reference(name: str, tmp_path: Path) -> None:
    adapter = TOWERS[name](tmp_path / "tiny")
    made = bundle(adapter, "drop:at=1:keep=0.4:by=diverse", tmp_path, samples=4).manifest
    assert (made.parity.samples, made.parity.ties) in ((4, 0), (4, 1))  # random images
    assert made.prune.stages[0] == Stage("encoder", made.prune.counts[0])
    assert made.prune.counts[0] < made.prune.visual_tokens
    assert made.encoder.operations < made.encoder.dense_operations


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", [n for n in policies.names() if n not in ("none", "tome", "vtw")]
)
def test_methods_choose_among_what_is_left(method: str, deep: Path, tmp_path: Path) -> None:
    """At CR 2.5 of all V tokens, of which half left the encoder."""
    adapter = open_model(str(deep))
    made = bundle(adapter, DROP, tmp_path, PruneSpec(method, 2.5)).manifest
    assert made.parity.samples == 2
    assert (made.prune.visual_tokens, made.prune.stages[0].survivors) == (16, 8)
    check_cr(made.prune.plan, 2.5)


@pytest.mark.slow
def test_tiles_have_their_shares_of_what_is_left(tmp_path: Path) -> None:
    adapter = TOWERS["video_llava"](tmp_path / "tiny")  # 4 frames of 9 patches and [CLS]
    made = bundle(adapter, "drop:at=1:keep=0.5", tmp_path, PruneSpec("cdpruner", 3)).manifest
    assert (made.parity.samples, made.prune.stages[0].survivors) == (2, 4 * (4 + 1))
    assert adapter.vision_config.layout.left_groups(4) == tuple(
        tile for tile in range(4) for _ in range(5 + (tile == 0) - (tile == 3))
    )  # a [CLS] counts to the tile before it


def test_padding_tiles_and_groups_of_a_layout() -> None:
    turns = Layout(2, 2, 1, (0, 1, 4, 5, -1, 2, 3, 6, 7, -1), (1, 10), newline=True)
    assert turns.why_whole == "" and not turns.by_tile
    units = torch.tensor([[1, 2], [0, 3]])  # of both tiles
    assert turns.left_indices(units).tolist() == [1, 4, 2, 7]
    assert "padding" in replace(turns, order=turns.order[1:]).why_whole
    assert "resized" in replace(turns, pool="resize").why_whole
    assert "in turns" in Layout(2, 1, 1, (1, 0), (1, 2)).why_whole


def test_a_ratio_counts_all_tokens() -> None:
    shape = ModelShape("llava", 100, (10, 10), 4, 8, 16, 4, 2, 8, 66, 512, True, after_encoder=40)
    assert make(PruneSpec("none")).unpruned(shape).counts == (40,) * 4
    plan = make(PruneSpec("fastervlm", 5)).plan(shape, 5)
    assert plan.counts == (20,) * 4 and plan.cr == 5
    assert [stage.site for stage in plan.stages] == ["encoder", "vision"]
    assert make(PruneSpec("utp")).entry_tokens(shape, 4) == 40  # 4 V / CR would be all 100
    assert make(PruneSpec("utp")).entry_tokens(shape, 20) == 20
    with pytest.raises(
        SpecError, match=r"leaves 40 of 100 visual tokens, which is CR 2\.5 already"
    ):
        make(PruneSpec("fastv", 2)).plan(shape, 2)


@pytest.mark.slow
@pytest.mark.parametrize(("positions", "taken"), [("renumber", 8), ("keep", 16), ("auto", 16)])
def test_tokens_are_renumbered_or_keep_their_positions(
    positions: str, taken: int, deep: Path, tmp_path: Path
) -> None:
    spec = PruneSpec("none", options={"positions": positions})
    made = bundle(open_model(str(deep)), DROP, tmp_path, spec).manifest
    assert made.decoder.image_positions == taken and made.parity.samples == 2


def test_tokens_keep_their_positions_unless_the_method_numbers_its_own_anew() -> None:
    shape = ModelShape("llava", 100, (10, 10), 4, 8, 16, 4, 2, 8, 66, 512, True, after_encoder=40)
    for method, keeps in (("none", True), ("dpp", True), ("fastervlm", False)):
        policy = make(PruneSpec(method, 5))
        plan = policy.unpruned(shape) if method == "none" else policy.plan(shape, 5)
        assert (plan.keeps_positions, plan.span) == (keeps, 100 if keeps else 20)


@pytest.mark.parametrize("name", STAYS)
def test_patches_stay_where_tokens_need_all_of_them(name: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=f"{STAYS[name]}.*choose exit"):
        site_of(TOWERS[name](tmp_path / "tiny"), DROP)


def test_what_cannot_be_is_refused_in_a_line(refused: Refused, deep: Path, tmp_path: Path) -> None:
    export = "export", "--model", deep, "--encoder", DROP
    assert "which is CR 2 already" in refused(*export, "--method", "fastv", "--cr", 1.5)
    assert "leaves the encoder's blocks as they are" in refused(*export, "--method", "tome")
    assert "prunes nothing" in refused(*export, "--method", "none", "--cr", 4)
    line = refused(*export, "--method", "fastv", "--cr", 4)
    assert "so --cr is at most 1.41, not 2" in line and "--cr 4 is CR 2 of these" in line
    adapter = TOWERS["llava_next"](tmp_path / "next")
    ours = adapter.with_encoder(site_of(adapter, DROP))
    policy = make(PruneSpec("dpp", 4))
    with pytest.raises(SpecError, match="leaves open which tile"):
        ours.decoder(policy, policy.plan(ours.shape, 4))


def test_a_schedule_is_of_what_is_left(deep: Path, instruct: Path, tmp_path: Path) -> None:
    """The real command: calibrated behind the drop, its loss told, several ratios in one bundle."""
    output, model = tmp_path / "b", ["--model", str(deep), "--samples-file", str(instruct)]
    encoder = ["--encoder", f"{DROP}:limit=3", "--parity", "1"]
    command = ["export", *model, *encoder, "--method", "utp", "--cr", "3,4", "-o", str(output)]
    assert main(command) == 0
    made = Bundle.open(output).manifest
    first, second = (ratio.prune for ratio in made.ratios)
    assert (first.counts[0], second.counts[0]) == (8, 8)  # min(8, 4 V / CR)
    assert (sum(first.counts), sum(second.counts)) == (16, 12)
    assert made.encoder.r2 is None and 0 < (made.encoder.angle or 0) < 3
    assert first.schedule is not None and first.schedule["visual_tokens"] == 8
    file = tmp_path / "dense.json"
    assert main(["calibrate", *model, "--cr", "2", "-o", str(file)]) == 0
    adapter = open_model(str(deep))
    ours = adapter.with_encoder(site_of(adapter, DROP))
    with pytest.raises(ScheduleError, match=r"made for 16 visual tokens.* this is 8, 3"):
        read_schedule(file, ours.shape, 4)


def test_each_method_has_a_limit_of_its_own() -> None:
    """By what was lost on the demo at each angle."""
    exits, drops = map(encoder_methods.make, ("exit", "drop"))
    assert exits is not None and drops is not None
    assert (exits.limit, drops.limit) == (0.13, 0.19)
    assert str(encoder_methods.make("drop:limit=0.13")).endswith("limit=0.13")
