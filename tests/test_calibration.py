"""Calibration: what it collects against plain definitions, samples of users, the cache."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from edgeprune.bundle import Bundle
from edgeprune.calib.collect import collect
from edgeprune.calib.samples import Sample, demo_samples
from edgeprune.calib.schedule import Schedule
from edgeprune.cli import main
from edgeprune.models import Adapter, open_model
from edgeprune.models._processor import Processor
from edgeprune.models._reference import Reference
from edgeprune.policies import Policy, make
from edgeprune.spec import Plan, PruneSpec, plan_from_counts


@dataclass(frozen=True)
class Demo:
    adapter: Adapter
    samples: list[Sample]
    policy: Policy


@pytest.fixture(scope="module")
def demo() -> Demo:
    adapter = open_model("demo")
    processor = Processor(adapter)
    return Demo(adapter, list(demo_samples(processor, 3)), make(PruneSpec("utp", 4)))


def test_losses_are_the_angle_without_visual_tokens_from_each_layer_on(demo: Demo) -> None:
    """ell_l by its definition: run with V tokens up to layer l - 1 and none from l on."""
    evidence = collect(demo.adapter, demo.policy, demo.samples)
    shape = demo.adapter.shape
    features: list[torch.Tensor] = []
    for layer in (None, 2, 5, shape.layers):
        counts = [shape.visual_tokens] * shape.layers
        if layer is not None:
            counts[layer - 1 :] = [0] * (shape.layers - layer + 1)
        plan = plan_from_counts(shape.visual_tokens, tuple(counts))
        reference = Reference.build(demo.adapter, demo.policy, plan)
        decoder = reference.decoder
        features.append(_features(reference, decoder, demo.samples))
    for column, layer in enumerate((2, 5, shape.layers), start=1):
        cosine = torch.cosine_similarity(features[column], features[0]).clamp(-1, 1)
        np.testing.assert_allclose(evidence.loss[:, layer - 1], cosine.acos(), atol=2e-3)
    assert (evidence.loss[:, 0] == 0).all()


def _features(reference: Reference, decoder: Any, samples: list[Sample]) -> torch.Tensor:
    found = []
    norm = decoder.ops.rms_norm

    def listen(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        out = norm(x, weight, eps)
        if weight is decoder.norm.weight:
            found.append(out[0, -1])
        return out

    decoder.ops.rms_norm = listen
    for sample in samples:
        reference.prefill(sample.prompt)
    return torch.stack(found)


def test_attention_is_that_of_transformers(demo: Demo) -> None:
    """From layer 4 on the score is the plain attention of the last prompt token."""
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(
        demo.adapter.checkpoint.folder, dtype=torch.float32, attn_implementation="eager"
    )
    evidence = collect(demo.adapter, demo.policy, demo.samples)
    for row, sample in enumerate(demo.samples):
        prompt = sample.prompt
        image = torch.full((1, demo.adapter.shape.visual_tokens), demo.adapter.image_token_id)
        ids = torch.cat([prompt.prefix_ids, image, prompt.text_ids], 1)
        with torch.no_grad():
            out = model(input_ids=ids, pixel_values=prompt.pixels, output_attentions=True)
        start = prompt.prefix_ids.shape[1]
        for layer in range(3, demo.adapter.shape.layers):
            wanted = out.attentions[layer][0, :, -1, start : start + image.shape[1]].mean(0)
            np.testing.assert_allclose(evidence.attention[row, layer], wanted, atol=1e-5)


def test_entry_scores_are_the_cls_attention_of_the_block_that_is_read(demo: Demo) -> None:
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(
        demo.adapter.checkpoint.folder, dtype=torch.float32, attn_implementation="eager"
    )
    evidence = collect(demo.adapter, demo.policy, demo.samples[:1])
    with torch.no_grad():
        tower = model.model.vision_tower(demo.samples[0].prompt.pixels, output_attentions=True)
    wanted = tower.attentions[-2][0, :, 0, 1:].mean(0)
    assert evidence.entry is not None
    np.testing.assert_allclose(evidence.entry[0], wanted, atol=1e-6)


@pytest.fixture
def instruct(tmp_path: Path) -> Path:
    """Five LLaVA-Instruct records with pictures beside them; the path of the JSON file."""
    records = []
    for number in range(5):
        noise = np.random.default_rng(number).integers(0, 255, (70, 90, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{number}.png")
        turns = [
            {"from": "human", "value": "<image>\nwhat color is the star ?"},
            {"from": "gpt", "value": "red"},
        ]
        records.append({"id": f"s{number}", "image": f"{number}.png", "conversations": turns})
    file = tmp_path / "samples.json"
    file.write_text(json.dumps(records))
    return file


@pytest.mark.parametrize("solver", ["joint", "exact", "paper"])
def test_users_samples_make_a_schedule_that_export_takes(
    solver: str, instruct: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    output = tmp_path / "schedule.json"
    model = ["--model", str(tiny_checkpoint), "--cr", "2"]
    samples = ["--samples-file", str(instruct), "--samples", "4", "--solver", solver]
    assert main(["calibrate", *model, *samples, "-o", str(output)]) == 0
    schedule = Schedule.from_json(output.read_text())
    assert schedule.sample_ids == ("s0", "s1", "s2", "s3")
    assert sum(schedule.counts) == 24
    bundle = tmp_path / "bundle"
    given = ["--schedule", str(output), "--parity", "2", "-o", str(bundle)]
    assert main(["export", *model, *given]) == 0
    assert Bundle.open(bundle).manifest.prune.counts == schedule.counts


def test_json_lines_are_read_too(instruct: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    lines = instruct.with_suffix(".jsonl")
    lines.write_text("\n".join(json.dumps(r) for r in json.loads(instruct.read_text())))
    output = tmp_path / "schedule.json"
    options = ["--model", str(tiny_checkpoint), "--cr", "2", "--samples-file", str(lines)]
    assert main(["calibrate", *options, "-o", str(output)]) == 0
    assert len(Schedule.from_json(output.read_text()).sample_ids) == 5


def test_what_was_solved_is_not_solved_again(
    instruct: Path,
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from edgeprune.calib import calibrate

    options = ["--model", str(tiny_checkpoint), "--cr", "2", "--samples-file", str(instruct)]
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    monkeypatch.setenv("EDGEPRUNE_CACHE", str(tmp_path / "cache"))
    assert main(["calibrate", *options, "-o", str(first)]) == 0

    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("measured or solved again")

    few = tmp_path / "few.json"  # the limit is part of what is stored
    assert main(["calibrate", *options, "--max-sites", "1", "-o", str(few)]) == 0
    counts = Schedule.from_json(few.read_text()).counts
    assert sum(after < before for before, after in pairwise(counts)) <= 1
    monkeypatch.setattr(calibrate, "collect", never)
    monkeypatch.setattr(calibrate, "solve", never)
    assert main(["calibrate", *options, "-o", str(second)]) == 0
    assert first.read_text() == second.read_text()


def test_a_model_that_is_not_the_demo_wants_samples(tiny_checkpoint: Path, capsys: Any) -> None:
    assert main(["export", "--model", str(tiny_checkpoint), "--cr", "2"]) == 2
    assert "--samples-file" in capsys.readouterr().err


def test_plans_are_dense_while_calibrating(demo: Demo) -> None:
    evidence = collect(demo.adapter, demo.policy, demo.samples[:1])
    shape = demo.adapter.shape
    assert evidence.attention.shape == (1, shape.layers, shape.visual_tokens)
    assert Plan(shape.visual_tokens, shape.layers).cr == 1
