"""The schedule as bars: how many visual tokens enter each layer, and what decided it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from edgeprune.bundle import PruneRecord
from edgeprune.drawing.canvas import ACCENT, GHOST, INK, QUIET, SOFT, Colour, Pen, Sheet

LOSS: Colour = (252, 224, 190)
"""Of the bars behind: what a layer loses without visual tokens."""


@dataclass(frozen=True)
class Bars:
    """Where the bars stand on a sheet, in pixels at scale 1; one slot for each layer."""

    sheet: Sheet
    width: float
    top: float
    base: float
    layers: int

    @property
    def gap(self) -> float:
        return min(8, 0.25 * self.width / self.layers)

    @property
    def slot(self) -> float:
        return (self.width + self.gap) / self.layers

    def draw(self, layer: int, share: float, colour: Colour, narrow: float = 1.0) -> None:
        """The bar of a layer (from 0), a share of the whole height tall, of its slot wide."""
        wide, tall = narrow * (self.slot - self.gap), share * (self.base - self.top)
        left = layer * self.slot + (self.slot - self.gap - wide) / 2
        self.sheet.box(left, self.base - tall, wide, tall, colour)

    def middle(self, layer: int, length: float) -> float:
        """Where a text of that length begins if it is to stand in the middle of a slot."""
        return layer * self.slot + (self.slot - self.gap - length) / 2


def chart(prune: PruneRecord, width: float, height: float, pen: Pen) -> Image.Image:
    """r_l as bars, dark where tokens are dropped.

    Behind them stands ell_l where the schedule stored it: how far the output turns if layers l .. L
    see no visual token, drawn against the largest. Otherwise it is the dense model's V.
    """
    counts, total = prune.counts, prune.visual_tokens
    falls = [now < before for before, now in zip((total, *counts), counts, strict=False)]
    sheet = Sheet(width, height, pen)
    losses = _losses(prune)
    bars = Bars(sheet, width, _captions(sheet, prune, any(falls), losses), height - 26, len(counts))
    for layer, (count, fall) in enumerate(zip(counts, falls, strict=True)):
        if losses:
            bars.draw(layer, losses[layer] / max(losses), LOSS)
        else:
            bars.draw(layer, 1, GHOST)
        bars.draw(layer, count / total, ACCENT if fall else SOFT, 0.64 if losses else 1)
    _number_bars(bars, falls, counts, total)
    _number_layers(bars)
    return sheet.image


def _losses(prune: PruneRecord) -> list[float]:
    """ell_1 .. ell_L; empty where the schedule has none, or where there is none."""
    found = (prune.schedule or {}).get("loss") or []
    return found if len(found) == len(prune.counts) and max(found) > 0 else []


def _captions(sheet: Sheet, prune: PruneRecord, falls: bool, losses: Sequence[float]) -> float:
    """What the bars are, from the top down; where the bars may begin."""
    counts, y = prune.counts, 0.0
    text = (
        f"visual tokens in each decoder layer: {sum(counts):,} of"
        f" {prune.visual_tokens * len(counts):,} in all, compression ratio {prune.cr_reached:.2f}"
    ) + ("; dark where tokens are dropped" if falls else "")
    for line in sheet.pen.wrap(text, 17, sheet.width, 3):
        sheet.text(0, y + 16, line, 17)
        y += 24
    if losses:
        sheet.box(0, y + 5, 15, 15, LOSS)
        text = (
            "what it would cost to drop all of them there: how far the output turns, at most"
            f" {max(losses):.2f} rad"
        )
        for line in sheet.pen.wrap(text, 15, sheet.width - 23, 2):
            sheet.text(23, y + 17, line, 15, QUIET)
            y += 21
    return y + 24


def _number_bars(bars: Bars, falls: Sequence[bool], counts: Sequence[int], total: int) -> None:
    """Each bar's number above its middle; where bars are narrow, only where they change."""
    pen, width = bars.sheet.pen, bars.width
    longs = [pen.length(str(count), 14) for count in counts]
    room = max(longs) + 2 < bars.slot
    end, last = 0.0, -99.0  # of the number before: its right end and its base line
    for i, (fall, count, long) in enumerate(zip(falls, counts, longs, strict=True)):
        y = bars.base - (bars.base - bars.top) * count / total - 5
        left = bars.middle(i, long) if room else min(i * bars.slot, width - long)
        if room or ((fall or i == 0) and (left >= end + 4 or abs(y - last) >= 15)):
            bars.sheet.text(max(0, left), y, str(count), 14, INK)
            end, last = left + long, y


def _number_layers(bars: Bars) -> None:
    """Each layer's number below its bar, or every fifth and so on where bars are narrow."""
    pen = bars.sheet.pen
    step = next(n for n in (1, 4, 5, 10, 20, 50, 1000) if n * bars.slot > pen.length("888", 14))
    for i in range(bars.layers):
        if i == 0 or (i + 1) % step == 0:
            long = pen.length(str(i + 1), 14)
            left = min(bars.middle(i, long), bars.width - long)
            bars.sheet.text(left, bars.base + 18, str(i + 1), 14)
