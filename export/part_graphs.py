"""Parts of the model as graphs of their own, for `edgeprune profile` to time.

A dense bundle holds no pruning site, and its decoder runs all layers at once. What choosing costs,
and how slow a layer of each kind is, is timed with these graphs: the same operators as in a pruned
bundle, with the bundle's own weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir
import torch
from torch import nn

from edgeprune import encoder_methods
from edgeprune.errors import SpecError
from edgeprune.export.dialects import Dialect
from edgeprune.export.layer_graph import layer_graph, layers_by_kind
from edgeprune.export.site_graphs import (
    DecoderSites,
    EncoderSites,
    decoder_site_graphs,
    encoder_site_graphs,
)
from edgeprune.graphs import DECODER_SITE, ENCODER_SITE, LAYER, PartRecord
from edgeprune.models import Adapter
from edgeprune.models._decoder import Decoder
from edgeprune.models._encoder_site import SiteConfig
from edgeprune.models._vision import Vision
from edgeprune.policies import utp

KEPT = 0.25, 0.75
"""Shares of the units that go on, at the encoder sites that are timed: between them times are
nearly on a line, since a greedy choice takes as many steps as it keeps units."""


@dataclass(frozen=True)
class Part:
    """A graph without its weights, the module that has them, and what the manifest says of it."""

    record: PartRecord
    model: ir.Model
    module: nn.Module


def part_graphs(
    vision: Vision, decoder: Decoder, adapter: Adapter, dtype: torch.dtype, dialect: Dialect
) -> Iterator[Part]:
    """All of them, one by one."""
    tile = adapter.vision_config.encoder.spans, *adapter.pixels[1:]
    if sites := encoder_sites(adapter):
        both = EncoderSites(vision.encoder, sites, dialect.ops())
        traced = encoder_site_graphs(both, tile, dtype, dialect.opset)
        for number, (site, model) in enumerate(zip(sites, traced, strict=True)):
            kind, file = site.method.choosing, f"{ENCODER_SITE}.{number}.onnx"
            yield Part(PartRecord(file, ENCODER_SITE, kind, site.kept_units), model, both)
    own = scorings(decoder)
    every = DecoderSites(decoder, list(own.values()))
    scored = decoder_site_graphs(every, dtype, dialect.opset)
    for number, (kind, model) in enumerate(zip(own, scored, strict=True)):
        record = PartRecord(f"{DECODER_SITE}.{number}.onnx", DECODER_SITE, kind)
        yield Part(record, model, every)
    for number, (kind, layer) in enumerate(layers_by_kind(decoder, adapter.shape).items()):
        record = PartRecord(f"{LAYER}.{number}.onnx", LAYER, kind)
        yield Part(record, layer_graph(layer, dtype, dialect), layer)


def encoder_sites(adapter: Adapter) -> list[SiteConfig]:
    """Encoder sites of every method with what chooses by default, before block 0 and behind it."""
    found = dict[tuple[str, int], SiteConfig]()
    for name in encoder_methods.names():
        for at in range(min(2, adapter.vision_config.encoder.blocks)):
            for keep in KEPT:
                try:
                    site = adapter.encoder_site(encoder_methods.load(name)(at=at, keep=keep))
                except SpecError:  # this model has no such site, or too few units for it
                    continue
                found.setdefault((site.method.choosing, site.kept_units), site)
    return list(found.values())


def scorings(decoder: Decoder) -> dict[str, tuple[utp.Policy, int]]:
    """The decoder sites of the method whose counts follow a time: by what they compute, a policy
    and a layer that has attention."""
    layers = decoder.config.layers
    first = next(number for number, layer in enumerate(layers, 1) if not layer.kernel)
    policies = [utp.Policy(query=query, ure=ure) for query in utp.QUERIES for ure in (True, False)]
    return {policy.scoring(first): (policy, first) for policy in policies}
