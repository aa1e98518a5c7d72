"""Parts of a model as graphs that are only timed: each computes what it does in the whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnxruntime import InferenceSession

from edgeprune.bundle import Bundle
from edgeprune.export.dialects import MODERN
from edgeprune.export.layer_graph import layer_graph, layers_by_kind
from edgeprune.export.part_graphs import encoder_sites, scorings
from edgeprune.export.site_graphs import AXES, DecoderSites
from edgeprune.export.writing import modules_of
from edgeprune.graphs import DECODER_SITE, ENCODER_SITE, PartRecord
from edgeprune.models import Adapter, open_model
from edgeprune.models._decoder import Decoder
from edgeprune.models._reference import Reference
from edgeprune.policies import make
from edgeprune.spec import Plan, PruneSpec
from tests import lfm2, qwen35

LAYERS = "conv", "full_attention", "conv"


@pytest.fixture(scope="module")
def adapter(deep_tower: Path) -> Adapter:
    return open_model(str(deep_tower))


@pytest.fixture(scope="module")
def bundle(profilable: Path) -> Bundle:
    return Bundle.open(profilable)


def parts(bundle: Bundle, component: str) -> list[tuple[PartRecord, InferenceSession]]:
    found = [one for one in bundle.manifest.parts if one.component == component]
    return [(one, InferenceSession(str(bundle.file(one.file)))) for one in found]


def decoder_of(adapter: Adapter) -> Decoder:
    plan = Plan(adapter.shape.visual_tokens, adapter.shape.layers)
    return Reference.build(adapter, make(PruneSpec("none")), plan).decoder


def given(session: InferenceSession, values: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {end.name: values[end.name].numpy() for end in session.get_inputs()}


@torch.no_grad()
def test_a_decoder_site_keeps_what_its_policy_does(adapter: Adapter, bundle: Bundle) -> None:
    decoder, rng = decoder_of(adapter), torch.Generator().manual_seed(0)
    config, graphs = decoder.config, parts(bundle, DECODER_SITE)
    assert [part.kind for part, _ in graphs] == list(scorings(decoder))
    for (kind, session), visual, keep in zip(graphs * 2, [9] * 4 + [16] * 4, [3] * 8, strict=True):
        tokens, heads = 5 + visual + 6, {"hidden": 1, "key": config.kv_heads}
        values = dict[str, torch.Tensor]()
        for name in AXES:
            if name == "hidden":
                values[name] = torch.randn(1, tokens, config.width, generator=rng)
            elif name.endswith(("query", "key")):
                count = heads.get(name.removeprefix("rotated_"), config.heads)
                shape = 1, count, tokens, config.head_size
                values[name] = torch.randn(*shape, generator=rng)
        own = decoder.own_rotary(0)
        values |= {"cos": own.cos, "sin": own.sin, "positions": torch.arange(tokens)[None]}
        values |= {"anchor": torch.tensor([7]), "prefix_ids": torch.zeros(1, 5, dtype=torch.int64)}
        values |= {"visual_indices": torch.arange(visual), "count": torch.tensor([keep])}
        values |= {"text_ids": torch.zeros(1, 6, dtype=torch.int64)}
        sites = DecoderSites(decoder, [scorings(decoder)[kind.kind]])
        wanted = sites(*(values[name] for name in AXES))
        found = session.run(None, given(session, values))
        assert found[0].shape == (1, 5 + keep + 6, config.width)
        for ours, theirs in zip(found, wanted, strict=True):
            np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-6)


@torch.no_grad()
def test_an_encoder_site_keeps_what_the_encoder_does(adapter: Adapter, bundle: Bundle) -> None:
    """Before block 0 and before block 1; of an exit all patches are there again."""
    pixels = torch.randn(adapter.pixels, generator=torch.Generator().manual_seed(0))
    graphs = parts(bundle, ENCODER_SITE)
    for site, (part, session) in zip(encoder_sites(adapter), graphs, strict=True):
        assert (part.kind, part.kept) == (site.method.choosing, site.kept_units)
        short = adapter.with_encoder(adapter.unfitted(site))
        plan = make(PruneSpec("none")).unpruned(short.shape)
        tower = Reference.build(short, make(PruneSpec("none")), plan).vision.encoder
        seen = tower.enter(pixels)
        for block in range(site.at):
            seen = tower.run_block(block, seen, None)
        named = {"hidden": seen.hidden, "pixels": pixels, "query": seen.query, "key": seen.key}
        values = {name: value for name, value in named.items() if value is not None}
        found = session.run(None, given(session, values))
        after = tower.split(seen, tower.site)
        np.testing.assert_allclose(found[0], after.hidden.numpy(), atol=1e-6)
        if tower.site.drops:
            np.testing.assert_array_equal(found[1], tower.site.kept_tokens(after.split)[0])
        else:
            np.testing.assert_allclose(found[1], seen.hidden[:, 1:].numpy(), atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("family", ["lfm2_vl", "qwen3_5"])
def test_a_layer_of_each_kind_is_that_of_the_decoder(family: str, tmp_path: Path) -> None:
    if family == "lfm2_vl":
        folder = lfm2.lfm2_vl(LAYERS).save(tmp_path / "tiny")
    else:
        kinds = "linear_attention", "full_attention", "linear_attention"
        folder = qwen35.checkpoint(tmp_path / "tiny", kinds=kinds)
    adapter, tokens = open_model(str(folder)), 21
    plan, policy = Plan(adapter.shape.visual_tokens, adapter.shape.layers), make(PruneSpec("none"))
    _, traced = modules_of(plan, adapter, policy, MODERN, torch.float32, ())
    layers, graphs = (layers_by_kind(d, adapter.shape) for d in (decoder_of(adapter), traced))
    assert len(layers) == 2
    for layer, stripped in zip(layers.values(), graphs.values(), strict=True):
        model, weights = layer_graph(stripped, torch.float32, MODERN), layer.state_dict()
        for value in model.graph.initializers.values():
            if value.name in weights:
                value.const_value = ir.tensor(weights[value.name].numpy())
        session = InferenceSession(ir.to_proto(model).SerializeToString())
        hidden = torch.randn(1, tokens, layer.config.width)
        turned = torch.randn(tokens, layer.halves)
        past = layer.config.nothing_kept(layer.index, tokens, torch.float32)
        ends = torch.zeros(1, dtype=torch.int64), torch.tensor([tokens])
        args = hidden, torch.arange(tokens)[None], turned.cos(), turned.sin(), *ends, *past
        wanted = layer(*args)
        names = ["hidden", "positions", "cos", "sin", "start", "end"]
        names += [f"past_{kind}" for kind in layer.config.layers[layer.index].keeps]
        found = session.run(None, given(session, dict(zip(names, args, strict=True))))
        for ours, theirs in zip(found, wanted, strict=True):
            np.testing.assert_allclose(ours, theirs.numpy(), atol=2e-5)
