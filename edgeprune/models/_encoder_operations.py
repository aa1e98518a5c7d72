"""What a vision encoder costs, by counting operations, where patches leave it and where none do."""

from __future__ import annotations

from typing import Protocol

from edgeprune import cost
from edgeprune.models._encoder_site import Runs, SiteConfig


class Blocks(Protocol):
    """What counting needs of an encoder's description."""

    @property
    def blocks(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def mlp_width(self) -> int: ...
    @property
    def products(self) -> int: ...
    @property
    def inputs(self) -> int: ...
    def windows(self, block: int, site: SiteConfig | None = None) -> Runs: ...
    def states_after(self, at: int) -> int: ...


def encoder_operations(encoder: Blocks, patches: int, site: SiteConfig | None = None) -> int:
    """Operations of the encoder for one tile: patch embedding, blocks and an exit's map."""
    width = encoder.width
    total = 2 * patches * encoder.inputs * width
    for block in range(encoder.blocks):
        windows = encoder.windows(block, site)
        total += cost.block_operations(width, encoder.mlp_width, windows, encoder.products)
    if site is not None and site.method.rejoins:
        left = (site.units.count - site.kept_units) * site.units.area
        total += 2 * left * width * width * encoder.states_after(site.at)
    return total
