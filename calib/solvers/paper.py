"""The paper's reading: the best schedule of each sample alone, averaged (UTP paper, Fig. 6b).

The mean keeps the budget and never rises; rounding keeps both. It is not the optimum of anything:
`joint` prices the shared counts instead.
"""

from __future__ import annotations

import numpy as np

from edgeprune.calib.solvers import exact, joint
from edgeprune.calib.solvers._certificate import certify
from edgeprune.calib.solvers._problem import (
    UNHURRIED,
    Goal,
    Ints,
    Problem,
    Progress,
    Solution,
    round_to_sum,
    silent,
)

SMALL = 450  # tokens times decisions that HiGHS solves in about a second


def solve(problem: Problem, *, goal: Goal = UNHURRIED, progress: Progress = silent) -> Solution:
    """The rounded mean, priced on all samples together; `goal.seconds` are for each sample, and
    for the bound."""
    each = []
    for index in range(problem.n_samples):
        each.append(_alone(problem.sample(index), goal.seconds))
        progress(f"sample {index + 1} of {problem.n_samples}", np.inf, 0.0)
    counts = round_to_sum(np.mean(each, axis=0), problem.total)
    objective = float(problem.evaluate(counts[None])[0])
    return Solution(counts, objective, min(objective, certify(problem, objective, goal, progress)))


def _alone(problem: Problem, time_limit: float | None) -> Ints:
    if problem.first * problem.n_decisions <= SMALL:
        return exact.solve(problem, time_limit=time_limit).counts
    return joint.search(problem, time_limit=time_limit)[0]
