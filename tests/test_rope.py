"""Stretched contexts: answers with YaRN and LongRoPE are those of transformers.

Prompts are about 20 or 80 tokens long, so that the answer begins, ends or lies wholly beyond the
positions that the frequencies were made for.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Refused
from PIL import Image

from edgeprune.calib.collect import collect
from edgeprune.calib.samples import Sample
from edgeprune.export.exporter import ExportRequest, export
from edgeprune.models import Adapter, open_model
from edgeprune.models._processor import Processor
from edgeprune.models._reference import Reference
from edgeprune.models._rope import Rope
from edgeprune.policies import make
from edgeprune.runtime import Sampling, Session
from edgeprune.spec import Plan, PruneSpec, plan_from_counts
from edgeprune.tiling import Size
from tests import families
from tests.qwen import IMAGES, QUESTION, drawn_image, generated, windowed_checkpoint
from tests.test_weights import answers_as, loaded
from tests.whole_model import advances

SCALES: dict[str, dict[str, Any]] = {
    "yarn": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 24},
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [1.5, 2.0, 3.0, 8.0],
        "factor": 8.0,
        "original_max_position_embeddings": 40,
    },
}
LONG = SCALES["longrope"]
KINDS = {
    **SCALES,
    "yarn with its own factor": {**SCALES["yarn"], "attention_factor": 1.7, "beta_fast": 4},
    "long from the start": {**LONG, "original_max_position_embeddings": 8},
    "short to the end": {**LONG, "original_max_position_embeddings": 512},
}


@pytest.mark.parametrize(
    "kind",
    [*SCALES, *(pytest.param(k, marks=pytest.mark.slow) for k in sorted(KINDS.keys() - SCALES))],
)
def test_a_stretched_decoder_answers_as_transformers_does(kind: str, tmp_path: Path) -> None:
    """LongRoPE changes over in the middle of the first one's answer."""
    family = families.llava(rope_parameters={"rope_theta": 1e4, **KINDS[kind]})
    folder = family.save(tmp_path / "tiny")
    rope = open_model(str(folder)).decoder_config.rope
    assert rope.factor > 1 and bool(rope.long) == (kind in ("longrope", "long from the start"))
    assert answers_as(loaded(folder), family, folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["rope_parameters"] = {"rope_theta": 1e4, "rope_type": "default"}
    (folder / "config.json").write_text(json.dumps(config))
    assert not answers_as(family.model, family, folder), "without scaling the answer is another"


def stretched(folder: Path, kind: str, layers: int = 2) -> Path:
    """A Qwen2.5-VL of 35 visual tokens, prompts of 78 positions, named as published."""
    windowed_checkpoint(folder, layers)
    scaling = {
        "yarn": {"type": "yarn", "factor": 4, "original_max_position_embeddings": 48},
        "longrope": {
            "rope_type": "longrope",
            "short_factor": [1.0 + 0.1 * n for n in range(8)],
            "long_factor": [1.0 + 0.5 * n for n in range(8)],
            "factor": 8,
            "original_max_position_embeddings": 85,
        },
    }[kind]
    config = json.loads((folder / "config.json").read_text())
    config["rope_scaling"] = {"mrope_section": [2, 3, 3], **scaling}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def frozen(folder: Path) -> tuple[Adapter, Image.Image]:
    return open_model(str(folder), size=Size(140, 196)), drawn_image(*IMAGES["196x140"])


@pytest.mark.parametrize("kind", SCALES)
def test_a_stretched_decoder_with_three_positions_a_token(kind: str, tmp_path: Path) -> None:
    """The documented long context of Qwen2.5-VL."""
    adapter, image = frozen(stretched(tmp_path / "tiny", kind))
    plan = Plan(35, 2)
    prompt = Processor(adapter)(image, QUESTION)
    reference = Reference.build(adapter, make(PruneSpec("none")), plan)
    assert reference.generate(prompt, 32, lambda token: False) == generated(
        adapter, [image], prompt.pixels
    )
    assert reference.position - 32 < 85 < reference.position, "LongRoPE changes over in between"


@pytest.mark.parametrize("target", ["cuda", pytest.param("jetpack6", marks=pytest.mark.slow)])
def test_pruned_graphs_change_over_where_the_reference_does(target: str, tmp_path: Path) -> None:
    """UTP turns queries by rows of the tables, the long ones in the calls that use them."""
    adapter, image = frozen(stretched(tmp_path / "tiny", "longrope", layers=3))
    spec, plan = PruneSpec("utp", 3), plan_from_counts(35, (20, 10, 5))
    processor, policy = Processor(adapter), make(spec)
    prompt = processor(image, QUESTION)
    text = prompt.text_ids.repeat(1, 2)[:, : prompt.text_ids.shape[1] + 9]  # ends beyond 85
    prompts = [prompt, replace(prompt, text_ids=text)]
    request = ExportRequest("tiny", spec, plan, tmp_path / "bundle", target=target, dtype="fp32")
    made = export(request, adapter, policy, processor, prompts)
    assert (made.manifest.parity.samples, made.manifest.parity.ties) == (2, 0)
    reference = Reference.build(adapter, policy, plan)
    with Session.open(made.path) as session:
        answer = session.ask(image, QUESTION, Sampling(max_new_tokens=24))
    ends = set(made.manifest.text.eos_token_ids)
    assert list(answer.ids) == reference.generate(prompt, 24, lambda token: token in ends)


def test_calibration_reads_the_long_tables_too(tmp_path: Path) -> None:
    """Evidence is that of a decoder that knows no other frequencies than the long ones."""
    scaled = KINDS["long from the start"]
    folder = families.llava(rope_parameters={"rope_theta": 1e4, **scaled}).save(tmp_path)
    adapter, policy = open_model(str(folder)), make(PruneSpec("utp", 2))
    sample = Sample("1", Processor(adapter)(drawn_image(42, 42), QUESTION))
    found = collect(adapter, policy, [sample])
    rope = adapter.decoder_config.rope
    only = replace(adapter.decoder_config, rope=Rope(rope.long, rope.factor))
    adapter.decoder_config = only
    wanted = collect(adapter, policy, [sample])
    np.testing.assert_allclose(found.loss, wanted.loss, rtol=1e-5)
    np.testing.assert_allclose(found.attention, wanted.attention, rtol=1e-5)
    adapter.decoder_config = replace(only, rope=Rope(rope.frequencies, rope.factor))
    assert not np.allclose(found.loss, collect(adapter, policy, [sample]).loss, rtol=1e-3)


def test_nearness_is_that_of_the_angles_alone(tmp_path: Path) -> None:
    """What SparseVLM divides by is 1 at no distance, whatever multiplies the tables."""
    folder = families.llava(rope_parameters={"rope_theta": 1e4, **KINDS["yarn"]}).save(tmp_path)
    adapter = open_model(str(folder))
    reference = Reference.build(adapter, make(PruneSpec("none")), Plan(9, 3))
    seen = advances(reference, Processor(adapter)(drawn_image(42, 42), QUESTION))[0].signals
    rows = replace(seen, rows=torch.zeros_like(seen.rows))
    torch.testing.assert_close(rows.text_nearness(), torch.ones_like(rows.text_nearness()))


def test_settings_that_cannot_be_met(tmp_path: Path, refused: Refused) -> None:
    folder = families.llava(num_hidden_layers=1).save(tmp_path / "tiny")
    config = json.loads((folder / "config.json").read_text())
    wrong = {
        "uses rope_type 'proportional'; supported: default, dynamic": {"rope_type": "proportional"},
        "(rope_type 'longrope') are incomplete or wrong": {**LONG, "short_factor": [1.0, 2.0]},
    }
    for says, parameters in wrong.items():
        config["text_config"]["rope_parameters"] = {"rope_theta": 1e4, **parameters}
        (folder / "config.json").write_text(json.dumps(config))
        assert says in refused("models", "--model", folder)
