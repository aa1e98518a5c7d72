"""One engine for many dialogues: each answers as on an engine of its own, or says why not."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edgeprune.bundle import Bundle
from edgeprune.cli import main
from edgeprune.demo import SAMPLES_DIR
from edgeprune.demo.questions import held_out
from edgeprune.errors import BackendError, CapacityError, InputError, SessionError
from edgeprune.runtime import Engine, Sampling, Sequence, Session, backends
from edgeprune.runtime.backend import DecoderInputs
from edgeprune.runtime.sequence import NO_IDS
from tests.fake_gpu import FakeGpu, pretend

NEXT = "how many circles are there ?"
ASKS = 600
SHORT = Sampling(max_new_tokens=3)


@dataclass(frozen=True)
class Setup:
    """A bundle and the backend that it runs on; every answer goes on to its last token."""

    bundle: Path
    backend: str

    def engine(self) -> Engine:
        opened = Bundle.open(self.bundle)
        manifest = replace(opened.manifest, text=replace(opened.manifest.text, eos_token_ids=()))
        opened = Bundle(opened.path, manifest)
        return Engine(opened, backends.make(opened, self.backend))

    def session(self) -> Session:
        """On an engine of its own."""
        return Session(self.engine())


@pytest.fixture(scope="module")
def bundles(
    tiny_jetpack7: Path, tiny_jetpack6: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Caches that are written in place under UTP, caches that grow without pruning."""
    copy = Path(shutil.copytree(tiny_jetpack7, tmp_path_factory.mktemp("engine") / "tiny"))
    found = {"in-place": copy, "grow": tiny_jetpack6}
    for bundle, backend in zip(found.values(), ("trt", "trt-rtx"), strict=True):
        pretend(bundle, backend)
    return found


SETUPS = [("in-place", "ort-cpu"), ("grow", "ort-cpu"), ("in-place", "trt"), ("grow", "trt-rtx")]


@pytest.fixture(params=SETUPS, ids=["-".join(setup) for setup in SETUPS])
def setup(request: pytest.FixtureRequest, bundles: dict[str, Path], gpus: list[FakeGpu]) -> Setup:
    kind, backend = request.param
    return Setup(bundles[kind], backend)


@pytest.fixture
def dense(bundles: dict[str, Path]) -> Setup:
    return Setup(bundles["grow"], "ort-cpu")


@pytest.fixture
def pruned(bundles: dict[str, Path]) -> Setup:
    return Setup(bundles["in-place"], "ort-cpu")


@cache
def questions() -> list[tuple[Image.Image, str]]:
    return [(image, question.text) for image, question in held_out(6)]


def steps(sequence: Sequence, question: tuple[Image.Image, str], count: int) -> Iterator[int]:
    """The tokens of an answer, one at a time, by greedy calls of a sequence."""
    engine, (image, text) = sequence.engine, question
    prefix_ids, text_ids = engine.prompter.first_turn(text)
    output = sequence.read(text_ids, prefix_ids, engine.encode_image(image))
    for _ in range(count):
        yield output.token
        output = sequence.read(np.array([[output.token]]), logits=False)


def test_sequences_of_one_engine_token_by_token_are_those_of_two(setup: Setup) -> None:
    """70 tokens: caches cross a growth step, each sequence at another token."""
    alone = [list(steps(setup.engine().sequence(), one, 70)) for one in questions()[:2]]
    assert alone[0] != alone[1]
    engine = setup.engine()
    side_by_side = zip(*(steps(engine.sequence(), one, 70) for one in questions()[:2]), strict=True)
    assert [list(tokens) for tokens in zip(*side_by_side, strict=True)] == alone


def in_threads(work: Callable[[int], None]) -> None:
    """`work(0)` and `work(1)` at the same time; what either raises is raised."""
    raised: list[BaseException] = []
    start = threading.Barrier(2)

    def run(number: int) -> None:
        start.wait()
        try:
            work(number)
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=run, args=[number]) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if raised:
        raise raised[0]


def test_two_threads_with_a_session_each_answer_as_two_engines(setup: Setup) -> None:
    """Questions and follow-ups; `ASKS` on ONNX Runtime, a tenth on the slower stand-in."""
    session = setup.session()
    wanted = [
        (session.ask(*one, SHORT).ids, session.follow_up(NEXT, SHORT).ids) for one in questions()
    ]
    assert len(set(wanted)) > 1
    engine, count = setup.engine(), ASKS if setup.backend == "ort-cpu" else ASKS // 10
    wrong = []

    def work(number: int) -> None:
        session = Session(engine)
        for index in range(number, count // 2, 2):
            one = index % len(wanted)
            ids = session.ask(*questions()[one], SHORT).ids, session.follow_up(NEXT, SHORT).ids
            if ids != wanted[one]:
                wrong.append(ids)

    in_threads(work)
    assert not wrong


def test_two_threads_with_one_session_get_right_answers_or_session_errors(pruned: Setup) -> None:
    session = pruned.session()
    wanted = [session.ask(*one, SHORT).ids for one in questions()]
    right, refused, wrong = [], [], []

    def work(number: int) -> None:
        for index in range(ASKS // 2):
            one = (index + number) % len(wanted)
            try:
                ids = session.ask(*questions()[one], SHORT).ids
            except SessionError as error:
                refused.append(str(error))
            else:
                (right if ids == wanted[one] else wrong).append(ids)

    in_threads(work)
    assert not wrong
    assert right and len(right) + len(refused) == ASKS
    assert all("give each thread a session of its own" in line for line in refused)
    assert session.ask(*questions()[0], SHORT).ids == wanted[0]


def test_an_older_stream_ends_when_another_question_is_asked(pruned: Setup) -> None:
    session, sampling = pruned.session(), Sampling(max_new_tokens=12)
    first, second = questions()[:2]
    wanted = pruned.session().ask(*second, sampling)
    older = session.stream(*first, sampling)
    next(older)
    newer = session.stream(*second, sampling)
    with pytest.raises(SessionError, match="this stream ended when another question was asked"):
        next(older)
    assert "".join(newer).strip() == wanted.text
    assert session.answer is not None and session.answer.ids == wanted.ids
    with pytest.raises(SessionError, match="this stream ended"):
        list(older)
    assert list(newer) == [], "a stream that is out stays so"


def test_a_stream_that_is_left_can_be_followed_up(setup: Setup) -> None:
    """As if the answer had ended there; and nothing of it is left in the next dialogue."""
    first, sampling = questions()[0], Sampling(max_new_tokens=12)
    session, whole = setup.session(), setup.session()
    pieces = session.stream(*first, sampling)
    next(pieces)
    assert session.answer is None
    prefix_ids, text_ids = session.engine.prompter.first_turn(first[1])
    prompt = prefix_ids.size + session.engine.visual_ids.size + text_ids.size
    said = session.sequence.ids.size - prompt + len(session.sequence.pending)
    whole.ask(*first, Sampling(max_new_tokens=said))
    assert session.follow_up(NEXT, sampling).ids == whole.follow_up(NEXT, sampling).ids
    assert session.ask(*first, sampling).ids == whole.ask(*first, sampling).ids


def test_a_stream_that_was_never_begun_leaves_no_answer(pruned: Setup) -> None:
    session = pruned.session()
    session.stream(*questions()[0], SHORT)
    with pytest.raises(InputError, match="needs a first answer"):
        session.follow_up(NEXT)


def broken(session: Session, call: int, error: BaseException) -> None:
    """Have the n-th call of the decoder raise, once it is done."""
    backend, done = session.engine.backend, [0]
    run = backend.run

    def runs(inputs: Any, caches: Any) -> Any:
        output = run(inputs, caches)
        done[0] += 1
        if done[0] == call:
            backend.run = run  # type: ignore[method-assign]
            raise error
        return output

    backend.run = runs  # type: ignore[method-assign]


@pytest.mark.parametrize("call", [1, 4])
def test_a_session_says_that_its_answer_was_interrupted(setup: Setup, call: int) -> None:
    first, sampling = questions()[0], Sampling(max_new_tokens=8)
    session, wanted = setup.session(), setup.session()
    broken(session, call, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        session.ask(*first, sampling)
    with pytest.raises(SessionError, match=r"broken off \(KeyboardInterrupt\); start again"):
        session.follow_up(NEXT)
    with pytest.raises(SessionError, match="broken off"):
        session.sequence.read(np.array([[5]]))
    assert session.ask(*first, sampling).ids == wanted.ask(*first, sampling).ids
    assert session.follow_up(NEXT, sampling).ids == wanted.follow_up(NEXT, sampling).ids


def test_a_sequence_says_that_a_call_was_interrupted(setup: Setup) -> None:
    session, wanted = setup.session(), setup.engine().sequence()
    sequence, ids = session.sequence, np.arange(3, 20)[None]
    sequence.read(ids)
    broken(session, 1, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        sequence.read(np.array([[7]]))
    for use in (lambda: sequence.read(np.array([[7]])), sequence.fork):
        with pytest.raises(SessionError, match="broken off before its end; start again"):
            use()
    sequence.reset()
    assert greedy(sequence, 7, 5) == greedy(wanted, 7, 5)


def test_what_is_refused_leaves_the_dialogue_as_it_was(pruned: Setup) -> None:
    session, wanted = pruned.session(), pruned.session()
    too_many = session.manifest.decoder.max_positions
    assert session.ask(*questions()[0], SHORT).ids == wanted.ask(*questions()[0], SHORT).ids
    for refused, error in [
        (lambda: session.ask("no such file.png", NEXT), InputError),
        (
            lambda: session.ask(questions()[1][0], NEXT, Sampling(max_new_tokens=too_many)),
            CapacityError,
        ),
        (lambda: session.follow_up("  "), InputError),
        (lambda: session.follow_up("star " * too_many), CapacityError),
    ]:
        with pytest.raises(error):
            refused()
    assert session.follow_up(NEXT, SHORT).ids == wanted.follow_up(NEXT, SHORT).ids


def test_a_closed_session_says_so(setup: Setup) -> None:
    first = questions()[0]
    with setup.session() as session:
        session.ask(*first, SHORT)
        pieces = session.stream(*first, Sampling(max_new_tokens=12))
        next(pieces)
        engine = session.engine
    for use in (
        lambda: session.ask(*first),
        lambda: session.follow_up(NEXT),
        lambda: list(session.stream(*first)),
        lambda: list(session.stream_follow_up(NEXT)),
        lambda: list(pieces),
        session.reset,
        session.warm_up,
        session.sequence.fork,
    ):
        with pytest.raises(SessionError, match="closed"):
            use()
    session.close()
    other = Session(engine)  # the engine is its caller's
    other.ask(*first, SHORT)
    engine.close()
    with pytest.raises(SessionError, match="this engine is closed; open the bundle again"):
        other.ask(*first)
    other.close()
    with pytest.raises(SessionError, match="closed"):
        engine.sequence()


def test_closing_waits_for_the_call_that_runs(pruned: Setup) -> None:
    """And the thread that called goes on to a SessionError."""
    session, running, ended = pruned.session(), threading.Event(), list[Exception]()
    backend = session.engine.backend
    run = backend.run

    def slow(inputs: Any, caches: Any) -> Any:
        running.set()
        assert not threading.Event().wait(0.1)
        return run(inputs, caches)

    backend.run = slow  # type: ignore[method-assign]

    def ask() -> None:
        try:
            session.ask(*questions()[0], Sampling(max_new_tokens=50))
        except SessionError as error:
            ended.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    running.wait()
    session.engine.close()
    thread.join()
    assert "closed" in str(ended[0])


def test_a_text_prefix_is_read_once_for_two_dialogues(setup: Setup) -> None:
    """A fork answers as the same tokens read on a sequence of its own."""
    engine, text_ids = setup.engine(), np.arange(5, 12)[None]
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


def greedy(sequence: Sequence, token: int, count: int) -> list[int]:
    found = []
    for _ in range(count):
        token = sequence.read(np.array([[token]]), logits=False).token
        found.append(token)
    return found


def test_an_image_is_forked_where_the_method_reads_no_text(
    dense: Setup, gpus: list[FakeGpu]
) -> None:
    for setup in (dense, replace(dense, backend="trt-rtx")):
        session = setup.session()
        assert not session.manifest.prune.reads_text
        session.ask(*questions()[0], SHORT)
        twin = Session(session.engine, session.sequence.fork())
        wanted = session.follow_up(NEXT, SHORT).ids
        other = session.follow_up("what color is the star ?", SHORT).ids
        assert twin.follow_up(NEXT, SHORT).ids == wanted
        assert twin.follow_up("what color is the star ?", SHORT).ids == other


def test_an_image_is_not_forked_where_the_method_reads_the_text(pruned: Setup) -> None:
    session = pruned.session()
    assert session.manifest.prune.reads_text
    session.ask(*questions()[0], SHORT)
    with pytest.raises(SessionError, match="utp chose the image's tokens by the text after it"):
        session.sequence.fork()
    session.reset()
    assert session.sequence.fork().position == 0


def test_caches_that_were_closed_before_their_turn_are_not_read(setup: Setup) -> None:
    """Another thread may close a dialogue while its call waits for the engine."""
    engine = setup.engine()
    caches = engine.backend.caches()
    lengths = np.zeros(engine.manifest.decoder.layers, np.int64)
    ids = np.array([[5]])
    inputs = DecoderInputs(NO_IDS, ids, None, 0, lengths, lengths + 1)
    engine.run(inputs, caches)
    caches.close()
    for use in (lambda: engine.run(inputs, caches), lambda: engine.copy(caches, lengths)):
        with pytest.raises(SessionError, match="this dialogue is closed"):
            use()


def test_an_image_is_encoded_once_for_several_questions(setup: Setup) -> None:
    engine, sampling = setup.engine(), Sampling(max_new_tokens=6)
    first, second = Session(engine), Session(engine)
    image = engine.encode_image(questions()[0][0])
    alone = setup.session()
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
    kind: str, backend: str, bundles: dict[str, Path], gpus: list[FakeGpu]
) -> None:
    """On the stand-in for CUDA, which counts bytes; a closed dialogue's serve the next one."""
    engine = Setup(bundles[kind], backend).engine()
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
    bundles: dict[str, Path], gpus: list[FakeGpu]
) -> None:
    engine = Setup(bundles["in-place"], "trt").engine()
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
