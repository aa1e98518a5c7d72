"""Whether predicted losses order what encoder and decoder together lose in answers, on the demo.

    python -m benchmarks.predicted_loss

Rows are those of benchmarks/results/encoder-joint.json, exits and drops with UTP, chosen or by
hand, and of UTP alone at other ratios in benchmarks/results/compare.json: 2,000 questions each. The
loss is predicted as `--method auto` predicts it: the encoder's angle, that of fewer tokens in layer
1, and the schedule's, added. No question is asked.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.encoder_accuracy import BUDGETS, chosen, spearman
from edgeprune.calib.calibrate import CalibrationRequest, calibrate
from edgeprune.calib.encoder import SiteMeasurement
from edgeprune.calib.entry import measure_entry
from edgeprune.calib.survey import Work, joint_spec
from edgeprune.encoder_methods import DENSE, make
from edgeprune.models import open_model
from edgeprune.models._processor import Processor
from edgeprune.policies import make as make_policy
from edgeprune.spec import PruneSpec
from edgeprune.tables import plain

RESULTS = Path(__file__).parent / "results"
UTP = PruneSpec("utp", 4.0)


class Predictor:
    """Of the demo."""

    def __init__(self) -> None:
        self.adapter, self.request = open_model("demo"), CalibrationRequest(1)
        self.processor = Processor(self.adapter)

    def of_pair(self, encoder: str, cr: float) -> float:
        """Radians, of an encoder and a ratio of UTP."""
        policy, adapter, turned = make_policy(UTP), self.adapter, 0.0
        if (method := make(encoder)) is not None:
            given = self.request, adapter, self.processor, policy
            site = SiteMeasurement(*given).of(adapter.encoder_site(method))
            adapter = adapter.with_encoder(site)
            turned = site.loss.angle if site.loss else 0.0
        request = replace(self.request, cr=cr)
        schedule = calibrate(request, adapter, policy, self.processor)
        entry = measure_entry(self.request, adapter, self.processor, policy)
        tokens, first = adapter.shape.encoded, schedule.counts[0]
        before = float(entry.by_count(tokens)[first]) if entry else 0.0
        return turned + before + schedule.objective

    def of_choice(self, operations: float, text: int) -> float:
        """Radians, of what is chosen for so many billion operations."""
        policy = make_policy(joint_spec(UTP))
        work = Work(self.request, self.adapter, policy, self.processor)
        return chosen(work, operations, text).loss


def right(cell: dict[str, Any]) -> float:
    """Percent."""
    return 100 * sum(cell["right"].values()) / sum(cell["asked"].values())


def main() -> None:
    cells = json.loads((RESULTS / "compare.json").read_text())["cells"]
    joint = json.loads((RESULTS / "encoder-joint.json").read_text())
    dense = next(right(cell) for cell in cells if cell["method"] == "none")
    predictor, rows = Predictor(), list[tuple[str, float, float]]()
    for cell in cells:
        if cell["method"] == "utp" and cell["cr_asked"] != UTP.cr:
            loss = predictor.of_pair(DENSE, cell["cr_asked"])
            rows.append((f"{DENSE}, CR {cell['cr_asked']:g}", loss, dense - right(cell)))
    for number, one in enumerate(joint["results"]):
        if 1 <= number <= len(BUDGETS):
            loss = predictor.of_choice(one["operations"], joint["text"])
        else:
            loss = predictor.of_pair(one["encoder"], one["cr"])
        marks = one["marks"]
        lost = dense - 100 * marks.count("1") / len(marks)
        rows.append((f"{one['encoder']}, CR {one['cr']:.3g}", loss, lost))
    rows.sort(key=lambda row: row[1])
    shown = [(name, f"{loss:.3f}", f"{lost:.1f}") for name, loss, lost in rows]
    print(plain([("encoder and UTP", "predicted rad", "points lost"), *shown]))
    relation = spearman([loss for _, loss, _ in rows], [lost for _, _, lost in rows])
    print(f"Spearman, {len(rows)}: {relation:.2f}")


if __name__ == "__main__":
    main()
