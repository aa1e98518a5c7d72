"""The class that lmms-eval makes and asks; one question at a time, on one session."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lmms_eval.api.model import lmms

from edgeprune.errors import EdgepruneError, SpecError
from edgeprune.lmms_eval import asking
from edgeprune.progress import Bar
from edgeprune.runtime import Session


class EdgepruneModel(lmms):  # type: ignore[misc]  # lmms-eval has no types
    """A bundle. `max_new_tokens` bounds what tasks ask for, where a bundle has no room for it."""

    is_simple = True

    def __init__(
        self,
        bundle: str,
        backend: str = "ort-cpu",
        threads: int | None = None,
        max_new_tokens: int | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
    ) -> None:
        super().__init__()
        if str(batch_size) != "1":
            raise SpecError(f"a bundle answers one question at a time; got batch size {batch_size}")
        if device is not None:
            raise SpecError(f"a bundle runs on a backend: backend=ort-cuda; got device {device}")
        self.session = Session.open(bundle, backend=backend, threads=threads)
        self.most = max_new_tokens

    def generate_until(self, asked: Sequence[Any]) -> list[str]:
        """The answer to each request, whose arguments are its text, the task's settings, and what
        finds its images."""
        answers = []
        with Bar() as bar:
            for request in asked:
                answers.append(self._answer(*request.args))
                bar("questions", len(answers), len(asked))
        return answers

    def _answer(
        self, text: str, settings: dict[str, Any], visuals: Any, number: Any, task: str, split: str
    ) -> str:
        session, doc = self.session, self.task_dict[task][split][number]
        try:
            answer = session.ask(
                asking.shown(visuals(doc), session.manifest.image),
                asking.prompt(text),
                asking.sampling(settings, session.sampling, self.most),
            )
        except EdgepruneError as error:
            raise asking.named(task, number, error) from error
        self.cache_hook.add_partial("generate_until", (text, settings), answer.text)
        return answer.text

    def loglikelihood(self, asked: Sequence[Any]) -> list[tuple[float, bool]]:
        raise SpecError(
            "a bundle answers in text; this task compares likelihoods (output_type loglikelihood),"
            " take its variant that generates"
        )

    def generate_until_multi_round(self, asked: Sequence[Any]) -> list[str]:
        raise SpecError("a bundle answers each question by itself; this task has several rounds")
