"""Which products have 4 bits, which 8, and which stay floats: an integer program.

Each group of products takes one kind of weight. The sum of the losses is least, the sum of the
bits is within a budget.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import highspy
import numpy as np

from edgeprune.errors import SpecError

OPTIONS = {"output_flag": False, "threads": 1, "mip_rel_gap": 1e-6, "mip_abs_gap": 0.0}


@dataclass(frozen=True)
class Candidate:
    """A kind of weight that a group may have: what the model loses by it, and what it takes."""

    loss: float
    bits: float


def choose(groups: Sequence[Mapping[str, Candidate]], budget: float) -> list[str]:
    """The kind of each group; SpecError where no choice is within the budget of bits."""
    columns = [(row, kind, one) for row, group in enumerate(groups) for kind, one in group.items()]
    losses = np.array([one.loss for _, _, one in columns], np.float64)
    bits = np.array([one.bits for _, _, one in columns], np.float64) / max(budget, 1.0)
    scale = losses.max(initial=0.0) or 1.0
    highs = highspy.Highs()
    for option, setting in OPTIONS.items():
        highs.setOptionValue(option, setting)
    count = len(columns)
    highs.addVars(count, np.zeros(count), np.ones(count))
    highs.changeColsCost(count, np.arange(count, dtype=np.int32), losses / scale)
    for column in range(count):
        highs.changeColIntegrality(column, highspy.HighsVarType.kInteger)
    for row in range(len(groups)):
        own = np.array([n for n, (group, _, _) in enumerate(columns) if group == row], np.int32)
        highs.addRow(1.0, 1.0, len(own), own, np.ones(len(own)))
    highs.addRow(-highspy.kHighsInf, 1.0, count, np.arange(count, dtype=np.int32), bits)
    highs.run()
    if (status := highs.getModelStatus()) != highspy.HighsModelStatus.kOptimal:
        said = highs.modelStatusToString(status)
        raise SpecError(f"no kinds of weights are within {budget:,.0f} bits (HiGHS: {said})")
    taken = np.asarray(highs.getSolution().col_value) > 0.5
    return [kind for (_, kind, _), is_taken in zip(columns, taken, strict=True) if is_taken]
