"""One picture of a pruned answer: the question, a panel for each pruning site, the schedule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from edgeprune.bundle import PruneRecord
from edgeprune.drawing.canvas import (
    ACCENT,
    OVERSAMPLE,
    PAPER,
    QUIET,
    Pen,
    Sheet,
)
from edgeprune.drawing.schedule_chart import chart
from edgeprune.drawing.show import MERGED, Levels, Said, Sites, dim

MOST_SITES = 7
"""Of more pruning sites so many are drawn: the first, the last, evenly between."""

WIDTH, MARGIN, GAP = 1200, 40, 16  # the picture's, in pixels at scale 1
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
    said: Sequence[Said],
    *,
    scale: int = 1,
    font: Path | None = None,
) -> Image.Image:
    """The whole picture, `scale` * 1200 pixels wide: question and answers, panels, schedule."""
    pen = Pen(scale * OVERSAMPLE, font)
    fine, inner = pen.fine, WIDTH - 2 * MARGIN
    panels = _panels(levels, representative(sites), prune, inner, pen)
    rows = [[_heading(prompt, said, inner, pen)], [panels]]
    room = inner - -(-panels.width // fine) - 2 * GAP
    if room > 0.35 * inner:  # on the right, for the schedule
        rows[1].append(chart(prune, room, panels.height / fine, pen))
    else:
        rows.append([chart(prune, inner, 220, pen)])
    return _stack(rows, fine).reduce(OVERSAMPLE)


def _stack(rows: list[list[Image.Image]], fine: int) -> Image.Image:
    """Rows below each other, the blocks of a row beside each other, a margin around."""
    gap, margin = 2 * GAP * fine, MARGIN * fine
    tall = [max(block.height for block in row) for row in rows]
    height = sum(tall) + gap * (len(rows) - 1) + 2 * margin
    whole = Image.new("RGB", (WIDTH * fine, height + -height % OVERSAMPLE), PAPER)
    top = margin
    for row, below in zip(rows, tall, strict=True):
        left = margin
        for block in row:
            whole.paste(block, (left, top))
            left += block.width + gap
        top += below + gap
    return whole


def _heading(prompt: str, said: Sequence[Said], width: float, pen: Pen) -> Image.Image:
    """The question, then each answer behind its label."""
    question = pen.wrap(prompt, 28, width, 4)
    indent = max(pen.length(one.label, 20) for one in said) + 28
    answers = [pen.wrap(one.text, 20, width - indent, 6) for one in said]
    height = 36 * len(question) + sum(28 * len(lines) + 4 for lines in answers)
    sheet, y = Sheet(width, height, pen), 0.0
    for line in question:
        sheet.text(0, y + 24, line, 28, bold=True)
        y += 36
    for i, (one, lines) in enumerate(zip(said, answers, strict=True)):
        sheet.text(0, y + 24, one.label, 20, QUIET if i else ACCENT)
        for line in lines:
            sheet.text(indent, y + 24, line, 20)
            y += 28
        y += 4
    return sheet.image


def _panels(
    levels: Levels, sites: Sites, prune: PruneRecord, width: float, pen: Pen
) -> Image.Image:
    """The picture, then what each site left of it, each with its caption below."""
    total, fine = math.prod(prune.grid), pen.fine
    rows = -(-(len(sites) + 1) // ROW)
    columns = -(-(len(sites) + 1) // rows)
    side = min((width - GAP * (columns - 1)) / columns, 362 if columns > 2 else 300)
    fit = fine / prune.grid[1]  # so that every patch is as wide as the others
    side = max(1, int(side * fit)) / fit
    space = (width - columns * side) / (columns - 1) if columns > 2 else GAP
    tall = side * levels.shape[0] / levels.shape[1]
    across, down = side + space, tall + 30 + GAP
    legend = 30 if any(site.merged for site in sites) else 0
    sheet = Sheet(columns * across - space, rows * down - GAP + legend, pen)
    size = (round(side * fine), round(tall * fine))
    large = np.asarray(Image.fromarray(levels).resize(size, Image.Resampling.BICUBIC))
    shown = [(f"input: {total} tokens", large)]
    for site in sites:
        dimmed = dim(large, site, prune.grid, fine // 2)
        shown.append((f"{site.caption} of {total}", dimmed))
    size_of_text = min(17.0, *(16.5 * side / pen.length(caption, 17) for caption, _ in shown))
    for i, (caption, panel) in enumerate(shown):
        x, y = round(i % columns * across), round(i // columns * down)
        sheet.image.paste(Image.fromarray(panel), (x * fine, y * fine))
        indent = (side - pen.length(caption, size_of_text)) / 2
        sheet.text(x + indent, y + tall + 24, caption, size_of_text)
    if legend:
        _legend(sheet, rows * down - GAP)
    return sheet.image


def _legend(sheet: Sheet, y: float) -> None:
    """What an outlined patch means, in 30 pixels below `y`."""
    sheet.box(0, y + 10, 15, 15, MERGED)
    sheet.box(2, y + 12, 11, 11, PAPER)
    sheet.text(23, y + 23, "merged token, drawn at its centre", 15, QUIET)
