"""Scales from calibration samples: folding changes nothing, quantising loses less."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from edgeprune.bundle import Bundle
from edgeprune.calib import awq
from edgeprune.calib.activations import collect
from edgeprune.cli import main
from edgeprune.models import open_model
from edgeprune.models._processor import random_prompt
from edgeprune.models._quantised import quantize
from edgeprune.models._reference import Reference
from edgeprune.models._weight_plan import HEAD
from edgeprune.policies import make
from edgeprune.progress import silent
from edgeprune.spec import Plan, PruneSpec
from edgeprune.weight_format import Form, WeightFormat
from tests import packing
from tests.families import llava, llava_onevision
from tests.test_quantised_checkpoints import FORMS

POLICY = make(PruneSpec("none"))


def opened(model):
    """An adapter, a plan that prunes nothing, and prompts."""
    adapter = open_model(str(model))
    prompts = [random_prompt(adapter.pixels, adapter.shape.vocabulary, seed) for seed in range(2)]
    return adapter, Plan(adapter.shape.visual_tokens, adapter.shape.layers), prompts


def grouped():
    """Query heads that share keys and values; an output head of its own."""
    return llava(hidden_size=64, intermediate_size=96, num_key_value_heads=2)


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """A checkpoint with channels far larger than others, as in trained models."""
    folder = grouped().save(tmp_path_factory.mktemp("uneven") / "model")
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        if "language_model" in name and "norm" in name:
            tensors[name][::16] *= 20
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("family", "format", "layer", "heads"),
    [
        (grouped, "int4:block=32", 9, 1),  # seven products and two norms
        # Tied; queries, keys and values have biases; no block divides the last product's inputs.
        (llava_onevision, "int4:block=32:head=off", 8, 0),
    ],
)
def test_folded_scales_leave_the_float_model_as_it_is(
    family, format, layer, heads, tmp_path, monkeypatch
):
    monkeypatch.setattr(awq, "ALPHAS", (1.0,))  # the strongest scales, whatever they are good for
    adapter, plan, prompts = opened(family().save(tmp_path / "tiny"))
    quantised = adapter.with_weights(WeightFormat.parse(format), torch.float32)
    tuning = awq.tune(quantised, POLICY, plan, prompts)
    weights = [fold for name, fold in tuning.folds.items() if name.endswith(".weight")]
    assert len(weights) == layer * adapter.shape.layers + 2 * heads
    biases = sum(name.endswith(".bias") for name in tuning.folds)
    assert biases == adapter.shape.layers * adapter.decoder_config.layers[0].qkv_bias
    inputs = torch.cat([fold.inputs for fold in weights if fold.inputs is not None])
    assert inputs.max() > 1.2
    folded = adapter.with_weights(WeightFormat.parse(format), torch.float32, tuning)
    # All weights as floats; in the head, which is apart where it has codes, each with a scale.
    folded.weights = replace(folded.weights, forms={HEAD: Form(8, 1)} if heads else {})
    found, wanted = (
        Reference.build(one, POLICY, plan).prefill(prompts[0]).logits for one in (folded, adapter)
    )
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


def test_moments_are_those_of_what_goes_into_products(tmp_path):
    """Against the first layer's norm, computed here."""
    adapter, plan, prompts = opened(grouped().save(tmp_path / "tiny"))
    found = collect(adapter, POLICY, plan, prompts[:1], silent)
    model = Reference.build(adapter, POLICY, plan)
    decoder, seen = model.decoder, list[torch.Tensor]()
    norm = decoder.layers[0].attention_norm
    norm.register_forward_hook(lambda module, inputs, output: seen.append(output[0]))
    model.prefill(prompts[0])
    rows = torch.cat(seen)
    for name in ("query", "value"):
        moments = found[f"layers.0.attention.{name}.weight"]
        assert moments.rows == len(rows)
        torch.testing.assert_close(moments.mean_absolute, rows.abs().mean(0))
        torch.testing.assert_close(moments.mean_square, rows.square().mean(0))
    assert {*adapter.with_weights(WeightFormat.parse("int4"), torch.float32).weights.forms} <= {
        *found
    }


def test_less_is_lost_with_scales_than_without(uneven):
    adapter, plan, prompts = opened(uneven)
    wanted = [Reference.build(adapter, POLICY, plan).prefill(p).logits for p in prompts]

    def lost(model):
        built = Reference.build(model, POLICY, plan)
        pairs = zip(prompts, wanted, strict=True)
        return sum(float((built.prefill(p).logits - w).square().sum()) for p, w in pairs)

    form = WeightFormat.parse("int4:clip=off"), torch.float32
    quantised = adapter.with_weights(*form)
    tuned = adapter.with_weights(*form, awq.tune(quantised, POLICY, plan, prompts))
    assert lost(tuned) < 0.6 * lost(quantised)


def test_clipped_scales_count_channels_by_their_size(uneven):
    adapter, plan, prompts = opened(uneven)
    form = WeightFormat.parse("int4"), torch.float32
    tuning = awq.tune(adapter.with_weights(*form), POLICY, plan, prompts)
    tuned, name = adapter.with_weights(*form, tuning), "layers.0.mlp.gate.weight"
    source = tuned.sources(tuned.empty_modules()[1])[name]
    ((_, exact),) = tuned.reader.floats(source)
    weighed = quantize(exact, 4, 64, clip=True, importance=tuning.importance[name])
    assert torch.equal(tuned.reader.read(source, torch.float32), weighed.dequantised())
    assert not torch.equal(weighed.codes, quantize(exact, 4, 64, clip=True).codes)
    moments = collect(adapter, POLICY, plan, prompts, silent)[name]
    square = moments.mean_square / tuning.folds[name].inputs.square()
    torch.testing.assert_close(tuning.importance[name], square)


@pytest.mark.parametrize(
    ("target", "weights"), [("cpu", "int4"), ("rtx", "int4:clip=off:vision=on")]
)
def test_a_bundle_with_scales_passes_parity(target, weights, uneven, instruct, tmp_path):
    """The graph is as without them, the reference reads the same folded weights."""
    output = tmp_path / "bundle"
    command = ["export", "--model", uneven, "--method", "none", "--parity", 2, "--target", target]
    command += ["--samples-file", instruct, "--weights", f"{weights}:awq=on", "-o", output]
    assert main([*map(str, command)]) == 0
    record = Bundle.open(output).manifest.weights
    assert ":awq=on:" in record.format
    assert record.algorithm == ("AWQ, clipped" if target == "cpu" else "AWQ")


def test_scales_need_samples_and_floats(uneven, instruct, tmp_path, refused):
    command = ["export", "--method", "none", "--weights", "int4:awq=on", "--model"]
    assert "--weights int4:awq=on measures on samples" in refused(*command, uneven)
    packed, _ = packing.pack(uneven, tmp_path, FORMS["awq"].scheme, FORMS["awq"].packed)
    said = refused(*command, packed, "--samples-file", instruct)
    assert "awq=on needs the floats of a checkpoint" in said
