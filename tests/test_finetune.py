"""Fine-tuning with pruning in place: what is trained is what is exported."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn.utils import parametrize

from benchmarks.finetune import merged
from benchmarks.finetune.__main__ import told
from benchmarks.finetune.examples import Encoded, Encoder, Example, demo_examples, file_examples
from benchmarks.finetune.student import AnswerDecoder, Student, trainable, trained
from edgeprune.demo import SAMPLES_DIR
from edgeprune.models import Adapter, open_model
from edgeprune.models._reference import Reference
from edgeprune.policies import make
from edgeprune.spec import Plan, PruneSpec
from tests import cogvlm, qwen_vl


def encoded(adapter: Adapter) -> Encoded:
    example = next(demo_examples(3))
    return Encoder(adapter)(Example(example.image, example.question, example.answer))


def student(adapter: Adapter, method: str, cr: float) -> tuple[Student, Plan]:
    policy = make(PruneSpec(method, cr))
    plan = policy.plan(adapter.shape, cr)
    return Student.build(adapter, policy, plan, decoder=AnswerDecoder), plan


@pytest.mark.parametrize("rank", [None, 4], ids=["all", "lora"])
def test_the_loss_of_a_pruned_answer_falls_and_is_what_the_checkpoint_has(
    rank: int | None, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    adapter = open_model(str(tiny_checkpoint))
    model, _ = student(adapter, "fastervlm", 4)
    example = encoded(adapter)
    names = [n for n, _ in model.decoder.named_parameters() if n.startswith(("layers.", "norm."))]
    parameters = trainable(model, rank)
    optimizer = torch.optim.Adam(parameters.values(), 3e-3)
    losses = list[float]()
    for _ in range(12):
        loss = model.loss(example)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in parameters.values())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    assert model.vision_kept.shape == (4,), "of 16 tokens"
    vision = [n for n, _ in adapter.empty_modules()[0].named_parameters() if "projector." in n]
    changed = {
        model.vision: trained(model.vision, iter(vision)),
        model.decoder: trained(model.decoder, iter(names)),
    }
    with torch.no_grad():
        wanted = model.loss(example).item()
    if rank is not None:
        for part in (model.vision, model.decoder):
            for module in [m for m in part.modules() if parametrize.is_parametrized(m)]:
                parametrize.remove_parametrizations(module, "weight")
    folder = merged.write(adapter, changed, tmp_path / "tuned")
    again, _ = student(open_model(str(folder)), "fastervlm", 4)
    with torch.no_grad():
        assert again.loss(example).item() == pytest.approx(wanted, rel=1e-2), "stored in fp16"


def test_an_answers_loss_is_that_of_its_tokens_in_turn(tiny_checkpoint: Path) -> None:
    """As a bundle is asked: policies see the prompt alone."""
    adapter = open_model(str(tiny_checkpoint))
    example = encoded(adapter)
    model, plan = student(adapter, "fastv", 1.4)
    reference = Reference.build(adapter, make(PruneSpec("fastv", 1.4)), plan)
    logits = [reference.prefill(example.prompt).logits]
    logits += [reference.step(token[None, None]).logits for token in example.answer[:-1]]
    wanted = torch.nn.functional.cross_entropy(torch.stack(logits), example.answer)
    torch.testing.assert_close(model.loss(example), wanted)


@pytest.mark.parametrize("make_one", [cogvlm.checkpoint, qwen_vl.checkpoint])
def test_packed_tensors_are_written_back_as_they_were(
    make_one: Callable[[Path], cogvlm.Cog | qwen_vl.QwenVL], tmp_path: Path
) -> None:
    """Several parameters in one tensor, rows in an order of their own, one tensor of several."""
    model = make_one(tmp_path / "a")
    tokenizer = model.tokenizer if isinstance(model, cogvlm.Cog) else None
    adapter = open_model(str(model.folder), tokenizer=tokenizer)
    policy, plan = make(PruneSpec("none")), Plan(adapter.shape.visual_tokens, adapter.shape.layers)
    modules = adapter.vision(policy, plan), adapter.decoder(policy, plan)
    changed = {
        adapter.load(module): {name: p.detach() + 1 for name, p in module.named_parameters()}
        for module in modules
    }
    merged.write(adapter, changed, tmp_path / "b")
    other = open_model(str(tmp_path / "b"), tokenizer=tokenizer)
    for module in modules:
        for name, source in other.sources(module).items():
            found = other.reader.read(source, torch.float32)
            assert torch.equal(found.reshape(-1), changed[module][name].reshape(-1)), name


def test_records_with_answers_are_read(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": " a star "}]
    record = {"image": "scene-1.png", "conversations": turns}
    (tmp_path / "a.json").write_text(json.dumps([{"id": 0}, record]))
    example = next(file_examples(tmp_path / "a.json", SAMPLES_DIR, 5))
    assert (example.question, example.answer) == ("what?", "a star")


def test_a_row_tells_the_paired_difference() -> None:
    cells = "50.0 ± 35.0 | 75.0 ± 32.7 | +25.0 ± 42.4 | 4 | 3 s"
    assert told("m", 8, "1100", "1110", 3) == f"| m | 8 | {cells} |"
