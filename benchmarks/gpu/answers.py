"""What the demo says on a backend beside what it says on the CPU, for every method.

    python -m benchmarks.gpu.answers out/gpu/bundles --backend ort-cuda

Both run the same float16 graphs. Greedy answers, the visual tokens kept at each site, and the first
token's logits are compared, question by question. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeprune.demo.questions import held_out
from edgeprune.errors import EdgepruneError
from edgeprune.runtime.session import Session


@dataclass(frozen=True)
class Said:
    """To one question."""

    ids: tuple[int, ...]
    kept: tuple[tuple[int, ...], ...]
    logits: NDArray[np.float32]


def compare(bundle: Path, backend: str, questions: int) -> dict[str, Any]:
    """Shares of equal answers and kept tokens, and the largest difference of logits."""
    try:
        wanted, found = (_ask(bundle, name, questions) for name in ("ort-cpu", backend))
    except EdgepruneError as error:
        return {"bundle": bundle.name, "failed": str(error)}
    pairs = list(zip(wanted, found, strict=True))
    sites = [(set(a), set(b)) for w, f in pairs for a, b in zip(w.kept, f.kept, strict=True)]
    kept = sum(len(a) for a, _ in sites)
    return {
        "bundle": bundle.name,
        "questions": questions,
        "same_answers": sum(w.ids == f.ids for w, f in pairs),
        "same_kept": sum(w.kept == f.kept for w, f in pairs),
        "share_kept": sum(len(a & b) for a, b in sites) / max(kept, 1),
        "logits": max(
            float(np.abs(w.logits - f.logits).max() / np.abs(w.logits).max()) for w, f in pairs
        ),
    }


def _ask(bundle: Path, backend: str, questions: int) -> list[Said]:
    said = []
    with Session.open(bundle, backend=backend, verify=False) as session:
        for image, question in held_out(questions):
            answer = session.ask(image, question.text)
            kept = tuple(tuple(map(int, site)) for site in (answer.vision_kept, *answer.layer_kept))
            said.append(Said(tuple(answer.ids), kept, _first_logits(session, image, question.text)))
    return said


def _first_logits(session: Session, image: Any, text: str) -> NDArray[np.float32]:
    """Those of the prefill, from a sequence of its own."""
    engine = session.engine
    prefix_ids, text_ids = engine.prompter.first_turn(text)
    sequence = engine.sequence()
    try:
        output = sequence.read(text_ids, prefix_ids, engine.encode_image(image), logits=True)
    finally:
        sequence.close()
    assert output.logits is not None
    return output.logits.astype(np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description="The demo's answers on a backend and on the CPU.")
    parser.add_argument("prepared", type=Path)
    parser.add_argument("--backend", default="ort-cuda")
    parser.add_argument("--questions", type=int, default=24)
    parser.add_argument("--processes", type=int, default=4)
    args = parser.parse_args()
    bundles = sorted(args.prepared.glob("demo-*"))
    with get_context("spawn").Pool(args.processes) as pool:
        task = partial(compare, backend=args.backend, questions=args.questions)
        print(json.dumps({"bundles": pool.map(task, bundles, chunksize=1)}))


if __name__ == "__main__":
    main()
