"""Asking one bundle all questions."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from edgeprune import cost, runtime
from edgeprune.compare.questions import Questions
from edgeprune.compare.store import key_of, source
from edgeprune.errors import BackendError, SpecError
from edgeprune.lowering import DTYPES
from edgeprune.runtime import Session, backends
from edgeprune.versions import installed

PACKAGES = ("edgeprune", "onnxruntime", "numpy", "pillow", "tokenizers")
EVERY = 20
"""Questions between two reports of progress."""


@dataclass(frozen=True)
class EvalResult:
    """What was right of what was asked, by kind; each answer; sizes at the median prompt."""

    right: dict[str, int]
    asked: dict[str, int]
    said: list[str]
    marks: str  # 1 where an answer is right, else 0
    text_tokens: int  # of the median prompt, beside the image's
    kv_bytes: int  # of the caches once that prompt is read


@dataclass(frozen=True)
class EvalRequest:
    """How bundles are asked: on which engine, for how long an answer at most."""

    questions: Questions
    backend: str = "ort-cpu"
    max_new_tokens: int = 32

    def __post_init__(self) -> None:
        if backends.find(self.backend).engines:
            raise BackendError(
                f"compare asks on ort-cpu or ort-cuda; got {self.backend}, whose engines are"
                " built and timed bundle by bundle: edgeprune build, edgeprune bench"
            )
        if self.max_new_tokens < 1:
            raise SpecError(f"--max-new-tokens is at least 1; got {self.max_new_tokens}")

    def key(self, bundle: str) -> str:
        """Names the answers of a bundle by all that decides them."""
        versions = {name: installed(name) for name in PACKAGES}
        asked = self.questions.fingerprint, self.backend, self.max_new_tokens
        return key_of(bundle, *asked, source(runtime), versions)

    def ask(self, bundle: Path, tick: Callable[[int], None] = lambda done: None) -> EvalResult:
        """Every question, greedily and else by the checkpoint's own settings of generation; `tick`
        is told how many more have been answered."""
        session = Session.open(bundle, backend=self.backend, threads=1)  # cores have other bundles
        sampling = replace(session.sampling, temperature=0.0, max_new_tokens=self.max_new_tokens)
        right, asked = Counter[str](), Counter[str]()
        lengths, said, marks = list[int](), list[str](), ""
        for question in self.questions:
            answer = session.ask(question.image, question.text, sampling)
            asked[question.kind] += 1
            is_right = answer.text in question.answers
            right[question.kind] += is_right
            marks += str(int(is_right))
            lengths.append(answer.prompt_tokens)
            said.append(answer.text)
            if not len(said) % EVERY:
                tick(EVERY)
        tick(len(said) % EVERY)
        record, prune = session.manifest.decoder, session.manifest.prune
        text = statistics.median_low(lengths)
        element = DTYPES[session.manifest.dtype].bytes
        stored = cost.kv_bytes(record, prune.counts, text, element)
        shares = {kind: right[kind] for kind in asked}
        return EvalResult(shares, dict(asked), said, marks, text, stored)
