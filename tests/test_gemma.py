"""Gemma 3 and PaliGemma against transformers: masks, windows, norms, caps, answers, layouts."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from edgeprune.errors import ModelError
from edgeprune.export.exporter import ExportRequest, export
from edgeprune.models import Adapter, open_model
from edgeprune.models._processor import Processor, Prompt, random_prompt
from edgeprune.models._reference import Reference
from edgeprune.policies import make
from edgeprune.runtime import Sampling, Session
from edgeprune.runtime.images import to_pixels
from edgeprune.spec import Plan, PruneSpec, plan_from_counts
from edgeprune.tiling import Size
from tests import gemma
from tests.dense import MORE, assert_same_logits, dense
from tests.dialogues import assert_same_answers, exported
from tests.engines import GPUS, assert_accepted
from tests.families import QUESTION, Family
from tests.frozen import frozen
from tests.test_families import block, drawn_image, generated

KINDS: dict[str, Callable[..., Family]] = {
    "gemma3": gemma.gemma3,
    "paligemma": gemma.paligemma,
    "paligemma2": gemma.paligemma2,
}


def old_gemma3(config: dict[str, Any]) -> dict[str, Any]:
    """As google/gemma-3-4b-it says it."""
    text = {name: config["text_config"][name] for name in SIZES}
    text |= {"model_type": "gemma3_text", "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}
    text |= {"rope_theta": 1_000_000.0, "rope_local_base_freq": 10_000.0}
    return {**config, "text_config": {**text, "sliding_window_pattern": 2}}


SIZES = (
    *("head_dim", "hidden_size", "intermediate_size", "num_hidden_layers", "sliding_window"),
    *("num_attention_heads", "num_key_value_heads", "query_pre_attn_scalar", "vocab_size"),
    *("max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"),
)


def old_paligemma(config: dict[str, Any]) -> dict[str, Any]:
    """As google/paligemma-3b-mix-448 and its successors say it."""
    kept = {*SIZES, "model_type", "attn_logit_softcapping", "final_logit_softcapping"}
    text = {name: value for name, value in config["text_config"].items() if name in kept}
    vision = {**config["vision_config"], "num_image_tokens": 64, "projector_hidden_act": "gelu"}
    return {**config, "text_config": {**text, "torch_dtype": "float32"}, "vision_config": vision}


OLD = {"gemma3": old_gemma3, "paligemma": old_paligemma}
PARTS = {
    "gemma3": ("sees", "windows", "ropes", "scale"),
    "paligemma": ("sees",),
    "paligemma2": ("sees", "windows", "scale", "caps", "cap"),
}
NO_TEMPLATE = "the checkpoint has no chat template; PaliGemma's is used"


def bundled(*quick: str) -> list[Any]:
    """All kinds; those that are not `quick` in a slow run alone."""
    return [kind if kind in quick else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def family(kind: str) -> Family:
    return KINDS[kind]()


@pytest.fixture(scope="module")
def checkpoint(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return family.save(tmp_path_factory.mktemp(family.name) / "tiny")


def logits(family: Family, adapter: Adapter, prompt: Prompt, shown: Any) -> torch.Tensor:
    """Of transformers' model, for every token of a prompt and of MORE: [S, vocabulary]."""
    parts = prompt.prefix_ids, torch.tensor([block(adapter)]), prompt.text_ids, MORE
    ids = torch.cat(parts, dim=1)
    given = {"input_ids": ids, "pixel_values": family.look(shown)["pixel_values"]}
    given |= family.kinds(ids, MORE.shape[1])
    with torch.no_grad():
        found: torch.Tensor = family.model(**given).logits[0]
    return found


@pytest.mark.parametrize("size", [Size(84, 84), Size(60, 101), Size(211, 41)])
def test_the_dense_model_is_that_of_transformers(
    family: Family, checkpoint: Path, size: Size
) -> None:
    """Pixels, answers of 64 tokens, and logits over two turns."""
    adapter, image = open_model(str(checkpoint)), drawn_image(size)
    pixels = to_pixels(image, adapter.image_record(Processor(adapter)))
    np.testing.assert_array_equal(pixels, family.look(image)["pixel_values"].numpy())
    prompt, ours = Processor(adapter)(image, QUESTION), dense(adapter)
    wanted = generated(family, adapter, prompt, tokens=64, **family.look(image))
    assert ours.generate(prompt, 64, lambda token: False) == wanted
    theirs = logits(family, adapter, prompt, image)
    assert_same_logits(ours, prompt, theirs, atol=2e-5)


def test_the_comparison_above_sees_each_part(kind: str, checkpoint: Path) -> None:
    image, adapter = drawn_image(Size(84, 84)), open_model(str(checkpoint))
    prompt, config = Processor(adapter)(image, QUESTION), adapter.decoder_config
    changes: dict[str, dict[str, Any]] = {
        "windows": {"window": None},
        "ropes": {"rope": None},
        "scale": {"scale": None},
        "caps": {"cap": None},
    }

    def second(**changed: Any) -> torch.Tensor:
        adapter.decoder_config = replace(config, **changed)
        reference = dense(adapter)
        reference.prefill(prompt)
        return reference.step(MORE[:, :1]).logits

    wanted = second()
    for part in PARTS[kind]:
        layers = tuple(replace(layer, **changes.get(part, {})) for layer in config.layers)
        whole = {"sees": {"sees": "past"}, "cap": {"cap": None}}.get(part, {})
        found = second(layers=layers, **whole)
        assert float((found - wanted).abs().max()) > 1e-2, part


@pytest.mark.parametrize("kind", bundled("gemma3"), indirect=True, scope="module")
def test_a_dense_bundle_answers_as_transformers(
    family: Family, checkpoint: Path, tmp_path: Path
) -> None:
    """Of two images of other shapes, then a second turn."""
    adapter = open_model(str(checkpoint))
    shape, processor = adapter.shape, Processor(adapter)
    request = ExportRequest(
        "tiny", PruneSpec("none"), Plan(shape.visual_tokens, shape.layers), tmp_path / "b"
    )
    prompts = [random_prompt(adapter.pixels, shape.vocabulary, 0)]
    made = export(request, adapter, make(request.spec), processor, prompts)
    assert made.notes == ((NO_TEMPLATE,) if family.name == "paligemma" else ())
    assert made.manifest.parity.ties == 0
    session = Session.open(made.path)
    for size in (Size(60, 101), Size(211, 41)):
        image = drawn_image(size)
        prompt = processor(image, QUESTION)
        wanted = generated(family, adapter, prompt, tokens=64, **family.look(image))
        assert list(session.ask(image, QUESTION, Sampling(max_new_tokens=64)).ids) == wanted


@pytest.mark.parametrize("kind", bundled("gemma3", "paligemma2"), indirect=True, scope="module")
def test_a_pruned_bundle_answers_as_its_reference(
    family: Family, checkpoint: Path, tmp_path: Path
) -> None:
    """And a second turn, on the same caches; tokens are dropped before layers 1, 2 and 3."""
    adapter, policy = open_model(str(checkpoint)), make(PruneSpec("utp", 4))
    tokens = adapter.shape.visual_tokens
    plan = plan_from_counts(tokens, (tokens // 2, tokens // 5, 1))
    made = exported(adapter, PruneSpec("utp", 4), plan, tmp_path / "b")
    session, image = Session.open(made.path), drawn_image(Size(60, 101))
    reference = Reference.build(adapter, policy, plan)
    assert_same_answers(session, reference, adapter, image, QUESTION)


def test_a_prompt_whose_image_is_dropped_is_seen_whole(tmp_path: Path) -> None:
    """As transformers computes the second layer of the text alone: later text is seen too."""
    family = gemma.paligemma(num_hidden_layers=2)
    adapter = open_model(str(family.save(tmp_path)))
    prompt = Processor(adapter)(drawn_image(Size(84, 84)), QUESTION)
    reference = Reference.build(adapter, make(PruneSpec("vtw")), plan_from_counts(64, (64, 0)))
    found = reference.prefill(prompt).logits
    model = family.model.model.language_model
    ids = torch.cat([prompt.prefix_ids, torch.tensor([block(adapter)]), prompt.text_ids], dim=1)
    given = {"input_ids": ids, "pixel_values": prompt.pixels, **family.kinds(ids, 0)}
    with torch.no_grad():
        states = family.model(**given, output_hidden_states=True).hidden_states
        stay = (ids[0] != adapter.image_token_id).nonzero()[:, 0]
        rotary = model.rotary_emb(states[1], stay[None])
        last = model.layers[1](states[1][:, stay], position_embeddings=rotary)
        wanted = family.model.lm_head(model.norm(last))[0, -1]
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-5)


def test_both_published_layouts_are_the_same(
    family: Family, checkpoint: Path, tmp_path: Path
) -> None:
    """The modules' own names of tensors beside the older ones that are saved; settings under the
    names of 2025; the template in chat_template.json."""
    for file in checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    own = {name: tensor for name, tensor in family.model.state_dict().items() if "head" not in name}
    assert own.keys().isdisjoint(load_file(checkpoint / "model.safetensors"))
    save_file(own, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(OLD[family.name](config)))
    if (file := tmp_path / "chat_template.jinja").exists():
        template = file.read_text()
        file.unlink()
        (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    ours, again = open_model(str(checkpoint)), open_model(str(tmp_path))
    assert again.decoder_config == ours.decoder_config
    assert again.vision_config == ours.vision_config
    assert again.all_notes == ours.all_notes == ()
    prompt = Processor(again)(drawn_image(Size(84, 84)), QUESTION)
    assert torch.equal(dense(again).prefill(prompt).logits, dense(ours).prefill(prompt).logits)


REFUSED: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "tokens": (lambda c: c.update(mm_tokens_per_image=9), "9 tokens of 8 x 8 patches"),
    "text": (
        lambda c: c["text_config"].update(use_bidirectional_attention=True),
        "attention to later text",
    ),
    "cap": (
        lambda c: c["text_config"].update(final_logit_softcapping=30.0),
        "a cap of 30.0 of logits",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_config_asks_beyond_is_refused_by_name(name: str, tmp_path: Path) -> None:
    folder, (change, says) = gemma.gemma3().save(tmp_path), REFUSED[name]
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=f"gemma3 checkpoint has .*{says}.*: not supported"):
        open_model(str(folder))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("method", ["none", "utp"])
@pytest.mark.parametrize("target", GPUS)
def test_engines_take_it(kind: str, target: str, method: str, dtype: str, tmp_path: Path) -> None:
    """`check` accepts the bundle, and TensorRT-RTX compiles that for RTX cards."""
    model = KINDS[kind](num_hidden_layers=5, max_position_embeddings=1024).save(tmp_path / "deep")
    cr = 4 if method == "utp" else 1
    bundle = frozen(tmp_path / "b", method, cr, model=model, target=target, dtype=dtype)
    assert_accepted(bundle, target)
