"""Qwen3.5 on GPU targets: `check` accepts its graphs, TensorRT-RTX compiles them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgeprune.lowering import TARGETS
from edgeprune.models import open_model
from edgeprune.runtime import Session
from edgeprune.runtime.images import to_pixels
from edgeprune.tiling import Size
from tests import qwen35
from tests.engines import assert_accepted
from tests.fake_gpu import FakeGpu, pretend
from tests.frozen import frozen
from tests.qwen import QUESTION, drawn_image

SIZE = Size(256, 256)
LATER = np.array([[5, 6, 7, 8]])
CASES = [
    ("none", 1, "rtx", "fp16"),
    ("utp", 2, "rtx", "fp16"),
    ("utp", 2, "rtx", "bf16"),
    *[
        (method, cr, target, "fp16")
        for target in TARGETS
        if target not in ("cpu", "rtx")
        for method, cr in (("none", 1), ("utp", 2))
    ],
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two rounds of the published layers."""
    return qwen35.checkpoint(tmp_path_factory.mktemp("qwen3_5"), kinds=qwen35.PUBLISHED * 2)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "cr", "target", "dtype"), CASES)
def test_engines_take_it(
    method: str, cr: float, target: str, dtype: str, checkpoint: Path, tmp_path: Path
) -> None:
    options = {"model": checkpoint, "size": SIZE, "target": target, "dtype": dtype}
    bundle = frozen(tmp_path / "b", method, cr, **options)
    assert_accepted(bundle, target)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["rtx", "jetpack6"])
def test_engines_keep_both_states(
    target: str, checkpoint: Path, tmp_path: Path, gpus: list[FakeGpu]
) -> None:
    """Two turns, a fork and a dialogue in the same memory, with half of the tokens pruned."""
    adapter = open_model(str(checkpoint), size=SIZE)
    options = {"model": checkpoint, "size": SIZE, "target": target, "dtype": "fp32"}
    path = frozen(tmp_path / "b", "fastv", 1.5, **options)
    pretend(path)
    prefix_ids, _, text_ids = adapter.chat.split(adapter.media, QUESTION)
    image, found = drawn_image(250, 262), []
    for backend in ("trt", "ort-cpu"):
        with Session.open(path, backend=backend) as session:
            pixels = to_pixels(image, session.manifest.image)
            for _ in range(2):
                sequence = session.engine.sequence()
                shown = session.engine.encode_pixels(pixels)
                sequence.read(text_ids.numpy(), prefix_ids.numpy(), shown)
                twin = sequence.branch()
                turns = LATER, LATER[:, :1], LATER[:, 1:2]
                found.append([sequence.read(ids).logits for ids in turns])
                found.append([twin.read(LATER[:, ::-1]).logits])
                sequence.close()
    for ours, theirs in zip(found[:4], found[4:], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    np.testing.assert_array_equal(found[0], found[2])
