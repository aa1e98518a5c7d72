"""`edgeprune serve` and the official client over a real socket, beside `Session`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgeprune.runtime import Session
from edgeprune.runtime.sampling import Sampling
from tests.server import NEXT, OTHER, QUESTION, SCENE, Server, asked, running, went_on

openai = pytest.importorskip("openai")
httpx = pytest.importorskip("httpx")
pytest.importorskip("uvicorn")
pytest.importorskip("starlette")


@pytest.fixture(scope="module")
def server(demo_fastv: Path) -> Iterator[Server]:
    with running(demo_fastv, "--sequences", "2", "--kept-memory", "0") as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def session(demo_fastv: Path) -> Iterator[Session]:
    with Session.open(demo_fastv, threads=1) as session:
        yield session


def answer_of(client: Any, messages: list[dict[str, Any]], **fields: Any) -> Any:
    return client.chat.completions.create(model=model_of(client), messages=messages, **fields)


def model_of(client: Any) -> str:
    (model,) = client.models.list().data
    return str(model.id)


def test_an_answer_is_a_sessions(client: Any, session: Session) -> None:
    wanted = session.ask(SCENE, QUESTION)
    found = answer_of(client, asked(QUESTION))
    (choice,) = found.choices
    assert (choice.message.content, choice.finish_reason) == (wanted.text, "stop")
    assert choice.message.role == "assistant"
    usage, prune = found.usage, session.manifest.prune
    assert usage.completion_tokens == len(wanted.ids)
    assert usage.prompt_tokens == wanted.prompt_tokens + prune.visual_tokens
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.visual_tokens["before"] == 144
    assert usage.visual_tokens["layers"] == list(prune.counts)
    assert usage.visual_tokens["after"] == pytest.approx(sum(prune.counts) / len(prune.counts))


def test_a_dialogue_goes_on_without_a_new_prefill(client: Any, session: Session) -> None:
    first = session.ask(SCENE, QUESTION)
    wanted = session.follow_up(NEXT)
    answer_of(client, asked(QUESTION))
    found = answer_of(client, went_on(asked(QUESTION), first.text, NEXT))
    assert found.choices[0].message.content == wanted.text
    details = found.usage.prompt_tokens_details
    assert found.usage.prompt_tokens - details.cached_tokens == wanted.prompt_tokens
    assert details.cached_tokens > 144


def test_after_an_eviction_the_answers_are_the_same(client: Any, session: Session) -> None:
    sampling = Sampling(max_new_tokens=20, min_new_tokens=20)
    long = {"max_tokens": 20, "extra_body": {"min_tokens": 20}}
    first = session.ask(OTHER, QUESTION, sampling)
    second = session.follow_up(NEXT, sampling)
    third = session.follow_up(QUESTION, sampling)
    messages, evict = asked(QUESTION, OTHER), asked(NEXT)
    for wanted, prompt in ((first, NEXT), (second, QUESTION), (third, "")):
        found = answer_of(client, messages, **long)
        assert found.choices[0].message.content == wanted.text
        assert found.usage.prompt_tokens_details.cached_tokens == 0
        for image in (SCENE, OTHER):  # as many dialogues as there are sequences
            answer_of(client, asked(evict[0]["content"][1]["text"], image))
        messages = went_on(messages, wanted.text, prompt)


def test_a_stream_is_the_answer_in_pieces(client: Any, session: Session) -> None:
    settings = {"max_tokens": 30, "extra_body": {"min_tokens": 30}}
    wanted = session.ask(SCENE, QUESTION, Sampling(max_new_tokens=30, min_new_tokens=30))
    events = answer_of(
        client, asked(QUESTION), stream=True, stream_options={"include_usage": True}, **settings
    )
    *pieces, end, usage = events
    assert pieces[0].choices[0].delta.role == "assistant"
    assert "".join(piece.choices[0].delta.content for piece in pieces) == wanted.text
    assert len(pieces) > 10
    assert {piece.id for piece in (*pieces, end, usage)} == {end.id}
    assert end.choices[0].finish_reason == "length" == wanted.finish
    assert (usage.choices, usage.usage.completion_tokens) == ([], 30)
    whole = answer_of(client, asked(QUESTION), **settings)
    assert whole.choices[0].message.content == wanted.text


def test_stop_ends_before_its_text(client: Any, session: Session) -> None:
    long = session.ask(SCENE, QUESTION, Sampling(max_new_tokens=30, min_new_tokens=30)).text
    stop = " ".join(long.split()[3:6])
    sampling = Sampling(max_new_tokens=30, min_new_tokens=30, stop=(stop,))
    wanted = session.ask(SCENE, QUESTION, sampling)
    fields = {"max_tokens": 30, "stop": [stop], "extra_body": {"min_tokens": 30}}
    found = answer_of(client, asked(QUESTION), **fields)
    assert found.choices[0].message.content == wanted.text == " ".join(long.split()[:3])
    assert found.choices[0].finish_reason == "stop"
    again = answer_of(client, went_on(asked(QUESTION), wanted.text, NEXT))
    assert again.usage.prompt_tokens_details.cached_tokens == 0  # it has read more than was said


def test_a_seed_draws_what_a_session_draws(client: Any, session: Session) -> None:
    drawn = set()
    for seed in (1, 2, 3):
        drawing: dict[str, Any] = {"temperature": 5.0, "top_p": 0.99, "seed": seed}
        sampling = replace(session.sampling, max_new_tokens=8, min_new_tokens=8, **drawing)
        fields = {"max_completion_tokens": 8, "extra_body": {"min_tokens": 8}}
        found = answer_of(client, asked(QUESTION), **fields, **drawing)
        wanted = session.ask(SCENE, QUESTION, sampling).text
        assert found.choices[0].message.content == wanted
        drawn.add(wanted)
    assert len(drawn) == 3


def test_choices_are_a_sessions(client: Any, session: Session) -> None:
    choices = ["yes", "no", "5"]
    wanted = session.choose(SCENE, QUESTION, choices)
    later = session.choose_follow_up(NEXT, choices)
    body = {"extra_body": {"choices": choices}}
    found = answer_of(client, asked(QUESTION), **body)
    (choice,) = found.choices
    assert (choice.message.content, choice.finish_reason) == ("5", "stop")
    assert choice.probabilities == pytest.approx(wanted.probabilities)
    assert choice.log_probabilities == pytest.approx(wanted.log_probabilities)
    assert found.usage.prompt_tokens == wanted.prompt_tokens + 144
    events = answer_of(client, went_on(asked(QUESTION), "5", NEXT), stream=True, **body)
    *_, said, end = events
    assert said.choices[0].delta.content == later.text
    assert end.choices[0].probabilities == pytest.approx(later.probabilities, abs=1e-5)


def test_logprobs_are_a_softmax_over_all_tokens(client: Any, session: Session) -> None:
    settings = {"max_tokens": 12, "extra_body": {"min_tokens": 12}}
    sampling = Sampling(max_new_tokens=12, min_new_tokens=12)
    wanted = session.ask(SCENE, QUESTION, sampling, logprobs=3)
    assert wanted.ids == session.ask(SCENE, QUESTION, sampling).ids
    found = answer_of(client, asked(QUESTION), logprobs=True, top_logprobs=3, **settings)
    content = found.choices[0].logprobs.content
    assert "".join(one.token for one in content).strip() == found.choices[0].message.content
    assert [one.logprob for one in content] == pytest.approx(
        [score.log_probability for score in wanted.scores], abs=1e-4
    )
    for one, score, token in zip(content, wanted.scores, wanted.ids, strict=True):
        assert (score.id, bytes(one.bytes).decode()) == (token, one.token)
        assert [top.logprob for top in one.top_logprobs] == pytest.approx(
            [top.log_probability for top in score.likeliest], abs=1e-4
        )
        shares = [2.718281828459045**top.logprob for top in one.top_logprobs]
        assert len(shares) == 3 and sum(shares) <= 1 + 1e-6
        assert shares == sorted(shares, reverse=True)
        assert one.logprob <= one.top_logprobs[0].logprob + 1e-6
    choices = session.choose(SCENE, QUESTION, ["5", "3"]).log_probabilities
    alone = session.ask(SCENE, QUESTION, logprobs=0).scores
    assert len(alone) == 1 and alone[0].log_probability >= choices["5"]
    assert alone[0].likeliest == ()
    events = answer_of(
        client, asked(QUESTION), logprobs=True, top_logprobs=3, stream=True, **settings
    )
    pieces = [event.choices[0].logprobs for event in events]
    streamed = [one.token for piece in pieces if piece for one in piece.content]
    assert streamed == [one.token for one in content]


def test_text_before_the_image_stays_before_it(client: Any, session: Session) -> None:
    messages = asked(QUESTION)
    messages[0]["content"].insert(0, {"type": "text", "text": "is the star red ? "})
    wanted = session.ask(SCENE, "is the star red ? <image>" + QUESTION)
    found = answer_of(client, messages)
    assert found.choices[0].message.content == wanted.text
    assert found.usage.prompt_tokens == wanted.prompt_tokens + 144


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"temperature": -1}, "temperature", "0 (greedy) or a positive number"),
        ({"max_tokens": 100000}, "messages", "is more than the"),
        ({"n": 2}, "n", "n is not supported"),
        ({"extra_body": {"nosuch": 1}}, "nosuch", "there is no field 'nosuch'"),
        ({"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "from 0 to 20"),
        ({"extra_body": {"choices": ["yes"]}}, "choices", "from 2 to 256"),
        ({"extra_body": {"choices": {"yes": 1, "no": 2}}}, "choices", "a list of texts"),
        ({"extra_body": {"choices": ["yes", "no"], "top_k": 2}}, "choices", "would do nothing"),
    ],
)
def test_what_cannot_be_met_is_a_bad_request(
    client: Any, fields: dict[str, Any], param: str, says: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        answer_of(client, asked(QUESTION), **fields)
    assert caught.value.param == param
    assert says in caught.value.message


def test_an_unknown_model_is_not_found(client: Any) -> None:
    with pytest.raises(openai.NotFoundError, match="choose one of: demo-fastv"):
        client.chat.completions.create(model="nosuch", messages=asked(QUESTION))
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nosuch")
    assert client.models.retrieve(model_of(client)).id == "demo-fastv"


def test_metrics_and_health(server: Server, client: Any) -> None:
    answer_of(client, asked(QUESTION))
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    model = 'model="demo-fastv"'
    assert float(values[f'edgeprune_requests_total{{{model},status="200"}}']) >= 1
    assert float(values[f"edgeprune_time_to_first_token_seconds_count{{{model}}}"]) >= 1
    before = float(values[f'edgeprune_visual_tokens_total{{{model},kind="before"}}'])
    kept = float(values[f'edgeprune_visual_tokens_total{{{model},kind="kept"}}'])
    assert before / kept == pytest.approx(2, rel=0.02)
    assert float(values[f"edgeprune_running{{{model}}}"]) == 0
    assert float(values["process_resident_memory_bytes"]) > 1e7
