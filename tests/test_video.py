"""Frames of a clip are those that a player shows; a hostile clip opens nothing and ends."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgeprune.errors import InputError
from edgeprune.images import RgbImage
from edgeprune.runtime import video
from edgeprune.runtime.video import read_frames
from tests.clips import TURNS, clip, corner, encoded


def frames(path: Path, count: int) -> list[Image.Image]:
    return read_frames(path, count, lambda frame: frame.image)


def first(path: Path) -> RgbImage:
    return read_frames(path, 1, lambda frame: frame)[0]


@pytest.fixture(scope="module")
def ten(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clip of ten frames."""
    return clip(tmp_path_factory.mktemp("clip") / "clip.mkv", 10)


def test_frames_are_spread_evenly_over_a_clip(ten: Path) -> None:
    found = frames(ten, 4)
    assert [frame.size for frame in found] == [(32, 16)] * 4
    numbers = np.arange(0, 10, 10 / 4).astype(int)  # as model cards sample
    assert [round(np.asarray(frame).mean() / 20) for frame in found] == numbers.tolist()


def test_a_clip_with_too_few_frames_is_refused(ten: Path) -> None:
    with pytest.raises(InputError, match="has 10 frames, this bundle takes 11"):
        frames(ten, 11)


@pytest.mark.parametrize("said", [0, 3, 30])
def test_frames_are_counted_where_a_file_is_wrong_about_them(
    said: int, ten: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = [np.asarray(frame).tolist() for frame in frames(ten, 5)]
    monkeypatch.setattr(video, "_declared", lambda av, path: said)
    assert [np.asarray(frame).tolist() for frame in frames(ten, 5)] == wanted
    with pytest.raises(InputError, match="has 10 frames, this bundle takes 11"):
        frames(ten, 11)


def test_what_is_no_video_is_refused(tmp_path: Path) -> None:
    (broken := tmp_path / "clip.mp4").write_bytes(b"not a video at all")
    with pytest.raises(InputError, match="cannot be read as a video"):
        frames(broken, 2)
    with pytest.raises(InputError, match="there is no video at"):
        frames(tmp_path / "none.mp4", 2)


BRIGHT = {  # the corner that shows the clip's upper left one: row, column
    "none": (0, 0),
    "90 clockwise": (0, 1),
    "180": (1, 1),
    "90 counter-clockwise": (1, 0),
    "mirrored": (0, 1),
    "mirrored, 90 clockwise": (0, 0),
    "a matrix of zeros": (0, 0),
}


@pytest.mark.parametrize("turn", TURNS)
def test_a_clip_is_turned_as_a_player_turns_it(turn: str, tmp_path: Path) -> None:
    found = first(corner(tmp_path / "clip.mp4", turn))
    levels = np.asarray(found.image.convert("L"))
    assert levels.shape == ((64, 32) if "90" in turn else (32, 64))
    height, width = levels.shape
    quarters = levels.reshape(2, height // 2, 2, width // 2).mean((1, 3))
    assert quarters[BRIGHT[turn]] > 200 and (quarters > 50).sum() == 1
    assert bool(found.warnings) == (turn not in ("none", "a matrix of zeros"))
    assert all("as its display matrix says" in warning for warning in found.warnings)


@pytest.mark.parametrize(
    ("aspect", "turn", "size"),
    [
        (Fraction(2), "none", (128, 32)),
        (Fraction(1, 2), "none", (64, 64)),
        (Fraction(2), "90 clockwise", (32, 128)),
    ],
)
def test_pixels_that_are_not_square_are_stretched(
    aspect: Fraction, turn: str, size: tuple[int, int], tmp_path: Path
) -> None:
    found = first(corner(tmp_path / "clip.mp4", turn, aspect))
    assert found.image.size == size
    assert f"pixels are {aspect.numerator}:{aspect.denominator}" in found.warnings[0]


def test_pixels_of_an_absurd_aspect_are_refused() -> None:
    frame = pytest.importorskip("av").VideoFrame(64, 64, "gray")
    with pytest.raises(InputError, match="frames would be 1,920,000 x 64"):
        video.frame_image(frame, Fraction(30_000))


def test_a_playlist_opens_no_other_file(ten: Path, tmp_path: Path) -> None:
    (tmp_path / "real.mkv").write_bytes(ten.read_bytes())
    segment = encoded(tmp_path / "real.ts", "mpeg2video", "yuv420p", [np.zeros((32, 32), np.uint8)])
    hls = f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{segment.name}\n#EXT-X-ENDLIST\n"
    playlists = {
        "list.m3u8": hls,
        "list.mp4": hls,
        "concat.mp4": "ffconcat version 1.0\nfile real.mkv\n",
        "camera.sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nt=0 0\nm=video 5004 RTP/AVP 96\n",
        "frame-%d.png": "frame-1.png is beside it",
    }
    Image.new("RGB", (9, 9)).save(tmp_path / "frame-1.png")
    for name, text in playlists.items():
        (path := tmp_path / name).write_text(text)
        with pytest.raises(InputError, match="cannot be read as a video") as caught:
            frames(path, 1)
        assert "\n" not in str(caught.value)


def test_a_clip_with_damaged_text_is_read(ten: Path, tmp_path: Path) -> None:
    content = ten.read_bytes()
    (path := tmp_path / "clip.mkv").write_bytes(content.replace(b"Lavf", b"\xffavf"))
    assert len(frames(path, 3)) == 3


def test_a_damaged_clip_gives_frames_or_our_error(ten: Path, tmp_path: Path) -> None:
    corner(tmp_path / "clip.mp4")
    rng = np.random.default_rng(0)
    for number in range(120):
        source = ten if number % 2 else tmp_path / "clip.mp4"
        content = np.frombuffer(source.read_bytes(), np.uint8).copy()
        at = rng.integers(0, len(content), rng.integers(1, 9))
        content[at] = rng.integers(0, 256, len(at))
        (path := tmp_path / f"damaged{source.suffix}").write_bytes(content.tobytes())
        try:
            assert len(frames(path, 2)) == 2
        except InputError as error:
            assert "\n" not in str(error)


def test_frames_that_would_fill_memory_are_not_decoded(tmp_path: Path) -> None:
    path = encoded(tmp_path / "huge.mkv", "mjpeg", "yuvj420p", [np.zeros((6400, 6400), np.uint8)])
    with pytest.raises(InputError, match="more than 40,000,000 pixels"):
        first(path)


def test_a_clip_that_does_not_end_is_refused(ten: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video, "MAX_CLIP_PIXELS", 5 * video.LEAST_FRAME)
    with pytest.raises(InputError, match="more than 500,000 pixels in all its frames; cut it"):
        frames(ten, 10)
