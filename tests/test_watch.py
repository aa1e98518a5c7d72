"""`edgeprune watch`: which frames are asked, what is reused, and what a source may do."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edgeprune.demo import SAMPLES_DIR
from edgeprune.errors import InputError, SpecError
from edgeprune.runtime import Sampling, Session
from edgeprune.watch.alarm import Alarm
from edgeprune.watch.changes import change, levels
from edgeprune.watch.latest import Latest
from edgeprune.watch.sources import Frame, Images, RawPipe, Source, Stream, VideoFile, find, shown
from edgeprune.watch.watching import Watch, WatchRequest
from tests.clips import clip
from tests.conftest import Refused
from tests.server import QUESTION

STILL, CHANGED = (SAMPLES_DIR / f"scene-{number}.png" for number in (1, 6))


@dataclass(frozen=True)
class Given:
    """Frames that are there already, ten a second."""

    images: tuple[Any, ...]
    live: bool = False

    def frames(self) -> Iterator[Frame]:
        for number, image in enumerate(self.images):
            yield Frame(image, number, number / 10)


@pytest.fixture(scope="module")
def session(demo_fastv: Path) -> Iterator[Session]:
    with Session.open(demo_fastv, threads=1) as session:
        yield session


def asked(session: Session, source: Source, **request: Any) -> list[dict[str, Any]]:
    return list(Watch(session, WatchRequest(QUESTION, **request)).records(source))


def test_a_still_scene_is_asked_once_and_a_change_again(session: Session) -> None:
    noisy = np.asarray(Image.open(STILL).convert("RGB"), np.int16)
    noisy = noisy + np.random.default_rng(0).integers(-4, 5, noisy.shape)
    still = (STILL, STILL, noisy.clip(0, 255).astype(np.uint8), STILL)
    records = asked(session, Given((*still, CHANGED, CHANGED, STILL)), on_change=0.05)
    assert [record["frame"] for record in records] == [0, 4, 6]
    assert [record["unchanged"] for record in records] == [0, 3, 1]
    assert records[0]["text"] == session.ask(STILL, QUESTION).text == "5"
    assert records[1]["text"] == session.ask(CHANGED, QUESTION).text
    assert all(0.05 <= record["change"] <= 1 for record in records)


def test_equal_frames_are_encoded_once(demo_fastv: Path) -> None:
    with Session.open(demo_fastv, threads=1) as session:
        records = asked(session, Given((STILL, STILL, CHANGED, STILL)))
    assert [record["tiles_encoded"] for record in records] == [1, 0, 1, 0]
    assert [record["text"] for record in records[:2]] == ["5", "5"]


def test_the_longest_answer_changes_no_other_setting(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, ask, given = Sampling(repetition_penalty=1.05), session.ask, list[Any]()

    def noted(image: Any, prompt: str, sampling: Any, *rest: Any) -> Any:
        given.append(sampling)
        return ask(image, prompt, sampling, *rest)

    monkeypatch.setattr(Session, "sampling", own)
    monkeypatch.setattr(session, "ask", noted)
    asked(session, Given((STILL,)), max_new_tokens=3)
    assert given == [Sampling(repetition_penalty=1.05, max_new_tokens=3)]


def test_every_is_in_the_time_of_the_source(session: Session) -> None:
    records = asked(session, Given((STILL,) * 10), every=0.35)
    assert [record["frame"] for record in records] == [0, 4, 8]


def test_an_alarm_says_when_it_begins_and_ends(
    session: Session, capsys: pytest.CaptureFixture[str]
) -> None:
    choices = ("5", "3")
    alarm = Alarm.parse("5 >= 0.5", choices)
    source = Given((STILL, STILL, "nosuch.png", CHANGED))
    records = asked(session, source, choices=choices, alarm=alarm)
    share = session.choose(CHANGED, QUESTION, choices).probabilities["5"]
    assert [record.get("alarm") for record in records] == [True, True, None, share >= 0.5]
    assert "nosuch.png" in records[2]["error"]
    told = capsys.readouterr().err.splitlines()
    assert told == ["alarm", *(["alarm is over"] if share < 0.5 else [])]


@pytest.mark.parametrize("text", ["yes", "yes>", "yes>1.5", "yes>a", "maybe>0.5", ">0.5", "yes=1"])
def test_an_alarm_that_says_nothing_is_refused(text: str) -> None:
    with pytest.raises(SpecError, match="--alarm"):
        Alarm.parse(text, ("yes", "no"))


def test_a_small_thing_counts_as_a_change_and_noise_does_not() -> None:
    rng = np.random.default_rng(1)
    scene = rng.integers(60, 200, (480, 640, 3)).astype(np.uint8)
    before = levels(Image.fromarray(scene))
    noise = (scene + rng.integers(-10, 11, scene.shape)).clip(0, 255).astype(np.uint8)
    moved = scene.copy()
    moved[200:240, 300:340] = 255
    assert change(levels(Image.fromarray(scene)), before) == 0
    assert change(levels(Image.fromarray(noise)), before) < 0.02
    assert change(levels(Image.fromarray(moved)), before) > 0.1
    dark, light = (levels(Image.new("RGB", (9, 7), colour)) for colour in ("black", "white"))
    assert change(dark, light) == 1


def test_of_a_live_source_the_newest_frame_is_taken() -> None:
    taken, more = threading.Event(), threading.Event()

    class Fast:
        live = True

        def frames(self) -> Iterator[Frame]:
            yield Frame(STILL, 0, 0.0)
            taken.wait(10)
            for number in range(1, 5):
                yield Frame(STILL, number, 0.1 * number)
            more.set()
            raise InputError("lost")

    latest = Latest(Fast())
    frames = latest.frames()
    assert next(frames).number == 0
    taken.set()
    assert more.wait(10)
    assert (next(frames).number, latest.dropped) == (4, 3)
    with pytest.raises(InputError, match="lost"):
        next(frames)


def test_a_stream_that_ends_is_opened_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    image, waits = Image.new("RGB", (8, 8)), list[float]()
    tries = iter([[image, image], InputError("no route"), [], [image]])

    def images(stream: Stream) -> Iterator[Image.Image]:
        found = next(tries)
        if isinstance(found, InputError):
            raise found
        yield from found

    monkeypatch.setattr(Stream, "images", images)
    source = Stream("rtsp://me:secret@camera/1", waits.append)
    frames = source.frames()
    assert [next(frames).number for _ in range(3)] == [0, 1, 2]
    assert waits == [1, 2, 4]
    told = capsys.readouterr().err
    assert "no route; opened again in 2 s" in told and "secret" not in told
    tries = iter([[]])
    with pytest.raises(InputError, match="gives no frame"):
        next(Stream("rtsp://camera").frames())


def test_an_address_that_nobody_answers_is_one_error() -> None:
    pytest.importorskip("av")
    with pytest.raises(InputError, match=r"rtsp://127\.0\.0\.1:9/a cannot be read"):
        next(find("rtsp://me:pw@127.0.0.1:9/a", None, "rgb", io.BytesIO()).frames())
    assert shown("rtsp://me:pw@host/a@b") == "rtsp://host/a@b"
    assert shown("rtsp://me:p@w@host/a") == "rtsp://host/a"


def test_a_clip_gives_all_its_frames_and_times(tmp_path: Path) -> None:
    frames = list(VideoFile(clip(tmp_path / "clip.mkv", 4)).frames())
    assert [frame.number for frame in frames] == [0, 1, 2, 3]
    assert [frame.seconds for frame in frames] == pytest.approx([0, 0.1, 0.2, 0.3])
    assert [np.asarray(frame.image).mean().round() for frame in frames] == [0, 20, 40, 60]
    (tmp_path / "damaged.mkv").write_bytes(b"no clip")
    with pytest.raises(InputError, match="cannot be read as a video"):
        list(VideoFile(tmp_path / "damaged.mkv").frames())


@pytest.mark.parametrize(
    ("pixels", "depth", "wanted"),
    [
        ("rgb", 3, (1, 2, 3)),
        ("bgr", 3, (3, 2, 1)),
        ("rgbx", 4, (1, 2, 3)),
        ("bgrx", 4, (3, 2, 1)),
        ("gray", 1, 1),
    ],
)
def test_raw_pixels_become_red_green_blue(pixels: str, depth: int, wanted: Any) -> None:
    content = bytes([1, 2, 3, 4][:depth]) * (5 * 2)
    first, second = RawPipe(io.BytesIO(content * 2), (5, 2), pixels).frames()
    assert np.shape(first.image)[:2] == (2, 5)
    assert (np.asarray(second.image) == wanted).all()
    with pytest.raises(InputError, match="ended inside frame 1"):
        list(RawPipe(io.BytesIO(content + b"1"), (5, 2), pixels).frames())
    with pytest.raises(InputError, match="ended inside frame 0"):
        list(RawPipe(io.BytesIO(b""), (5, 2), pixels).frames())


def test_a_folder_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    for name in ("b.png", "a.png", ".hidden"):
        shutil.copyfile(STILL, tmp_path / name)
    assert [frame.image for frame in Images(tmp_path).frames()] == [
        tmp_path / "a.png",
        tmp_path / "b.png",
    ]
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no files"):
        list(Images(tmp_path / "empty").frames())


def test_the_command_watches_a_pipe_and_a_folder(demo_fastv: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "edgeprune.cli", "watch", str(demo_fastv)]
    options = ["--prompt", QUESTION, "--threads", "1"]
    raw = Image.open(STILL).convert("RGB")
    size = f"{raw.width}x{raw.height}"
    done = subprocess.run(
        [*command, "-", *options, "--size", size, "--frames", "all", "--on-change", "0.02"],
        input=raw.tobytes() * 3,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert json.loads(line)["text"] == "5"
    shutil.copyfile(STILL, tmp_path / "a.png")
    (tmp_path / "b.png").write_text("no image")
    shutil.copyfile(STILL, tmp_path / "c.png")
    asks = [*options, "--choices", "3,5", "--alarm", "5>0.5"]
    done = subprocess.run([*command, str(tmp_path), *asks], capture_output=True, check=False)
    first, second, third = map(json.loads, done.stdout.splitlines())
    assert first["alarm"] and third["alarm"] and "error" in second
    assert third["tiles_encoded"] == 0 and first["total_ms"] > 0
    assert done.stderr.decode().splitlines() == ["alarm"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["nosuch.mp4"], "there is nothing at nosuch.mp4"),
        (["-"], "say it: --size"),
        ([".", "--size", "4x4"], "leave it out"),
        ([".", "--every", "-1"], "--every is a number"),
        ([".", "--on-change", "2"], "--on-change is a share"),
        ([".", "--alarm", "maybe>0.5"], "none of --choices (yes, no)"),
        ([".", "--choices", "yes"], "--choices: choices are from 2"),
        ([".", "--choices", ""], "--choices: choices are from 2"),
        ([".", "--choices", "a,b", "--max-new-tokens", "3"], "choices are scored"),
        ([".", "--regex", ""], "not empty"),
    ],
)
def test_what_cannot_be_watched_is_one_line(
    options: list[str], says: str, refused: Refused, tmp_path: Path
) -> None:
    assert says in refused("watch", tmp_path / "nosuch", *options, "--prompt", "a")


def test_memory_for_tiles_is_not_negative(demo_fastv: Path, refused: Refused) -> None:
    asked = [demo_fastv, STILL, "--prompt", QUESTION, "--tile-memory", -1]
    assert "--tile-memory is a number of megabytes from 0; got -1" in refused("watch", *asked)
