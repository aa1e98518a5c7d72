"""The parity check tells a tie from a fault: engines here are stubs that choose by one number."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from edgeprune.export import parity
from edgeprune.models._processor import Prompt
from edgeprune.models._reference import Step

TOLERANCE = 1e-4


@dataclass
class Engine:
    """Keeps token 1 where the pixels' sum is above `cut`, else token 0."""

    cut: float
    shift: float = 0.0  # of every logit
    dtype: torch.dtype = torch.float32

    def prefill(self, prompt: Prompt) -> Step:
        chosen = int(prompt.pixels.sum() > self.cut)
        self.vision_kept = torch.tensor([chosen])
        self.visual = torch.full((1, 1, 4), float(chosen))
        return self.step(prompt.text_ids)

    def step(self, ids: Tensor) -> Step:
        return Step(torch.arange(5.0) + self.visual.sum() + self.shift, ())


def prompt(total: float) -> Prompt:
    pixels = torch.zeros(1, 3, 4, 4)
    pixels[0, 0, 0, 0], pixels[0, 0, 0, 1] = total + 1, -1
    return Prompt(pixels, torch.zeros(1, 2).long(), torch.ones(1, 3).long())


@pytest.mark.parametrize(
    ("total", "dtype", "tie"),
    [
        (2e-7, torch.float32, True),  # nearer to the cut than rounding
        (2e-2, torch.float32, False),
        (2e-2, torch.float16, True),
        (9.0, torch.float16, False),
    ],
)
def test_a_tie_is_a_choice_that_rounding_can_turn(
    total: float, dtype: torch.dtype, tie: bool
) -> None:
    reference, graphs, sample = Engine(0, dtype=dtype), Engine(10), prompt(total)
    wanted, token = parity._play(reference, sample)  # type: ignore[arg-type]
    found, _ = parity._play(graphs, sample, token)  # type: ignore[arg-type]
    assert not parity._agree(found, wanted, TOLERANCE)
    assert "keeps other tokens" in parity._fault(found, wanted, TOLERANCE)
    found_tie = parity._is_tie(reference, sample, token, found, wanted, TOLERANCE)  # type: ignore[arg-type]
    assert found_tie == tie


def test_a_tie_explains_no_wrong_logits() -> None:
    """The choice turns with rounding, but the graph's logits fit neither choice."""
    reference, graphs, sample = Engine(0), Engine(10, shift=0.5), prompt(2e-7)
    wanted, token = parity._play(reference, sample)  # type: ignore[arg-type]
    found, _ = parity._play(graphs, sample, token)  # type: ignore[arg-type]
    assert not parity._is_tie(reference, sample, token, found, wanted, TOLERANCE)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("places", "among"),
    [
        (([0, 2, 3], [0, 1]), True),  # 0 always, then what one or the other kept: 0 and 2
        (([1, 2, 3], [0, 1]), False),  # 0 is kept always
        (([0, 2, 5], [0, 1]), False),  # 5 is never kept
        (([0, 1, 2], [0, 1]), False),  # the first's choice: then it is no choice that differs
        (([0, 2, 1], [0, 2]), True),  # the first's too, but another token stands for merged ones
        (([0, 2, 3], [1, 2]), False),  # of 0, 2 and 3 it drops 0
    ],
)
def test_many_close_choices_are_ties_together(places: tuple[list[int], ...], among: bool) -> None:
    def outcome(*places: list[int]) -> parity.Outcome:
        return parity.Outcome(tuple(map(torch.tensor, places)), torch.zeros(1, 1, 1), ())

    others = [outcome([0, 1, 2], [0, 1]), outcome([0, 1, 3], [0, 2]), outcome([0, 2, 4], [0, 1])]
    assert parity._is_among(outcome(*places), others) == among


def test_a_fault_names_what_differs() -> None:
    sample = prompt(3.0)
    wanted, token = parity._play(Engine(0), sample)  # type: ignore[arg-type]
    shifted, _ = parity._play(Engine(0, shift=0.8), sample, token)  # type: ignore[arg-type]
    assert "logits differ from the eager reference by 1.00e-01" in parity._fault(
        shifted, wanted, TOLERANCE
    )
    merged = parity.Outcome(wanted.places, wanted.visual * 1.1, wanted.logits)
    assert "visual tokens differ from the eager reference by 1.00e-01" in parity._fault(
        merged, wanted, TOLERANCE
    )
