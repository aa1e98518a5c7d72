"""One figure of a pruned answer: the question, a panel for each pruning site, the schedule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from edgeprune.drawing.canvas import (
    ACCENT,
    PAPER,
    QUIET,
    Levels,
    Pen,
    Pixels,
    Sheet,
)
from edgeprune.drawing.schedule_chart import chart
from edgeprune.drawing.show import DROPPED, MERGED, Caption, dim
from edgeprune.manifest import PruneRecord
from edgeprune.runtime.survivors import Site, Sites

MOST_SITES = 7
"""Of more pruning sites so many are drawn: the first, the last, evenly between."""

WIDTH, MARGIN, GAP = 1200, 40, 16  # of the figure, in pixels at scale 1
ROW = 6  # panels in one row; more are wrapped


def representative(sites: Sites, most: int = MOST_SITES) -> Sites:
    """All sites, or `most` of them: the first, the last, evenly between."""
    picked = np.linspace(0, len(sites) - 1, min(most, len(sites))).round()
    return [sites[int(i)] for i in picked]


def figure(
    levels: Levels,
    sites: Sites,
    prune: PruneRecord,
    prompt: str,
    said: Sequence[Caption],
    *,
    font: Path | None = None,
) -> Sheet:
    """The whole figure, 1200 pixels wide: question and answers, panels, schedule."""
    pen, inner = Pen(font), WIDTH - 2 * MARGIN
    panels = _panels(levels, representative(sites), prune, inner, pen)
    rows = [[_heading(prompt, said, inner, pen)], [panels]]
    room = inner - math.ceil(panels.width) - 2 * GAP
    if room > 0.35 * inner:  # on the right, for the schedule
        rows[1].append(chart(prune, room, panels.height, pen))
    else:
        rows.append([chart(prune, inner, 220, pen)])
    return _stack(rows, pen)


def _stack(rows: list[list[Sheet]], pen: Pen) -> Sheet:
    """Rows below each other, the blocks of a row beside each other, a margin around."""
    gap, tall = 2 * GAP, [max(block.height for block in row) for row in rows]
    whole = Sheet(WIDTH, sum(tall) + gap * (len(rows) - 1) + 2 * MARGIN, pen)
    top = float(MARGIN)
    for row, below in zip(rows, tall, strict=True):
        left = float(MARGIN)
        for block in row:
            whole.place(left, top, block)
            left += block.width + gap
        top += below + gap
    return whole


def _heading(prompt: str, said: Sequence[Caption], width: float, pen: Pen) -> Sheet:
    """The question, then each answer behind its label."""
    question = pen.wrap(prompt, 28, width, 4)
    indent = max(pen.length(one.label, 20) for one in said) + 28
    answers = [pen.wrap(one.text, 20, width - indent, 6) for one in said]
    height = 36 * len(question) + sum(28 * len(lines) + 4 for lines in answers)
    sheet, y = Sheet(width, height, pen), 0.0
    for line in question:
        sheet.text(1, y + 24, line, 28, bold=True)  # the stroke is 1 wide
        y += 36
    for i, (one, lines) in enumerate(zip(said, answers, strict=True)):
        sheet.text(0, y + 24, one.label, 20, QUIET if i else ACCENT)
        for line in lines:
            sheet.text(indent, y + 24, line, 20)
            y += 28
        y += 4
    return sheet


def _panels(levels: Levels, sites: Sites, prune: PruneRecord, width: float, pen: Pen) -> Sheet:
    """The image, then what each site left of it, each with its caption below."""
    total = math.prod(prune.grid)
    rows = -(-(len(sites) + 1) // ROW)
    columns = -(-(len(sites) + 1) // rows)
    side = min((width - GAP * (columns - 1)) / columns, 362 if columns > 2 else 300)
    fit = 2 / prune.grid[1]  # so that every patch is as wide as the others
    side = max(1, int(side * fit)) / fit
    space = (width - columns * side) / (columns - 1) if columns > 2 else GAP
    tall = side * levels.shape[0] / levels.shape[1]
    across, down = side + space, tall + 30 + GAP
    legend = 30 if sites else 0
    sheet = Sheet(columns * across - space, rows * down - GAP + legend, pen)
    captions = [f"input: {total} tokens", *(f"{site.caption} of {total}" for site in sites)]
    size = min(17.0, *(16.5 * side / pen.length(caption, 17) for caption in captions))
    for i, (caption, site) in enumerate(zip(captions, [None, *sites], strict=True)):
        x, y = round(i % columns * across), round(i // columns * down)
        sheet.raster(x, y, side, tall, _pixels(levels, site, prune.grid, side))
        sheet.text(x + (side - pen.length(caption, size)) / 2, y + tall + 24, caption, size)
    if legend:
        _legend(sheet, rows * down - GAP, any(site.merged for site in sites))
    return sheet


def _pixels(levels: Levels, site: Site | None, grid: tuple[int, int], side: float) -> Pixels:
    """The image at any resolution, pruned patches dimmed; their ruling is half a pixel wide."""

    def draw(width: int, height: int) -> Levels:
        image = Image.fromarray(levels).resize((width, height), Image.Resampling.BICUBIC)
        large = np.asarray(image)
        line = max(1, round(width / side / 2))
        return large if site is None else dim(large, site, grid, line)

    return draw


def _legend(sheet: Sheet, y: float, merged: bool) -> None:
    """What a grey patch and an outlined one mean, in 30 pixels below `y`."""
    sheet.box(0, y + 10, 15, 15, DROPPED)
    sheet.text(23, y + 23, "dropped", 15, QUIET)
    if merged:
        left = 23 + sheet.pen.length("dropped", 15) + 24
        sheet.box(left, y + 10, 15, 15, MERGED)
        sheet.box(left + 2, y + 12, 11, 11, PAPER)
        sheet.text(left + 23, y + 23, "merged token, drawn at its centre", 15, QUIET)
