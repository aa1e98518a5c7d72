"""Qwen3.5 against transformers' own model: linear attention, its states, gates, partial rotary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

from edgeprune.commands._common import image_size
from edgeprune.cost import kv_bytes, prefill_operations
from edgeprune.export.dialects import ModernOps
from edgeprune.export.exporter import ExportRequest, export
from edgeprune.export.trace import End, to_graph
from edgeprune.models import open_model
from edgeprune.models._decoder import Flow
from edgeprune.models._delta_rule import CHUNK, gated_delta_rule
from edgeprune.models._layers import Linear
from edgeprune.models._layerwise import Layerwise
from edgeprune.models._processor import Processor, random_prompt
from edgeprune.models._reference import Reference
from edgeprune.policies import make
from edgeprune.runtime import Session
from edgeprune.spec import Plan, PruneSpec, plan_from_counts
from edgeprune.tiling import Size
from tests import qwen35
from tests.dialogues import assert_same_answers
from tests.qwen import QUESTION, assert_same_dialogue, drawn_image, inputs, pruned_logits

SIZE = Size(256, 256)  # 64 tokens
MOST = 700  # tokens of a call


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Attention in the layer in the middle."""
    kinds = "linear_attention", "full_attention", "linear_attention"
    return qwen35.checkpoint(tmp_path_factory.mktemp("qwen3_5"), kinds=kinds)


@pytest.fixture(scope="module")
def theirs(checkpoint: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32).eval()


def rule_inputs(tokens: int, decay: float = 1.0) -> tuple[Tensor, ...]:
    """Of three heads: unit queries and keys, values, g, b and a state."""
    torch.manual_seed(tokens)
    query, key = (nn.functional.normalize(torch.randn(1, 3, tokens, 8), dim=-1) for _ in range(2))
    value, state = torch.randn(1, 3, tokens, 5), torch.randn(1, 3, 8, 5)
    return query, key, value, -decay * torch.rand(1, 3, tokens), torch.rand(1, 3, tokens), state


def token_by_token(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The rule as its paper has it, in float64."""
    read, state = [], state.double()
    for n in range(query.shape[2]):
        q, k, v = (x[:, :, n].double()[..., None] for x in (query, key, value))
        state = state * decay[:, :, n].double().exp()[..., None, None]
        seen = state.transpose(-1, -2) @ k
        state = state + k @ (beta[:, :, n].double()[..., None, None] * (v - seen)).transpose(-1, -2)
        read.append((state.transpose(-1, -2) @ q)[..., 0])
    return torch.stack(read, 2).float(), state.float()


class Rule(nn.Module):
    """The rule alone, as graphs have it."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor, s: Tensor
    ) -> tuple[Tensor, Tensor]:
        return ModernOps().delta_rule(q, k, v, g, b, s)


@pytest.fixture(scope="module")
def rule_graph() -> onnxruntime.InferenceSession:
    """In ONNX Runtime, any number of tokens up to MOST."""
    shapes = *[{2: torch.export.Dim.DYNAMIC}] * 5, None
    ends = [End(name, name) for name in "qkvgbs"], [End(name, name) for name in ("read", "after")]
    model = to_graph(Rule(), rule_inputs(7), shapes, *ends, 24, tokens=MOST)
    found = ir.to_proto(model).SerializeToString()
    return onnxruntime.InferenceSession(found, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("decay", [0.0, 1.0, 30.0])
@pytest.mark.parametrize("tokens", [1, 2, 37, CHUNK, CHUNK + 1, 200, MOST])
def test_chunks_are_the_rule(
    tokens: int, decay: float, rule_graph: onnxruntime.InferenceSession
) -> None:
    """The eager one, and the one that is written out, for any number of chunks."""
    given, close = rule_inputs(tokens, decay), 1e-5
    wanted = token_by_token(*given)
    for found, right in zip(gated_delta_rule(*given), wanted, strict=True):
        torch.testing.assert_close(found, right, atol=close, rtol=close)
    feeds = dict(zip("qkvgbs", (x.numpy() for x in given), strict=True))
    for array, right in zip(rule_graph.run(None, feeds), wanted, strict=True):
        np.testing.assert_allclose(array, right.numpy(), atol=close, rtol=close)


def test_equal_keys_do_not_blow_up(rule_graph: onnxruntime.InferenceSession) -> None:
    """A plain sky: nothing decays, every token writes at the full rate under the same key."""
    query, key, value, decay, beta, state = rule_inputs(MOST)
    given = query, key[:, :, :1].expand_as(key), value, 0 * decay, torch.ones_like(beta), state
    wanted = token_by_token(*given)[0]
    torch.testing.assert_close(gated_delta_rule(*given)[0], wanted, atol=1e-4, rtol=1e-4)
    feeds = {name: x.contiguous().numpy() for name, x in zip("qkvgbs", given, strict=True)}
    np.testing.assert_allclose(rule_graph.run(None, feeds)[0], wanted.numpy(), atol=1e-4)


@pytest.mark.parametrize("size", qwen35.IMAGE_SIZES)
def test_the_dense_model_is_that_of_transformers(size: str, checkpoint: Path, theirs: Any) -> None:
    """Greedy answers and logits over two turns, at three aspect ratios."""
    adapter = open_model(str(checkpoint), size=image_size(size))
    images = [drawn_image(*qwen35.IMAGE_SIZES[size])]
    assert_same_dialogue(adapter, images, theirs, atol=1e-4, rtol=1e-4)


def test_a_dropped_token_never_enters_a_state(checkpoint: Path, theirs: Any) -> None:
    """Tokens are dropped in the vision graph and behind layer 2, which has attention."""
    adapter = open_model(str(checkpoint), size=SIZE)
    plan, image = plan_from_counts(64, (40, 40, 9)), drawn_image(250, 262)
    prompt = Processor(adapter)(image, QUESTION)
    ours = Reference.build(adapter, make(PruneSpec("utp", 3)), plan)
    step = ours.prefill(prompt)
    layers = [stage.layer for stage in plan.in_decoder]
    assert layers == [3]
    kept = dict(zip(layers, step.kept, strict=True))
    with torch.no_grad():
        given = inputs(adapter, [image], prompt.pixels)
        wanted = pruned_logits(theirs, given, ours.vision_kept, kept)
    torch.testing.assert_close(step.logits, wanted, atol=1e-4, rtol=1e-4)


def test_a_pruned_bundle_answers_as_its_reference(checkpoint: Path, tmp_path: Path) -> None:
    """And a second turn, on the same caches and states, and a fork of it."""
    adapter, spec = open_model(str(checkpoint), size=SIZE), PruneSpec("utp", 2)
    policy, plan = make(spec), plan_from_counts(64, (40, 40, 9))
    prompts = [random_prompt(adapter.pixels, 256, seed) for seed in range(2)]
    request = ExportRequest("qwen3_5", spec, plan, tmp_path / "b")
    made = export(request, adapter, policy, Processor(adapter), prompts)
    assert (made.manifest.parity.samples, made.manifest.parity.ties) == (2, 0)
    caches = made.manifest.graph.caches
    sizes = {f"capacity.{layer}": 40 + 7 for layer in range(3)}
    held = sum(cache.past.bytes(sizes) for cache in caches)
    assert held == kv_bytes(made.manifest.decoder, (40, 40, 9), 7, 4)
    reference = Reference.build(adapter, policy, plan)
    with Session.open(made.path) as session:
        for _ in range(2):  # the second dialogue begins anew, in the memory of the first
            assert_same_answers(session, reference, adapter, drawn_image(250, 262), QUESTION)


@torch.no_grad()
def test_the_last_tokens_resume_as_they_were(checkpoint: Path) -> None:
    """A layer in windows makes its states anew of the tokens before."""
    adapter = open_model(str(checkpoint), size=SIZE)
    plan = Plan(adapter.shape.visual_tokens, adapter.shape.layers)
    engine = Layerwise(adapter, make(PruneSpec("none")), plan)
    prompt = Processor(adapter)(drawn_image(250, 262), QUESTION)

    def step(index: int, flow: Flow) -> Flow:
        done = engine.advance(index, flow)
        again = engine.resumed(index, flow.hidden[:, -3:], flow, done.cache)
        torch.testing.assert_close(again, done.flow.hidden[:, -3:], atol=1e-5, rtol=1e-5)
        return done.flow

    list(engine.layers(engine.keep(one.flow for one in engine.start([prompt])), step).drain())


def test_what_a_prefill_takes_is_counted(checkpoint: Path) -> None:
    """Two operations for each number of a product, token and layer, and what has no weights."""
    adapter = open_model(str(checkpoint), size=SIZE)
    shape, decoder = adapter.shape, adapter.empty_modules()[1]
    counts, text = (40, 40, 9), 5
    products, others = 0, 2 * shape.width * shape.vocabulary  # of the head
    for layer, count in zip(decoder.layers, counts, strict=True):
        inside = (part.weight.numel() for part in layer.modules() if isinstance(part, Linear))
        products += 2 * (count + text) * sum(inside)
    others += 4 * (40 + text) ** 2 * shape.attention_heads * shape.head_size
    others += sum(6 * (count + text) * 4 * 8 * 16 for count in (40, 9))  # matrices of 4 heads
    assert prefill_operations(shape, counts, text) == products + others
