"""Schedule files altered with regard to types."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from tests.fuzz.case import Case, reader
from tests.fuzz.mutate import alter, damage, parses
from tests.fuzz.seeds import Seeds

WEIGHT = 4


def make(rng: Random, seeds: Seeds, folder: Path) -> Case:
    _adapter(seeds.checkpoint)  # slow the first time
    if rng.random() < 0.1:
        content, note = damage(seeds.schedule.read_bytes(), rng)
    else:
        text, note = alter(json.loads(seeds.schedule.read_text()), rng)
        content = text.encode()
    (file := folder / "schedule.json").write_bytes(content)
    return Case(reader(lambda: _plan(file, seeds)), note, parses(content))


def _plan(file: Path, seeds: Seeds) -> None:
    """Read it and plan with it, as `export --schedule` does before it exports."""
    from edgeprune import policies
    from edgeprune.calib.schedule import read_schedule
    from edgeprune.spec import PruneSpec, check_cr, check_separators

    shape = _adapter(seeds.checkpoint).shape
    plan = policies.make(PruneSpec("utp", 2)).plan(shape, 2, read_schedule(file, shape, 2))
    check_cr(plan, 2)
    check_separators(plan, shape)


@cache
def _adapter(checkpoint: Path) -> Any:
    from edgeprune.models import open_model

    return open_model(str(checkpoint))
