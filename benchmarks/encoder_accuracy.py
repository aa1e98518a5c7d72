"""What a shorter encoder loses on the demo's held-out questions, beside what calibration predicts.

    python -m benchmarks.encoder_accuracy --questions 2000 -o out/encoder \
        --json benchmarks/results/encoder-accuracy.json

With the dense decoder: right answers of each way to shorten the encoder, and the angle that
calibration measured, with Spearman's correlation of the two.

    python -m benchmarks.encoder_accuracy --joint --questions 2000 -o out/encoder \
        --json benchmarks/results/encoder-joint.json

Encoder and decoder chosen together, as `--method auto` does it: for as many operations as
`--method utp --cr 4` takes with the dense encoder, end to end with the demo's mean number of text
tokens, and for half of them.

Differences are to the first row, on the same questions, with 95% intervals of paired differences.
Bundles are deleted once asked; a second run asks only what is missing in --output.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from edgeprune import cost
from edgeprune.bundle import Bundle
from edgeprune.calib.planning import Settled, settle
from edgeprune.calib.samples import demo_samples
from edgeprune.calib.survey import Work
from edgeprune.calib.ttft import Operations
from edgeprune.compare.answers import EvalRequest
from edgeprune.compare.questions import Questions
from edgeprune.encoder_methods import AUTO, DENSE
from edgeprune.errors import SpecError
from edgeprune.files import write_whole
from edgeprune.intervals import difference
from edgeprune.making import make
from edgeprune.manifest import Manifest
from edgeprune.models import open_model
from edgeprune.models._processor import Processor
from edgeprune.recipe import Recipe
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
DROPS = tuple(
    (f"drop:at={at}:keep={keep}:{ANY}", positions)
    for at, keep, positions in (
        *((0, keep, "renumber") for keep in (0.7, 0.5, 0.35)),
        (1, 0.5, "renumber"),
        *((2, keep, "renumber") for keep in (0.7, 0.5, 0.35, 0.25)),
        *((at, keep, "keep") for at in (0, 2) for keep in (0.7, 0.5, 0.35)),
    )
)
"""Encoders, and where the tokens that are left stand."""
BUDGETS = 1.0, 0.5
"""Of the operations of UTP at CR 4 with the dense encoder."""
BY_HAND = (
    ("exit:at=2:keep=0.5", 16.0),
    ("exit:at=2:keep=0.35", 12.0),
    ("drop:at=0:keep=0.5:limit=3", 4.0),
)
"""Encoders and ratios of UTP that a user would try."""
BASE = PruneSpec("utp", 4.0)
MEASURED = 100
"""Samples of which the mean number of text tokens is taken."""


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
    operations: float | None = None  # billions to the first token; None: not counted

    @property
    def right(self) -> float:
        """Percent."""
        return 100 * self.marks.count("1") / len(self.marks)


@dataclass(frozen=True)
class Runs:
    """Where results are kept, and how many questions each bundle is asked."""

    folder: Path
    questions: int

    def measured(self, name: str, export: Callable[[Path], object], text: int = 0) -> Result:
        """Export, ask and delete a bundle, unless that was done before; with `text` tokens its
        operations are counted."""
        name = f"{name}-{self.questions}".replace(":", "-").replace("=", "")
        stored = self.folder / f"{name}.json"
        if stored.is_file():
            return Result(**json.loads(stored.read_text()))
        path = self.folder / f"{name}.bundle"
        export(path)
        marks = EvalRequest(Questions(self.questions)).ask(path).marks
        manifest = Bundle.open(path, verify=False).manifest
        shutil.rmtree(path)
        record, prune = manifest.encoder, manifest.prune
        counted = operations(manifest, text) if text else None
        about = record.method, prune.method, prune.cr_reached, record.share
        found = Result(*about, record.r2, record.angle, marks, counted)
        write_whole(stored, json.dumps(asdict(found)).encode())
        return found

    def alone(self, encoder: str, positions: str = "auto") -> Result:
        """One encoder under the dense decoder."""
        spec = PruneSpec("none", options={"positions": positions})
        where = "" if positions == "auto" else f"-{positions}"

        def export(path: Path) -> None:
            make(Recipe(spec, path, encoder=encoder, parity=0))

        found = self.measured(f"{encoder}-none-1{where}", export)
        return replace(found, encoder=f"{found.encoder}{where}")

    def chosen_for(self, budget: float, text: int) -> Result:
        """What is chosen for so many billion operations, with `text` text tokens."""

        def export(path: Path) -> None:
            recipe = Recipe(BASE, path, encoder=AUTO, parity=0)
            make(recipe, choose=partial(chosen, budget=budget, text=text))

        return self.measured(f"joint-{budget:.4f}-{text}", export, text)

    def by_hand(self, encoder: str, cr: float, text: int) -> Result:
        """An encoder and a ratio of UTP."""

        def export(path: Path) -> None:
            make(Recipe(PruneSpec("utp", cr), path, encoder=encoder, parity=0))

        return self.measured(f"hand-{encoder}-{cr}", export, text)


def chosen(work: Work, budget: float, text: int) -> Settled:
    """Encoder and schedule that take at most `budget` billion operations."""
    costs = Operations(work.adapter, text)
    return settle(work, costs, AUTO, budget)


def operations(manifest: Manifest, text: int) -> float:
    """Billions of operations to the first token, with `text` text tokens."""
    prefill = cost.prefill_operations(manifest.decoder, manifest.prune.counts, text)
    return (manifest.encoder.operations + prefill) / 1e9


def text_tokens() -> int:
    """The mean number of text tokens of the demo's prompts."""
    prompts = [one.prompt for one in demo_samples(Processor(open_model("demo")), MEASURED)]
    return round(sum(p.prefix_ids.numel() + p.text_ids.numel() for p in prompts) / len(prompts))


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """Correlation of ranks; equal values have the mean of theirs."""

    def ranks(values: Sequence[float]) -> np.ndarray:
        found = np.array(values)
        return np.array([(found < v).sum() + ((found == v).sum() - 1) / 2 for v in found])

    return float(np.corrcoef(ranks(one), ranks(other))[0, 1])


def table(results: Sequence[Result]) -> str:
    """One row a bundle, its difference to the first in points."""
    first = results[0]
    head = "encoder", "decoder", "enc", "R2", "angle", "operations", "right", "difference"
    rows: list[tuple[str, ...]] = [head]
    for one in results:
        gain, half = difference(one.marks, first.marks)
        share = one.operations / first.operations if one.operations and first.operations else None
        rows.append(
            (
                one.encoder.replace(":limit=3.0", ""),
                f"{one.method} {one.cr:.4g}",
                f"{one.share:.2f}",
                "-" if one.r2 is None else f"{one.r2:.3f}",
                "-" if one.angle is None else f"{one.angle:.3f}",
                "-" if share is None else f"{share:.3f}",
                f"{one.right:.1f}",
                f"{100 * gain:+.1f} +- {100 * half:.1f}",
            )
        )
    return plain(rows)


def encoders(runs: Runs) -> dict[str, object]:
    """Each encoder under the dense decoder, printed."""
    dense, relations = runs.alone(DENSE), dict[str, float]()
    exits = [runs.alone(encoder) for encoder in ALONE]
    drops = [runs.alone(encoder, positions) for encoder, positions in DROPS]
    print(table([dense, *exits, *drops]))
    in_place = [*exits, *(one for one in drops if one.encoder.endswith("-keep"))]
    kinds = {"exits": exits, "drops": drops, "in place": in_place, "all": [*exits, *drops]}
    for kind, found in kinds.items():
        lost = [dense.right - one.right for one in found]
        relations[kind] = spearman([one.angle or 0.0 for one in found], lost)
        print(f"Spearman of angle and points lost, {kind}, {len(lost)}: {relations[kind]:.2f}")
    return {"spearman": relations, "results": [asdict(one) for one in (dense, *exits, *drops)]}


def joint(runs: Runs) -> dict[str, object]:
    """UTP at CR 4, what is chosen for its operations and for half of them, and pairs, printed."""
    text, refused = text_tokens(), list[str]()

    def base(path: Path) -> None:
        make(Recipe(BASE, path, parity=0))

    results = [runs.measured(f"base-{text}", base, text)]
    for share in BUDGETS:
        assert results[0].operations is not None  # it was asked with `text`
        try:
            results.append(runs.chosen_for(share * results[0].operations, text))
        except SpecError as error:
            refused.append(f"{share:g} of the operations: {error}")
    results += [runs.by_hand(encoder, cr, text) for encoder, cr in BY_HAND]
    print(table(results))
    print(
        f"operations with {text} text tokens: {results[0].operations:.4g} billion in the first row"
    )
    for line in refused:
        print(line)
    return {"text": text, "refused": refused, "results": [asdict(one) for one in results]}


def main() -> None:
    parser = argparse.ArgumentParser(description="What a shorter encoder loses on the demo.")
    parser.add_argument("--questions", type=int, default=2000)
    parser.add_argument(
        "--joint", action="store_true", help="encoder and decoder together, in place of encoders"
    )
    parser.add_argument("-o", "--output", type=Path, default=Path("out/encoder"))
    parser.add_argument("--json", type=Path, help="all results as JSON")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    found = (joint if args.joint else encoders)(Runs(args.output, args.questions))
    if args.json:
        write_whole(args.json, json.dumps(found).encode())


if __name__ == "__main__":
    main()
