"""Caches of dialogues on one engine: forked, copied, and what they take."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgeprune.cli import main
from edgeprune.demo import SAMPLES_DIR
from edgeprune.errors import BackendError, SessionError
from edgeprune.runtime import Sampling, Session
from edgeprune.runtime.backend import DecoderInputs
from edgeprune.runtime.sequence import NO_IDS
from tests.engine_setups import NEXT, SETUPS, SHORT, Setup, greedy, questions
from tests.fake_gpu import FakeGpu


def test_a_text_prefix_is_read_once_for_two_dialogues(engine_setup: Setup) -> None:
    """A fork answers as the same tokens read on a sequence of its own."""
    engine, text_ids = engine_setup.engine(), np.arange(5, 12)[None]
    images = [engine.encode_image(image) for image, _ in questions()[:2]]
    prefix = engine.sequence()
    prefix.read(np.arange(3, 40)[None])
    forks = [prefix.fork(), prefix.fork()]
    for fork, image in zip(forks, images, strict=True):
        whole = engine.sequence()
        whole.read(np.arange(3, 40)[None])
        wanted, found = whole.read(text_ids, image=image), fork.read(text_ids, image=image)
        assert wanted.logits is not None and found.logits is not None
        np.testing.assert_array_equal(found.logits, wanted.logits)
        assert [k.tolist() for k in found.kept] == [k.tolist() for k in wanted.kept]
        assert greedy(fork, 5, 30) == greedy(whole, 5, 30)
    whole = engine.sequence()
    whole.read(np.arange(3, 40)[None])
    assert greedy(prefix, 7, 5) == greedy(whole, 7, 5), "what is forked goes on as it was"


def test_an_image_is_forked_where_the_method_reads_no_text(
    dense_setup: Setup, gpus: list[FakeGpu]
) -> None:
    for engine_setup in (dense_setup, replace(dense_setup, backend="trt-rtx")):
        session = engine_setup.session()
        assert not session.manifest.prune.reads_text
        session.ask(*questions()[0], SHORT)
        twin = Session(session.engine, session.sequence.fork())
        wanted = session.follow_up(NEXT, SHORT).ids
        other = session.follow_up("what color is the star ?", SHORT).ids
        assert twin.follow_up(NEXT, SHORT).ids == wanted
        assert twin.follow_up("what color is the star ?", SHORT).ids == other


def test_an_image_is_not_forked_where_the_method_reads_the_text(pruned_setup: Setup) -> None:
    session = pruned_setup.session()
    assert session.manifest.prune.reads_text
    session.ask(*questions()[0], SHORT)
    with pytest.raises(SessionError, match="utp chose the image's tokens by the text after it"):
        session.sequence.fork()
    session.reset()
    assert session.sequence.fork().position == 0


def test_caches_that_were_closed_before_their_turn_are_not_read(engine_setup: Setup) -> None:
    """Another thread may close a dialogue while its call waits for the engine."""
    engine = engine_setup.engine()
    caches = engine.backend.caches()
    lengths = np.zeros(engine.manifest.decoder.layers, np.int64)
    ids = np.array([[5]])
    inputs = DecoderInputs(NO_IDS, ids, None, 0, lengths, lengths + 1)
    engine.run(inputs, caches)
    caches.close()
    for use in (lambda: engine.run(inputs, caches), lambda: engine.copy(caches, lengths)):
        with pytest.raises(SessionError, match="this dialogue is closed"):
            use()


def test_an_image_is_encoded_once_for_several_questions(engine_setup: Setup) -> None:
    engine, sampling = engine_setup.engine(), Sampling(max_new_tokens=6)
    first, second = Session(engine), Session(engine)
    image = engine.encode_image(questions()[0][0])
    alone = engine_setup.session()
    for session, text in ((first, "what color is the star ?"), (second, NEXT)):
        answer, wanted = (
            session.ask(image, text, sampling),
            alone.ask(questions()[0][0], text, sampling),
        )
        assert answer.ids == wanted.ids
        assert answer.vision_kept.tolist() == wanted.vision_kept.tolist()
    with pytest.raises(SessionError, match="encoded by another engine"):
        alone.ask(image, NEXT)
    asked, other = alone.follow_up(NEXT, sampling), second.follow_up(NEXT, sampling)
    assert asked.ids == other.ids, "what was refused left the dialogue as it was"


@pytest.mark.parametrize(("kind", "backend"), SETUPS[2:])
def test_a_second_dialogue_takes_its_caches_and_no_more(
    kind: str, backend: str, engine_bundles: dict[str, Path], gpus: list[FakeGpu]
) -> None:
    """On the stand-in for CUDA, which counts bytes; a closed dialogue's serve the next one."""
    engine = Setup(engine_bundles[kind], backend).engine()
    first = engine.sequence()
    before = gpus[0].taken
    second = engine.sequence()
    tensors = 2 * len(engine.manifest.prune.counts) * (2 if kind == "grow" else 1)
    assert 0 <= gpus[0].taken - before - second.cache_bytes() < 256 * tensors, "but for alignment"
    assert first.cache_bytes() == second.cache_bytes() > 0
    after = gpus[0].taken
    second.close()
    dropped = engine.sequence()
    del dropped
    engine.sequence()
    assert gpus[0].taken == after


def test_too_little_memory_for_a_second_dialogue(
    engine_bundles: dict[str, Path], gpus: list[FakeGpu]
) -> None:
    engine = Setup(engine_bundles["in-place"], "trt").engine()
    held = [engine.sequence()]
    gpus[0].memory = gpus[0].taken
    with pytest.raises(BackendError, match="a further dialogue needs"):
        engine.sequence()
    held.pop().close()
    engine.sequence()


def test_warming_up_takes_no_more_positions_than_a_model_has(
    copy_checkpoint: Callable[[], Path], tmp_path: Path
) -> None:
    """100 positions, 16 of them an image's; `run` warms up where it compares bundles."""
    checkpoint, bundle = copy_checkpoint(), str(tmp_path / "short")
    config = json.loads((checkpoint / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 100
    (checkpoint / "config.json").write_text(json.dumps(config))
    export = ["export", "--model", str(checkpoint), "--method", "none", "--parity", "0"]
    assert main([*export, "-o", bundle]) == 0
    asked = ["--image", str(SAMPLES_DIR / "scene-1.png"), "--prompt", NEXT]
    assert main(["run", bundle, bundle, *asked]) == 0
