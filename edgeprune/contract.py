"""What a manifest must agree with, looked at once when a bundle is opened: its own parts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated

from edgeprune.graphs import ENCODER_SITE
from edgeprune.manifest import (
    DecoderRecord,
    EncoderRecord,
    ImageRecord,
    Manifest,
    PruneRecord,
    TextRecord,
)
from edgeprune.records import Between, build
from edgeprune.tiling import Tiling
from edgeprune.weight_format import WeightFormat

PIXELS = 1 << 28
"""Numbers that the vision graph takes at most: 1 GB of float32."""
ENLARGED = 4
"""An image is made so many times larger at most than what is cropped from it."""


def check_sizes(manifest: Manifest) -> None:
    """ValueError, SpecError or TypeError where parts of a manifest contradict each other."""
    wrong = (
        *_prune(manifest.prune, manifest.decoder.layers),
        *_ratios(manifest),
        *_delta(manifest.encoder, manifest.image),
        *_decoder(manifest.decoder),
        *_image(manifest.image),
        *_text(manifest.text, manifest.decoder.vocabulary, manifest.prune.visual_tokens),
        *_parts(manifest),
    )
    if manifest.weights is not None:
        WeightFormat.parse(manifest.weights.format)
    if wrong:
        raise ValueError("; ".join(wrong))


def _prune(prune: PruneRecord, layers: int) -> Iterator[str]:
    if not prune.counts or len(prune.counts) != layers:
        yield f"{len(prune.counts)} token counts for {layers} layers"
        return
    plan = prune.plan  # SpecError where the stages are none
    if plan.counts != prune.counts:
        yield "the stages give other token counts"
    elif not math.isclose(plan.cr, prune.cr_reached, rel_tol=1e-6):
        yield f"the token counts give a ratio of {plan.cr:.4g}, not {prune.cr_reached:.4g}"
    sites = [stage.layer for stage in plan.in_decoder]
    if len(set(sites)) != len(sites):
        yield "two stages stand before one layer"
    rows, columns = prune.grid
    if rows * columns != prune.visual_tokens:
        yield f"a grid of {rows} x {columns} has not {prune.visual_tokens} tokens"
    if loss := (prune.schedule or {}).get("loss"):
        build(tuple[Annotated[float, Between(0, 1e9)], ...], loss, "manifest.prune.schedule.loss")


def _ratios(manifest: Manifest) -> Iterator[str]:
    """Several ratios are of one method, on the same sites; the first is the default."""
    if not (ratios := manifest.ratios):
        return
    first = ratios[0]
    default = manifest.prune, manifest.decoder.image_positions, manifest.parity
    if (first.prune, first.image_positions, first.parity) != default:
        yield "the first of the ratios is not the default"
    if len({ratio.prune.cr for ratio in ratios}) != len(ratios):
        yield "a ratio stands twice"
    for ratio in ratios:
        prune = ratio.prune
        yield from _prune(prune, manifest.decoder.layers)
        if _common(prune) != _common(first.prune):
            yield f"CR {prune.cr:g} is of another method or image, or has other sites"
        if any(stage.merged or stage.lead for stage in prune.stages):
            yield "tokens are merged where counts are an input"


def _delta(encoder: EncoderRecord, image: ImageRecord) -> Iterator[str]:
    """Some patches of a tile are units of it, and each tile is an image."""
    if (delta := encoder.delta) is None:
        return
    if image.frames is not None or image.shape[0] != encoder.tiles:
        yield "some patches are encoded of a video"
    rows, columns = image.height // delta.patch, image.width // delta.patch
    if rows * columns != encoder.patches:
        yield f"{encoder.patches} patches of {delta.patch} pixels a side make no tile"
    if any(count % delta.unit for count in (rows, columns)) or delta.patches % delta.unit**2:
        yield f"groups of {delta.unit} x {delta.unit} patches fill no tile, or not those encoded"
    if delta.patches >= encoder.patches:
        yield f"{delta.patches} of {encoder.patches} patches are not some"
    if encoder.width % delta.heads:
        yield f"a width of {encoder.width} has no {delta.heads} heads"


def _parts(manifest: Manifest) -> Iterator[str]:
    """Graphs of parts are files of the bundle, none stands twice, and some of a tile goes on."""
    names = [part.file for part in manifest.parts]
    if len(set(names)) != len(names) or not set(names) <= manifest.files.keys():
        yield "parts names a file twice, or one that files has not"
    for part in manifest.parts:
        if (part.component == ENCODER_SITE) != (0 < part.kept < manifest.encoder.units):
            yield f"{part.file} keeps {part.kept} of {manifest.encoder.units} units"


def _common(prune: PruneRecord) -> tuple[object, ...]:
    """What all ratios of a bundle share."""
    sites = [replace(stage, keep=0) for stage in prune.stages]
    same = prune.method, prune.visual_tokens, prune.grid, prune.reads_text, prune.seed
    return *same, prune.options, sites


def _decoder(record: DecoderRecord) -> Iterator[str]:
    if record.attention_heads % record.kv_heads:
        yield f"{record.attention_heads} heads cannot share {record.kv_heads} keys"
    if record.deepstack > record.layers:
        yield f"DeepStack rows for {record.deepstack} of {record.layers} layers"
    found = record.convolutions
    if list(found) != sorted(set(found)) or (found and found[-1] > record.layers):
        yield f"convolutions in the layers {list(found)} of {record.layers}"
    if bool(found) != (record.kernel > 1):
        yield f"{len(found)} layers have convolutions of {record.kernel} tokens"
    if (linear := record.linear) is not None:
        if not found:
            yield "linear attention in no layer"
        if linear.value_heads % linear.key_heads:
            yield f"{linear.value_heads} value heads cannot share {linear.key_heads} key heads"


def _image(record: ImageRecord) -> Iterator[str]:
    frozen = record.height, record.width
    if (numbers := math.prod(record.shape)) > PIXELS:
        yield f"images of {numbers:,} numbers, at most {PIXELS:,} are taken"
    if record.frames is not None and record.images != 1:
        yield f"{record.images} images of a video"
    if record.step is not None and any(side % record.step for side in frozen):
        yield f"{record.height} x {record.width} pixels are not multiples of {record.step}"
    if record.longest_edge is not None and not isinstance(record.resize, tuple):
        yield f"a longest edge of {record.longest_edge} pixels, and no size that follows"
    if (tiling := record.tiling) is not None:
        if frozen != (tiling.tile, tiling.tile) or (record.resize, record.crop) != (None, None):
            yield f"tiles of {tiling.tile} pixels, images of {record.height} x {record.width}"
        if tiling.kind == "stretch" and tiling.cut > 1 and not tiling.ratios:
            yield "tiling.ratios is empty"
        if (tiling.kind == "round_up") != (tiling.longest_edge is not None):
            yield f"tiles by {tiling.kind} with a longest edge of {tiling.longest_edge} pixels"
        if (tiling.kind == "crop") != (tiling.crops is not None):
            yield f"tiles by {tiling.kind} with a rule of crops {tiling.crops}"
        if tiling.crops is not None and not tiling.suits(tiling.height, tiling.width):
            yield f"{tiling.rows} x {tiling.columns} crops are not those of its image size"
        if tiling.overview_size is not None:
            yield from _overview(tiling)
        chosen_from = tiling.cut if tiling.kind in ("stretch", "crop") else 0
        if tiling.kept is not None and tiling.kept >= chosen_from:
            yield f"{tiling.kept} of {tiling.cut} tiles by {tiling.kind}"
    yield from _resizing(record, frozen)


def _overview(tiling: Tiling) -> Iterator[str]:
    """A view of the whole that stands in a tile's place."""
    if tiling.kind != "stretch" or tiling.overview != "last":
        yield f"a view of the whole of its own size, {tiling.overview}, by {tiling.kind}"
    if any(side % tiling.block for side in (tiling.tile, *(tiling.overview_size or ()))):
        yield f"views of {tiling.overview_size} and tiles of {tiling.tile} pixels are no tokens"
    if (found := math.prod(tiling.overview_grid)) > tiling.tokens**2:
        yield f"a view of the whole of {found} tokens, {tiling.tokens**2} in a tile"


def _resizing(record: ImageRecord, frozen: tuple[int, int]) -> Iterator[str]:
    """An image is resized, then cropped, to the frozen size."""
    resize = record.resize
    if record.crop is not None:
        given: tuple[int, int] | None = record.crop
    elif isinstance(resize, int):
        given = (resize, resize) if record.pad_to_square is not None else None
    else:
        given = resize
    if given not in (None, frozen):
        yield f"resize and crop give {given[0]} x {given[1]} pixels, not {frozen[0]} x {frozen[1]}"
    sides = resize if isinstance(resize, tuple) else (resize or 0,)
    if max(sides) > ENLARGED * max(frozen):
        yield f"resize makes {max(sides)} pixels of which {max(frozen)} are used"


def _text(record: TextRecord, vocabulary: int, visual_tokens: int) -> Iterator[str]:
    if beyond := [token for token in record.eos_token_ids if token >= vocabulary]:
        yield f"the end token {beyond[0]} is not among {vocabulary}"
    if (ids := sum(count for _, count in record.visual_ids)) != visual_tokens:
        yield f"visual_ids has {ids} ids for {visual_tokens} visual tokens"
