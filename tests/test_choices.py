"""The likeliest of given answers: probabilities are transformers' own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from edgeprune.cli import main
from edgeprune.demo import MODEL_DIR, SAMPLES_DIR
from edgeprune.errors import BackendError, CapacityError, SpecError
from edgeprune.runtime import Sampling, Session
from edgeprune.runtime.choosing import log_probabilities
from tests.conftest import Refused

SCENE = SAMPLES_DIR / "scene-1.png"
QUESTION = "what digit is on the purple card ?"
CHOICES = ("yes", "no", "5", "5 5", "5 red 5", "red", "no star")
CHAT = "USER: <image>\n{} ASSISTANT: {}"


@pytest.fixture(scope="module")
def dense(demo_dense: Path) -> Iterator[Session]:
    with Session.open(demo_dense, threads=1) as session:
        yield session


@pytest.fixture
def pruned(demo_fastv: Path) -> Iterator[Session]:
    with Session.open(demo_fastv, threads=1) as session:
        yield session


@pytest.fixture(scope="module")
def transformers_scores() -> Any:
    """Summed log-probabilities of an answer's tokens and the end, after a text with an image."""
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(MODEL_DIR, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(MODEL_DIR)
    image = Image.open(SCENE).convert("RGB")

    def scores(question: str, choices: tuple[str, ...]) -> list[float]:
        found = []
        for choice in choices:
            text, whole = (CHAT.format(question, said) for said in ("", f"{choice}</s>"))
            before = processor(images=image, text=text.rstrip(), return_tensors="pt")
            inputs = processor(images=image, text=whole, return_tensors="pt")
            with torch.no_grad():
                logits = model(**inputs).logits[0].double().log_softmax(-1)
            ids, start = inputs["input_ids"][0], before["input_ids"].shape[1]
            assert ids[:start].tolist() == before["input_ids"][0].tolist()
            found.append(float(sum(logits[i - 1, ids[i]] for i in range(start, len(ids)))))
        return found

    return scores


@pytest.mark.parametrize("question", [QUESTION, "is the star red ?"])
def test_probabilities_are_those_of_transformers(
    question: str, dense: Session, transformers_scores: Any
) -> None:
    wanted = np.array(transformers_scores(question, CHOICES))
    found = dense.choose(SCENE, question, CHOICES)
    assert list(found.log_probabilities) == list(CHOICES)
    assert [*found.log_probabilities.values()] == pytest.approx(wanted, abs=1e-4)
    shares = np.exp(wanted - np.logaddexp.reduce(wanted))
    assert [*found.probabilities.values()] == pytest.approx(shares, abs=1e-4)
    assert found.text == CHOICES[int(wanted.argmax())]
    assert found.prompt_tokens == dense.ask(SCENE, question).prompt_tokens


def by_reading(session: Session, question: str, choice: str) -> float:
    """The log-probability of a choice, read token by token on a sequence of its own."""
    prompter, sequence = session.engine.prompter, session.engine.sequence()
    prefix_ids, text_ids = prompter.first_turn(question)
    output = sequence.read(text_ids, prefix_ids, session.engine.encode_image(SCENE))
    total = 0.0
    for token in prompter.answer(choice)[0].tolist():
        total += log_probabilities(output.logits)[token]
        output = sequence.read(np.array([[token]]))
    sequence.close()
    (end,) = session.manifest.text.eos_token_ids
    return float(total + log_probabilities(output.logits)[end])


def test_a_method_that_reads_the_question_scores_the_same_as_alone(pruned: Session) -> None:
    assert pruned.manifest.prune.reads_text
    found = pruned.choose(SCENE, QUESTION, CHOICES)
    for choice in CHOICES:
        alone = by_reading(pruned, QUESTION, choice)
        assert found.log_probabilities[choice] == pytest.approx(alone, abs=1e-5)
    assert sum(found.probabilities.values()) == pytest.approx(1)


def test_a_dialogue_goes_on_as_if_the_choice_had_been_said(pruned: Session) -> None:
    long = Sampling(max_new_tokens=12, min_new_tokens=12)
    said = pruned.ask(SCENE, QUESTION)
    wanted = pruned.follow_up("is the star red ?", long)
    held = pruned.sequence.ids.size
    chosen = pruned.choose(SCENE, QUESTION, ("7", said.text, "yes"))
    assert (chosen.text, chosen.ids) == (said.text, said.ids[:-1])
    assert pruned.follow_up("is the star red ?", long).ids == wanted.ids
    assert pruned.sequence.ids.size == held
    again = pruned.choose_follow_up("is the star red ?", ("yes", "no"))
    assert again.text in ("yes", "no")


def test_choices_that_cannot_be_scored_change_nothing(pruned: Session) -> None:
    pruned.ask(SCENE, QUESTION)
    held = pruned.sequence.ids.size
    for choices, says in [
        ((), "from 2 to 256"),
        (("yes",), "from 2 to 256"),
        ("yes", "a list of texts"),
        (("yes", " no"), "without white space"),
        (("yes", ""), "without white space"),
        (("yes", "yes"), "one is there twice"),
        (("zzz", "qqq"), "the same tokens"),  # both are unknown words
    ]:
        with pytest.raises(SpecError, match=says):
            pruned.choose(SCENE, QUESTION, choices)
    with pytest.raises(CapacityError):
        pruned.choose_follow_up(QUESTION, ("yes", "no " * 1000 + "no"))
    assert pruned.sequence.ids.size == held
    assert pruned.follow_up("is the star red ?").text


def test_a_score_that_is_no_number_ends_the_dialogue() -> None:
    with pytest.raises(BackendError, match="not finite"):
        log_probabilities(np.array([0.0, np.nan]))


def test_the_command_says_the_likeliest(
    demo_fastv: Path, capfd: pytest.CaptureFixture[str], refused: Refused
) -> None:
    command = ["run", str(demo_fastv), "--image", str(SCENE), "--prompt", QUESTION]
    assert main([*command, "--choices", "yes, 5,no"]) == 0
    out, err = capfd.readouterr()
    assert out == "5\n"
    assert "    5 1.0000, yes 0.0000" in err and "scored in" in err
    assert main([*command, "--choices", "yes,5,no", "--json"]) == 0
    (turn,) = json.loads(capfd.readouterr().out)["turns"]
    assert turn["text"] == "5"
    assert list(turn["probabilities"]) == ["yes", "5", "no"]
    assert sum(turn["probabilities"].values()) == pytest.approx(1)
    assert "from 2 to 256 texts; got 1" in refused(*command, "--choices", "yes")
    told = refused(*command, "--choices", "yes,no", "--top-k", 5)
    assert "--top-k does nothing with --choices" in told
