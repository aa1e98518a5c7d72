"""What the parts of a model take on one machine: `edgeprune profile` measures it, `plan` and
`export --ttft` count with it.

Time to first token is: reading the image file, preprocessing, the vision graph, prefill. Each is a
median of rounds in milliseconds. Of a decoder layer and of an encoder block it is known as a
function of tokens. A layer that r visual tokens enter takes P(r) / L, where P(r) is a prefill in
which r enter every layer: what a prefill costs beside its layers is then counted once. Where layers
are of several kinds, each takes the share of P(r) that it has of all layers by themselves.

Choosing tokens takes time at each site: in the decoder by the tokens that are alive there, in the
encoder by the units that go on.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated

from edgeprune.errors import InputError
from edgeprune.records import Amount, Between, Count, Few, build, parse

SCHEMA = 2
LARGEST = 16 << 20
"""Bytes of a profile that are read."""
Milliseconds = Annotated[float, Between(0, 1e9)]


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, p10 and p90 of rounds, in milliseconds."""

    ms: Milliseconds
    low: Milliseconds
    high: Milliseconds


@dataclass(frozen=True, slots=True)
class Table:
    """Milliseconds by a count of tokens, which rises: as measured, and with medians that never
    fall."""

    counts: tuple[Amount, ...]
    measured: tuple[Spread, ...]
    ms: tuple[Milliseconds, ...]  # monotone

    @classmethod
    def of(cls, counts: Sequence[int], measured: Sequence[Spread]) -> Table:
        return cls(tuple(counts), tuple(measured), monotone([one.ms for one in measured]))

    def at(self, count: float) -> float:
        """Between two counts on the line through them; below the first as there, above the last on
        the line through the last two."""
        if count <= self.counts[0] or len(self.counts) == 1:
            return self.ms[0]
        index = min(bisect_right(self.counts, count), len(self.counts) - 1)
        (left, right), (low, high) = (
            self.counts[index - 1 : index + 1],
            self.ms[index - 1 : index + 1],
        )
        return low + (high - low) * (count - left) / (right - left)

    def plateaus(self, share: float = 0.02) -> list[tuple[int, int]]:
        """Runs of counts over which time rises by less than `share`: first and last."""
        runs, start = list[tuple[int, int]](), 0
        for index in range(1, len(self.counts) + 1):
            ends = index == len(self.counts) or self.ms[index] > self.ms[start] * (1 + share)
            if ends:
                if index - 1 > start:
                    runs.append((self.counts[start], self.counts[index - 1]))
                start = index
        return runs


def monotone(values: Sequence[float]) -> tuple[float, ...]:
    """The nearest sequence that never falls, by least squares: neighbours that fall are pooled."""
    pools = list[tuple[float, int]]()
    for value in values:
        pools.append((value, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (one, n), (other, m) = pools.pop(-2), pools.pop()
            pools.append(((one * n + other * m) / (n + m), n + m))
    return tuple(mean for mean, size in pools for _ in range(size))


@dataclass(frozen=True, slots=True)
class KindTimes:
    """Times of all parts of one kind."""

    kind: str
    table: Table


@dataclass(frozen=True, slots=True)
class Profiled:
    """The model that was timed, by its sizes: a profile is for no other."""

    family: str
    layers: Few
    width: Count
    mlp_width: Count
    visual_tokens: Count
    blocks: Few  # of the encoder
    patches: Count  # of a tile
    tiles: Few
    dtype: str
    weights: str


@dataclass(frozen=True, slots=True)
class Profile:
    """All times of one model on one machine and backend."""

    model: Profiled
    backend: str
    threads: Few | None
    machine: dict[str, str]  # processor, GPU, versions, power mode
    text_tokens: Count  # of the prompt, beside the image's
    rounds: Count
    image: tuple[Count, Count]  # height, width of the file that was read
    read: Spread  # the file, to pixels in RGB
    preprocess: Spread
    vision: Spread  # the vision graph, all blocks on all patches
    prefill: Table  # with so many visual tokens in every layer
    block: Table  # of the encoder, all tiles, by the tokens of each
    whole: Spread  # all of it, one after the other, with all visual tokens
    choices: tuple[
        KindTimes, ...
    ] = ()  # encoder sites, all tiles, by the units of a tile that go on
    sites: tuple[KindTimes, ...] = ()  # decoder sites, by the visual tokens that are alive there
    layers: tuple[KindTimes, ...] = ()  # decoder layers by themselves, by the visual tokens that
    # enter; none where all are of one kind
    windowed: Table | None = None  # blocks where attention is within windows, by tokens of each
    schema: Count = SCHEMA

    @property
    def added(self) -> float:
        """What the parts of `whole` take, added."""
        return self.read.ms + self.preprocess.ms + self.vision.ms + self.prefill.ms[-1]

    @property
    def tables(self) -> Iterator[Table]:
        """Every one."""
        yield from (self.prefill, self.block)
        if self.windowed is not None:
            yield self.windowed
        yield from (times.table for times in (*self.choices, *self.sites, *self.layers))

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"


def read_profile(file: Path) -> Profile:
    """A stored profile; InputError where it is none."""
    try:
        if file.stat().st_size > LARGEST:
            raise ValueError("it is too long")
        data = parse(file.read_text(encoding="utf-8"))
        if not isinstance(data, dict):
            raise ValueError("it is no object")
        if data.get("schema") != SCHEMA:
            raise ValueError(f"its schema is not {SCHEMA}")
        profile: Profile = build(Profile, data, "profile")
        for table in profile.tables:
            _check(table)
        for times in (profile.choices, profile.sites, profile.layers):
            if len({one.kind for one in times}) < len(times):
                raise ValueError("it has two tables of one kind")
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(
            f"{file} is no profile ({error}); make one on the device: edgeprune profile BUNDLE -o"
            f" {file}"
        ) from error
    return profile


def _check(table: Table) -> None:
    """ValueError unless counts rise and times never fall."""
    sizes = {len(table.counts), len(table.measured), len(table.ms)}
    if len(sizes) > 1 or not table.counts:
        raise ValueError("a table has columns of different lengths")
    if any(a >= b for a, b in pairwise(table.counts)) or any(a > b for a, b in pairwise(table.ms)):
        raise ValueError("a table's counts rise and its times never fall")
