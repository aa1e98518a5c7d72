"""Any body is a request or one error: no other exception leaves the reader."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeprune.errors import BackendError, CapacityError, InputError
from edgeprune.serve.errors import HttpError, http_error
from edgeprune.serve.images import ImageDoors
from edgeprune.serve.messages import conversation
from edgeprune.serve.request import IGNORED, NEUTRAL, OWN, parse
from tests.server import NEXT, QUESTION, SCENE, asked, data_uri, folder_of, went_on

LIMIT = 1 << 20
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
WORDS = st.sampled_from(
    ["role", "content", "type", "text", "image_url", "url", "user", "assistant", "system", "file:a"]
)
JSON = st.recursive(
    SCALARS | WORDS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(WORDS | st.text(), inner, max_size=4)
    ),
    max_leaves=20,
)
FIELDS = st.sampled_from(sorted({*OWN, *NEUTRAL, *IGNORED}))


def read(fields: dict[str, Any], media: Path | None = None) -> str:
    """`taken`, or the error of a body."""
    try:
        parse(json.dumps(fields).encode(), ImageDoors(LIMIT, media))
    except HttpError as error:
        assert error.status in (400, 404, 413) and error.message and "\n" not in error.message
        return error.message
    return "taken"


@given(st.binary() | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_body_is_refused_in_a_line(body: bytes) -> None:
    with pytest.raises(HttpError):
        parse(body, ImageDoors(LIMIT))


@given(st.dictionaries(FIELDS, JSON, max_size=3), JSON, st.integers(0, 4))
def test_any_change_to_a_request_is_taken_or_refused(
    fields: dict[str, Any], part: Any, where: int
) -> None:
    messages: list[Any] = went_on(asked(QUESTION), "5", NEXT)
    if where < 3:
        messages[where] = part
    elif where == 3:
        messages[0]["content"] = [*messages[0]["content"], part]
    read({"model": "demo", "messages": messages, **fields}, Path("/nosuch"))


def test_a_request_says_what_it_asks() -> None:
    fields = {"temperature": 0.5, "stop": "no", "max_completion_tokens": 7, "user": "me", "n": 1}
    body = {"model": "demo", "messages": went_on(asked(QUESTION), " 5\n", NEXT), "stream": True}
    found = parse(json.dumps({**body, **fields}).encode(), ImageDoors(LIMIT))
    assert found.settings == {"max_new_tokens": 7, "temperature": 0.5, "stop": ("no",)}
    assert (found.stream, found.stream_usage, found.choices) == (True, False, ())
    talk = found.conversation
    assert (talk.images, talk.system, talk.prompt) == ((SCENE,), None, NEXT)
    assert talk.turns == ((QUESTION, "5"),)


def test_a_key_tells_all_that_was_said() -> None:
    system = {"role": "system", "content": "be short"}
    messages = [
        asked(QUESTION),
        asked(QUESTION, SCENE + b"\0"),
        asked(QUESTION + " "),
        [system, *asked(QUESTION)],
    ]
    talks = [conversation(one, ImageDoors(LIMIT)) for one in messages]
    keys = [talk.after(answer) for talk in talks for answer in ("5", "6")]
    assert len(set(keys)) == len(keys)
    on = conversation(went_on(asked(QUESTION), "5", NEXT), ImageDoors(LIMIT))
    assert on.keys() == [talks[0].after("5")]
    split = conversation(went_on(asked(QUESTION + "5"), "", NEXT), ImageDoors(LIMIT))
    assert split.keys() != on.keys()


def test_an_image_is_what_the_address_holds(tmp_path: Path) -> None:
    media = folder_of(SCENE, tmp_path / "open")
    (media / "below").mkdir()
    (media / "below" / "a b.png").write_bytes(b"image")
    os.mkfifo(media / "pipe")
    read_image = ImageDoors(LIMIT, media).open().read
    assert ImageDoors(LIMIT).open().read(data_uri()) == SCENE
    assert read_image("file:scene.png") == SCENE
    assert read_image(f"file://{media}/scene.png") == SCENE
    assert read_image("file:below/a%20b.png") == b"image"
    for url, status in [
        ("file:scene.png", 400),
        ("file:pipe", 404),
        ("file:below", 404),
        ("file:link.png", 404),
        ("file:out/secret.png", 404),
        ("file:below/../scene.png", 400),
        (f"file:{tmp_path}/secret.png", 400),
    ]:
        with pytest.raises(HttpError) as caught:
            (ImageDoors(LIMIT).open().read if url == "file:scene.png" else read_image)(url)
        assert caught.value.status == status, url
    with pytest.raises(HttpError) as caught:
        ImageDoors(100, media).open().read("file:scene.png")
    assert caught.value.status == 413


@pytest.mark.parametrize(
    ("error", "status", "says"),
    [
        (InputError("no\nimage"), 400, "no image"),
        (CapacityError("full"), 400, "full"),
        (BackendError("lost"), 500, "lost"),
        (KeyError("a secret"), 500, "the server failed (KeyError); its log says where"),
    ],
)
def test_an_error_becomes_a_status(error: Exception, status: int, says: str) -> None:
    found = http_error(error)
    assert (found.status, found.message) == (status, says)
    assert set(found.body()["error"]) == {"message", "type", "param", "code"}
