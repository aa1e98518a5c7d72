"""The engine that holds one layer at a time against a model that is in memory as a whole."""

from __future__ import annotations

import io
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Refused

from benchmarks.schedules import planned
from edgeprune.calib.calibrate import CalibrationRequest, calibrate
from edgeprune.calib.collect import collect
from edgeprune.calib.samples import Sample, demo_samples
from edgeprune.calib.schedule import solve
from edgeprune.errors import ModelError
from edgeprune.models import Adapter, open_model
from edgeprune.models._activations import Activations
from edgeprune.models._decoder import Flow
from edgeprune.models._layerwise import Layerwise
from edgeprune.models._processor import Processor, Prompt, random_prompt
from edgeprune.models._reference import Reference
from edgeprune.policies import Policy, make
from edgeprune.spec import PruneSpec
from tests import families
from tests.test_every_family import PRUNED, Case, Opened
from tests.whole_model import Measured, advances, measured

IN_FILE = 0
POLICY = make(PruneSpec("utp", 4))


def prompts(adapter: Adapter) -> list[Prompt]:
    """Of two lengths."""
    noise = [random_prompt(adapter.pixels, adapter.shape.vocabulary, seed) for seed in range(3)]
    return [*noise[:2], replace(noise[2], text_ids=noise[2].text_ids[:, 2:])]


def equal(found: Any, wanted: list[Measured]) -> None:
    """Bit for bit."""
    for name in ("attention", "loss", "entry"):
        np.testing.assert_array_equal(
            getattr(found, name), np.stack([getattr(one, name) for one in wanted]), err_msg=name
        )


@pytest.mark.parametrize("case", PRUNED, ids=str)
def test_calibration_measures_what_the_whole_model_says(case: Case, tmp_path: Path) -> None:
    """In memory and through the file, in every family: the same bits."""
    adapter = Opened(case, tmp_path, layers=4).adapter
    shown = prompts(adapter)
    wanted = measured(adapter, POLICY, shown)
    samples = [Sample(str(number), prompt) for number, prompt in enumerate(shown)]
    equal(collect(adapter, POLICY, samples), wanted)
    equal(collect(adapter, POLICY, samples, activations=Activations(IN_FILE)), wanted)


def test_the_demo_is_measured_the_same_too() -> None:
    adapter = open_model("demo")
    samples = list(demo_samples(Processor(adapter), 3))
    told: list[tuple[int, int]] = []
    found = collect(adapter, POLICY, samples, lambda done, total: told.append((done, total)))
    equal(found, measured(adapter, POLICY, [sample.prompt for sample in samples]))
    steps = 3 * (adapter.encoder.blocks + adapter.shape.layers)
    assert told == [(done, steps) for done in range(1, steps + 1)]
    assert solve(found, cr=4, first=144).counts[0] == 144


@pytest.mark.parametrize("case", PRUNED, ids=str)
def test_the_last_tokens_of_a_prefill_go_on_alone(case: Case, tmp_path: Path) -> None:
    """Unchanged, they are what the prefill makes of them, in every family."""
    adapter = Opened(case, tmp_path, layers=3).adapter
    engine = _engine(adapter, POLICY, make(PruneSpec("none")).plan(adapter.shape, 1), 1 << 30)
    kept = engine.keep(started.flow for started in engine.start(prompts(adapter)[:1]))
    seen = 0

    def step(index: int, flow: Flow) -> Flow:
        nonlocal seen
        done, last = engine.advance(index, flow), flow.hidden[:, -5:]
        found = engine.resumed(index, torch.cat([last, last + 1, last]), flow, done.cache)
        wanted = done.flow.hidden[0, -5:]
        for same in found[::2]:
            torch.testing.assert_close(same, wanted, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(found[0], found[1], atol=1e-2)
        seen += 1
        return done.flow

    engine.layers(kept, step)
    assert seen == adapter.shape.layers


def resident(module: torch.nn.Module) -> set[str]:
    """Parts of which a parameter is in memory."""
    names = (name for name, value in module.named_parameters() if not value.is_meta)
    return {name.rpartition(".")[0] for name in names}


def test_one_layer_is_in_memory_at_a_time(tiny_checkpoint: Path) -> None:
    adapter = open_model(str(tiny_checkpoint))
    engine = _engine(adapter, POLICY, make(PruneSpec("none")).plan(adapter.shape, 1), 1 << 30)
    seen = list[set[str]]()
    kept = engine.keep(started.flow for started in engine.start(prompts(adapter)))
    assert not resident(engine.vision) and not resident(engine.decoder)

    def step(index: int, flow: Flow) -> Flow:
        seen.append(resident(engine.decoder))
        assert not resident(engine.vision)
        return engine.advance(index, flow).flow

    kept = engine.layers(kept, step)
    assert len(kept) == 3
    layers = [number for number in range(adapter.shape.layers) for _ in range(3)]
    assert [{name.split(".")[1] for name in parts} for parts in seen] == [{str(n)} for n in layers]
    assert not resident(engine.decoder)


def test_one_block_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = open_model(str(families.llava().save(tmp_path)))
    assert adapter.encoder.blocks == 2
    engine = _engine(adapter, POLICY, make(PruneSpec("none")).plan(adapter.shape, 1), 1 << 30)
    advance, seen = engine.vision.encoder.advance, list[set[str]]()

    def listen(*arguments: Any) -> Any:
        names = resident(engine.vision) | resident(engine.decoder)
        seen.append({name.split(".")[2] for name in names if "blocks" in name})
        return advance(*arguments)

    monkeypatch.setattr(engine.vision.encoder, "advance", listen)
    for _ in engine.start(prompts(adapter)):
        pass
    assert seen == [{str(block)} for block in range(adapter.encoder.blocks) for _ in range(3)]


@pytest.mark.parametrize("bound", [IN_FILE, 1 << 30])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("utp", {}),
        ("fastv", {"K": "1"}),
        ("pyramiddrop", {"positions": "renumber"}),
        ("sparsevlm", {}),
        ("polymorphic", {}),
        ("visionzip", {}),
        ("trimtokenator", {}),
        ("tome", {}),
    ],
)
def test_pruned_layers_give_what_the_reference_gives(
    method: str, options: dict[str, str], bound: int, tiny_checkpoint: Path
) -> None:
    """Tokens dropped inside, merged in layers, before the decoder or in the encoder."""
    adapter = open_model(str(tiny_checkpoint))
    policy = make(PruneSpec(method, 1.5, options=options))
    plan = planned(policy, adapter.shape, 1.5)
    assert plan.stages
    engine, shown = _engine(adapter, policy, plan, bound), prompts(adapter)
    runs = engine.keep(Run(started.flow) for started in engine.start(shown))

    def step(index: int, run: Run) -> Run:
        done = engine.advance(index, run.flow)
        return Run(done.flow, (*run.kept, *done.kept))

    found = list(engine.layers(runs, step).drain())
    reference = Reference.build(adapter, policy, plan)
    for prompt, run in zip(shown, found, strict=True):
        layers = advances(reference, prompt)
        kept = [chosen for layer in layers for chosen in layer.kept]
        assert [k.tolist() for k in run.kept] == [k.tolist() for k in kept]
        assert torch.equal(run.flow.hidden, layers[-1].flow.hidden)


@dataclass(frozen=True)
class Run:
    flow: Flow
    kept: tuple[torch.Tensor, ...] = ()


def _engine(adapter: Adapter, policy: Policy, plan: Any, bound: int) -> Layerwise:
    return Layerwise(adapter, policy, plan, activations=Activations(bound))


def test_activations_above_the_bound_are_in_a_file_that_goes() -> None:
    """Values of several dtypes and shapes, some of no size, come back in order."""
    values = [
        (torch.full((3, 2), float(n)), torch.arange(n), torch.ones(2, n).bfloat16().t(), str(n))
        for n in range(6)
    ]
    room = Activations(bound=100)
    kept = room.keep(values)
    assert 0 < room.held <= 100 and len(kept) == 6
    found = list(kept.drain())
    assert room.held == 0 and len(kept) == 0
    for one, other in zip(found, values, strict=True):
        assert [type(item) for item in one] == [type(item) for item in other]
        assert all(torch.equal(a, b) for a, b in zip(one[:3], other[:3], strict=True))
        assert [t.dtype for t in one[:3]] == [t.dtype for t in other[:3]] and one[3] == other[3]


class FullDisk(io.FileIO):
    def __init__(self, prefix: str) -> None:
        super().__init__("/dev/full", "w")


def test_a_full_disk_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "TemporaryFile", FullDisk)
    with pytest.raises(
        ModelError, match=r"do not fit in .* \(No space left on device\); set TMPDIR"
    ):
        Activations(IN_FILE).keep([torch.zeros(4)])


def test_memory_is_said_beforehand(
    tiny_checkpoint: Path, instruct: Path, monkeypatch: pytest.MonkeyPatch, refused: Refused
) -> None:
    """With the progress; where there is less, nothing begins."""
    adapter, told = open_model(str(tiny_checkpoint)), set[str]()
    request = CalibrationRequest(2, samples=2, file=instruct, cache=instruct.parent / "cache")

    def report(step: str, done: int, total: int) -> None:
        told.add(step)

    calibrate(request, adapter, make(PruneSpec("utp", 2)), Processor(adapter), report)
    assert {"calibrate in 0.6 GB", "solve schedule"} <= told
    monkeypatch.setattr("edgeprune.models._memory.available_bytes", lambda: 10**8)
    options = ["--model", str(tiny_checkpoint), "--cr", "2", "--samples-file", str(instruct)]
    line = refused("calibrate", *options, "--samples", "2", "-o", str(instruct.parent / "s.json"))
    assert "calibration needs 0.6 GB of memory, 0.1 GB is free" in line
    line = refused("export", *options[:4], "--method", "none", "-o", str(instruct.parent / "b"))
    assert "parity needs 0.6 GB of memory, 0.1 GB is free; check fewer samples with --pari" in line
