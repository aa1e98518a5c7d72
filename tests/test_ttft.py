"""`profile`, `plan` and `export --ttft`: from times on a machine to a bundle within a time."""

from __future__ import annotations

import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from onnxruntime import InferenceSession

from edgeprune import cost
from edgeprune.bundle import Bundle
from edgeprune.calib.ttft import Costs, Operations, menu, open_costs
from edgeprune.cli import main
from edgeprune.errors import SpecError
from edgeprune.models import open_model
from edgeprune.models._reference import Reference
from edgeprune.policies import make
from edgeprune.runtime.backends._ort import OrtBackend
from edgeprune.spec import Plan, PruneSpec
from edgeprune.timing import Profile, read_profile
from tests.conftest import Refused
from tests.encoder_sites import site_of
from tests.qwen import windowed_checkpoint
from tests.test_timing import PROFILE
from tests.tiny import TINY


@pytest.fixture
def made_up(tmp_path: Path) -> Path:
    """A profile with times that are easy to count with."""
    file = tmp_path / "made-up.json"
    file.write_text(PROFILE.to_json())
    return file


def test_a_profile_has_every_part_and_the_models_sizes(profilable: Path, tmp_path: Path) -> None:
    file = tmp_path / "p.json"
    command = ["profile", str(profilable), "-o", str(file), "--rounds", "1", "--warmup", "0"]
    assert main([*command, "--text", "32"]) == 0
    found = read_profile(file)
    assert found.model == PROFILE.model
    assert found.prefill.counts[-1] == 16 and found.block.counts[-1] == 17
    assert found.windowed is None and found.text_tokens == 32 and not found.layers
    assert [one.kind for one in found.sites] == [
        "query=last, one position",
        "query=last",
        "query=text, one position",
        "query=text",
    ]
    assert all(one.table.counts[-1] == 16 for one in found.sites)
    assert {one.kind: one.table.counts for one in found.choices} == {
        f"{name}:by={by}": (4, 12) for name in ("drop", "exit") for by in ("pixels", "salient")
    }
    parts = found.read, found.preprocess, found.vision, *found.prefill.measured, found.whole
    parts += tuple(one for table in found.tables for one in table.measured)
    assert all(0 < one.low <= one.ms <= one.high for one in parts)
    assert {"processor", "power", "onnxruntime", "edgeprune"} <= found.machine.keys()


def test_the_block_is_that_of_the_encoder(deep_tower: Path, profilable: Path) -> None:
    """With any number of patches, of several tiles, as the eager block says."""
    adapter, spec = open_model(str(deep_tower)), PruneSpec("none")
    plan = Plan(adapter.shape.visual_tokens, adapter.shape.layers)
    block = Reference.build(adapter, make(spec), plan).vision.get_submodule("encoder.blocks.1")
    session = InferenceSession(str(profilable / "encoder_block.onnx"))
    for tiles, patches in ((1, 17), (3, 5), (2, 1)):
        hidden = torch.randn(tiles, patches, TINY.vision_width)
        wanted = block(hidden, None, lambda key: None)[0]
        rows = np.zeros((tiles, patches), np.int64)  # of no rotary table here
        (found,) = session.run(None, {"hidden": hidden.numpy(), "rows": rows})
        assert np.allclose(found, wanted.numpy(), atol=1e-5)


def test_a_windowed_block_is_timed_too(tmp_path: Path) -> None:
    output, file = tmp_path / "b", tmp_path / "p.json"
    model = ["--model", str(windowed_checkpoint(tmp_path / "tiny")), "--image-size", "224x112"]
    options = ["--method", "none", "--profilable", "--parity", "0"]
    assert main(["export", *model, *options, "-o", str(output)]) == 0
    command = ["profile", str(output), "-o", str(file), "--rounds", "1", "--warmup", "0"]
    assert main(command) == 0
    found = read_profile(file)
    assert found.windowed is not None and found.windowed.counts[-1] == 64


def test_what_is_no_dense_profilable_bundle_is_refused(
    tiny_bundle: Path, profilable: Path, refused: Refused, tmp_path: Path
) -> None:
    file = tmp_path / "p.json"
    assert "--profilable" in refused("profile", tiny_bundle, "-o", file)
    line = refused("profile", profilable, "-o", file, "--backend", "trt")
    assert "timed by edgeprune bench" in line
    assert "--rounds is at least 1" in refused("profile", profilable, "-o", file, "--rounds", 0)
    assert "--text is at least 6; got 5" in refused("profile", profilable, "-o", file, "--text", 5)
    assert re.search(
        r"has \d+ positions, \d+ of them for the image; --text is at most \d+; got 99999",
        refused("profile", profilable, "-o", file, "--text", 99999),
    )


def test_idle_threads_leave_the_cores_to_the_next_graph(demo_dense: Path) -> None:
    """ONNX Runtime's threads wait for work by spinning, longer than a prefill of the demo takes."""
    bundle = Bundle.open(demo_dense)
    backend = OrtBackend(bundle, threads=2)
    burned = []
    for _ in range(5):
        backend.encode_tile(np.zeros(bundle.manifest.image.shape, np.float32))
        begin = time.process_time()
        time.sleep(0.04)
        burned.append(time.process_time() - begin)
    backend.close()
    assert min(burned) < 2e-3


def costs(deep_tower: Path, profile: Profile = PROFILE, **options: str) -> Costs:
    policy = make(PruneSpec("utp", 2, options=options))
    return open_costs(open_model(str(deep_tower)), profile, policy)


def test_what_a_first_token_takes(deep_tower: Path) -> None:
    """Reading 1, preprocessing 2, vision 20, prefill; a block of n tokens takes (n + 1) / 2; to
    choose takes n / 4 with [CLS] in the encoder, in the decoder 0.1 n + 0.4 at one position."""
    found = costs(deep_tower)
    assert (found.before, found.vision(None)) == (3, 20)
    site = site_of(found.adapter, "exit:at=1:keep=0.5")  # 8 of 16 and [CLS]: 5 in place of 9
    inner = found.adapter.vision_config.encoder.mlp_width
    embedding = 2 * 16 * 3 * 14 * 14 * 64
    block = 2 * 17 * 64 * (4 * 64 + 2 * inner) + 4 * 17 * 17 * 64
    share = 2 * 8 * 64 * 64 / (embedding + 2 * block)  # the map of the 8 that leave
    assert found.vision(site) == pytest.approx(20 - 4 + 20 * share + 2)
    early = site_of(found.adapter, "exit:at=0:keep=0.5")
    assert found.vision(early) == pytest.approx(20 - 8 + 20 * share + 0.375)
    diverse = site_of(found.adapter, "exit:at=0:keep=0.5:by=diverse")
    with pytest.raises(SpecError, match=r"no times of --encoder exit:by=diverse; it has exit:by"):
        found.vision(diverse)
    assert found.prefill((16, 16, 16)) == pytest.approx(36)
    assert found.prefill((16, 1, 1)) == pytest.approx((36 + 6 + 6) / 3 + 2)
    assert found.prefill((16, 6, 1)) == pytest.approx((36 + 16 + 6) / 3 + 2 + 1)
    plain = costs(deep_tower, ure="off")
    assert plain.prefill((16, 1, 1)) == pytest.approx((36 + 6 + 6) / 3 + 1)
    with pytest.raises(SpecError, match="choosing in the decoder by query=text"):
        costs(deep_tower, query="text").prefill((16, 1, 1))
    times, floor = found.times(), found.times(floor=True)
    assert (times.units[:, 16] == 512).all() and (floor.units[:, 16] == 512).all()
    exact = np.array([found.layer(1, n) for n in range(17)]) / found.unit
    assert (times.units >= exact - 1e-6).all() and (floor.units <= exact + 1e-6).all()
    assert times.falls[1, 16] == np.ceil(2 / found.unit) and floor.falls[0, 1] == 21
    counts = np.array([[16, 6, 1]])
    assert times.of(counts)[0] >= found.prefill((16, 6, 1)) / found.unit >= floor.of(counts)[0]
    assert {method.at for method in menu(found.adapter)} == {0, 1}


def test_a_profile_of_another_model_is_refused(deep_tower: Path, tiny_checkpoint: Path) -> None:
    with pytest.raises(SpecError, match="its blocks is 2, this model's 1"):
        costs(tiny_checkpoint)


def test_plan_shows_what_can_be_reached_and_export_reaches_it(
    deep_tower: Path,
    made_up: Path,
    instruct: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    refused: Refused,
) -> None:
    model = ["--model", str(deep_tower), "--samples-file", str(instruct), "--profile", str(made_up)]
    encoder = ["--encoder", "exit:at=1:keep=0.5:limit=3"]
    figure = tmp_path / "plan.svg"
    assert main(["plan", *model, *encoder, "--figure", str(figure)]) == 0
    out, err = capfd.readouterr()
    head, *rows = [line.split() for line in out.splitlines()]
    assert head[:2] == ["TTFT", "ms"] and figure.read_text().startswith("<svg")
    times, losses = [float(row[0]) for row in rows], [float(row[-1]) for row in rows]
    assert times == sorted(times) and losses == sorted(losses, reverse=True)
    assert times[-1] == 59.0 and losses[-1] == 0  # dense: 3 + 20 + 36
    assert "dense 59.0 ms" in err

    fastest = times[0]
    for asked in (fastest, 45.0, 59.0):
        output = tmp_path / f"b{asked:g}"
        command = ["export", *model, *encoder, "--ttft", str(asked + 0.06), "--parity", "1"]
        assert main([*command, "-o", str(output)]) == 0
        manifest = Bundle.open(output).manifest
        timing = manifest.timing
        assert timing is not None and timing.predicted <= timing.asked + 1e-6
        assert timing.predicted == pytest.approx(timing.before + timing.vision + timing.prefill)
        assert timing.prefill == pytest.approx(costs(deep_tower).prefill(manifest.prune.counts))
        assert manifest.prune.schedule is not None
    assert manifest.prune.cr_reached == 1 and manifest.encoder.method == "dense"

    line = refused("export", *model, *encoder, "--ttft", fastest - 1)
    assert "ms are out of reach: the least that is predicted is" in line


def test_auto_takes_no_more_operations_than_a_ratio_with_the_dense_encoder(
    deep_tower: Path, instruct: Path, tmp_path: Path, refused: Refused
) -> None:
    output = tmp_path / "b"
    model = ["--model", str(deep_tower), "--samples-file", str(instruct), "--method", "auto"]
    assert main(["export", *model, "--cr", "1.5", "--parity", "1", "-o", str(output)]) == 0
    manifest = Bundle.open(output).manifest
    choice, prune = manifest.choice, manifest.prune
    assert choice is not None and choice.unit == "billion operations"
    counting = Operations(open_model(str(deep_tower)))
    at_the_ratio = counting.before + counting.vision(None) + counting.prefill((16 / 1.5,) * 3)
    assert choice.budget == pytest.approx(at_the_ratio)
    record = manifest.decoder
    spent = cost.prefill_operations(record, prune.counts, 64) + manifest.encoder.operations
    assert choice.spent == pytest.approx(spent / 1e9, rel=1e-6) and choice.spent <= choice.budget
    assert manifest.encoder.method in choice.losses
    line = refused("export", *model, "--encoder", "exit:at=1", "-o", output)
    assert "leave out --encoder" in line
    assert "give --cr one ratio" in refused("export", *model, "--cr", "1.5,2", "-o", output)
    assert "give it to export or plan" in refused("calibrate", *model, "-o", tmp_path / "s.json")


def test_budgets_exclude_each_other(refused: Refused, made_up: Path) -> None:
    profile = ["--profile", made_up]
    assert "give one of them" in refused("export", "--ttft", 9, *profile, "--cr", 2)
    assert "give --ttft and --profile" in refused("export", "--ttft", 9)
    assert "--method auto or utp" in refused("export", "--encoder", "auto", "--method", "fastv")
    assert "leave out --cr" in refused("plan", *profile, "--cr", 4)
    assert "leave out --max-sites" in refused("plan", *profile, "--max-sites", 2)
    for ms in "nan", "inf", "0", "-3":
        assert "above 0" in refused("export", f"--ttft={ms}", *profile)
    assert "dense encoder" in refused(
        "export", "--method", "none", "--profilable", "--encoder", "drop"
    )
    auto = "export", "--method", "auto"
    assert "--method auto chooses for one budget" in refused(*auto, "--cr", "2,3")
    assert "--method auto solves a schedule" in refused(*auto, "--cr", 2, "--max-sites", 1)
    assert "--delta and --method auto" in refused(*auto, "--cr", 2, "--delta", 0.5)
    assert "--method none" in refused("export", "--profilable", "--cr", 2)
    assert "of another model" in refused("plan", *profile)
    assert "of another model" in refused("export", "--ttft", 9, *profile)


def test_a_profile_in_another_dtype_is_refused(
    deep_tower: Path, made_up: Path, refused: Refused
) -> None:
    options = ["--model", deep_tower, "--ttft", 99, "--profile", made_up, "--target", "cuda"]
    assert "this export is in fp16" in refused("export", *options)
