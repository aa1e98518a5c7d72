"""A bundle with several ratios is several models to a client: NAME at the default, NAME@CR."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edgeprune.demo import SAMPLES_DIR
from edgeprune.runtime import Sampling, Session
from edgeprune.spec import PruneSpec
from tests.frozen import dialed
from tests.server import NEXT, Server, asked, chat, refusal, running, went_on

httpx = pytest.importorskip("httpx")
pytest.importorskip("uvicorn")
pytest.importorskip("starlette")

LIMIT = 3


@pytest.fixture(scope="module")
def dial(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = PruneSpec("fastv", options={"K": "1"})
    folder = tmp_path_factory.mktemp("served") / "tiny"
    return dialed(folder, spec, {2.0: (), 2.5: ()}, model=tiny_checkpoint)


@pytest.fixture(scope="module")
def server(dial: Path) -> Iterator[Server]:
    with running(dial, "--sequences", "2", "--kept-memory", "0") as found:
        yield found


def test_each_ratio_is_a_model(server: Server, dial: Path) -> None:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        listed = client.get("/v1/models").json()["data"]
        assert [(m["id"], m["layers"]) for m in listed] == [
            ("tiny", [16, 4, 4]),
            ("tiny@2", [16, 4, 4]),
            ("tiny@2.5", [16, 2, 2]),
        ]
        assert client.get("/v1/models/tiny@2.5").json() == listed[2]
        said: dict[str, list[Any]] = {}
        for model in ("tiny", "tiny@2.5", "tiny@2"):
            messages, said[model] = asked("what color ?"), []
            for prompt in (NEXT, ""):
                reply = chat(client, messages, model=model, max_tokens=LIMIT).json()
                assert reply["model"] == model
                said[model].append(reply)
                messages = went_on(messages, reply["choices"][0]["message"]["content"], prompt)
        told = refusal(chat(client, model="tiny@3"), 404)
    assert "choose one of: tiny, tiny@2, tiny@2.5" in told
    for model, cr in (("tiny", None), ("tiny@2", 2.0), ("tiny@2.5", 2.5)):
        with Session.open(dial, cr=cr) as session:
            counts = list(session.manifest.prune.counts)
            limit = Sampling(max_new_tokens=LIMIT)
            answers = [session.ask(SAMPLES_DIR / "scene-1.png", "what color ?", limit)]
            answers.append(session.follow_up(NEXT, limit))
        for reply, answer in zip(said[model], answers, strict=True):
            assert reply["choices"][0]["message"]["content"] == answer.text
            assert reply["usage"]["visual_tokens"]["layers"] == counts
