"""A bundle that is exported with a parity check, and its answers beside its eager reference's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from edgeprune.export.exporter import Exported, ExportRequest, export
from edgeprune.models import Adapter
from edgeprune.models._processor import Processor, random_prompt
from edgeprune.models._reference import Reference
from edgeprune.policies import make
from edgeprune.runtime import Answer, Sampling, Session
from edgeprune.spec import Plan, PruneSpec


def exported(adapter: Adapter, spec: PruneSpec, plan: Plan, folder: Path) -> Exported:
    """A bundle that agrees with its eager reference on two samples, without ties."""
    prompts = [random_prompt(adapter.pixels, adapter.shape.vocabulary, seed) for seed in range(2)]
    request = ExportRequest("tiny", spec, plan, folder)
    made = export(request, adapter, make(spec), Processor(adapter), prompts)
    assert (made.manifest.parity.samples, made.manifest.parity.ties) == (2, 0)
    return made


def assert_same_answers(
    session: Session, reference: Reference, adapter: Adapter, shown: Any, question: str
) -> Answer:
    """Eight tokens about what is shown, and one of a second turn, are the reference's; the first
    answer."""
    answer = session.ask(shown, question, Sampling(max_new_tokens=8))
    ends, prompt = session.manifest.text.eos_token_ids, Processor(adapter)(shown, question)
    assert list(answer.ids) == reference.generate(prompt, 8, lambda token: token in ends)
    step = reference.step(torch.from_numpy(session.engine.prompter.next_turn("how many ?")))
    again = session.follow_up("how many ?", Sampling(max_new_tokens=1))
    assert again.ids == (int(step.logits.argmax()),)
    return answer
