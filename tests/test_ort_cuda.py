"""ONNX Runtime on a GPU, on a stand-in that counts what crosses over: a token, and no cache."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgeprune.demo.questions import held_out
from edgeprune.runtime import Engine, Sampling, Session
from edgeprune.runtime.backends._caches import STEP
from tests.endless import endless
from tests.fake_cuda import FakeCuda

PROMPT = 20
"""Tokens; the caches then cross a growth step within the first 64 that follow."""


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    monkeypatch.setattr("edgeprune.runtime.backends._ort._import", lambda: fake)
    return fake


@pytest.fixture(params=["tiny_jetpack7", "tiny_jetpack6"])
def bundle(request: pytest.FixtureRequest) -> Path:
    """Caches that are written in place, and caches that grow."""
    found: Path = request.getfixturevalue(request.param)
    return found


def test_a_step_moves_a_token_and_growing_moves_nothing(bundle: Path, cuda: FakeCuda) -> None:
    engine = Engine.open(bundle, "ort-cuda")
    sequence = engine.sequence()
    output = sequence.read(np.arange(3, 3 + PROMPT)[None], logits=False)
    layers, moved, sizes = len(engine.manifest.prune.counts), set(), set()
    for _ in range(2 * STEP):
        before = cuda.uploaded, cuda.downloaded
        output = sequence.read(np.array([[output.token]]), logits=False)
        moved.add((cuda.uploaded - before[0], cuda.downloaded - before[1]))
        sizes.add(sequence.cache_bytes())
    assert len(sizes) == 3, "the caches grew twice"
    assert moved == {(8 * (2 + layers), 8)}, "token, position and lengths; the next token"
    before_logits = cuda.downloaded
    output = sequence.read(np.array([[output.token]]))
    assert output.logits is not None
    assert cuda.downloaded - before_logits == 8 + output.logits.nbytes, "logits are asked for"


def test_answers_are_those_on_a_cpu(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stale input or a cache that was not copied would change them."""
    wanted = _dialogue(Session.open(bundle))
    monkeypatch.setattr("edgeprune.runtime.backends._ort._import", FakeCuda)
    assert _dialogue(Session.open(bundle, backend="ort-cuda")) == wanted


def _dialogue(session: Session) -> list[tuple[int, ...]]:
    sampling = Sampling(max_new_tokens=STEP + 6)
    endless(session)
    said = []
    for image, question in held_out(2):
        said.append(session.ask(image, question.text, sampling).ids)
        said.append(session.follow_up("how many circles are there ?", sampling).ids)
    return said
