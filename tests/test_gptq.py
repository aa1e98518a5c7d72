"""Codes that make up for each other's errors: round=gptq."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import Refused

from edgeprune.bundle import Bundle
from edgeprune.calib import gptq
from edgeprune.cli import main
from edgeprune.models import open_model
from edgeprune.models._processor import random_prompt
from edgeprune.models._quantised import quantize
from edgeprune.policies import make
from edgeprune.spec import Plan, PruneSpec
from edgeprune.weight_format import WeightFormat
from tests.families import llava


def test_outputs_on_inputs_that_go_together_lose_less() -> None:
    """Than by rounding, on the samples and on others like them; of inputs that do not, as much."""
    mixing = torch.randn(16, 64)
    rows, others = (torch.randn(400, 16) @ mixing + 0.1 * torch.randn(400, 64) for _ in range(2))
    weight = torch.randn(64, 24)
    found = quantize(weight, 4, 32)

    def lost(codes: torch.Tensor, x: torch.Tensor) -> float:
        scales = found.scales.repeat_interleave(32, 0)
        return float((x @ (codes * scales - weight)).square().sum())

    codes = gptq.compensated(weight, found, gptq.inverse_factor(rows.t() @ rows))
    for x in (rows, others):
        assert lost(codes, x) < 0.3 * lost(found.codes, x)
    assert codes.min() >= -8 and codes.max() <= 7
    apart = gptq.compensated(weight, found, gptq.inverse_factor(torch.eye(64)))
    assert torch.equal(apart, found.codes)


def test_an_input_that_is_always_0_does_no_harm() -> None:
    rows = torch.randn(100, 64)
    rows[:, 5] = 0
    weight = torch.randn(64, 8)
    found = quantize(weight, 4, 32)
    codes = gptq.compensated(weight, found, gptq.inverse_factor(rows.t() @ rows))
    assert torch.equal(codes[5], found.codes[5])


def test_products_with_too_many_inputs_are_rounded_to_nearest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gptq, "MOST_INPUTS", 64)
    folder = llava(hidden_size=64, intermediate_size=96).save(tmp_path / "tiny")
    adapter, policy = open_model(str(folder)), make(PruneSpec("none"))
    plan = Plan(adapter.shape.visual_tokens, adapter.shape.layers)
    wanted = WeightFormat.parse("int4:round=gptq")
    four = adapter.with_weights(wanted, torch.float32)
    prompts = [random_prompt(adapter.pixels, adapter.shape.vocabulary, 0)]
    tuning = gptq.tune(four, policy, plan, prompts)
    assert set(tuning.left) == {f"layers.{n}.mlp.down.weight" for n in range(3)}
    assert len(tuning.codes) == 6 * 3
    tuned = adapter.with_weights(wanted, torch.float32, tuning)
    sources = tuned.sources(tuned.empty_modules()[1])
    for name in ("layers.1.mlp.up.weight", "layers.1.mlp.down.weight"):
        found = tuned.reader.read(sources[name], torch.float32)
        nearest = four.reader.read(replace(sources[name], codes=None), torch.float32)
        assert torch.equal(found, nearest) == (name in tuning.left)


@pytest.mark.slow
def test_a_bundle_passes_parity_and_says_so(instruct: Path, tmp_path: Path) -> None:
    folder = llava(hidden_size=64, intermediate_size=96).save(tmp_path / "tiny")
    command = ["export", "--model", folder, "--method", "none", "--parity", 1]
    command += ["--samples-file", instruct, "--weights", "int4:round=gptq"]
    assert main([*map(str, [*command, "-o", tmp_path / "bundle"])]) == 0
    record = Bundle.open(tmp_path / "bundle").manifest.weights
    assert record is not None and record.algorithm == "GPTQ, clipped"
    assert ":round=gptq:" in record.format


def test_what_it_needs_is_said(tiny_checkpoint: Path, refused: Refused) -> None:
    command = ["export", "--method", "none", "--model", tiny_checkpoint, "--weights"]
    assert "--weights int4:round=gptq measures on samples" in refused(*command, "int4:round=gptq")
    line = refused(*command, "int8:round=gptq")
    assert "round=gptq is an option of --weights int4 and auto; got int8" in line
    assert "round of --weights is nearest or gptq; got 'up'" in refused(*command, "int4:round=up")
