"""What a profile of the dense bundle says of the other bundles of benchmarks.speed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from edgeprune.bench.bench import BenchResult
from edgeprune.bundle import Bundle
from edgeprune.calib.ttft import open_costs
from edgeprune.encoder_methods import make as make_encoder
from edgeprune.models import Adapter
from edgeprune.models._encoder_site import SiteConfig
from edgeprune.policies import make
from edgeprune.spec import PruneSpec
from edgeprune.timing import Profile, read_profile


def profiled(dense: Path, backend: str, rounds: int, threads: int | None) -> Profile:
    """The profile beside a dense bundle, measured in a process of its own unless it is there."""
    file = dense.with_name(f"{dense.name}-profile.json")
    if not file.is_file():
        command = [sys.executable, "-m", "edgeprune", "profile", str(dense), "-o", str(file)]
        limit = ["--threads", str(threads)] if threads else []
        asked = ["--backend", backend, "--rounds", str(rounds)]
        subprocess.run([*command, *asked, *limit], check=True)
    return read_profile(file)


def predicted(
    result: BenchResult, bundles: Sequence[Path], adapter: Adapter, profile: Profile
) -> BenchResult:
    """The rows of these bundles, on one backend, with the milliseconds of vision and prefill that
    a profile predicts."""
    costs = open_costs(adapter, profile, make(PruneSpec("utp", 1)))
    rows = list(result.rows)
    for number, path in enumerate(bundles):
        manifest = Bundle.open(path).manifest
        vision = costs.vision(_site(adapter, manifest.encoder.method))
        ms = vision + costs.prefill(manifest.prune.counts)
        rows[number] = replace(rows[number], predicted=ms)
    return replace(result, rows=tuple(rows))


def _site(adapter: Adapter, encoder: str) -> SiteConfig | None:
    method = make_encoder(encoder)
    return None if method is None else adapter.encoder_site(method)
