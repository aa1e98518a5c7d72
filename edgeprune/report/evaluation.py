"""Results of lmms-eval: the scores of one run, by task and metric."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from edgeprune.records import Amount, Between, build, parse

Score = Annotated[float, Between(-1e12, 1e12)]


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task; `error` is the standard error, None where there is none."""

    task: str
    metric: str
    value: float
    error: float | None
    samples: int | None


@dataclass(frozen=True)
class Evaluation:
    """One run of lmms-eval."""

    model: str
    arguments: str  # of the model
    scores: tuple[TaskScore, ...]

    @classmethod
    def from_json(cls, text: str) -> Evaluation:
        """ValueError or TypeError where the text is no file of results."""
        content = build(dict[str, Any], parse(text), "lmms-eval")
        config, results, sizes = (
            build(kind, content.get(name, {}), name)
            for name, kind in (
                ("config", dict[str, Any]),
                ("results", dict[str, dict[str, Any]]),
                ("n-samples", dict[str, _Samples]),
            )
        )
        scores = [
            TaskScore(task, metric, *_numbers(found, metric), _count(sizes.get(task)))
            for task, found in results.items()
            for metric in found
            if _is_metric(metric, found[metric])
        ]
        model, arguments = (str(config.get(name, "")) for name in ("model", "model_args"))
        return cls(model, arguments, tuple(scores))


@dataclass(frozen=True)
class _Samples:
    effective: Amount


def _is_metric(name: str, value: object) -> bool:
    """Names are `metric,filter`; errors stand beside under names of their own."""
    return "," in name and "_stderr" not in name and type(value) in (int, float)


def _numbers(found: dict[str, Any], metric: str) -> tuple[float, float | None]:
    name, _, used = metric.partition(",")
    error = found.get(f"{name}_stderr,{used}")
    value: float = build(Score, found[metric], metric)
    known = type(error) in (int, float)
    return value, build(Score, error, metric) if known else None


def _count(samples: _Samples | None) -> int | None:
    return samples.effective if samples else None
