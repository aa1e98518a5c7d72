"""python -m tests.fuzz --inputs 5000 --seed 1"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

from tests.fuzz import report
from tests.fuzz.case import names, shares
from tests.fuzz.judge import Input, Judge, Verdict
from tests.fuzz.seeds import prepare


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--inputs", type=int, default=500, metavar="N", help="default 500")
    parser.add_argument("--seed", type=int, default=1, help="default 1")
    parser.add_argument("--kinds", metavar="LIST", help=f"of {', '.join(names())}; default all")
    parser.add_argument("--only", metavar="KIND:N", help="one input again")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="leave the inputs there")
    parser.add_argument("--seeds", type=Path, metavar="DIR", help="good files, made once")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="default 1")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as scratch:
        seeds = prepare((args.seeds or Path(scratch) / "seeds").resolve())
        os.environ["EDGEPRUNE_CACHE"] = str(Path(scratch) / "cache")
        judge = Judge(seeds.folder, args.seed, args.keep and args.keep.resolve())
        verdicts = judge.run(_inputs(args), args.workers, _tell)
    print(report.table(verdicts))
    print()
    print(report.reached(verdicts))
    return int(any(verdict.wrong for verdict in verdicts))


def _inputs(args: argparse.Namespace) -> list[Input]:
    if args.only:
        kind, _, number = args.only.partition(":")
        return [(kind, int(number))]
    chosen = args.kinds.split(",") if args.kinds else names()
    counts = shares(args.inputs)
    return [(kind, number) for kind in chosen for number in range(counts[kind])]


def _tell(verdict: Verdict) -> None:
    if verdict.wrong:
        print(report.wrongs([verdict]), file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
