"""The schedule as bars: how many visual tokens enter each layer, and what decided it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edgeprune.drawing.canvas import ACCENT, GHOST, INK, LOSS, QUIET, SOFT, Colour, Pen, Sheet
from edgeprune.manifest import PruneRecord

SMALL = 14.0
"""Size of the letters at axes and bars."""


@dataclass(frozen=True)
class Bars:
    """Where the bars stand on a sheet, in pixels at scale 1; one slot for each layer."""

    sheet: Sheet
    left: float
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

    @property
    def right(self) -> float:
        return self.left + self.width

    def draw(self, layer: int, share: float, colour: Colour, narrow: float = 1.0) -> None:
        """The bar of a layer (from 0), a share of the whole height tall, of its slot wide."""
        wide, tall = narrow * (self.slot - self.gap), share * (self.base - self.top)
        left = self.left + layer * self.slot + (self.slot - self.gap - wide) / 2
        self.sheet.box(left, self.base - tall, wide, tall, colour)

    def middle(self, layer: int, length: float) -> float:
        """Where a text of that length begins if it is to stand in the middle of a slot."""
        return self.left + layer * self.slot + (self.slot - self.gap - length) / 2

    def height(self, share: float) -> float:
        """y of a share of the whole height."""
        return self.base - share * (self.base - self.top)


def chart(prune: PruneRecord, width: float, height: float, pen: Pen) -> Sheet:
    """r_l as bars on the left axis, dark where tokens are dropped.

    Behind them, on the right axis, stands ell_l where the schedule stored it: the angle between the
    outputs with and without visual tokens in layers l ... L. Otherwise it is the dense model's V.
    """
    counts, total = prune.counts, prune.visual_tokens
    falls = [now < before for before, now in zip((total, *counts), counts, strict=False)]
    sheet, losses = Sheet(width, height, pen), _losses(prune)
    left = pen.length(f"{total:,}", SMALL) + 10
    right = pen.length(_angle(max(losses)), SMALL) + 10 if losses else 0.0
    top = _legend(sheet, prune, any(falls), losses) + 30
    bars = Bars(sheet, left, width - left - right, top, height - 26, len(counts))
    for layer, (count, fall) in enumerate(zip(counts, falls, strict=True)):
        if losses:
            bars.draw(layer, losses[layer] / max(losses), LOSS)
        else:
            bars.draw(layer, 1, GHOST)
        bars.draw(layer, count / total, ACCENT if fall else SOFT, 0.64 if losses else 1)
    _axes(bars, total, losses)
    _number_bars(bars, falls, counts, total)
    _number_layers(bars)
    return sheet


def _losses(prune: PruneRecord) -> list[float]:
    """ell_1 .. ell_L; empty where the schedule has none, or where there is none."""
    found = (prune.schedule or {}).get("loss") or []
    return found if len(found) == len(prune.counts) and max(found) > 0 else []


def _legend(sheet: Sheet, prune: PruneRecord, falls: bool, losses: Sequence[float]) -> float:
    """What the bars are, from the top down; how much height that takes."""
    counts = prune.counts
    title = (
        f"Visual tokens that enter each decoder layer: {sum(counts):,} of"
        f" {prune.visual_tokens * len(counts):,} in all, CR {prune.cr_reached:.2f}"
    )
    entries: list[tuple[Colour, str]] = [(SOFT, "visual tokens (left axis)")]
    entries += [(ACCENT, "the same, where tokens are dropped before the layer")] if falls else []
    if losses:
        text = "angle between the outputs with and without visual tokens from this layer on"
        entries.append((LOSS, f"{text} (right axis, rad)"))
    else:
        entries.append((GHOST, f"the dense model: {prune.visual_tokens:,} tokens in every layer"))
    y = 0.0
    for line in sheet.pen.wrap(title, 17, sheet.width, 3):
        sheet.text(0, y + 16, line, 17)
        y += 24
    for colour, text in entries:
        sheet.box(0, y + 5, 15, 15, colour)
        for line in sheet.pen.wrap(text, 15, sheet.width - 23, 2):
            sheet.text(23, y + 17, line, 15, QUIET)
            y += 21
    return y


def _axes(bars: Bars, total: int, losses: Sequence[float]) -> None:
    """Ticks of the counts on the left and, where there are angles, of those on the right."""
    sheet = bars.sheet
    for share in (0.0, 0.5, 1.0):
        y = bars.height(share)
        sheet.line([(bars.left - 5, y), (bars.left, y)], QUIET, 1)
        count = f"{round(share * total):,}"
        long = sheet.pen.length(count, SMALL)
        sheet.text(bars.left - 8 - long, y + 5, count, SMALL, QUIET)
        if losses:
            sheet.line([(bars.right, y), (bars.right + 5, y)], QUIET, 1)
            sheet.text(bars.right + 8, y + 5, _angle(share * max(losses)), SMALL, QUIET)


def _angle(radians: float) -> str:
    return f"{radians:.2g}" if radians else "0"


def _number_bars(bars: Bars, falls: Sequence[bool], counts: Sequence[int], total: int) -> None:
    """Each bar's number above its middle; where bars are narrow, only where they change."""
    pen = bars.sheet.pen
    longs = [pen.length(str(count), SMALL) for count in counts]
    room = max(longs) + 2 < bars.slot
    end, last = 0.0, -99.0  # of the number before: its right end and its base line
    for i, (fall, count, long) in enumerate(zip(falls, counts, longs, strict=True)):
        y = bars.height(count / total) - 5
        left = bars.middle(i, long) if room else min(bars.left + i * bars.slot, bars.right - long)
        if room or ((fall or i == 0) and (left >= end + 4 or abs(y - last) >= 15)):
            bars.sheet.text(max(0, left), y, str(count), SMALL, INK)
            end, last = left + long, y


def _number_layers(bars: Bars) -> None:
    """Each layer's number below its bar, or every fifth and so on where bars are narrow."""
    pen = bars.sheet.pen
    step = next(n for n in (1, 4, 5, 10, 20, 50, 1000) if n * bars.slot > pen.length("888", SMALL))
    for i in range(bars.layers):
        if i == 0 or (i + 1) % step == 0:
            long = pen.length(str(i + 1), SMALL)
            left = min(bars.middle(i, long), bars.right - long)
            bars.sheet.text(left, bars.base + 18, str(i + 1), SMALL)
