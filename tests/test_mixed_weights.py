"""--weights auto: the kind of each product by what it loses, within a budget of bits."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from edgeprune.bundle import Bundle
from edgeprune.calib import sensitivity
from edgeprune.calib.mixed import Candidate, choose
from edgeprune.cli import main
from edgeprune.errors import SpecError
from edgeprune.models import open_model
from edgeprune.models._processor import random_prompt
from edgeprune.policies import make
from edgeprune.spec import Plan, PruneSpec
from edgeprune.weight_format import WeightFormat
from tests.families import llava

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
    with pytest.raises(
        SpecError, match=r"bits=4.2 is less than 4 bits take with their scales, 4\.298 a"
    ):
        mixed(4.2)


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
    assert record.algorithm.endswith("mixed by measured loss")


def test_a_choice_needs_samples(uneven, refused):
    said = refused("export", "--method", "none", "--weights", "auto", "--model", uneven)
    assert "--weights auto measures on samples; give images and questions" in said
