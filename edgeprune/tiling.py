"""How an image is cut into tiles: the arithmetic that an export freezes and a runtime repeats.

Four ways are known. `stretch` (InternVL, LFM2-VL): the image is made exactly as large as a grid of
tiles, the grid of the nearest aspect ratio; the view of the whole may have a size of its own. `fit`
(LLaVA-NeXT, LLaVA-OneVision): it is made as large as it can be inside the grid and padded; whole
rows or columns of tokens that show padding are left out.
`round_up` (SmolVLM, Idefics3): its longer side gets a fixed length, then each side is stretched to
the next multiple of the tile; the view of the whole image is made from that. `crop` (Gemma 3): its
longer side is cut into equal parts first, and each part, like the whole image, is squeezed to a
tile.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, NamedTuple

from edgeprune.records import Between, Count, Few, LongestEdge, Magnitude, OneOf, Side

TILE_MEMORY_MB = 64
"""For what the encoder gave for tiles that may come again, unless another number is given."""

AspectRatio = Annotated[float, Between(1e-4, 1e4)]


class Size(NamedTuple):
    """Pixels, or tiles, or tokens."""

    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.width} x {self.height} (width x height)"


@dataclass(frozen=True, slots=True)
class CropRule:
    """Which images are cut into crops, and into how many (pan and scan)."""

    ratio: AspectRatio  # of the longer side to the other: from here on an image is cut
    least: Side  # pixels of the shorter side of a crop; an image that has no more is not cut
    most: Few  # crops

    def grid(self, image: Size) -> Size:
        """Rows and columns of an image's crops; 1 x 1: it is not cut."""
        longer, other = max(image), min(image)
        if longer / other < self.ratio:
            return Size(1, 1)
        count = min(longer // self.least, math.floor(longer / other + 0.5))
        count = min(self.most, max(2, count))
        side = math.ceil(longer / count)
        if min(side, other) < self.least or (count - 1) * side >= longer:  # or nothing in the last
            return Size(1, 1)
        return Size(1, count) if image.width >= image.height else Size(count, 1)


class Views(NamedTuple):
    """What the encoder sees of an image."""

    grid: Size  # rows and columns of tiles; 1 x 1: the image is not cut
    whole: Size | None  # pixels of the view of the whole image; None: there is none


@dataclass(frozen=True, slots=True)
class ViewRule:
    """Which views LFM2-VL's processor makes of an image, by its size: of a large one tiles, and a
    view of the whole; of others one view."""

    patch: Side  # pixels a side
    step: Side  # pixels a side of a token
    tokens: tuple[Count, Count]  # of a view of the whole: least, most
    tile: Side | None  # pixels a side; None: no image is cut
    tiles: tuple[Few, Few]  # of an image that is cut: least, most
    tolerance: Magnitude  # an image is cut where it has more pixels than so many largest views
    overview: bool  # whether an image that is cut has a view of the whole too

    def views(self, image: Size) -> Views:
        """The tiles and the view of the whole of an image of that size."""
        if self.tile is None or not self.splits(image):
            return Views(Size(1, 1), self.whole(image))
        grid = stretch_grid(image, self.tile, *self.tiles)
        return Views(grid, self.whole(image) if self.overview else None)

    def splits(self, image: Size) -> bool:
        """Whether an image is cut into tiles."""
        height, width = (max(self.patch, round(side / self.step) * self.step) for side in image)
        largest = self.tokens[1] * self.step**2
        return self.tile is not None and height * width > largest * self.tolerance

    def whole(self, image: Size) -> Size:
        """The pixels of a view of the whole: sides to the nearest multiples of the step, unless
        that makes too few tokens or too many; then both are scaled and rounded up, or down."""
        step, area = self.step, image.height * image.width
        height, width = (max(step, round(side / step) * step) for side in image)
        least, most = (tokens * step**2 for tokens in self.tokens)
        if height * width > most:
            scale = math.sqrt(area / most)
            height, width = (max(step, math.floor(s / scale / step) * step) for s in image)
        elif height * width < least:
            scale = math.sqrt(least / area)
            height, width = (math.ceil(side * scale / step) * step for side in image)
        return Size(height, width)

    def described(self, views: Views) -> str:
        """Views in words, with their tokens."""
        (rows, columns), whole = views
        found = [] if (rows, columns) == (1, 1) else [f"{rows} x {columns} tiles (rows x columns)"]
        if whole is not None:
            tokens = whole.height * whole.width // self.step**2
            found.append(f"one view of {tokens} tokens")
        return " and ".join(found)


@dataclass(frozen=True, slots=True)
class Tiling:
    """The tiles of a bundle: rows x columns of them, and the whole image as one more."""

    kind: Annotated[str, OneOf(("stretch", "fit", "round_up", "crop"))]
    rows: Few
    columns: Few
    height: Side  # of the images that the bundle is frozen for, pixels
    width: Side
    tile: Side  # pixels a side
    tokens: Few  # visual tokens a side of a tile
    overview: Annotated[str, OneOf(("first", "last", "none"))]  # where the whole image stands
    ratios: tuple[AspectRatio, ...] = ()  # stretch: columns / rows of every grid to choose from
    longest_edge: LongestEdge | None = None  # round_up: pixels of the longer side at first
    crops: CropRule | None = None  # crop: which images are cut so
    kept: Few | None = None  # tiles of the grid that are encoded, as tile_choice.py says; None: all
    overview_size: tuple[Side, Side] | None = None  # height, width of the view of the whole; None:
    # a tile's (tile_views.py says how another one is encoded)

    @property
    def cut(self) -> int:
        """Tiles of the grid."""
        return self.rows * self.columns

    @property
    def all_tiles(self) -> int:
        """Those of the grid, and the whole image where it is one more."""
        return self.cut + (self.overview != "none")

    @property
    def tiles(self) -> int:
        """How many the encoder sees."""
        return self.all_tiles if self.kept is None else self.all_tiles - self.cut + self.kept

    @property
    def choice(self) -> str:
        """What is left out, for people; empty where nothing is."""
        if self.kept is None:
            return ""
        whole = "" if self.overview == "none" else ", and the view of the whole"
        return f"{self.kept} of the {self.cut} tiles of an image are encoded{whole}"

    @property
    def channels(self) -> int:
        """Numbers of a pixel."""
        return 3 if self.overview_size is None else 4

    @property
    def views(self) -> Views:
        """Tiles and view of the whole."""
        grid = Size(self.rows, self.columns)
        if self.overview == "none":
            return Views(grid, None)
        return Views(grid, Size(*(self.overview_size or (self.tile, self.tile))))

    @property
    def overview_grid(self) -> Size:
        """Tokens of the view of the whole."""
        if self.overview_size is None:
            return Size(self.tokens, self.tokens)
        height, width = self.overview_size
        return Size(height // self.block, width // self.block)

    @property
    def block(self) -> int:
        """Pixels a side of a token of a tile."""
        return self.tile // self.tokens

    @property
    def canvas(self) -> Size:
        """Pixels of the grid."""
        return Size(self.rows * self.tile, self.columns * self.tile)

    @property
    def grid(self) -> Size:
        """Tokens of the grid."""
        return Size(self.rows * self.tokens, self.columns * self.tokens)

    def suits(self, height: int, width: int) -> bool:
        """Whether an image of such a shape gives the tokens that the bundle has."""
        if self.kind == "stretch":
            if self.cut > 1 and self.columns / self.rows not in nearest(
                width / height, self.ratios
            ):
                return False
            whole = self.overview_size
            return whole is None or rounds_to(Size(height, width), Size(*whole), self.block)
        if self.crops is not None:
            return self.crops.grid(Size(height, width)) == (self.rows, self.columns)
        if self.longest_edge is not None:
            grid = round_up_grid(Size(height, width), self.longest_edge, self.tile)
            return grid == (self.rows, self.columns)
        frozen = Size(self.height, self.width)
        return shown(self.grid, Size(height, width)) == shown(self.grid, frozen)


def rounds_to(image: Size, frozen: Size, step: int) -> bool:
    """Whether Qwen-VL's processor would make an image `frozen` at some scale.

    It scales an image and rounds both sides to multiples of `step`: to the nearest, or both down
    or both up where the number of pixels is bounded. So each has to come that near its frozen one.
    """
    sides = list(zip(frozen, image, strict=True))
    for below, above in ((step / 2, step / 2), (0, step), (step, 0)):
        least = max((side - below) / own for side, own in sides)
        most = min((side + above) / own for side, own in sides)
        if least <= most:
            return True
    return False


def rounded(image: Size, pixels: int, step: int) -> Size:
    """An image's shape in multiples of `step`, with about so many pixels."""
    scale = math.sqrt(pixels / (image.height * image.width))
    height, width = (max(1, round(side * scale / step)) * step for side in image)
    return Size(height, width)


def nearest(ratio: float, ratios: Iterable[float]) -> list[float]:
    """Those of `ratios` that come closest, differences alone counted as InternVL does."""
    least = min(abs(ratio - other) for other in ratios)
    return [other for other in ratios if abs(ratio - other) == least]


def stretch_grid(image: Size, tile: int, least: int, most: int) -> Size:
    """Rows and columns of the grid that InternVL's processor chooses, of `least` to `most` tiles.

    Of grids with the same ratio the larger, unless the image has less than half of its pixels.
    """
    ratio, area = image.width / image.height, image.width * image.height
    best, difference = Size(1, 1), math.inf
    for grid in grids(least, most):
        found = abs(ratio - grid.width / grid.height)
        large = area > 0.5 * tile * tile * grid.height * grid.width
        if found < difference or (found == difference and large):
            best, difference = grid, found
    return best


def grids(least: int, most: int) -> list[Size]:
    """All grids of `least` to `most` tiles, fewest tiles first, then fewest columns."""
    every = [
        Size(rows, columns)
        for columns in range(1, most + 1)
        for rows in range(1, most // columns + 1)
    ]
    fitting = [grid for grid in every if grid.height * grid.width >= least]
    return sorted(fitting, key=lambda grid: grid.height * grid.width)


def fit_canvas(image: Size, choices: Iterable[Size]) -> Size:
    """The canvas that LLaVA-NeXT's processor chooses: the most of the image's pixels, then the
    least waste."""
    best, most, wasted = None, 0, math.inf
    for choice in choices:
        scale = min(choice.width / image.width, choice.height / image.height)
        inside = int(image.width * scale) * int(image.height * scale)
        useful = min(inside, image.width * image.height)
        waste = choice.width * choice.height - useful
        if useful > most or (useful == most and waste < wasted):
            best, most, wasted = choice, useful, waste
    assert best is not None  # an image has pixels
    return best


def longest(image: Size, edge: int) -> Size:
    """An image's size with a longer side of `edge` pixels, enlarged too; the other is rounded down,
    then up to an even number."""
    ratio = image.width / image.height
    if image.width >= image.height:
        other = int(edge / ratio)
        return Size(max(1, other + other % 2), edge)
    other = int(edge * ratio)
    return Size(edge, max(1, other + other % 2))


def round_up_grid(image: Size, edge: int, tile: int) -> Size:
    """Rows and columns of the tiles of an image whose longer side is made `edge` pixels first.

    The other side follows the longer one when that is rounded up, so it may get a tile more.
    """
    height, width = longest(image, edge)
    ratio = width / height
    if width >= height:
        columns = math.ceil(width / tile)
        return Size(math.ceil(int(columns * tile / ratio) / tile), columns)
    rows = math.ceil(height / tile)
    return Size(rows, math.ceil(int(rows * tile * ratio) / tile))


def fitted(image: Size, canvas: Size) -> Size:
    """An image's size when it is as large as it can be inside a canvas."""
    across, down = canvas.width / image.width, canvas.height / image.height
    if across < down:
        return Size(min(math.ceil(image.height * across), canvas.height), canvas.width)
    return Size(canvas.height, min(math.ceil(image.width * down), canvas.width))


def shown(grid: Size, image: Size) -> tuple[int, int, int, int]:
    """Top, left, height and width of the tokens of a grid that show an image fitted into it."""
    if image.width / image.height > grid.width / grid.height:
        height = int(round(image.height * (grid.width / image.width), 7))
        margin = (grid.height - height) // 2
        return margin, 0, grid.height - 2 * margin, grid.width
    width = int(round(image.width * (grid.height / image.height), 7))
    margin = (grid.width - width) // 2
    return 0, margin, grid.height, grid.width - 2 * margin
