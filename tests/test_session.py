"""The runtime session: equal to transformers when dense, dialogues, streaming, capacity."""

from __future__ import annotations

import itertools
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgeprune.bundle import Bundle
from edgeprune.cli import main
from edgeprune.demo import MODEL_DIR, SAMPLES_DIR
from edgeprune.demo.questions import held_out
from edgeprune.errors import CapacityError, InputError
from edgeprune.runtime import Engine, Sampling, Session, backends
from edgeprune.runtime.backend import FakeBackend
from edgeprune.runtime.backends import _caches
from edgeprune.runtime.backends._caches import STEP
from tests.essence import essence

QUESTION = "what color is the star ?"
SCENE = SAMPLES_DIR / "scene-1.png"


@pytest.fixture(scope="module")
def dense(demo_dense: Path) -> Session:
    return Session.open(demo_dense)


@pytest.fixture(scope="module")
def pruned(demo_utp: Path) -> Session:
    return Session.open(demo_utp)


@pytest.fixture(scope="module")
def transformers_model() -> tuple[Any, Any]:
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(MODEL_DIR, dtype=torch.float32).eval()
    return model, AutoProcessor.from_pretrained(MODEL_DIR)


def generate(transformers_model: tuple[Any, Any], image: Any, text: str, **options: Any) -> Any:
    """transformers' own greedy answer: new ids and the first logits."""
    model, processor = transformers_model
    content = [{"type": "image"}, {"type": "text", "text": text}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    inputs = processor(images=image, text=prompt, return_tensors="pt")
    out = model.generate(
        **inputs, do_sample=False, output_logits=True, return_dict_in_generate=True, **options
    )
    return out.sequences[0, inputs["input_ids"].shape[1] :].tolist(), out.logits[0][0].numpy()


@pytest.mark.parametrize("count", essence([60, 200], ["60"]))
def test_dense_equals_transformers_on_held_out_questions(
    count: int, dense: Session, transformers_model: tuple[Any, Any]
) -> None:
    right = 0
    for image, question in held_out(count):
        wanted, _ = generate(transformers_model, image, question.text, max_new_tokens=8)
        answer = dense.ask(image, question.text)
        assert list(answer.ids) == wanted, question
        right += answer.text == question.answer
    assert right >= 0.85 * count, "the demo model answers at least 85% of held-out questions"


def test_dense_equals_transformers_over_64_free_tokens(
    dense: Session, transformers_model: tuple[Any, Any]
) -> None:
    """No end token stops them: the dialogue runs on over what the model makes up."""
    session = endless(dense)
    for image, question in held_out(6):
        wanted, _ = generate(
            transformers_model, image, question.text, max_new_tokens=64, eos_token_id=None
        )
        answer = session.ask(image, question.text, Sampling(max_new_tokens=64))
        assert list(answer.ids) == wanted
        assert (answer.finish, len(answer.ids)) == ("length", 64)


def endless(session: Session) -> Session:
    """Another session on the same graphs, whose answers no end token stops."""
    manifest = session.manifest
    manifest = replace(manifest, text=replace(manifest.text, eos_token_ids=()))
    return Session(Engine(Bundle(session.bundle.path, manifest), session.engine.backend))


def test_dense_logits_are_those_of_transformers(
    dense: Session, transformers_model: tuple[Any, Any]
) -> None:
    for image, question in held_out(12):
        _, wanted = generate(transformers_model, image, question.text, max_new_tokens=1)
        prefix, text = dense.engine.prompter.first_turn(question.text)
        encoded = dense.engine.encode_image(image)
        found = dense.engine.sequence().read(text, prefix, encoded).logits
        assert found is not None
        np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_two_turns_equal_one_long_dialogue(dense: Session) -> None:
    """A follow-up on the cache answers as the same tokens read from scratch do."""
    questions = list(held_out(24))
    for (image, first), (_, second) in zip(questions[::2], questions[1::2], strict=True):
        answer = dense.ask(image, first.text)
        again = dense.follow_up(second.text)
        prompter = dense.engine.prompter
        prefix, text = prompter.first_turn(first.text)
        said = [i for i in answer.ids if i not in dense.manifest.text.eos_token_ids]
        whole = np.concatenate([text, [said], prompter.next_turn(second.text)], axis=1)
        assert again.ids == greedy(dense, image, prefix, whole)


def greedy(session: Session, image: Any, prefix: Any, text: Any) -> tuple[int, ...]:
    """Ids of an answer, the end token among them, read token by token on a sequence of its own."""
    sequence, said = session.engine.sequence(), list[int]()
    ends = session.manifest.text.eos_token_ids
    output = sequence.read(text, prefix, session.engine.encode_image(image))
    while len(said) < 8 and not (said and said[-1] in ends):
        said.append(output.token)
        output = sequence.read(np.array([said[-1:]]), logits=False)
    return tuple(said)


def test_caches_grow_without_changing_the_answer(
    pruned: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """80 tokens cross a growth step; where all room is reserved at once the answer is the same."""
    image, question = next(held_out(1))
    sampling, session = Sampling(max_new_tokens=STEP + 16), endless(pruned)
    answer = session.ask(image, question.text, sampling)
    monkeypatch.setattr(_caches, "STEP", 1000)
    assert answer.ids == endless(pruned).ask(image, question.text, sampling).ids
    assert len(answer.ids) == STEP + 16


def test_streamed_pieces_are_the_answer(pruned: Session) -> None:
    image, question = next(held_out(1))
    pieces = list(pruned.stream(image, question.text))
    assert pruned.answer is not None
    assert "".join(pieces).strip() == pruned.answer.text == question.answer


def test_sampling_is_drawn_by_its_seed(pruned: Session) -> None:
    image, question = next(held_out(1))
    hot = [
        pruned.ask(image, question.text, Sampling(temperature=50.0, seed=seed)).ids
        for seed in (1, 1, 2)
    ]
    assert hot[0] == hot[1] != hot[2]


def test_a_stop_string_ends_the_answer(pruned: Session) -> None:
    image, question = next(held_out(1))
    session = endless(pruned)
    whole = session.ask(image, question.text, Sampling(max_new_tokens=12))
    letter = whole.text[1]
    cut = session.ask(image, question.text, Sampling(max_new_tokens=12, stop=(letter,)))
    assert cut.text == whole.text.partition(letter)[0].strip()
    assert cut.finish == "stop"


def test_what_was_kept_is_told(pruned: Session) -> None:
    image, question = next(held_out(1))
    answer = pruned.ask(image, question.text)
    counts = pruned.manifest.prune.counts
    assert len(answer.vision_kept) == counts[0]
    falls = [b for a, b in itertools.pairwise(counts) if b < a]
    assert [len(kept) for kept in answer.layer_kept] == falls


def test_a_follow_up_needs_a_first_answer(demo_dense: Path) -> None:
    bundle = Bundle.open(demo_dense)
    session = Session(Engine(bundle, FakeBackend([2], bundle.manifest.decoder.vocabulary, 144)))
    with pytest.raises(InputError, match="first answer"):
        session.follow_up("how many ?")


def test_a_dialogue_may_not_outgrow_the_positions(demo_dense: Path) -> None:
    bundle = Bundle.open(demo_dense)
    session = Session(Engine(bundle, FakeBackend([2], bundle.manifest.decoder.vocabulary, 144)))
    image, question = next(held_out(1))
    with pytest.raises(CapacityError, match="1024 positions; shorten the prompt"):
        session.ask(image, "star " * 1000)
    with pytest.raises(CapacityError, match="ask for fewer"):
        session.ask(image, question.text, Sampling(max_new_tokens=5000))


def test_the_cache_is_written_in_place(demo_utp: Path, tmp_path: Path) -> None:
    """onnxruntime says on stderr when it copies a cache; with bound buffers it must not."""
    image = tmp_path / "scene.png"
    next(held_out(1))[0].save(image)
    command = [sys.executable, "-m", "edgeprune.cli", "run", str(demo_utp)]
    done = subprocess.run(
        [*command, "--image", str(image), "--prompt", QUESTION, "--prompt", QUESTION],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "in-place optimization not activated" not in done.stderr
    assert "prefill" in done.stderr


def test_an_engine_is_freed_with_its_session(tiny_bundle: Path, no_collector: None) -> None:
    """When the block ends though the session is still there, and when it is not there any more."""
    engines = []
    with Session.open(tiny_bundle) as closed:
        engines.append(_asked(closed))
    dropped = Session.open(tiny_bundle)
    engines.append(_asked(dropped))
    del dropped
    assert [engine() for engine in engines] == [None, None]
    closed.close()  # again, and nothing happens


def _asked(session: Session) -> weakref.ref[Any]:
    """The engine of a session that has prefilled and decoded."""
    backend: Any = session.engine.backend
    session.warm_up()
    return weakref.ref(backend._decoder)


@pytest.mark.parametrize("command", ["run", "show"])
def test_one_bundle_is_closed_before_the_next_is_opened(
    command: str,
    tiny_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    no_collector: None,
) -> None:
    engines, open_then, make = [], [], backends.make

    def made(*arguments: Any) -> Any:
        open_then.append(sum(engine() is not None for engine in engines))
        backend: Any = make(*arguments)
        engines.append(weakref.ref(backend._decoder))
        return backend

    monkeypatch.setattr(backends, "make", made)
    bundle, question = str(tiny_bundle), ["--image", str(SCENE), "--prompt", QUESTION]
    second = {"run": [bundle], "show": ["--dense", bundle, "-o", str(tmp_path / "out.png")]}
    assert main([command, bundle, *second[command], *question]) == 0
    assert open_then == [0, 0]
