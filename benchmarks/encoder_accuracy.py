"""What a shorter encoder loses on the demo's held-out questions, beside what calibration predicts.

    python -m benchmarks.encoder_accuracy --questions 2000 -o out/encoder \
        --json benchmarks/results/encoder-accuracy.json

Two tables. With the dense decoder: right answers of each way to shorten the encoder, and the angle
that calibration measured, with Spearman's correlation of the two. With UTP, calibrated and solved
for each encoder: the product as it would ship. Differences are to the dense encoder under the same
decoder, on the same questions, with 95% intervals of paired differences. Bundles are deleted once
asked; a second run asks only what is missing in --output.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from edgeprune.bundle import Bundle
from edgeprune.compare.answers import EvalRequest
from edgeprune.compare.questions import Questions
from edgeprune.encoder_methods import DENSE
from edgeprune.files import write_whole
from edgeprune.intervals import difference
from edgeprune.recipe import Recipe, make
from edgeprune.spec import PruneSpec
from edgeprune.tables import plain

ANY = "limit=3"  # radians: whatever is lost is measured, not refused
ALONE = tuple(
    f"exit:at={at}:keep={keep}{by}:{ANY}"
    for at, keep, by in (
        *((0, keep, "") for keep in (0.7, 0.5, 0.35, 0.25)),
        *((0, keep, ":by=diverse") for keep in (0.5, 0.25)),
        *((1, keep, "") for keep in (0.5, 0.35, 0.25)),
        *((2, keep, "") for keep in (0.7, 0.5, 0.35, 0.25, 0.15)),
        *((2, 0.5, f":by={by}") for by in ("diverse", "contrast", "dpp", "cls")),
        *((2, 0.25, f":by={by}") for by in ("diverse", "contrast", "dpp", "cls")),
        *((3, keep, "") for keep in (0.5, 0.25)),
    )
)
JOINT = tuple(
    (f"exit:at={at}:keep={keep}:{ANY}", "utp", cr)
    for cr in (4.0, 2.0)
    for at, keep in ((0, 0.5), (0, 0.35), (2, 0.5), (2, 0.35))
)


@dataclass(frozen=True)
class Result:
    """One bundle: what it is, what was measured of it, and which answers are right (1) or not."""

    encoder: str
    method: str
    cr: float
    share: float  # of the dense encoder's operations
    r2: float | None
    angle: float | None
    marks: str

    @property
    def right(self) -> float:
        """Percent."""
        return 100 * self.marks.count("1") / len(self.marks)


def measured(encoder: str, method: str, cr: float, questions: int, folder: Path) -> Result:
    """Export, ask and delete a bundle, unless that was done before."""
    name = f"{encoder}-{method}-{cr:g}-{questions}".replace(":", "-").replace("=", "")
    stored = folder / f"{name}.json"
    if stored.is_file():
        return Result(**json.loads(stored.read_text()))
    path = folder / f"{name}.bundle"
    made = make(Recipe(PruneSpec(method, cr), path, encoder=encoder, parity=0))
    marks = EvalRequest(Questions(questions)).ask(made.path).marks
    record = Bundle.open(made.path, verify=False).manifest.encoder
    shutil.rmtree(made.path)
    found = Result(encoder, method, cr, record.share, record.r2, record.angle, marks)
    write_whole(stored, json.dumps(asdict(found)).encode())
    return found


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """Correlation of ranks; equal values have the mean of theirs."""

    def ranks(values: Sequence[float]) -> np.ndarray:
        found = np.array(values)
        return np.array([(found < v).sum() + ((found == v).sum() - 1) / 2 for v in found])

    return float(np.corrcoef(ranks(one), ranks(other))[0, 1])


def table(results: Sequence[Result], bases: Sequence[Result]) -> str:
    """One row a bundle, its difference to the dense encoder's in points."""
    head = "encoder", "decoder", "enc", "R2", "angle", "right", "difference"
    rows: list[tuple[str, ...]] = [head]
    for one in results:
        base = next(b for b in bases if (b.method, b.cr) == (one.method, one.cr))
        gain, half = difference(one.marks, base.marks)
        rows.append(
            (
                one.encoder.removesuffix(f":{ANY}"),
                f"{one.method} {one.cr:g}",
                f"{one.share:.2f}",
                "-" if one.r2 is None else f"{one.r2:.3f}",
                "-" if one.angle is None else f"{one.angle:.3f}",
                f"{one.right:.1f}",
                f"{100 * gain:+.1f} +- {100 * half:.1f}",
            )
        )
    return plain(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="What a shorter encoder loses on the demo.")
    parser.add_argument("--questions", type=int, default=2000)
    parser.add_argument("--joint", action="store_true", help="with UTP too (minutes a bundle)")
    parser.add_argument("-o", "--output", type=Path, default=Path("out/encoder"))
    parser.add_argument("--json", type=Path, help="all results as JSON")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)

    def run(encoder: str, method: str, cr: float) -> Result:
        return measured(encoder, method, cr, args.questions, args.output)

    dense = run(DENSE, "none", 1.0)
    alone = [run(encoder, "none", 1.0) for encoder in ALONE]
    print(table([dense, *alone], [dense]))
    lost = [dense.right - one.right for one in alone]
    relation = spearman([one.angle or 0.0 for one in alone], lost)
    print(f"Spearman of angle and points lost, {len(alone)} encoders: {relation:.2f}")
    joint, bases = list[Result](), list[Result]()
    if args.joint:
        bases = [run(DENSE, "utp", cr) for cr in dict.fromkeys(cr for _, _, cr in JOINT)]
        joint = [run(*case) for case in JOINT]
        print(table([*bases, *joint], bases))
    if args.json:
        found = [asdict(one) for one in (dense, *alone, *bases, *joint)]
        write_whole(args.json, json.dumps({"spearman": relation, "results": found}).encode())


if __name__ == "__main__":
    main()
