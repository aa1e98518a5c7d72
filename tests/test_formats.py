"""Answers of a given form: the sessions, the command and the server keep it, or say `length`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from edgeprune.errors import SpecError
from edgeprune.runtime import AnswerFormat, Sampling, Session
from edgeprune.runtime.formats import LONGEST, Grammar, Vocabulary
from edgeprune.runtime.tokenizer import SafeTokenizer
from edgeprune.serve.errors import HttpError
from edgeprune.serve.images import ImageDoors
from edgeprune.serve.request import parse
from tests.conftest import Refused
from tests.server import NEXT, QUESTION, SCENE, asked

pytest.importorskip("llguidance")

SCHEMA = {
    "type": "object",
    "properties": {
        "shape": {"enum": ["star", "heart"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 9},
    },
    "required": ["shape", "count"],
    "additionalProperties": False,
}
END = 0


@pytest.fixture(scope="module")
def session(demo_fastv: Path) -> Iterator[Session]:
    with Session.open(demo_fastv, threads=1) as session:
        yield session


@pytest.fixture(scope="module")
def bytewise(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    """A vocabulary of bytes, as GPT-2's and Qwen's are, and one token that ends an answer."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {"<end>": END, **{letter: number + 1 for number, letter in enumerate(letters)}}
    tokenizer = Tokenizer(models.BPE(words, []))
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    file = tmp_path_factory.mktemp("bytes") / "tokenizer.json"
    tokenizer.save(str(file))
    vocabulary = Vocabulary(SafeTokenizer.open(file), [END])
    vocabulary.decode = SafeTokenizer.open(file).decode  # type: ignore[attr-defined]
    return vocabulary


def drawn(grammar: Grammar, vocabulary: Any, rng: np.random.Generator, most: int) -> str | None:
    """A random answer that a grammar lets through; None where it did not end in time."""
    said = list[int]()
    while len(said) < most:
        scores = rng.gumbel(size=300).astype(np.float32)
        grammar.mask(scores)
        token = int(scores.argmax())
        assert np.isfinite(scores[token])
        grammar.take(token)
        if token == END:
            return str(vocabulary.decode(said))
        said.append(token)
    return None


def test_whatever_is_drawn_has_the_form(bytewise: Vocabulary) -> None:
    rng, ended = np.random.default_rng(0), 0
    for _ in range(40):
        text = drawn(bytewise.grammar(AnswerFormat.json_schema(SCHEMA)), bytewise, rng, 200)
        if text is not None:
            found = json.loads(text)
            assert set(found) == {"shape", "count"}
            assert found["shape"] in ("star", "heart") and 0 <= found["count"] <= 9
            ended += 1
    assert ended > 30
    pattern = r"[A-Z]{2}-\d{3,4}|none"
    texts = [
        drawn(bytewise.grammar(AnswerFormat.regex(pattern)), bytewise, rng, 30) for _ in range(40)
    ]
    wrong = [text for text in texts if text and not re.fullmatch(pattern, text.strip(), re.ASCII)]
    assert not wrong
    assert len(set(texts)) > 20
    any_object = bytewise.grammar(AnswerFormat.json_object())
    assert drawn(any_object, bytewise, np.random.default_rng(1), 3) is None


def test_a_sessions_answers_have_the_form(session: Session) -> None:
    free = session.ask(SCENE, QUESTION)
    assert free.text == "5"
    kept = session.ask(SCENE, QUESTION, answer_format=AnswerFormat.regex("yes|no"))
    assert (kept.text in ("yes", "no"), kept.finish) == (True, "stop")
    likeliest = session.choose(SCENE, QUESTION, ["yes", "no"]).text
    assert kept.text == likeliest
    assert session.ask(SCENE, QUESTION, answer_format=AnswerFormat.regex(r"\d")).ids == free.ids
    wanted = AnswerFormat.regex("red( star){6}")
    assert session.follow_up(NEXT, answer_format=wanted).text == "red" + 6 * " star"
    short = session.follow_up(NEXT, Sampling(max_new_tokens=3), wanted)
    assert (short.text, short.finish) == ("red star star", "length")
    drawing = Sampling(temperature=9.0, seed=3, max_new_tokens=40)
    text = "".join(session.stream(SCENE, QUESTION, drawing, None, AnswerFormat.regex(r"(\d ){9}5")))
    assert re.fullmatch(r"(\d ){9}5", text.strip())


def test_a_form_that_the_words_of_a_model_cannot_have_is_refused(session: Session) -> None:
    for wanted in (AnswerFormat.json_object(), AnswerFormat.regex("red wine")):
        with pytest.raises(SpecError, match="no tokens to write an answer of the form"):
            session.ask(SCENE, QUESTION, answer_format=wanted)
    assert session.ask(SCENE, QUESTION).text == "5"


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        (AnswerFormat.regex("(a"), "the regular expression cannot be kept: unclosed group"),
        (AnswerFormat.regex("a(?=b)"), "look-around"),
        (AnswerFormat.json_schema({"type": "nosuch"}), "Invalid type: nosuch"),
        (AnswerFormat.json_schema({"not": {}}), 'Unimplemented keys: ["not"]'),
        (AnswerFormat.json_schema({"$ref": "http://a.example/b"}), "does not fetch"),
    ],
)
def test_a_form_that_cannot_be_kept_is_refused(
    wanted: AnswerFormat, says: str, bytewise: Vocabulary
) -> None:
    with pytest.raises(SpecError) as caught:
        bytewise.grammar(wanted)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_a_kind_that_is_not_known_is_refused() -> None:
    with pytest.raises(SpecError, match="json or regex; got 'xml'"):
        AnswerFormat("xml", "<a/>")


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"response_format": {"type": "nosuch"}}, "response_format", "response_format is"),
        ({"response_format": "json"}, "response_format", "response_format is"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "response_format is"),
        ({"regex": 5}, "regex", "a text that is not empty"),
        ({"regex": "a" * (LONGEST + 1)}, "regex", "at most 65536 letters"),
        ({"regex": "a", "response_format": {"type": "json_object"}}, "regex", "give one"),
        ({"regex": "a", "stop": "b"}, "regex", "stop would break the form"),
        ({"regex": "a", "choices": ["a", "b"]}, "choices", "leave the other out"),
    ],
)
def test_a_request_names_its_wrong_form(fields: dict[str, Any], param: str, says: str) -> None:
    body = json.dumps({"model": "demo", "messages": asked(QUESTION), **fields}).encode()
    with pytest.raises(HttpError) as caught:
        parse(body, ImageDoors(1 << 20))
    assert (caught.value.status, caught.value.param) == (400, param)
    assert says in str(caught.value)


def test_a_request_says_its_form() -> None:
    described = {"type": "json_schema", "json_schema": {"name": "scene", "schema": SCHEMA}}
    for value, wanted in [
        (described, AnswerFormat.json_schema(SCHEMA)),
        ({"type": "json_object"}, AnswerFormat.json_object()),
        ({"type": "text"}, None),
    ]:
        body = {"model": "demo", "messages": asked(QUESTION), "response_format": value}
        assert parse(json.dumps(body).encode(), ImageDoors(1 << 20)).answer_format == wanted


def test_the_command_keeps_a_form(
    demo_fastv: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], refused: Refused
) -> None:
    from edgeprune.cli import main

    image = tmp_path / "scene.png"
    image.write_bytes(SCENE)
    ask = ["run", str(demo_fastv), "--image", str(image), "--prompt", QUESTION, "--threads", "1"]
    assert main([*ask, "--regex", "yes|no"]) == 0
    assert capfd.readouterr().out.strip() in ("yes", "no")
    schema = tmp_path / "schema.json"
    schema.write_text("{]")
    assert "is no JSON file" in refused(*ask, "--json-schema", schema)
    schema.write_text("{}")
    assert "stop would break" in refused(*ask, "--json-schema", schema, "--stop", "a")
