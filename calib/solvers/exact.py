"""The optimum by integer programming: linear in size, one cut-off per sample and layer.

Eq. (5) couples all pairs of tokens. Here binaries y mark the ranks above a layer's cut-off and a
token survives exactly when it was alive and stands above it: x^d = x^{d-1} AND y^d. That allows the
same choices with 4 n rows per sample and layer. Only y has to be integer: x and r follow from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import highspy
import numpy as np
from numpy.typing import NDArray

from edgeprune.calib.solvers import joint
from edgeprune.calib.solvers._problem import Floats, Ints, Problem, Progress, Solution, silent
from edgeprune.errors import ScheduleError

OPTIONS = {
    "log_to_console": False,  # output_flag would silence the progress callback as well
    "presolve": "off",  # with it HiGHS found no schedule in 240 s where this took 90 s
    "threads": 1,
    "mip_rel_gap": 1e-6,
    "mip_abs_gap": 0.0,  # losses are small numbers: only the relative gap means something
}


@dataclass(frozen=True)
class _Columns:
    """Numbers of the columns, with tokens in the order of their rank at decision d."""

    y: Ints  # [L-1, S, n] 1 above the cut-off
    x: Ints  # [L-1, S, n] 1 for a survivor
    parent: Ints  # [L-2, S, n] the x at d - 1 of the token that x[d] is about
    r: Ints  # [L-1] how many survive

    @classmethod
    def of(cls, problem: Problem) -> _Columns:
        size = problem.n_decisions * problem.start.size
        y = np.arange(size).reshape(problem.n_decisions, *problem.start.shape)
        parent = np.empty_like(y[1:])
        rank = problem.carry[:-1, :, :-1] - problem.start[:, :1]
        np.put_along_axis(parent, rank, y[:-1] + size, axis=-1)
        return cls(y, y + size, parent, 2 * size + np.arange(problem.n_decisions))

    def __len__(self) -> int:
        return int(self.r[-1]) + 1


def solve(
    problem: Problem, *, time_limit: float | None = None, progress: Progress = silent
) -> Solution:
    """The best schedule and the proven bound; they meet unless `time_limit` (seconds) cut in."""
    known, objective = joint.search(problem)
    columns = _Columns.of(problem)
    highs = _load(problem, columns)
    if time_limit is not None:
        highs.setOptionValue("time_limit", float(time_limit))
    everything = np.arange(len(columns), dtype=np.int32)
    highs.setSolution(len(columns), everything, _as_point(problem, columns, known))
    highs.cbMipLogging += lambda event: progress(
        "exact", event.data_out.mip_primal_bound, max(0.0, event.data_out.mip_dual_bound)
    )
    highs.run()
    status = highs.getModelStatus()
    if status not in (highspy.HighsModelStatus.kOptimal, highspy.HighsModelStatus.kTimeLimit):
        raise ScheduleError(f"HiGHS stopped: {highs.modelStatusToString(status)}")

    values = np.asarray(highs.getSolution().col_value)
    found = np.rint([problem.first, *values[columns.r]]).astype(np.intp)
    found_objective = float(problem.evaluate(found[None])[0])
    if found_objective < objective and found.sum() == problem.total:
        known, objective = found, found_objective
    bound = max(0.0, highs.getInfo().mip_dual_bound)
    return Solution(known, objective, min(bound, objective))


def _load(problem: Problem, columns: _Columns) -> highspy.Highs:
    """HiGHS with the program in it."""
    n_columns, n_tokens = len(columns), problem.first
    price = problem.prices[..., :-1] / problem.n_samples
    cost = np.zeros(n_columns)  # sum of price * (x^{d-1} - x^d), with x^{-1} = 1
    cost[columns.x] -= price
    cost[columns.parent] += price[1:]
    upper = np.ones(n_columns)
    upper[columns.r] = n_tokens
    integer = np.zeros(n_columns, np.int32)
    integer[columns.y] = 1
    index, value, start, row_lower, row_upper = _rows(problem, columns)

    highs = highspy.Highs()
    for option, setting in OPTIONS.items():
        highs.setOptionValue(option, setting)
    highs.passModel(
        n_columns, len(row_lower), len(index),
        int(highspy.MatrixFormat.kRowwise), int(highspy.ObjSense.kMinimize), float(price[0].sum()),
        cost, np.zeros(n_columns), upper, row_lower, row_upper, start, index, value, integer,
    )  # fmt: skip
    return highs


def _rows(problem: Problem, columns: _Columns) -> tuple[NDArray[Any], ...]:
    """Column indices, values and row starts of the matrix, and the limits of its rows."""
    y, x, parent, r = columns.y, columns.x, columns.parent, columns.r
    budget, inf = problem.total - problem.first, highspy.kHighsInf
    counted = [*np.moveaxis(x, -1, 0), r[:, None]]
    blocks: list[tuple[list[Ints], list[int], float, float]] = [
        ([y[..., :-1], y[..., 1:]], [1, -1], 0, inf),  # one cut-off: y falls along the ranks
        ([x[0], y[0]], [1, -1], 0, 0),  # all are alive at first: x = y
        ([y[1:], x[1:]], [1, -1], 0, inf),  # x <= y
        ([parent, x[1:]], [1, -1], 0, inf),  # x <= x'
        ([x[1:], parent, y[1:]], [1, -1, -1], -1, inf),  # x >= x' + y - 1
        (counted, [1] * problem.first + [-1], 0, 0),  # all samples keep r
        (list(r), [1] * len(r), budget, budget),
    ]
    index, value, width, lower, upper = [], [], [], [], []
    for terms, factors, low, high in blocks:
        rows = np.stack(np.broadcast_arrays(*terms), axis=-1).reshape(-1, len(terms))
        index.append(rows.ravel())
        value.append(np.tile(np.array(factors, np.float64), len(rows)))
        width.append(np.full(len(rows), len(terms)))
        lower.append(np.full(len(rows), float(low)))
        upper.append(np.full(len(rows), float(high)))
    start = np.concatenate([[0], np.concatenate(width).cumsum()])
    columns_used = np.concatenate(index).astype(np.int32)
    return (
        columns_used, np.concatenate(value), start.astype(np.int32),
        np.concatenate(lower), np.concatenate(upper),
    )  # fmt: skip


def _as_point(problem: Problem, columns: _Columns, counts: Ints) -> Floats:
    """A schedule as values of all columns, for HiGHS to start from."""
    point = np.zeros(len(columns))
    point[columns.r] = counts[1:]
    base, alive = problem.start[:, :1], problem.start
    for d, keep in enumerate(counts[1:]):
        kept = np.sort(alive, axis=-1)[:, :keep]
        if keep:
            rank = kept - base
            point[np.take_along_axis(columns.x[d], rank, axis=-1)] = 1
            point[columns.y[d][np.arange(problem.first) <= rank[:, -1:]]] = 1
        alive = problem.carry[d].take(kept)
    return point
