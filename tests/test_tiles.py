"""An image of several tiles: each has its share of what stays, or all compete for it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Refused
from hypothesis import given
from hypothesis import strategies as st

from edgeprune import policies
from edgeprune.making import make
from edgeprune.models._layout import NEWLINE, Layout
from edgeprune.policies._signals import InputSignals, VisionSignals
from edgeprune.policies._tiles import parts, shared
from edgeprune.recipe import Recipe
from edgeprune.spec import PruneSpec, Stage
from edgeprune.tiling import Size
from tests import families, oracles

TILES, PATCHES, WIDTH = 3, 12, 16
COUNT = TILES * PATCHES
ALTERNATE = tuple(i % TILES for i in range(COUNT))
"""Read as a mosaic may be: one token of each tile after the other."""
BEHIND = tuple(i // PATCHES for i in range(COUNT))
"""Read tile after tile."""


@given(st.lists(st.integers(0, 600), min_size=1, max_size=9), st.data())
def test_shares_are_the_sizes_to_a_token(sizes: list[int], data: st.DataObject) -> None:
    total = data.draw(st.integers(0, sum(sizes)))
    found = shared(total, sizes)
    assert sum(found) == total
    for share, size in zip(found, sizes, strict=True):
        assert share <= size
        assert abs(share - total * size / max(1, sum(sizes))) < 1


def test_equal_tiles_have_the_published_share() -> None:
    """VisionZip's 54 + 10 of each of five crops."""
    totals = shared(320, [576] * 5)
    assert totals == [64] * 5 and shared(50, totals) == [10] * 5


def test_a_layout_tells_the_tile_of_each_token() -> None:
    """Two tiles of 2 x 2 beside each other behind a view of the whole, a newline behind each row,
    the first row of the mosaic padding."""
    order = (0, 1, 2, 3, 6, 7, 10, 11, NEWLINE)
    layout = Layout(3, 2, 1, order, (1, 9), newline=True)
    assert layout.tile_of == (0, 0, 0, 0, 1, 1, 2, 2)
    assert layout.group_of == (0, 0, 0, 0, 1, 1, 2, 2, 2)
    assert Layout.with_cls(2, tiles=2).group_of == (0,) * 6 + (1,) * 4
    assert parts(layout.tile_of, 8, "each") == [[0, 1, 2, 3], [4, 5], [6, 7]]
    assert parts(layout.tile_of, 8, "joint") == [list(range(8))] == parts((), 8, "each")
    one = Layout.plain(4)
    assert one.tile_of == one.group_of == ()


def encoded(seed: int, tile_of: tuple[int, ...], *, cls: bool = True) -> VisionSignals:
    """Random signals of tiles of 3 x 4 patches, whose attention differs from tile to tile."""
    generator = torch.Generator().manual_seed(seed)
    first = int(cls)
    scale = torch.tensor([0.2, 1.0, 3.0]).reshape(TILES, 1, 1, 1)
    query, key = torch.randn(2, TILES, 2, first + PATCHES, 4, generator=generator) * scale
    features = torch.randn(TILES, PATCHES, WIDTH, generator=generator)
    order = torch.tensor(sorted(range(COUNT), key=lambda i: (i % PATCHES, i // PATCHES)))
    order = order if tile_of == ALTERNATE else torch.arange(COUNT)

    def pool(values: Any) -> Any:
        return values.flatten(0, 1)[order]

    token = torch.randn(TILES, 1, WIDTH, generator=generator) if cls else None
    grid = (1, COUNT) if tile_of == ALTERNATE else (TILES * 3, 4)
    return VisionSignals(pool(features)[None], query, key, grid, token, pool, tile_of=tile_of)


def alone(signals: VisionSignals, tile: int) -> tuple[VisionSignals, list[int]]:
    """One of the tiles as an image of its own, and where its tokens stand among all."""
    indices = [i for i, own in enumerate(signals.tile_of) if own == tile]
    one = replace(
        signals,
        features=signals.features[:, indices],
        query=signals.query[tile : tile + 1],
        key=signals.key[tile : tile + 1],
        cls=None if signals.cls is None else signals.cls[tile : tile + 1],
        pool=None,
        grid=(3, 4),
        tile_of=(),
    )
    return one, indices


@pytest.mark.parametrize("tile_of", [ALTERNATE, BEHIND], ids=["mosaic", "behind"])
@pytest.mark.parametrize("cls", [True, False])
@pytest.mark.parametrize("method", ["fastervlm", "vispruner", "visionzip", "visiontrim"])
def test_each_tile_is_pruned_as_if_it_were_alone(
    method: str, cls: bool, tile_of: tuple[int, ...]
) -> None:
    signals, policy = encoded(1, tile_of, cls=cls), policies.make(PruneSpec(method))
    merged = 2 if method == "visionzip" else 0
    stage, own = Stage("vision", 5 * TILES, merged * TILES), Stage("vision", 5, merged)
    found = policy.vision(signals, stage)
    kept, made, tokens, averages = list[int](), list[int](), list[Any](), list[Any]()
    for tile in range(TILES):
        one, indices = alone(signals, tile)
        chosen = policy.vision(one, own)
        at = [indices[i] if i < PATCHES else COUNT for i in chosen.indices.tolist()]
        kept += at[:5]
        made += at[5:]
        tokens += list(zip(at[:5], chosen.gather(one.features)[0], strict=False))
        averages += list(chosen.gather(one.features)[0, 5:])
    classes = kept.count(COUNT)
    wanted = [COUNT] * classes + sorted(i for i in kept if i < COUNT)
    assert classes == (TILES if method == "visionzip" and cls else 0)
    assert found.indices.tolist() == wanted + made
    kept_tokens = [x for i, x in sorted(tokens, key=lambda pair: (pair[0] < COUNT, pair[0]))]
    torch.testing.assert_close(
        found.gather(signals.features)[0], torch.stack(kept_tokens + averages)
    )


@pytest.mark.parametrize("method", ["fastervlm", "vispruner", "visionzip", "visiontrim"])
def test_jointly_a_busy_tile_has_more(method: str) -> None:
    """The first tile's attention is the most even, the last one's the least."""
    signals = encoded(2, BEHIND)
    policy = policies.make(PruneSpec(method, options={"tiles": "joint"}))
    kept = policy.vision(signals, Stage("vision", 9)).indices
    share = torch.bincount(kept[kept < COUNT] // PATCHES, minlength=TILES).tolist()
    each = policies.make(PruneSpec(method)).vision(signals, Stage("vision", 9)).indices
    assert (
        torch.bincount(each[each < COUNT] // PATCHES).tolist() == [3 - (method == "visionzip")] * 3
    )
    assert share != [3 - (method == "visionzip")] * 3


@pytest.mark.parametrize("variant", ["released", "paper"])
def test_visiontrim_gathers_in_each_tile(variant: str) -> None:
    """Dominant tokens of all tiles first, then each tile's complement of its own others."""
    signals = encoded(3, BEHIND)
    text = torch.randn(1, 4, WIDTH, generator=torch.Generator().manual_seed(5))
    policy = policies.make(PruneSpec("visiontrim", options={"variant": variant}))
    first, second = Stage("vision", COUNT, lead=12), Stage("input", 12, 6, text=True)
    passed = policy.vision(signals, first)
    visual = passed.gather(signals.features)
    found = policy.input(InputSignals(visual, COUNT, text, BEHIND), second, second)
    dominant, complement, tokens = list[int](), list[int](), list[Any]()
    for tile in range(TILES):
        one, indices = alone(signals, tile)
        own = policy.vision(one, replace(first, keep=PATCHES, lead=4))
        seen = own.gather(one.features)
        stage = replace(second, keep=4, merged=2)
        chosen = policy.input(InputSignals(seen, PATCHES, text), stage, stage)
        at = [indices[own.indices[i]] for i in chosen.indices.tolist()]
        dominant += at[:4]
        complement += at[4:]
        tokens += list(chosen.gather(seen)[0, 4:])
    assert passed.indices[found.indices].tolist() == sorted(dominant) + complement
    torch.testing.assert_close(found.gather(visual)[0, 12:], torch.stack(tokens))


@pytest.mark.parametrize("tile_of", [ALTERNATE, BEHIND], ids=["mosaic", "behind"])
def test_cdpruner_takes_a_determinant_of_each_tile(tile_of: tuple[int, ...]) -> None:
    """Relevance is scaled over all of them together, as in the released code."""
    rng = np.random.default_rng(7)
    visual, text = rng.standard_normal((COUNT, 40)), rng.standard_normal((5, 40))
    cosine = oracles.cosines(visual, text).mean(1)
    quality = (cosine - cosine.min() + 1e-6) / (cosine.max() - cosine.min())
    vectors = visual / np.linalg.norm(visual, axis=1, keepdims=True) * quality[:, None]
    wanted = list[int]()
    for tile in range(TILES):
        indices = [i for i, own in enumerate(tile_of) if own == tile]
        wanted += [indices[i] for i in oracles.determinant(vectors[indices], 4)]
    signals = InputSignals(torch.tensor(visual)[None], COUNT, torch.tensor(text)[None], tile_of)
    stage = Stage("input", 12, text=True)
    policy = policies.make(PruneSpec("cdpruner"))
    assert policy.input(signals, stage, stage).indices.tolist() == sorted(wanted)
    joint = policies.make(PruneSpec("cdpruner", options={"tiles": "joint"}))
    found = joint.input(signals, stage, stage).indices.tolist()
    assert found == sorted(oracles.determinant(vectors, 12)) != sorted(wanted)
    nothing = InputSignals(torch.zeros(1, 0, 40), COUNT, torch.tensor(text)[None], tile_of)
    assert policy.input(nothing, stage, replace(stage, keep=0)).indices.shape == (0,)


def test_a_graph_of_tiles_decodes(tmp_path: Path) -> None:
    """Five views, a newline a row, one token or more of each; parity decodes and asks again."""
    families.llava_next().save(tmp_path / "model")
    recipe = Recipe(
        PruneSpec("cdpruner", options={"counts": "8"}),
        tmp_path / "bundle",
        str(tmp_path / "model"),
        image_size=Size(84, 84),
        parity=2,
    )
    exported = make(recipe)
    assert exported.manifest.parity.samples == 2
    assert exported.manifest.prune.counts == (8, 8, 8)


@pytest.mark.parametrize(
    "method", ["fastervlm", "vispruner", "visionzip", "visiontrim", "cdpruner"]
)
def test_tiles_are_each_or_joint(method: str, refused: Refused) -> None:
    said = refused("export", "--method", method, "--set", "tiles=all", "-o", "nowhere")
    assert "--set tiles= is one of each, joint; got 'all'" in said
