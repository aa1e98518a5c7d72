"""--weights auto: the kind of each product by what it loses, within a budget of bits."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from edgeprune.bundle import Bundle
from edgeprune.calib import sensitivity
from edgeprune.calib.divergence import Divergences
from edgeprune.calib.mixed import Candidate, choose
from edgeprune.calib.open_products import OpenProducts
from edgeprune.calib.samples import answered, user_samples
from edgeprune.cli import main
from edgeprune.errors import SpecError
from edgeprune.models import open_model
from edgeprune.models._layerwise import Layerwise
from edgeprune.models._processor import Processor, random_prompt
from edgeprune.models._reference import Reference
from edgeprune.models._weight_plan import HEAD
from edgeprune.policies import make
from edgeprune.spec import Plan, PruneSpec
from edgeprune.tiling import Size
from edgeprune.weight_format import WeightFormat
from tests import lfm2, qwen35
from tests.families import llava
from tests.test_layerwise import resident

HURT = "layers.1.mlp.down.weight"
STORED = "language_model.model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """A checkpoint with one product that 4 bits spoil: one weight in each block is far larger."""
    folder = llava(hidden_size=64, intermediate_size=96).save(
        tmp_path_factory.mktemp("m") / "model"
    )
    tensors = load_file(folder / "model.safetensors")
    tensors[STORED][:, ::32] *= 100  # stored [outputs, inputs]
    tensors["language_model.model.layers.1.mlp.up_proj.weight"][::32] /= 100
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("seed", range(6))
def test_the_choice_is_the_best_of_all(seed):
    random = np.random.default_rng(seed)
    groups = [
        {kind: Candidate(loss, bits) for kind, loss, bits in zip("abc", losses, sizes, strict=True)}
        for losses, sizes in zip(random.random((6, 3)), random.integers(1, 9, (6, 3)), strict=True)
    ]
    every = list(product("abc", repeat=6))
    bits = {kinds: sum(g[k].bits for g, k in zip(groups, kinds, strict=True)) for kinds in every}
    loss = {kinds: sum(g[k].loss for g, k in zip(groups, kinds, strict=True)) for kinds in every}
    budget = float(np.quantile(list(bits.values()), 0.2))
    wanted = min((kinds for kinds in every if bits[kinds] <= budget), key=loss.get)
    assert tuple(choose(groups, budget)) == wanted
    with pytest.raises(SpecError, match="no kinds of weights are within"):
        choose(groups, min(bits.values()) - 0.5)


def test_divergences_are_those_of_the_whole_vocabulary():
    logits = torch.randn(4, 3, 50) * 5
    wanted, others = logits[0], logits[1:]
    found = Divergences(3, 3)
    for part in torch.arange(50).split(7):
        found.add(wanted[..., part], others[..., part])
    p, q = wanted.double().log_softmax(-1), others.double().log_softmax(-1)
    torch.testing.assert_close(found.mean(), (p.exp() * (p - q)).sum(-1).mean(-1))


@pytest.mark.parametrize("tied", [False, True])
def test_losses_are_those_of_the_whole_model(tied, tmp_path):
    """Exactly for the last layer and the head; before it nearly, since tokens before the last go on
    as they were. One layer is in memory at a time."""
    model = llava(hidden_size=64, intermediate_size=96, tie_word_embeddings=tied)
    adapter = open_model(str(model.save(tmp_path / "tiny")))
    policy, shape = make(PruneSpec("none")), adapter.shape
    plan = Plan(shape.visual_tokens, shape.layers)
    prompts = [random_prompt(adapter.pixels, shape.vocabulary, seed) for seed in range(2)]
    settled = (WeightFormat.parse(f"{kind}:clip=off") for kind in ("int4", "int8"))
    four, eight = (adapter.with_weights(one, torch.float16) for one in settled)
    groups = OpenProducts.of(four, eight, 2, fused=False).groups
    found = sensitivity.Sensitivity(four, eight, policy, plan, groups)
    with torch.no_grad():
        losses = found.losses(prompts)
    reference = Reference.build(adapter, policy, plan)
    if tied:  # a head of its own with the embedding's floats
        reference.decoder.config = replace(reference.decoder.config, tied=False)
        reference.decoder.head = nn.Linear(shape.width, shape.vocabulary, bias=False)
        reference.decoder.head.weight.data = reference.decoder.embedding.weight.data.clone()
    wanted, sources = _log_probabilities(reference, prompts), four.sources(four.empty_modules()[1])
    assert len(groups) == len(losses) == 4 * shape.layers + 1
    for names, loss in zip(groups, losses, strict=True):
        weights = {name: reference.decoder.get_parameter(name).data.clone() for name in names}
        for name in names:
            exact, quantised = (
                reference.decoder.get_parameter(name).data,
                four.reader.read(sources[name], torch.float32),
            )
            exact.copy_(quantised.t() if name == HEAD else quantised)
        said = _log_probabilities(reference, prompts)
        whole = float((wanted.exp() * (wanted - said)).sum(-1).mean())
        for name, weight in weights.items():
            reference.decoder.get_parameter(name).data.copy_(weight)
        last = names[0].startswith(f"layers.{shape.layers - 1}.") or HEAD in names
        assert loss == pytest.approx(whole, rel=1e-3 if last else 1)


def _log_probabilities(reference, prompts):
    """Behind each of the last tokens of the prompts: [prompts, ANSWER, vocabulary]."""
    found = []
    for prompt in prompts:
        count = prompt.text_ids.shape[1]
        for end in range(count - sensitivity.ANSWER + 1, count + 1):
            cut = replace(prompt, text_ids=prompt.text_ids[:, :end])
            found.append(reference.prefill(cut).logits.double().log_softmax(-1))
    return torch.stack(found)


def test_one_layer_is_in_memory_while_losses_are_measured(uneven, monkeypatch):
    adapter = open_model(str(uneven))
    policy, seen = make(PruneSpec("none")), []
    prompts = [random_prompt(adapter.pixels, adapter.shape.vocabulary, 0)]

    class Listening(Layerwise):
        def resumed(self, index, *rest):
            seen.append(({index}, resident(self.decoder), resident(self.vision)))
            return super().resumed(index, *rest)

    monkeypatch.setattr(sensitivity, "Layerwise", Listening)
    plan = Plan(adapter.shape.visual_tokens, adapter.shape.layers)
    wanted = WeightFormat.parse("auto:bits=6")
    sensitivity.mix(adapter, wanted, torch.float16, policy, plan, prompts)
    assert len(seen) == adapter.shape.layers
    for index, decoder, vision in seen:
        assert {int(name.split(".")[1]) for name in decoder} == index and not vision


def test_a_sample_has_its_answer_behind_the_question(instruct):
    processor = Processor(open_model("demo"))
    (sample,) = user_samples(processor, instruct, instruct.parent, 1)
    (word,) = processor.tokenizer("red", add_special_tokens=False)["input_ids"]
    prompt = answered(sample, processor, 8)
    assert prompt.text_ids[0, -1] == word
    assert torch.equal(prompt.text_ids[:, :-1], sample.prompt.text_ids)
    assert torch.equal(answered(sample, processor, 1).text_ids, sample.prompt.text_ids)
    unanswered = answered(replace(sample, answer=""), processor, 8)
    assert torch.equal(unanswered.text_ids, sample.prompt.text_ids)


def test_what_four_bits_spoil_has_eight(uneven):
    adapter = open_model(str(uneven))
    shape, policy = adapter.shape, make(PruneSpec("none"))
    prompts = [random_prompt(adapter.pixels, shape.vocabulary, seed) for seed in range(2)]
    plan = Plan(shape.visual_tokens, shape.layers)

    def mixed(bits):
        wanted = WeightFormat.parse(f"auto:bits={bits}:clip=off")
        return sensitivity.mix(adapter, wanted, torch.float16, policy, plan, prompts)

    kinds = mixed(4.9)
    assert kinds[HURT] == "int8"
    assert list(kinds.values()).count("int4") >= 15
    assert kinds["layers.0.attention.query.weight"] == kinds["layers.0.attention.key.weight"]
    assert set(mixed(16).values()) == {"float", "int8"}  # of the head there is no float
    with pytest.raises(SpecError, match=r"bits=4.2 cannot be met: 4\.298 bits a weight are the"):
        mixed(4.2)
    assert list(mixed(4.3).values()).count("int4") == len(kinds)  # the least


@pytest.mark.parametrize(("target", "weights"), [("cpu", "bits=4.9"), ("rtx", "bits=6:awq=on")])
def test_a_mixed_bundle_passes_parity_and_says_what_was_chosen(
    target, weights, uneven, instruct, tmp_path
):
    output, bits = tmp_path / "bundle", float(weights[5:].split(":")[0])
    command = ["export", "--model", uneven, "--method", "none", "--parity", 2, "--target", target]
    command += ["--samples-file", instruct, "--weights", f"auto:{weights}", "-o", output]
    assert main([*map(str, command)]) == 0
    record = Bundle.open(output).manifest.weights
    if "awq" not in weights:  # scales of channels take away what 4 bits spoil
        assert record.kinds[HURT] == "int8"
    kinds = list(record.kinds.values())
    assert {kind: kinds.count(kind) for kind in ("int4", "int8")} == {
        kind: record.tensors.get(kind, 0) for kind in ("int4", "int8")
    }
    assert record.bits <= bits
    adapter, element = open_model(str(uneven)), 4 if target == "cpu" else 2
    settled = (WeightFormat.parse(kind) for kind in ("int4", "int8"))
    both = (adapter.with_weights(one, torch.float32) for one in settled)
    found = OpenProducts.of(*both, element, fused=target == "cpu")
    taken = found.rest + sum(
        each[record.kinds[names[0]]] for names, each in zip(found.groups, found.bits, strict=True)
    )
    assert record.bits == pytest.approx(taken / found.numbers, abs=1e-9)
    assert record.algorithm.endswith("mixed by measured loss")


SIZES = {"hidden_size": 64, "intermediate_size": 96}
MIXERS = {
    "convolution": lambda folder: lfm2.lfm2_vl(**SIZES).save(folder),
    "linear attention": lambda folder: qwen35.checkpoint(folder, **SIZES),
}


@pytest.mark.parametrize("save", MIXERS.values(), ids=MIXERS.keys())
def test_every_product_that_four_bits_hold_is_chosen_for(save, tmp_path):
    """The one behind a convolution too, and the one behind linear attention."""
    adapter = open_model(str(save(tmp_path / "tiny")), size=Size(64, 96))
    settled = (WeightFormat.parse(f"{kind}:embedding=on") for kind in ("int4", "int8"))
    four, eight = (adapter.with_weights(one, torch.float16) for one in settled)
    found = OpenProducts.of(four, eight, 2, fused=False)
    forms = four.weights.forms
    chosen = {name for names in found.groups for name in names}
    assert chosen == {name for name, form in forms.items() if form.bits == 4}
    assert any(".output." in name and ".attention." not in name for name in chosen)
    rest = {name for name in forms if name not in chosen}
    sizes = four.weights.sizes
    assert found.rest == 8 * sum(forms[name].bytes(*sizes[name], 2) for name in rest)
    assert found.numbers == sum(k * n for k, n in sizes.values())


def test_a_budget_counts_what_has_no_choice(uneven, refused, instruct):
    """Rows of the embedding have 8 bits and a scale; it is refused before anything is measured."""
    command = ["export", "--model", uneven, "--method", "none", "--samples-file", instruct]
    said = refused(*command, "--weights", "auto:bits=4.7:embedding=on")
    assert "--weights auto:bits=4.7 cannot be met: 4.773 " in said and "give bits=4.78 or" in said
    alone = WeightFormat.parse("auto:bits=4.7")
    sensitivity.check_budget(open_model(str(uneven)), alone, torch.float32, fused=True)


def test_a_choice_needs_samples(uneven, refused):
    said = refused("export", "--method", "none", "--weights", "auto", "--model", uneven)
    assert "--weights auto measures on samples; give images and questions" in said
