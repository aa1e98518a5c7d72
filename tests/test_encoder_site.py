"""Patches that leave the encoder: which they are, how they come back, and graphs that do so."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.schedules import planned
from benchmarks.shapes import write
from edgeprune import encoder_methods
from edgeprune.bundle import Bundle
from edgeprune.cli import main
from edgeprune.encoder_methods._choices import SiteSignals, contrast, diverse
from edgeprune.export.check import check_graph
from edgeprune.lowering import TARGETS
from edgeprune.models import Adapter, open_model
from edgeprune.models._encoder_site import EncoderSite, ExitMap, SiteConfig, Units
from edgeprune.models._layers import compute_buffers
from edgeprune.models._ops import TorchOps
from edgeprune.models._processor import Processor
from edgeprune.models._vision_tower import Tower
from edgeprune.models._windows import Windows
from edgeprune.policies import make
from edgeprune.policies._select import max_min
from edgeprune.spec import PruneSpec
from tests.conftest import Refused
from tests.encoder_sites import DENSE, TOWERS, bundle, site_of
from tests.essence import essence
from tests.tiny import TINY

EXIT = "exit:at=1:keep=0.5"


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint with three blocks in its tower, of which two are run."""
    return write(replace(TINY, vision_layers=3), tmp_path_factory.mktemp("deep") / "tiny")


@given(st.integers(2, 40), st.integers(1, 3), st.data())
def test_one_at_a_time_is_max_min_and_several_are_as_many(count: int, groups: int, data) -> None:
    seed = data.draw(st.integers(0, 99))
    keep = data.draw(st.integers(1, count - 1))
    tokens = torch.randn(groups, count, 8, generator=torch.Generator().manual_seed(seed))
    one = diverse(tokens, keep, step=1)
    for row, marks in zip(tokens, one, strict=True):
        assert marks.nonzero()[:, 0].tolist() == max_min(row, keep).tolist()
    for step in (2, 8, 64):
        assert diverse(tokens, keep, step).sum(1).tolist() == [keep] * groups


def test_a_weight_turns_the_choice_and_takes_nothing_twice() -> None:
    tokens = torch.eye(6)[None]  # all as unlike
    weight = torch.tensor([[1.0, 2.0, 3.0, 6.0, 5.0, 4.0]])
    assert diverse(tokens, 3, 8, weight)[0].tolist() == [0, 0, 0, 1, 1, 1]
    alike = torch.ones(1, 6, 4)  # nothing is unlike: still as many
    assert diverse(alike, 4, 2, weight)[0].sum() == 4


def test_contrast_is_the_distance_to_the_median_colour() -> None:
    pixels = torch.randn(2, 3, 12, 20, generator=torch.Generator().manual_seed(1))
    found = contrast(pixels, 3, 5, 4).numpy()
    for tile, wanted in zip(pixels.numpy(), found, strict=True):
        quarters = tile.reshape(3, 6, 2, 10, 2).mean((2, 4))
        colours = np.stack(
            [
                quarters[:, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2].ravel()
                for r in range(3)
                for c in range(5)
            ]
        )
        median = np.sort(colours, axis=0)[7]  # of 15
        assert np.allclose(np.abs(colours - median).mean(1), wanted, atol=1e-6)


@pytest.mark.parametrize("grid", [(8, 8), (6, 10)])
def test_units_are_squares_and_windows_hold_whole_ones(grid: tuple[int, int]) -> None:
    windows = Windows.of(grid, 4)
    units = Units.of(windows.order, grid, 2, windows.runs)
    assert sorted(units.patches) == list(range(grid[0] * grid[1]))
    assert sorted(units.tokens) == list(range(units.count))
    for token, members in zip(units.tokens, units.members, strict=True):
        cells = {divmod(windows.order[index], grid[1]) for index in members}
        top, left = (2 * part for part in divmod(token, grid[1] // 2))
        assert cells == {(top + r, left + c) for r in (0, 1) for c in (0, 1)}
    first = 0
    for number, size in units.runs:
        for _ in range(number):
            rows = [units.members[unit] for unit in range(first, first + size)]
            flat = sorted(index for row in rows for index in row)
            assert flat == list(range(4 * first, 4 * (first + size)))
            first += size


def test_what_leaves_comes_back_to_its_place() -> None:
    """With a map that changes nothing, splitting and joining is no change at all."""
    windows = Windows.of((6, 10), 4)
    method = encoder_methods.make("exit:keep=0.4:by=diverse")
    assert method is not None
    same = ExitMap(torch.eye(8), torch.zeros(8))
    config = SiteConfig(method, Units.of(windows.order, (6, 10), 2, windows.runs), same)
    site = EncoderSite(config, TorchOps())
    compute_buffers(site, torch.float32)
    states = torch.randn(3, 60, 8)
    kept, split = site.split(states)
    assert kept.shape == (3, 4 * config.kept_units, 8)
    assert torch.equal(site.rejoin(kept, split, 0), states)
    rows = site.rows(split.chosen)
    assert torch.equal(states.gather(1, rows[..., None].expand(-1, -1, 8)), kept)
    assert torch.allclose(
        split.removed_states,
        states.gather(1, site.rows(split.removed)[..., None].expand(-1, -1, 8)),
    )


def _features(adapter: Adapter, pixels: Tensor) -> Tensor:
    plan = planned(make(DENSE), adapter.shape, 1)
    with torch.device("meta"):
        vision = adapter.vision(make(DENSE), plan)
    tower = adapter.load(vision).get_submodule("encoder")
    assert isinstance(tower, Tower)
    found: Tensor = tower(pixels).features
    return found


def test_all_that_go_on_is_the_dense_encoder(deep: Path) -> None:
    """Were every patch to go on, the features would be the dense ones: rows and order are right."""
    adapter = open_model(str(deep))
    pixels = torch.randn(adapter.pixels, generator=torch.Generator().manual_seed(0))
    wanted = _features(adapter, pixels)
    site = replace(site_of(adapter, EXIT), method=_All(at=1, keep=0.5, by="diverse"))
    assert torch.allclose(_features(adapter.with_encoder(site), pixels), wanted, atol=1e-5)


class _All(encoder_methods.load("exit")):  # type: ignore[misc]
    """Keeps every unit."""

    def kept(self, units: int) -> int:
        return units

    def choose(self, signals: SiteSignals) -> Tensor:
        return torch.ones(signals.hidden.shape[:2])


ALWAYS = ("qwen2_5_vl", "qwen3_vl")
EACH = essence(TOWERS, ALWAYS)


@pytest.mark.parametrize("name", EACH)
def test_every_tower_equals_its_reference(name: str, tmp_path: Path) -> None:
    adapter = TOWERS[name](tmp_path / "tiny")
    texts = ("exit:at=0:keep=0.4", "exit:at=1:keep=0.3:step=2")
    for text in texts[name in ALWAYS :]:
        made = bundle(adapter, text, tmp_path).manifest
        assert (made.parity.samples, made.parity.ties) == (2, 0)
        assert 0 < made.encoder.kept < made.encoder.units
        assert made.encoder.operations < made.encoder.dense_operations


@pytest.mark.parametrize("name", ALWAYS)
def test_a_window_and_a_row_are_those_of_each_patch(name: str, tmp_path: Path) -> None:
    """Were all patches to go on, unit by unit: rotary rows, windows and middle blocks are right."""
    adapter = TOWERS[name](tmp_path / "tiny")
    pixels = torch.randn(adapter.pixels, generator=torch.Generator().manual_seed(0))
    wanted = _features(adapter, pixels)
    site = replace(site_of(adapter, EXIT), method=_All(at=1, keep=0.5, by="diverse"))
    found = _features(adapter.with_encoder(site), pixels)
    assert torch.allclose(found, wanted, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["exit", "drop"])
def test_windows_may_keep_different_numbers(kind: str, tmp_path: Path) -> None:
    """Chosen among all of an image. Where all patches go on, the mask is the windows themselves."""
    adapter = TOWERS["qwen2_5_vl"](tmp_path / "tiny")
    text = f"{kind}:at=0:keep=0.4:windows=joint"
    made = bundle(adapter, text, tmp_path).manifest
    assert (made.parity.samples, made.parity.ties) == (2, 0)
    assert made.encoder.kept == round(0.4 * made.encoder.units)
    if kind == "drop":
        return
    pixels = torch.randn(adapter.pixels, generator=torch.Generator().manual_seed(0))
    every = _All(at=0, keep=0.5, by="diverse", windows="joint")
    site = replace(site_of(adapter, text), method=every)
    wanted, found = (_features(a, pixels) for a in (adapter, adapter.with_encoder(site)))
    assert torch.allclose(found, wanted, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize("method", ["utp", "fastervlm", "divprune"])
def test_methods_go_with_it(method: str, deep: Path, tmp_path: Path) -> None:
    """Those that rank by the last block get that of the last one before the exit."""
    adapter = open_model(str(deep))
    made = bundle(adapter, EXIT, tmp_path, PruneSpec(method, 2)).manifest
    assert made.parity.samples == 2
    assert made.prune.visual_tokens == 16


@pytest.mark.parametrize("target", ["jetpack7", pytest.param("jetpack6", marks=pytest.mark.slow)])
def test_engines_take_it(target: str, deep: Path, tmp_path: Path) -> None:
    made = bundle(open_model(str(deep)), EXIT, tmp_path, target=target, samples=1)
    assert made.manifest.range is not None  # scores of a choice, beyond float16, are float32
    verdicts = [v for v in check_graph(made.file("vision.onnx")) if target in v.target.names]
    assert verdicts and not any(v.problems for v in verdicts)
    assert main(["build", str(made.path), "--backend", "trt-rtx", "--text-capacity", "64"]) == 0


def test_the_map_is_ridge_regression_of_what_the_dense_encoder_says(instruct: Path) -> None:
    """On the demo: it explains what it never saw, and is the least squares of what it saw."""
    from edgeprune.calib.encoder_loss import angle, features
    from edgeprune.calib.exit_map import _Sums, fit
    from edgeprune.calib.samples import demo_samples

    adapter = open_model("demo")
    prompts = [one.prompt for one in demo_samples(Processor(adapter), 10)]
    site = adapter.encoder_site(encoder_methods.make("exit:at=2"))  # type: ignore[arg-type]
    found, r2 = fit(adapter, site, prompts)
    assert r2 > 0.8  # on two images that the map of the other eight never saw
    dense, plain = features(adapter, prompts[:4]), adapter.with_encoder(adapter.unfitted(site))
    fitted = adapter.with_encoder(replace(site, exit_map=found))
    ours, without = (angle(features(a, prompts[:4]), dense) for a in (fitted, plain))
    assert 0.001 < ours < 0.2 and ours < 0.5 * without
    x, y = torch.randn(300, 5), torch.randn(300, 3)
    y += x @ torch.randn(5, 3)
    sums = _Sums.none(5, 3)
    sums.add(x[:100], y[:100])
    sums.add(x[100:], y[100:])
    solved = torch.linalg.lstsq(torch.cat([x, torch.ones(300, 1)], 1), y).solution
    assert torch.allclose(sums.solve().weight, solved[:-1], atol=5e-3)
    left = (y - x @ sums.solve().weight - sums.solve().bias).square().sum()
    assert sums.r2(sums.solve()) == pytest.approx(
        1 - float(left / (y - y.mean(0)).square().sum()), abs=1e-5
    )


REFUSED = [
    ("exit:at=9", "from 0 to 4"),
    ("exit:keep=1.5", "above 0 and below 1"),
    ("exit:at=0:by=cls", "looks at a block that has been run"),
    ("exit:by=luck", "by is one of"),
    ("exit:windows=all", "windows is each or joint"),
    ("drop:windows=joint", "attends within several windows, which this one does not"),
    ("exit:when=1", "takes at=, keep="),
    ("exit:at=x", "takes a int"),
    ("exit:at=1:at=2", "gives at twice"),
    ("", "has no method ''"),
    ("leave:at=1", "choose one of: dense"),
    ("exit:keep=0.999", "keeps all of 144"),
]


@pytest.mark.parametrize(("text", "why"), REFUSED)
def test_what_cannot_be_is_refused_in_a_line(text: str, why: str, refused: Refused) -> None:
    assert why in refused("export", "--encoder", text, "--method", "none")


def test_methods_that_need_a_block_are_refused_before_it_runs(refused: Refused, deep: Path) -> None:
    model = ["--model", deep]
    line = refused("export", *model, "--encoder", "exit", "--method", "fastervlm", "--cr", 2)
    assert "looks at the attention of an encoder block" in line
    line = refused("export", *model, "--encoder", EXIT, "--method", "tome", "--cr", 2)
    assert "leaves the encoder's blocks as they are" in line
    line = refused("export", *model, "--encoder", EXIT, "--method", "none")
    assert "--samples-file" in line


def test_more_units_than_engines_rank_are_refused(
    refused: Refused, deep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is calibrated; engines that rank 8 stand for those that rank 3,840."""
    few = replace(TARGETS["jetpack7"], topk_limit=8)
    monkeypatch.setitem(TARGETS, "jetpack7", few)
    options = ["--encoder", EXIT, "--method", "none", "--target", "jetpack7"]
    line = refused("export", "--model", deep, *options)
    assert "ranks 16 visual tokens at once" in line and "8 at most" in line


def test_a_loss_above_the_limit_is_refused_and_told(
    refused: Refused, deep: Path, instruct: Path, tmp_path: Path
) -> None:
    options = ["--model", deep, "--samples-file", instruct, "--method", "none"]
    line = refused("export", *options, "--encoder", f"{EXIT}:limit=0.0001")
    assert "radians on 5 samples, at most 0.0001" in line
    output = tmp_path / "b"
    command = [*map(str, options), "--encoder", f"{EXIT}:limit=3", "--parity", "1"]
    assert main(["export", *command, "-o", str(output)]) == 0
    record = Bundle.open(output).manifest.encoder
    assert record.method == f"{EXIT}:by=salient:limit=3.0" and record.samples == 5
    assert record.r2 is not None and record.angle is not None and 0 < record.angle < 3
    assert (record.kept, record.units, record.blocks) == (8, 16, 2)
