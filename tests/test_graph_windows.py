"""Graphs in windows of one layer: what a window reads, and a fault that is named by its layer."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch

from edgeprune.bundle import Bundle
from edgeprune.errors import ParityError
from edgeprune.export.dialogue import Graphs
from edgeprune.export.trace import HIDDEN, End, to_graph
from edgeprune.models import Adapter, _stages, open_model
from edgeprune.models._eager import Eager
from edgeprune.models._processor import Prompt, random_prompt
from edgeprune.models._reference import Reference
from edgeprune.policies import make
from edgeprune.spec import PruneSpec
from tests import families
from tests.frozen import compared, frozen

LAYERS, FAULTY = 12, 10
METHOD = PruneSpec("fastv", 1.5)


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose layers have numbers of one digit and of two."""
    family = families.llava(num_hidden_layers=LAYERS)
    return family.save(tmp_path_factory.mktemp("deep") / "model")


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def bundle(request: pytest.FixtureRequest, deep: Path) -> Path:
    folder, dtype = deep.parent / request.param, request.param
    target = "cpu" if dtype == "fp32" else "rtx"
    return frozen(folder, METHOD.method, METHOD.cr, model=deep, target=target, dtype=dtype)


def prompts(adapter: Adapter, count: int = 2) -> list[Prompt]:
    return [random_prompt(adapter.pixels, adapter.shape.vocabulary, seed) for seed in range(count)]


def flip(bundle: Path, graph: str, name: str) -> None:
    """Turn the sign of the largest number of a tensor in weights.bin."""
    initializers = onnx.load(bundle / graph, load_external_data=False).graph.initializer
    (tensor,) = (found for found in initializers if found.name == name)
    place = {entry.key: entry.value for entry in tensor.external_data}
    dtype = torch.float32 if tensor.data_type == onnx.TensorProto.FLOAT else torch.bfloat16
    with (bundle / "weights.bin").open("r+b") as file:
        file.seek(int(place["offset"]))
        values = torch.frombuffer(bytearray(file.read(int(place["length"]))), dtype=dtype)
        values[values.abs().argmax()] *= -1
        file.seek(int(place["offset"]))
        file.write(values.view(torch.uint8).numpy().tobytes())


@pytest.mark.parametrize("window", [0, _stages.WINDOW], ids=["one layer", "all layers"])
def test_a_flipped_weight_is_named_by_its_layer(
    window: int, bundle: Path, deep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_stages, "WINDOW", window)
    adapter, policy = open_model(str(deep)), make(METHOD)
    name = f"layers.{FAULTY}.mlp.down.weight"
    assert compared(bundle, adapter, policy, prompts(adapter)).logits < 1e-5
    flip(bundle, "decoder.onnx", name)
    try:
        with pytest.raises(ParityError, match=rf"begins in decoder layers\.{FAULTY};"):
            compared(bundle, adapter, policy, prompts(adapter))
    finally:
        flip(bundle, "decoder.onnx", name)
    name = "encoder.blocks.1.down.weight"
    flip(bundle, "vision.onnx", name)
    try:
        with pytest.raises(ParityError, match=r"begins in vision blocks\.1;"):
            compared(bundle, adapter, policy, prompts(adapter))
    finally:
        flip(bundle, "vision.onnx", name)


def test_a_window_holds_the_weights_of_its_layers(
    bundle: Path, deep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_stages, "WINDOW", 0)
    adapter, manifest = open_model(str(deep)), Bundle.open(bundle).manifest
    eager = Eager(adapter, make(METHOD), manifest.prune.plan)
    graphs = Graphs(bundle, manifest.graphs, eager, wide=manifest.dtype == "bf16")
    windows = graphs.decoder.windows
    assert [window.stages for window in windows] == [range(n, n + 1) for n in range(LAYERS + 2)]
    for number, window in enumerate(windows[1:-1]):
        held = {name for name in window.initializers if name.startswith("layers.")}
        assert held and all(name.startswith(f"layers.{number}.") for name in held)
        assert f"past_key.{number}" in window.inputs
        assert len([name for name in window.inputs if name.startswith("past_")]) == 2
    assert not any(name.startswith("layers.") for name in windows[0].initializers)
    assert not any(name.startswith("layers.") for name in windows[-1].initializers)


def test_an_eager_dialogue_is_what_the_whole_model_says(
    deep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the windows are; torch rounds by where in memory weights lie, so not to the bit."""
    adapter, policy = open_model(str(deep)), make(METHOD)
    plan, asked = policy.plan(adapter.shape, METHOD.cr), prompts(adapter, 3)
    reference = Reference.build(adapter, policy, plan)
    for window in (0, _stages.WINDOW):
        monkeypatch.setattr(_stages, "WINDOW", window)
        for prompt, found in zip(asked, Eager(adapter, policy, plan).outcomes(asked), strict=True):
            first, ids = reference.prefill(prompt), prompt.text_ids
            steps = [first, *(reference.step(t) for t in (ids[:, :1], ids[:, -1:], ids))]
            torch.testing.assert_close(found.visual, reference.visual, atol=1e-6, rtol=0)
            kept = (reference.vision_kept, *first.kept)
            assert [k.tolist() for k in found.kept] == [k.tolist() for k in kept]
            for logits, step in zip(found.logits, steps, strict=True):
                torch.testing.assert_close(logits, step.logits, atol=1e-6, rtol=0)


def test_stages_are_grouped_by_their_bytes() -> None:
    assert list(_stages.grouped([5, 5, 5, 20, 1, 1], 10)) == [
        range(2),
        range(2, 3),
        range(3, 4),
        range(4, 6),
    ]
    assert list(_stages.grouped([5, 5], 0)) == [range(1), range(1, 2)]
    assert list(_stages.grouped([5, 5], 10)) == [range(2)]


class _Same(torch.nn.Module):
    """Gives its only hidden state as it is."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = x * 2
        return hidden, hidden


def test_an_output_that_is_a_hidden_state_has_a_name_of_its_own() -> None:
    """As of a tower that ends without a norm (Pixtral)."""
    ends = [End("x", "pixels")], [End("features", "features")]
    graph = to_graph(_Same(), (torch.ones(2, 3),), None, *ends, 18, states=1).graph
    (output,) = graph.outputs
    assert output.name == "features" and output.shape is not None
    (node,) = (node for node in graph if output in node.outputs)
    assert node.op_type == "Identity" and node.inputs[0].name == f"{HIDDEN}0"
