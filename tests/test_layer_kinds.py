"""Budgets of time, and few sites, where layers are of two kinds with a table of times each."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from edgeprune.bundle import Bundle
from edgeprune.calib.ttft import Measured, open_costs
from edgeprune.cli import main
from edgeprune.errors import SpecError
from edgeprune.models import Adapter, open_model
from edgeprune.policies import make
from edgeprune.spec import PruneSpec
from edgeprune.tiling import Size
from edgeprune.timing import KindTimes, Profile, Profiled
from tests import lfm2, qwen35
from tests.test_timing import PROFILE, table

SIDES = {"convolution": 64, "linear attention": 256}
"""Of an image, by what the other layers have: 16 and 64 visual tokens."""


@pytest.fixture(scope="module", params=SIDES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    """Three layers, of which the one in the middle has attention."""
    folder = tmp_path_factory.mktemp("kinds") / "tiny"
    if request.param == "convolution":
        lfm2.lfm2_vl(("conv", "full_attention", "conv")).save(folder)
    else:
        kinds = "linear_attention", "full_attention", "linear_attention"
        folder = qwen35.checkpoint(folder, kinds=kinds)
    side = SIDES[request.param]
    return open_model(str(folder), size=Size(side, side))


def profile_of(adapter: Adapter) -> Profile:
    """Layers by themselves take 1 or 2 ms with one token, with all 2 or 8: together 4 and 12."""
    shape, encoder = adapter.shape, adapter.vision_config.encoder
    patches = (adapter.pixels[2] // encoder.patch) * (adapter.pixels[3] // encoder.patch)
    last, sizes = shape.visual_tokens, (shape.layers, shape.width, shape.mlp_width)
    other = list(SIDES)[shape.linear is not None]
    return replace(
        PROFILE,
        model=Profiled(*(shape.family, *sizes, last, encoder.blocks, patches, 1, "fp32", "float")),
        prefill=table([1, last], [6, 36]),
        sites=tuple(KindTimes(one.kind, table([1, last], [0.5, 2])) for one in PROFILE.sites),
        layers=(
            KindTimes(other, table([1, last], [1, 2])),
            KindTimes("attention", table([1, last], [2, 8])),
        ),
    )


def test_layers_take_their_kinds_share_of_a_prefill(model: Adapter) -> None:
    costs = open_costs(model, profile_of(model), make(PruneSpec("utp", 2)))
    last = model.shape.visual_tokens
    assert isinstance(costs, Measured)
    assert [costs.layer(n, last) for n in (1, 2, 3)] == pytest.approx([6, 24, 6])
    assert [costs.layer(n, 1) for n in (1, 2, 3)] == pytest.approx([1.5, 3, 1.5])
    assert costs.prefill((last, last, last)) == pytest.approx(36)
    assert costs.prefill((last, last, 1)) == pytest.approx(6 + 24 + 1.5 + 2)
    times = costs.times()  # layers 1 and 2 have one count; a unit is 36 / 3 / 512
    assert times.units[:, last].tolist() == [1280, 256]
    assert times.units[1, 1] == 64 and times.falls[0, last] == 86 and len(times.falls) == 1


def test_a_profile_without_a_kind_is_refused(model: Adapter) -> None:
    bare = replace(profile_of(model), layers=())
    with pytest.raises(SpecError, match="no times of decoder layers with attention; it has none"):
        open_costs(model, bare, make(PruneSpec("utp", 2)))


def test_a_time_and_few_sites_are_kept(model: Adapter, instruct: Path, tmp_path: Path) -> None:
    file, last = tmp_path / "p.json", model.shape.visual_tokens
    file.write_text(profile_of(model).to_json())
    side = model.pixels[2]
    options = ["--model", str(model.checkpoint.folder), "--image-size", f"{side}x{side}"]
    options += ["--samples-file", str(instruct), "--samples", "2"]
    asked = 3 + 20 + 35  # read, preprocess, vision; with all tokens everywhere prefill takes 36
    command = ["--ttft", str(asked), "--profile", str(file), "--encoder", "dense"]
    output = tmp_path / "b"
    assert main(["export", *options, *command, "--parity", "0", "-o", str(output)]) == 0
    manifest = Bundle.open(output).manifest
    assert manifest.timing is not None and manifest.timing.predicted <= asked
    first, second, third = manifest.prune.counts
    assert last >= first == second > third
    shares = [max(0, count - 1) / (last - 1) for count in (first, third)]  # from one token to all
    other, behind = ((6 + 30 * s) * (1 + s) / (4 + 8 * s) for s in shares)
    attention = (6 + 30 * shares[0]) * (2 + 6 * shares[0]) / (4 + 8 * shares[0])
    chosen = 0.5 + 1.5 * shares[0]
    assert manifest.timing.prefill == pytest.approx(other + attention + chosen + behind)
    schedule = tmp_path / "s.json"
    few = ["--method", "utp", "--cr", "1.3", "--max-sites", "1", "-o", str(schedule)]
    assert main(["calibrate", *options, *few]) == 0
    counts = json.loads(schedule.read_text())["counts"]
    assert counts[0] == counts[1] == last > counts[2]
