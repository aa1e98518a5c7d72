"""One picture of a pruned answer: the question, a panel for each pruning site, the schedule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import takewhile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from edgeprune.bundle import PruneRecord
from edgeprune.errors import InputError
from edgeprune.runtime.show import Levels, Said, Sites, dim

MOST_SITES = 7
"""Of more pruning sites so many are drawn: the first, the last, evenly between."""

Colour = tuple[int, int, int]

WIDTH, MARGIN, GAP = 1200, 40, 16  # the picture's, in pixels at scale 1
OVERSAMPLE = 2  # drawn so much larger, then averaged: smooth edges
ROW = 6  # panels in one row; more are wrapped
PAPER: Colour = (255, 255, 255)
INK: Colour = (31, 35, 40)
QUIET: Colour = (101, 109, 118)
ACCENT: Colour = (9, 105, 218)
SOFT: Colour = (122, 173, 236)
GHOST: Colour = (238, 241, 245)


@dataclass(frozen=True, slots=True)
class Pen:
    """What everything is drawn with: dots for each pixel at scale 1, and a font file."""

    fine: int
    file: Path | None = None  # None: the one that Pillow brings along

    def font(self, size: float) -> ImageFont.FreeTypeFont:
        return _font(self.file, size)

    def length(self, text: str, size: float) -> float:
        """Width of a line in pixels at scale 1, the same at every scale."""
        return self.font(8 * size).getlength(text) / 8

    def wrap(self, text: str, size: float, width: float, most: int) -> list[str]:
        """Lines no wider than `width`, at most `most`: the last then ends in three dots."""

        def fits(line: str) -> bool:
            return self.length(line, size) <= width

        lines, line = list[str](), ""
        for word in text.split():
            if fits(f"{line} {word}".strip()):
                line = f"{line} {word}".strip()
                continue
            lines += [line] if line else []
            while not fits(word):
                end = _fitting(word, fits)
                lines.append(word[:end])
                word = word[end:]
            line = word
        lines += [line] if line else []
        if len(lines) > most:
            end = _fitting(lines[most - 1], lambda start: fits(start + "..."))
            lines[most - 1 :] = [lines[most - 1][:end] + "..."]
        return lines


@lru_cache(maxsize=32)
def _font(file: Path | None, size: float) -> ImageFont.FreeTypeFont:
    try:
        font = ImageFont.truetype(file, size) if file else ImageFont.load_default(size)
    except (OSError, ImportError) as error:
        raise InputError(
            f"the font {file or 'of Pillow'} cannot be used ({error}); name a .ttf or .otf: --font"
        ) from error
    assert isinstance(font, ImageFont.FreeTypeFont)  # the other kind has no size
    return font


def check_font(file: Path | None) -> None:
    """InputError, before any work, where a file is no font."""
    _font(file, 16)


def _fitting(text: str, fits: Callable[[str], bool]) -> int:
    """How many characters fit, at least one."""
    return max(takewhile(lambda end: fits(text[:end]), range(1, len(text) + 1)), default=1)


class _Sheet:
    """A blank part of the picture; positions and sizes are in pixels at scale 1."""

    def __init__(self, width: float, height: float, pen: Pen) -> None:
        self.pen = pen
        self.image = Image.new("RGB", (round(width * pen.fine), round(height * pen.fine)), PAPER)
        self._draw = ImageDraw.Draw(self.image)

    def box(self, x: float, y: float, width: float, height: float, colour: Colour) -> None:
        edges = (round(v * self.pen.fine) for v in (x, y, x + width, y + height))
        left, top, right, bottom = edges
        if right > left and bottom > top:
            self._draw.rectangle((left, top, right - 1, bottom - 1), colour)

    def text(
        self,
        x: float,
        y: float,
        text: str,
        size: float,
        colour: Colour = INK,
        *,
        bold: bool = False,
    ) -> None:
        """One line; x is its left end, y its base line."""
        self._draw.text(
            (x * self.pen.fine, y * self.pen.fine),
            text,
            colour,
            self.pen.font(size * self.pen.fine),
            anchor="ls",
            stroke_width=self.pen.fine // 2 if bold else 0,
            stroke_fill=colour,
        )


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
        rows[1].append(_chart(prune, room, panels.height / fine, pen))
    else:
        rows.append([_chart(prune, inner, 190, pen)])
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
    sheet, y = _Sheet(width, height, pen), 0.0
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
    total, fine = prune.visual_tokens, pen.fine
    rows = -(-(len(sites) + 1) // ROW)
    columns = -(-(len(sites) + 1) // rows)
    side = min((width - GAP * (columns - 1)) / columns, 362 if columns > 2 else 300)
    fit = fine / prune.grid[1]  # so that every patch is as wide as the others
    side = max(1, int(side * fit)) / fit
    space = (width - columns * side) / (columns - 1) if columns > 2 else GAP
    tall = side * levels.shape[0] / levels.shape[1]
    across, down = side + space, tall + 30 + GAP
    sheet = _Sheet(columns * across - space, rows * down - GAP, pen)
    size = (round(side * fine), round(tall * fine))
    large = np.asarray(Image.fromarray(levels).resize(size, Image.Resampling.BICUBIC))
    shown = [(f"input: {total} tokens", large)]
    for title, kept in sites:
        dimmed = dim(large, kept, prune.grid, fine // 2)
        shown.append((f"{title}: {len(kept)} of {total}", dimmed))
    for i, (caption, panel) in enumerate(shown):
        x, y = round(i % columns * across), round(i // columns * down)
        sheet.image.paste(Image.fromarray(panel), (x * fine, y * fine))
        size_of_text = min(17.0, 17 * side / pen.length(caption, 17))
        indent = (side - pen.length(caption, size_of_text)) / 2
        sheet.text(x + indent, y + tall + 24, caption, size_of_text)
    return sheet.image


def _chart(prune: PruneRecord, width: float, height: float, pen: Pen) -> Image.Image:
    """r_l as bars, the dense model's V behind them, dark where tokens are dropped."""
    counts, total = prune.counts, prune.visual_tokens
    falls = [now < before for before, now in zip((total, *counts), counts, strict=False)]
    text = (
        f"visual tokens in each decoder layer: {sum(counts):,} of {total * len(counts):,} in all,"
        f" compression ratio {prune.cr_reached:.2f}"
    ) + ("; dark where tokens are dropped" if any(falls) else "")
    sheet, y = _Sheet(width, height, pen), 0.0
    for line in pen.wrap(text, 17, width, 3):
        sheet.text(0, y + 16, line, 17)
        y += 24
    top, base = y + 24, height - 26
    gap = min(8, 0.25 * width / len(counts))
    slot = (width + gap) / len(counts)
    tall = [(base - top) * count / total for count in counts]
    for i, fall in enumerate(falls):
        sheet.box(i * slot, top, slot - gap, base - top, GHOST)
        sheet.box(i * slot, base - tall[i], slot - gap, tall[i], ACCENT if fall else SOFT)
    _number_bars(sheet, falls, counts, [base - t - 5 for t in tall], (slot, gap, width))
    step = next(n for n in (1, 4, 5, 10, 20, 50, 1000) if n * slot > pen.length("888", 14))
    for i in range(len(counts)):
        if i == 0 or (i + 1) % step == 0:
            name = str(i + 1)
            left = i * slot + (slot - gap - pen.length(name, 14)) / 2
            sheet.text(min(left, width - pen.length(name, 14)), base + 18, name, 14)
    return sheet.image


def _number_bars(
    sheet: _Sheet,
    falls: Sequence[bool],
    counts: Sequence[int],
    lines: Sequence[float],
    places: tuple[float, float, float],
) -> None:
    """Each bar's number above its middle; where bars are narrow, only where they change."""
    slot, gap, width = places
    longs = [sheet.pen.length(str(count), 14) for count in counts]
    room = max(longs) + 2 < slot
    end, last = 0.0, -99.0  # of the number before: its right end and its base line
    for i, (fall, count, long, y) in enumerate(zip(falls, counts, longs, lines, strict=True)):
        left = i * slot + (slot - gap - long) / 2 if room else min(i * slot, width - long)
        if room or ((fall or i == 0) and (left >= end + 4 or abs(y - last) >= 15)):
            sheet.text(max(0, left), y, str(count), 14)
            end, last = left + long, y
