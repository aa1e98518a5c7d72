"""The plans that the search tries: which selection leaves how many tokens after which layer."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.scenes576.scenes import GRID

VISUAL = GRID * GRID


@dataclass(frozen=True)
class Plan:
    """Which selection after which layer leaves how many visual tokens."""

    name: str
    sites: tuple[tuple[int, str, int], ...]  # layer (0: input), selection, tokens that stay
    renumber: bool = False  # whether tokens that are left stand one behind the other

    def cr(self, layers: int) -> float:
        total, live, rest = 0, VISUAL, list(self.sites)
        for layer in range(layers):
            while rest and rest[0][0] == layer:
                live = rest.pop(0)[2]
            total += live
        return VISUAL * layers / total


def one_site(cr: float, layer: int, layers: int) -> int:
    """Tokens that stay behind one site after `layer` layers."""
    return int((VISUAL * layers / cr - layer * VISUAL) / (layers - layer))


def two_sites(cr: float, first: int, later: int, keep: int, layers: int) -> int:
    """Tokens behind a second site where `keep` stay behind the first."""
    used = first * VISUAL + (later - first) * keep
    return int((VISUAL * layers / cr - used) / (layers - later))


def plans(layers: int) -> Iterator[Plan]:
    """The plans of the search; those that cannot be are left out."""
    found = itertools.chain(
        _diverse(layers), _depths(layers), _causes(layers), _staged(layers), _mixed(layers)
    )
    yield Plan("dense", ())
    for plan in found:
        if all(keep >= 1 for _, _, keep in plan.sites):
            yield plan


def _depths(layers: int) -> Iterator[Plan]:
    """Which score after which layer. CR is not held here: 64 tokens stay wherever the site is."""
    scores = ("last", "last-agnostic", "prompt-agnostic", "question", "question-agnostic",
              "question-max")  # fmt: skip
    for layer, score in itertools.product((1, 2, 3, 4, 6, 8, 10, 12, 15, 18, 21), scores):
        yield Plan(f"64 by {score} after {layer}", ((layer, f"top:{score}", 64),))


def _diverse(layers: int) -> Iterator[Plan]:
    """Selections before the decoder, with and without tokens' own positions."""
    for cr, renumber in itertools.product((4, 8, 16, 32), (False, True)):
        keep, said = VISUAL // cr, ", renumbered" if renumber else ""
        names = ["spread", "dpp:input", *(f"top:{s}" for s in ("cosine", "cosine-largest"))]
        for score, power in itertools.product(
            ("cosine", "cosine-prompt", "cosine-largest"), (0.25, 0.5, 0.75, 1)
        ):
            names.append(f"dpp:input:{score}:{power}")
        for name in names:
            yield Plan(f"CR{cr} {name}{said}", ((0, name, keep),), renumber)


UTP = {4: (576,) * 3 + (109,) + (97,) * 3 + (96,) * 15 + (94,) * 8}
"""The schedule that calibration found for the exported model, by ratio."""


def _causes(layers: int) -> Iterator[Plan]:
    """UTP and FastV with other scores in place of their own, at their own counts."""
    scores = ("last", "last-agnostic", "prompt-agnostic", "question", "question-agnostic",
              "question-max")  # fmt: skip
    for cr, layer in itertools.product((4, 8), (1, 2, 3, 4)):
        keep = one_site(cr, layer, layers)
        for score in scores:
            yield Plan(f"CR{cr} {keep} by {score} after {layer}", ((layer, f"top:{score}", keep),))
    for cr, counts in UTP.items():
        for score in ("utp", *scores):
            sites = [
                (layer, f"top:{_utp(layer) if score == 'utp' else score}", counts[layer])
                for layer in range(1, layers)
                if counts[layer] < counts[layer - 1]
            ]
            yield Plan(f"CR{cr} UTP's counts by {score}", tuple(sites))


def _utp(layer: int) -> str:
    """UTP's score after a layer."""
    return "last-agnostic" if layer <= 3 else "last"


def _mixed(layers: int) -> Iterator[Plan]:
    """Relevance and diversity together after an early layer."""
    scores = ("last-agnostic", "question-agnostic")
    for cr, layer in itertools.product((4, 8), (1, 2, 3)):
        keep = one_site(cr, layer, layers)
        for features in ("hidden", "key"):
            name = f"CR{cr} dpp {features} after {layer}"
            yield Plan(name, ((layer, f"dpp:{features}", keep),))
            for score, power in itertools.product(scores, (0.25, 1)):
                select = f"dpp:{features}:{score}:{power}"
                yield Plan(f"{name} {score}^{power}", ((layer, select, keep),))


def _staged(layers: int) -> Iterator[Plan]:
    """Diversity at the input, relevance deeper."""
    scores = ("last-agnostic", "question-agnostic", "question-max")
    for cr, share, later in itertools.product((4, 8, 16), (1.5, 2, 3), (6, 9, 12, 15, 18)):
        first = int(VISUAL / cr * share)
        keep = two_sites(cr, 0, later, first, layers)
        for score in scores:
            for name in ("spread", "dpp:input"):
                sites = ((0, name, first), (later, f"top:{score}", max(keep, 0)))
                yield Plan(f"CR{cr} {name} {first}, {score} {keep} after {later}", sites)
