"""Where the eager model computes: on a device that is pretended, and in half precision."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Refused

from benchmarks.schedules import planned
from edgeprune import encoder_methods, policies
from edgeprune.calib import activations, encoder_loss, exit_map, sensitivity
from edgeprune.calib.calibrate import check_room
from edgeprune.calib.collect import collect
from edgeprune.calib.samples import Sample, demo_samples
from edgeprune.calib.schedule import Evidence, pose, solve
from edgeprune.errors import ModelError
from edgeprune.models import Adapter, open_model
from edgeprune.models._eager import Eager
from edgeprune.models._execution import Execution
from edgeprune.models._processor import Processor, random_prompt
from edgeprune.policies import make
from edgeprune.progress import silent
from edgeprune.spec import PruneSpec
from edgeprune.weight_format import WeightFormat
from tests.essence import essence
from tests.frozen import compared
from tests.overflows import LLAVA, edited
from tests.pretend_device import DEVICE, Far, pretended
from tests.test_every_family import PRUNED, Case, Opened
from tests.test_timing import PROFILE

UTP = make(PruneSpec("utp", 4))
FAMILIES = list({case.family: case for case in PRUNED}.values())
ALWAYS = ("llava_next", "qwen3_vl", "gemma3", "lfm2_vl")
"""The last inputs of each: a video, or several images, where it takes them."""


def noise(adapter: Adapter, count: int = 2) -> list[Sample]:
    seeds, size = range(count), (adapter.pixels, adapter.shape.vocabulary)
    return [Sample(str(seed), random_prompt(*size, seed)) for seed in seeds]


def close(found: Evidence, wanted: Evidence, atol: float) -> None:
    for name in ("attention", "loss", "entry"):
        ours, theirs = getattr(found, name), getattr(wanted, name)
        np.testing.assert_allclose(ours, theirs, atol=atol, rtol=0, err_msg=name)


@pytest.mark.parametrize("case", essence(FAMILIES, ALWAYS))
def test_calibration_leaves_nothing_on_the_cpu(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every family; on a device whose numbers are the CPU's, it measures what the CPU does."""
    adapter = Opened(case, tmp_path, layers=3).adapter
    samples = noise(adapter, 1)
    wanted = collect(adapter, UTP, samples)
    with pretended(monkeypatch) as execution:
        found = collect(adapter.with_execution(execution), UTP, samples)
    close(found, wanted, 1e-5)


def test_a_tensor_that_stays_behind_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    with pretended(monkeypatch):
        far = torch.ones(3).to(DEVICE)
        assert isinstance(far, Far)
        with pytest.raises(RuntimeError, match="is on cpu, others on the device"):
            far + torch.ones(3)
        with pytest.raises(TypeError, match="to numpy"):
            far.numpy()


@pytest.mark.parametrize(
    "method", essence(policies.names(), ("none", "utp", "tome", "visiontrim", "cdpruner"))
)
def test_the_reference_of_parity_leaves_nothing_on_the_cpu(
    method: str, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With every method: the same tokens kept, logits the CPU's."""
    adapter = open_model(str(tiny_checkpoint))
    policy = make(PruneSpec(method, 1 if method == "none" else 1.4))
    plan = planned(policy, adapter.shape, 1 if method == "none" else 1.4)
    prompts = [sample.prompt for sample in noise(adapter, 1)]
    (wanted,) = Eager(adapter, policy, plan).outcomes(prompts)
    with pretended(monkeypatch) as execution:
        (found,) = Eager(adapter.with_execution(execution), policy, plan).outcomes(prompts)
    assert [k.tolist() for k in found.kept] == [k.tolist() for k in wanted.kept]
    for ours, theirs in zip(
        (found.visual, *found.logits), (wanted.visual, *wanted.logits), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_parity_and_what_is_measured_of_weights_run_on_a_device(
    tiny_bundle: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, policy = open_model(str(tiny_checkpoint)), make(PruneSpec("none"))
    prompts = [sample.prompt for sample in noise(adapter)]
    plan = policy.plan(adapter.shape, 1)
    wanted = activations.collect(adapter, policy, plan, prompts, silent)
    loss = encoder_loss.features(adapter, prompts)
    site = adapter.encoder_site(encoder_methods.make("exit:at=0:keep=0.5"))
    auto = WeightFormat.parse("auto:bits=6:block=32")
    fitted, r2 = exit_map.fit(adapter, site, prompts * 5)
    with pretended(monkeypatch) as execution:
        moved = adapter.with_execution(execution)
        record = compared(tiny_bundle, moved, policy, prompts)
        found = activations.collect(moved, policy, plan, prompts, silent)
        torch.testing.assert_close(encoder_loss.features(moved, prompts), loss, atol=1e-5, rtol=0)
        exits = exit_map.fit(moved, site, prompts * 5)
        kinds = sensitivity.mix(moved, auto, torch.float32, policy, plan, prompts)
    assert kinds == sensitivity.mix(adapter, auto, torch.float32, policy, plan, prompts)
    assert (record.samples, record.ties) == (2, 0) and record.logits < 1e-5
    assert found.keys() == wanted.keys()
    for name, moments in found.items():
        torch.testing.assert_close(moments.mean_square, wanted[name].mean_square)
        torch.testing.assert_close(
            torch.as_tensor(moments.largest), torch.as_tensor(wanted[name].largest)
        )
    torch.testing.assert_close(exits[0].weight, fitted.weight)
    assert exits[1] == pytest.approx(r2, abs=1e-3)


def test_nothing_is_rounded_on_a_device_that_the_cpu_does_not_round() -> None:
    """TF32 and sums in half precision are off while a sample is there, and as before after it."""
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn

    def settings(_: object) -> tuple[bool, ...]:
        halves = products.allow_fp16_reduced_precision_reduction
        return products.allow_tf32, convolutions.allow_tf32, halves

    before = settings(None)
    assert Execution(DEVICE).run(settings, ()) == (False, False, False)
    assert settings(None) == before and before[1:] == (True, True)
    assert Execution().run(settings, ()) == before


def test_a_device_without_room_is_one_line(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told before any work, or where it happens after all."""
    adapter = open_model(str(tiny_checkpoint)).with_execution(Execution(DEVICE))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (400 << 20, 8 << 30))
    with pytest.raises(ModelError, match=r"calibration needs 0\.5 GB on meta, 0\.4 GB is free;"):
        check_room(adapter, 1)

    def fail(_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nOf these")

    with pytest.raises(ModelError, match="meta has no memory left for one layer and one sample"):
        adapter.execution.run(fail, ())


@pytest.mark.parametrize("command", ["calibrate", "export", "compare", "plan"])
def test_a_device_that_is_not_there_is_one_line(
    command: str, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    options = ["-o", str(tmp_path / "out")]
    if command == "plan":
        (tmp_path / "profile.json").write_text(PROFILE.to_json())
        options = ["--profile", str(tmp_path / "profile.json")]
    for device, why in (
        ("cuda", r"--device cuda:0 is not there: torch .* or use --device cpu"),
        ("tpu", r"--device is cpu, cuda or cuda:N; got 'tpu'"),
        ("cuda:x", r"--device is cpu, cuda or cuda:N; got 'cuda:x'"),
    ):
        assert re.search(why, refused(command, "--device", device, *options))
    line = refused(command, "--reference-dtype", "fp8", *options)
    assert "--reference-dtype is one of fp32, fp16, bf16; got 'fp8'" in line
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    line = refused(command, "--device", "cuda:2", *options)
    assert "--device cuda:2 is not there; this machine has cuda:0, cuda:1" in line


@pytest.fixture(scope="module")
def on_demo() -> tuple[list[Sample], Evidence]:
    """Samples of the demo, and what its float32 model does on them."""
    adapter = open_model("demo")
    samples = list(demo_samples(Processor(adapter), 4))
    return samples, collect(adapter, UTP, samples)


@pytest.mark.parametrize(
    ("dtype", "bound", "more"),
    [pytest.param("fp16", 1e-3, 1.02, marks=pytest.mark.slow), ("bf16", 0.015, 1.3)],
)
def test_half_precision_solves_for_nearly_the_same_schedule(
    dtype: str, bound: float, more: float, on_demo: tuple[list[Sample], Evidence]
) -> None:
    """On the demo. Scores and angles stay float32 numbers; by those of the float32 model the
    schedule loses at most so many times what its own one does, which is the best for 4 samples."""
    samples, exact = on_demo
    half = open_model("demo").with_execution(Execution.parse("cpu", dtype))
    found = collect(half, UTP, samples)
    assert found.attention.dtype == found.loss.dtype == np.float32
    assert not np.array_equal(found.loss, exact.loss)
    np.testing.assert_allclose(found.loss, exact.loss, atol=bound, rtol=0)
    counts = [solve(one, cr=4, first=144).counts for one in (found, exact)]
    ours, best = pose(exact, 4, 144).evaluate(np.array(counts))
    assert ours <= more * best


def test_numbers_that_half_precision_cannot_hold_are_refused(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """Hidden states beyond fp16's range."""
    adapter = open_model(str(edited(tiny_checkpoint, tmp_path / "large", LLAVA["residual"])))
    collect(adapter, UTP, noise(adapter))
    half = adapter.with_execution(Execution.parse("cpu", "fp16"))
    with pytest.raises(ModelError, match=r"in fp16 .* not finite .* --reference-dtype bf16 or"):
        collect(half, UTP, noise(adapter))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")
def test_a_gpu_measures_what_the_cpu_does(
    tiny_bundle: Path, tiny_checkpoint: Path, on_demo: tuple[list[Sample], Evidence]
) -> None:
    """Calibration of the demo in float32 and half precision, and parity."""
    adapter, (samples, exact) = open_model("demo"), on_demo
    for dtype, bound in (("fp32", 1e-4), ("fp16", 2e-3), ("bf16", 0.02)):
        found = collect(adapter.with_execution(Execution.parse("cuda", dtype)), UTP, samples)
        np.testing.assert_allclose(found.loss, exact.loss, atol=bound, rtol=0)
        np.testing.assert_allclose(found.attention, exact.attention, atol=bound, rtol=0)
    tiny = open_model(str(tiny_checkpoint)).with_execution(Execution.parse("cuda", "fp32"))
    prompts = [sample.prompt for sample in noise(tiny)]
    assert compared(tiny_bundle, tiny, make(PruneSpec("none")), prompts).logits < 1e-4
