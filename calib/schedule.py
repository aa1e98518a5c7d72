"""From what calibration measured to the counts r_1 >= ... >= r_L (UTP paper section 3.3, UTR)."""

from __future__ import annotations

import hashlib
import json
import math
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any, Literal, get_args

import numpy as np

from edgeprune.calib.solvers import grouped
from edgeprune.calib.solvers._problem import (
    UNHURRIED,
    Goal,
    Ints,
    Measured,
    Problem,
    Progress,
    Solution,
    silent,
)
from edgeprune.calib.solvers.grouped import decisions_of, spread
from edgeprune.calib.solvers.timed import Times
from edgeprune.errors import ScheduleError, SpecError
from edgeprune.spec import ModelShape, budget

Solver = Literal["joint", "exact", "paper"]
SCHEMA = 1


@dataclass(frozen=True, eq=False)
class Evidence:
    """What calibration measured on S samples of a model with L layers and V visual tokens."""

    attention: Measured  # [S, L, V] head-mean attention of the last prompt token in layer l
    loss: Measured  # [S, L] ell_l in radians: layers l .. L see no visual token; [:, 0] is unused
    entry: Measured | None  # [S, V] score that picks the r_1 tokens; None or empty if r_1 = V
    sample_ids: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.entry is not None and not self.entry.size:
            object.__setattr__(self, "entry", None)  # an .npz file cannot hold None
        if self.attention.ndim != 3 or self.attention.shape[1] < 2 or not self.attention.size:
            raise ScheduleError(
                f"attention is [samples, layers, tokens] with two layers or more;"
                f" got {list(self.attention.shape)}"
            )
        samples, layers, tokens = self.attention.shape
        self._expect("attention", self.attention, (samples, layers, tokens))
        self._expect("loss", self.loss, (samples, layers))
        if self.entry is not None:
            self._expect("entry", self.entry, (samples, tokens), signed=True)
        if len(self.sample_ids) != samples:
            raise ScheduleError(f"{samples} samples have {len(self.sample_ids)} ids")

    def _expect(
        self, name: str, values: Measured, shape: tuple[int, ...], signed: bool = False
    ) -> None:
        if values.shape != shape:
            raise ScheduleError(f"{name} is {list(shape)} here; got {list(values.shape)}")
        if not np.isfinite(values).all() or not (signed or (values >= 0).all()):
            kind = "finite" if signed else "finite and not negative"
            raise ScheduleError(f"{name} must be {kind}: calibrate again and look for overflow")

    def sha256(self) -> str:
        """One hash over all arrays and ids; float32 and float64 of equal value hash alike."""
        digest = hashlib.sha256(json.dumps(self.sample_ids).encode())
        for values in (self.attention, self.loss, self.entry):
            if values is not None:
                digest.update(str(values.shape).encode())
                digest.update(np.ascontiguousarray(values, "<f8").tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Schedule:
    """How many visual tokens enter each layer, and how good that is known to be."""

    counts: tuple[int, ...]  # r_1 .. r_L
    objective: float  # mean over samples of sum_l t_l, radians
    bound: float  # proven: no schedule of this budget loses less on these samples
    solver: str
    visual_tokens: int  # V
    cr: float  # asked for
    sample_ids: tuple[str, ...]
    evidence_hash: str
    versions: dict[str, str]
    seconds: float
    loss: tuple[float, ...] = ()  # ell_l, mean over samples, radians; empty: not stored at the time

    def __post_init__(self) -> None:
        counts = self.counts
        falling = all(before >= after for before, after in pairwise(counts))
        if not (counts and falling and self.visual_tokens >= counts[0] > 0 <= counts[-1]):
            raise ScheduleError(f"counts never rise and stay in 0 .. V; got {list(counts)}")
        spare = tokens_for(self.visual_tokens, len(counts), self.cr) - sum(counts)
        if not 0 <= spare < len(counts):
            raise ScheduleError(
                f"counts sum to {sum(counts)}, which is not CR {self.cr:g} of"
                f" {self.visual_tokens} tokens in {len(counts)} layers"
            )
        angles = all(0 <= angle < math.inf for angle in self.loss)
        if self.loss and not (angles and len(self.loss) == len(counts)):
            raise ScheduleError(f"loss is an angle for each layer; got {list(self.loss)}")
        if not (0 <= self.bound <= self.objective < math.inf):
            raise ScheduleError(f"no bound {self.bound} can prove an objective {self.objective}")

    @property
    def gap(self) -> float:
        """How far from the optimum this can be at most, as a share of the objective."""
        return (self.objective - self.bound) / self.objective if self.objective else 0.0

    @property
    def cr_reached(self) -> float:
        """V L / (r_1 + ... + r_L)."""
        return self.visual_tokens * len(self.counts) / sum(self.counts)

    def record(self) -> dict[str, Any]:
        """All of it as JSON values, with the gap and the CR reached for people to read."""
        shown = {"cr_reached": self.cr_reached, "gap": self.gap}
        return {"schema": SCHEMA, **asdict(self), **shown}

    def to_json(self) -> str:
        """One line per field; `from_json` reads it back."""
        lines = (f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in self.record().items())
        return "{\n" + ",\n".join(lines) + "\n}\n"

    @classmethod
    def from_json(cls, text: str) -> Schedule:
        """Read `to_json` back; refuse anything else in one line."""
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ScheduleError(f"this is not a schedule, nor any JSON: {error}") from error
        if not isinstance(content, dict) or "schema" not in content:
            raise ScheduleError("this JSON is not a schedule: it names no schema")
        if content["schema"] != SCHEMA:
            raise ScheduleError(
                f"this schedule has schema {content['schema']!r}, this version reads {SCHEMA}:"
                " make it again with edgeprune calibrate"
            )
        try:
            content = {"loss": [], **content}  # which older files lack
            return cls(**{f.name: _READ[f.name](content[f.name]) for f in fields(cls)})
        except KeyError as error:
            raise ScheduleError(f"this schedule lacks {error}") from error
        except (TypeError, OverflowError, SpecError) as error:
            raise ScheduleError(f"this schedule is damaged: {error}") from error


def read_schedule(file: Path, shape: ModelShape, cr: float) -> Schedule:
    """A stored schedule, if it was made for this model's sizes and this compression ratio; behind
    an encoder that drops tokens, for those that it gives and their ratio."""
    try:
        schedule = Schedule.from_json(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ScheduleError(f"{file} cannot be read as a schedule: {error}") from error
    except ScheduleError as error:
        raise ScheduleError(f"{file}: {error}") from error
    made = (schedule.visual_tokens, len(schedule.counts), schedule.cr)
    ours = (shape.encoded, shape.layers, shape.ratio_behind(cr))
    if made != ours:
        raise ScheduleError(
            f"{file} was made for {made[0]} visual tokens, {made[1]} layers and CR {made[2]:g};"
            f" this is {ours[0]}, {ours[1]} and CR {ours[2]:g}: calibrate for these"
        )
    return schedule


def solve(
    evidence: Evidence,
    *,
    cr: float,
    first: int,
    solver: Solver = "joint",
    max_sites: int | None = None,
    convolutions: Sequence[int] = (),
    goal: Goal = UNHURRIED,
    progress: Progress = silent,
) -> Schedule:
    """Choose r_2 .. r_L for r_1 = `first` tokens, so that V L / (r_1 + ... + r_L) = `cr`.

    `max_sites` (joint only) allows so many layers at most where the count falls; the sum may then
    stay below the budget by less than L. Behind the layers of `convolutions` (1-based) it never
    falls. `goal` says when to stop.
    """
    if solver not in get_args(Solver):
        raise SpecError(f"no solver {solver!r}; choose one of: {', '.join(get_args(Solver))}")
    if max_sites is not None and (solver != "joint" or max_sites < 1):
        raise SpecError(f"a limit of {max_sites} sites needs solver joint and at least one site")
    began = perf_counter()
    problem = pose(evidence, cr, first)
    if convolutions and solver == "joint":
        solution = grouped.solve(problem, convolutions, max_sites, goal, progress)
    else:
        solution = _run(problem, solver, max_sites, goal, progress)
        if convolutions:
            solution = grouped.settle(problem, solution, convolutions)
    return _schedule(evidence, solution, solver, cr, began)


def solve_timed(
    problem: Problem,
    evidence: Evidence,
    times: Times,
    floor: Times,
    budget: int,
    convolutions: Sequence[int] = (),
    goal: Goal = UNHURRIED,
    progress: Progress = silent,
    known: Ints | None = None,
) -> Schedule | None:
    """Choose the counts of a problem, which `evidence` says, within a budget of time; None where
    none fits.

    `known` [G] are the counts of some schedule, to begin with. `floor` are the times rounded down,
    by which no schedule is missed that the bound is about. Behind the layers of
    `convolutions` (1-based) counts never fall: times are of the G groups that follow from them.
    """
    from edgeprune.calib.solvers import timed

    began = perf_counter()
    _, layers, tokens = evidence.attention.shape
    groups = decisions_of(layers, convolutions)
    given = problem.falling_at(groups), times, floor, budget, goal, progress
    solution = timed.solve(*given, known=known)
    if solution is None:
        return None
    solution = replace(solution, counts=spread(solution.counts, layers, convolutions))
    cr = tokens * layers / int(solution.counts.sum())
    return _schedule(evidence, solution, "timed", cr, began)


def _schedule(
    evidence: Evidence, solution: Solution, solver: str, cr: float, began: float
) -> Schedule:
    return Schedule(
        counts=tuple(int(count) for count in solution.counts),
        objective=solution.objective,
        bound=solution.bound,
        solver=solver,
        visual_tokens=evidence.attention.shape[2],
        cr=float(cr),
        sample_ids=evidence.sample_ids,
        evidence_hash=evidence.sha256(),
        versions={
            "python": platform.python_version(),
            **{name: version(name) for name in ("edgeprune", "numpy", "highspy")},
        },
        seconds=round(perf_counter() - began, 3),
        loss=tuple(round(float(angle), 6) for angle in evidence.loss.mean(0)),
    )


def tokens_for(visual_tokens: int, layers: int, cr: float) -> int:
    """r_1 + ... + r_L at a compression ratio; a SpecError where that is none."""
    if not (math.isfinite(cr) and cr >= 1):
        raise SpecError(f"CR compares dense with pruned, so at least 1; got {cr:g}")
    return budget(visual_tokens, layers, cr)


def pose(evidence: Evidence, cr: float, first: int) -> Problem:
    """The problem that the solvers see, or a SpecError if no schedule can meet `cr`."""
    _, layers, tokens = evidence.attention.shape
    total = tokens_for(tokens, layers, cr)
    if not 1 <= first <= tokens:
        raise SpecError(f"{first} tokens enter layer 1, but the model has 1 to {tokens}")
    if not first <= total <= first * layers:
        raise SpecError(
            f"CR {cr:g} gives {total} tokens over {layers} layers; with {first} in layer 1 that"
            f" must be {first} to {first * layers}: ask for CR {tokens / first:.4g} to"
            f" {tokens * layers / first:.4g}"
        )
    if first < tokens and evidence.entry is None:
        raise SpecError(f"{first} of {tokens} tokens enter layer 1, but no entry score says which")
    entry = None if first == tokens else evidence.entry
    return Problem.pose(evidence.attention, evidence.loss, entry, first, total)


def _run(
    problem: Problem,
    solver: Solver,
    max_sites: int | None,
    goal: Goal,
    progress: Progress,
) -> Solution:
    # Imported here so that reading a stored schedule does not load HiGHS.
    if solver == "joint":
        from edgeprune.calib.solvers import joint

        return joint.solve(problem, max_falls=max_sites, goal=goal, progress=progress)
    if solver == "exact":
        from edgeprune.calib.solvers import exact

        return exact.solve(problem, time_limit=goal.seconds, progress=progress)
    from edgeprune.calib.solvers import paper

    return paper.solve(problem, goal=goal, progress=progress)


def _a(kind: type, value: Any) -> Any:
    """The value if it is of that JSON type; True is no number here."""
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"{value!r} where {kind.__name__} belongs")
    return value


def _number(value: Any) -> float:
    return float(_a(int, value) if isinstance(value, int) else _a(float, value))


_READ: dict[str, Callable[[Any], Any]] = {
    "counts": lambda value: tuple(_a(int, count) for count in _a(list, value)),
    "objective": _number,
    "bound": _number,
    "solver": lambda value: _a(str, value),
    "visual_tokens": lambda value: _a(int, value),
    "cr": _number,
    "sample_ids": lambda value: tuple(_a(str, name) for name in _a(list, value)),
    "evidence_hash": lambda value: _a(str, value),
    "versions": lambda value: {_a(str, k): _a(str, v) for k, v in _a(dict, value).items()},
    "seconds": _number,
    "loss": lambda value: tuple(_number(angle) for angle in _a(list, value)),
}
