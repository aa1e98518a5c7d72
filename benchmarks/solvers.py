"""How good and how fast the schedule solvers are: python -m benchmarks.solvers

Part 1 compares `joint` with the proven optimum of `exact` on 20 cases of 96 tokens, 12 layers and
one sample. Part 2 solves the size of LLaVA-1.5 with 100 samples. Attention is synthetic, not a
model's: log-normal, with a given share of its variance common to all layers (0: layers disagree,
1: they rank alike). The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable
from itertools import product
from time import perf_counter, process_time
from typing import Any

import numpy as np

from edgeprune.calib.schedule import Evidence, pose
from edgeprune.calib.solvers import exact, joint
from edgeprune.calib.solvers._bound import simple_bound
from edgeprune.calib.solvers._problem import Goal, Solution

AGREE = (0.0, 0.3, 0.6, 0.9, 1.0)
RATIOS = (2, 3, 4, 8)
LIMIT = 600.0  # seconds for one exact case


def synthetic(seed: int, samples: int, layers: int, tokens: int, agree: float) -> Evidence:
    """Attention and losses of no model; deeper layers lose less, as in the paper's Fig. 4."""
    rng = np.random.default_rng(seed)
    shared = rng.normal(size=(samples, 1, tokens))
    own = rng.normal(size=(samples, layers, tokens))
    attention = np.exp(1.5 * (np.sqrt(agree) * shared + np.sqrt(1 - agree) * own))
    depth = np.exp(-3 * np.arange(layers) / layers) * np.exp(0.15 * rng.normal(size=layers))
    loss = depth * rng.uniform(0.6, 1.2, (samples, 1))
    entry = shared[:, 0] + rng.normal(size=(samples, tokens))
    return Evidence(attention, loss, entry, tuple(str(s) for s in range(samples)))


def timed(solve: Callable[[], Solution]) -> tuple[Solution, dict[str, float]]:
    """The solution, with its seconds on the wall and on the CPU (all threads)."""
    wall, cpu = perf_counter(), process_time()
    solution = solve()
    return solution, {"wall": perf_counter() - wall, "cpu": process_time() - cpu}


def small_case(seed: int, agree: float, cr: float) -> dict[str, Any]:
    """joint against exact; at CR above 4 the [CLS] score lets 4 V / CR tokens in, as in UTP."""
    first = round(min(96, 4 * 96 / cr))
    problem = pose(synthetic(seed, 1, 12, 96, agree), cr, first)
    best, exact_seconds = timed(lambda: exact.solve(problem, time_limit=LIMIT))
    found, joint_seconds = timed(lambda: joint.solve(problem))
    return {
        "agree": agree,
        "cr": cr,
        "first": first,
        "optimum": best.objective,
        "proven": bool(best.bound >= best.objective * (1 - 1e-5)),
        "excess": found.objective / best.objective - 1,
        "bound_below": 1 - found.bound / best.objective,
        "simple_below": 1 - simple_bound(problem)[0] / best.objective,
        "exact_seconds": exact_seconds,
        "joint_seconds": joint_seconds,
    }


def large_case(samples: int, agree: float, cr: float, goal: Goal) -> dict[str, Any]:
    """V = 576, L = 32: LLaVA-1.5-7B. A line for each better bound."""
    problem = pose(synthetic(0, samples, 32, 576, agree), cr, 576)
    began, proven = perf_counter(), [0.0]

    def tell(step: str, objective: float, bound: float) -> None:
        if bound > proven[0]:
            proven[0] = bound
            print(f"  {perf_counter() - began:4.0f} s: {bound / objective:.1%} proven", flush=True)

    found, seconds = timed(lambda: joint.solve(problem, goal=goal, progress=tell))
    return {
        "agree": agree,
        "cr": cr,
        "samples": samples,
        "objective": found.objective,
        "bound": found.bound,
        "gap": 1 - found.bound / found.objective,
        "counts": found.counts.tolist(),
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--cases", type=int, default=20, help="small cases to run (default 20)")
    parser.add_argument("--samples", type=int, default=100, help="of the large cases; 0: none")
    parser.add_argument("--gap", type=float, default=0.15, help="that the large cases stop at")
    parser.add_argument("--seconds", type=float, help="of the search for their bounds")
    args = parser.parse_args()

    print("                      joint   bound   simple      exact          joint")
    print("agree  cr   optimum   above   below   below    s     cpu      s     cpu")
    small = []
    for seed, (agree, cr) in enumerate(list(product(AGREE, RATIOS))[: args.cases]):
        case = small_case(seed, agree, cr)
        small.append(case)
        exact_s, joint_s = case["exact_seconds"], case["joint_seconds"]
        print(
            f"{agree:5.1f} {cr:3d}  {case['optimum']:8.5f}{' ' if case['proven'] else '?'}"
            f" {case['excess']:6.2%} {case['bound_below']:7.1%} {case['simple_below']:7.1%}"
            f" {exact_s['wall']:6.1f} {exact_s['cpu']:6.1f} {joint_s['wall']:7.1f}"
            f" {joint_s['cpu']:6.1f}",
            flush=True,
        )
    goal = Goal(args.gap, args.seconds)
    large = [large_case(args.samples, agree, 4, goal) for agree in (0.5, 0.9) if args.samples]
    for case in large:
        print(
            f"V=576 L=32 S={args.samples} agree={case['agree']}: objective {case['objective']:.5f},"
            f" bound {case['bound']:.5f}, gap {case['gap']:.1%},"
            f" {case['seconds']['wall']:.0f} s ({case['seconds']['cpu']:.0f} s of CPU)",
            flush=True,
        )
    print(
        json.dumps(
            {"machine": platform.processor() or platform.machine(), "small": small, "large": large}
        )
    )


if __name__ == "__main__":
    main()
