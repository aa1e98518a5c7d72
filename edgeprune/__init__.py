"""edgeprune: visual-token pruning for vision-language models, frozen into static ONNX graphs.

The public API is what this package names; `docs/api.md` lists it and says what is stable. A name is
imported when it is first used, so `import edgeprune` loads neither PyTorch nor an engine.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgeprune.bench.bench import BenchRequest, BenchResult
    from edgeprune.bench.bench import bench as bench_bundles
    from edgeprune.bundle import Bundle
    from edgeprune.compare.comparing import CompareRequest
    from edgeprune.compare.comparing import compare as compare_methods
    from edgeprune.compare.results import Comparison
    from edgeprune.errors import EdgepruneError
    from edgeprune.export.check import Verdict, check_bundle
    from edgeprune.export.exporter import Exported
    from edgeprune.generation import Sampling
    from edgeprune.making import make as export_bundle
    from edgeprune.manifest import Manifest
    from edgeprune.models import names as list_models
    from edgeprune.policies import names as list_methods
    from edgeprune.recipe import Recipe
    from edgeprune.runtime.answer import Answer, Choice, Timings, TokenScore
    from edgeprune.runtime.build import BuildRequest, Built
    from edgeprune.runtime.build import build as build_engines
    from edgeprune.runtime.engine import Engine
    from edgeprune.runtime.formats import AnswerFormat
    from edgeprune.runtime.sequence import Sequence
    from edgeprune.runtime.session import Session
    from edgeprune.spec import PruneSpec

__version__ = "0.1.0"

_HOMES = {
    "Answer": ("runtime.answer", "Answer"),
    "AnswerFormat": ("runtime.formats", "AnswerFormat"),
    "BenchRequest": ("bench.bench", "BenchRequest"),
    "BenchResult": ("bench.bench", "BenchResult"),
    "BuildRequest": ("runtime.build", "BuildRequest"),
    "Built": ("runtime.build", "Built"),
    "Bundle": ("bundle", "Bundle"),
    "Choice": ("runtime.answer", "Choice"),
    "CompareRequest": ("compare.comparing", "CompareRequest"),
    "Comparison": ("compare.results", "Comparison"),
    "EdgepruneError": ("errors", "EdgepruneError"),
    "Engine": ("runtime.engine", "Engine"),
    "Exported": ("export.exporter", "Exported"),
    "Manifest": ("manifest", "Manifest"),
    "PruneSpec": ("spec", "PruneSpec"),
    "Recipe": ("recipe", "Recipe"),
    "Sampling": ("generation", "Sampling"),
    "Sequence": ("runtime.sequence", "Sequence"),
    "Session": ("runtime.session", "Session"),
    "Timings": ("runtime.answer", "Timings"),
    "TokenScore": ("runtime.answer", "TokenScore"),
    "Verdict": ("export.check", "Verdict"),
    "bench_bundles": ("bench.bench", "bench"),
    "build_engines": ("runtime.build", "build"),
    "check_bundle": ("export.check", "check_bundle"),
    "compare_methods": ("compare.comparing", "compare"),
    "export_bundle": ("making", "make"),
    "list_methods": ("policies", "names"),
    "list_models": ("models", "names"),
}
"""Where each public name is, below this package."""

__all__ = [
    "Answer",
    "AnswerFormat",
    "BenchRequest",
    "BenchResult",
    "BuildRequest",
    "Built",
    "Bundle",
    "Choice",
    "CompareRequest",
    "Comparison",
    "EdgepruneError",
    "Engine",
    "Exported",
    "Manifest",
    "PruneSpec",
    "Recipe",
    "Sampling",
    "Sequence",
    "Session",
    "Timings",
    "TokenScore",
    "Verdict",
    "__version__",
    "bench_bundles",
    "build_engines",
    "check_bundle",
    "compare_methods",
    "export_bundle",
    "list_methods",
    "list_models",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'edgeprune' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    found = getattr(import_module(f"edgeprune.{module}"), attribute)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted(__all__)
