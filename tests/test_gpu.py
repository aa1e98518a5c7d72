"""On a GPU: ONNX Runtime and TensorRT answer as ONNX Runtime does on the CPU.

pytest -m gpu tests/test_gpu.py

A backend that is not installed, or cannot start on this GPU, is skipped with its reason.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgeprune.cli import main
from edgeprune.demo.questions import held_out
from edgeprune.errors import BackendError
from edgeprune.runtime import machine, trt
from edgeprune.runtime.answer import Answer
from edgeprune.runtime.sampling import Sampling
from edgeprune.runtime.session import Session
from tests.endless import endless
from tests.frozen import frozen

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(machine.gpu() is None, reason="there is no NVIDIA GPU"),
]
QUESTIONS = 40
METHODS = ("none", "utp", "fastv", "visionzip")


@pytest.fixture(scope="module", params=METHODS)
def method(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def single(method: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 bundle."""
    return _bundle(method, "fp32", tmp_path_factory.mktemp(method))


@pytest.fixture(scope="module")
def half(method: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float16 bundle."""
    return _bundle(method, "fp16", tmp_path_factory.mktemp(method))


def _bundle(method: str, dtype: str, folder: Path) -> Path:
    cr = 1 if method == "none" else 4
    return frozen(folder / dtype, method, cr, target="rtx", dtype=dtype)


def _answers(bundle: Path, backend: str) -> list[Answer]:
    with Session.open(bundle, backend=backend) as session:
        return [session.ask(image, question.text) for image, question in held_out(QUESTIONS)]


def test_cuda_answers_as_the_cpu_does(single: Path) -> None:
    """In float32: the same tokens kept, the same answers."""
    for ours, theirs in zip(_answers(single, "ort-cuda"), _answers(single, "ort-cpu"), strict=True):
        assert ours.ids == theirs.ids
        assert np.array_equal(ours.vision_kept, theirs.vision_kept)
        for mine, other in zip(ours.layer_kept, theirs.layer_kept, strict=True):
            assert np.array_equal(mine, other)


def test_cuda_in_half_precision_answers_as_the_cpu_in_single(single: Path, half: Path) -> None:
    """But for close decisions."""
    pairs = zip(_answers(half, "ort-cuda"), _answers(single, "ort-cpu"), strict=True)
    assert sum(ours.ids == theirs.ids for ours, theirs in pairs) >= 0.95 * QUESTIONS


def test_a_dialogue_on_cuda_goes_on_as_on_the_cpu(single: Path) -> None:
    """Long enough for caches to grow, with a second turn."""
    said = []
    for backend in ("ort-cuda", "ort-cpu"):
        with Session.open(single, backend=backend) as session:
            endless(session)
            image, question = next(held_out(1))
            sampling = Sampling(max_new_tokens=150)
            first = session.ask(image, question.text, sampling).ids
            said.append((first, session.follow_up("what color is the card ?", sampling).ids))
    assert said[0] == said[1]


@pytest.mark.parametrize("backend", ["trt", "trt-rtx"])
def test_an_engine_answers_as_the_cpu_does(backend: str, half: Path) -> None:
    try:
        trt.load(backend)
    except BackendError as error:
        pytest.skip(str(error))
    assert main(["build", str(half), "--backend", backend]) == 0
    pairs = zip(_answers(half, backend), _answers(half, "ort-cpu"), strict=True)
    assert sum(ours.ids == theirs.ids for ours, theirs in pairs) >= 0.95 * QUESTIONS
