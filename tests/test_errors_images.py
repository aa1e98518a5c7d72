"""Images and prompts as users have them: what works, what is refused, what stdout may be."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
from conftest import Refused
from PIL import Image

from edgeprune.cli import main
from edgeprune.demo import SAMPLES_DIR
from edgeprune.runtime import Session

SCENE = SAMPLES_DIR / "scene-1.png"
QUESTION = ["--prompt", "what color is the star ?", "--max-new-tokens", "3"]
COMMAND = [sys.executable, "-W", "error", "-m", "edgeprune.cli"]


def _cut(file: Path) -> None:
    file.write_bytes(SCENE.read_bytes()[:300])


def _huge(file: Path) -> None:
    """A whole PNG of 20,000 x 20,000 black pixels, small on disk."""
    rows = zlib.compressobj(1)
    data = b"".join(rows.compress(b"\0" * 2501 * 200) for _ in range(100)) + rows.flush()
    header = struct.pack(">IIBBBBB", 20_000, 20_000, 1, 0, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", data), (b"IEND", b""))
    chunks = [
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in parts
    ]
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))


def _deflated(file: Path) -> None:
    """A TIFF whose rows are damaged, of which libtiff tells by itself."""
    Image.effect_noise((90, 90), 50).save(file, "TIFF", compression="tiff_adobe_deflate")
    content = bytearray(file.read_bytes())
    content[8:20] = bytes(12)
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("write", "says"),
    [
        (
            lambda f: f.write_text("an image of a cat"),
            "is not an image in a format that is read (PNG, JPEG, ",
        ),
        (lambda f: f.touch(), "is empty (0 bytes); give a file with the image"),
        (lambda f: f.mkdir(), "is a folder; name one image file in it"),
        (lambda f: None, "there is no image at"),
        (_cut, "it is damaged, cut short or not yours to read; copy it again"),
        (_deflated, "cannot be read as an image (decoder error"),
        (_huge, "has 400,000,000 pixels, at most 100,000,000 are read"),
        (lambda f: Image.new("1", (40_000, 1)).save(f), "too long and narrow"),
    ],
    ids=["text", "empty", "folder", "missing", "truncated", "deflated", "huge", "narrow"],
)
def test_images_that_cannot_be_used(
    write: Any, says: str, tiny_bundle: Path, tmp_path: Path, refused: Refused
) -> None:
    write(image := tmp_path / "image.png")
    assert says in refused("run", tiny_bundle, "--image", image, *QUESTION)


def _ids(bundle: Path, image: Path, capfd: pytest.CaptureFixture[str]) -> list[int]:
    """The answer of the real command, out of its JSON."""
    capfd.readouterr()
    assert main(["run", str(bundle), "--image", str(image), *QUESTION, "--json"]) == 0
    record = json.loads(capfd.readouterr().out)
    ids: list[int] = record["turns"][0]["ids"]
    assert 1 <= len(ids) <= 3
    return ids


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_images_of_any_mode(
    mode: str, tiny_bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    image = Image.open(SCENE).convert("RGB")
    if mode == "I;16":
        image = image.convert("L").convert("I")
    file = tmp_path / f"image.{'jpg' if mode == 'CMYK' else 'png'}"
    image.convert(mode).save(file)
    with Image.open(file) as stored:
        assert stored.mode == mode
    _ids(tiny_bundle, file, capfd)


def test_a_rotated_image_is_seen_upright(
    tiny_bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    upright, lying = Image.open(SCENE).convert("RGB"), tmp_path / "lying.png"
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    upright.transpose(Image.Transpose.ROTATE_90).save(lying, exif=exif)
    assert _ids(tiny_bundle, lying, capfd) == _ids(tiny_bundle, SCENE, capfd)


def test_what_was_done_to_an_image_is_told(
    tiny_bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    sign = Image.new("RGBA", (90, 60), (0, 0, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 3
    sign.save(file := tmp_path / "sign.png", exif=exif)
    wanted = [
        "transparent parts of the image are shown on white",
        "the image is turned by 180 degrees, as its orientation tag says",
    ]
    capfd.readouterr()
    assert main(["run", str(tiny_bundle), "--image", str(file), *QUESTION]) == 0
    told = capfd.readouterr().err
    assert all(f"note: {line}\n" in told for line in wanted)
    assert main(["run", str(tiny_bundle), "--image", str(file), *QUESTION, "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["turns"][0]["warnings"] == wanted


def test_a_prompt_needs_no_image_slot_and_may_hold_one(
    tiny_bundle: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for prompt in ("what color is the star ?", "<image> what color ?", "what is in <image> here"):
        command = ["run", str(tiny_bundle), "--image", str(SCENE), "--prompt", prompt, "--json"]
        assert main([*command, "--max-new-tokens", "1"]) == 0
        assert json.loads(capfd.readouterr().out)["turns"][0]["prompt"] == prompt


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--prompt", ""], "the prompt is empty; ask something about the image"),
        (["--prompt", " \n\t"], "the prompt is empty"),
        (["--prompt", "<image>"], "the prompt is empty"),
        (["--prompt", "<image> or <image> ?"], "holds <image> 2 times; keep one"),
        (["--prompt", "star " * 5000], "the model has 4096 positions; shorten the prompt"),
        ([*QUESTION[:2], "--max-new-tokens", "4090"], "--max-new-tokens 4090 is more than the "),
        ([*QUESTION[:2], "--max-new-tokens", "0"], "an answer has at least 1 token; got 0"),
        ([*QUESTION[:2], "--temperature", "nan"], "the temperature is 0 (greedy) or a positive"),
        ([*QUESTION[:2], "--top-p", "1.5"], "top-p is a probability from 0 to 1; got 1.5"),
        ([*QUESTION[:2], "--seed", "-1"], "the seed is a whole number from 0; got -1"),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, list) else "",
)
def test_prompts_and_lengths(
    options: list[str], says: str, tiny_bundle: Path, refused: Refused
) -> None:
    assert says in refused("run", tiny_bundle, "--image", SCENE, *options)


def test_how_to_sample_is_checked_before_a_bundle_is_opened(
    tiny_bundle: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Session, "open", None)
    line = refused("run", tiny_bundle, "--image", SCENE, *QUESTION, "--temperature", "-1")
    assert "the temperature is 0 (greedy) or a positive number; got -1.0" in line


def test_a_dialogue_ends_where_the_positions_do(
    tiny_bundle: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The first answer is given, the follow-up that does not fit is refused."""
    prompts = ["--prompt", "star " * 2000, "--prompt", "star " * 2100]
    command = ["run", str(tiny_bundle), "--image", str(SCENE), *prompts]
    assert main([*command, "--max-new-tokens", "1"]) == 2
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("edgeprune: the dialogue takes 41") and "4096 positions" in last


def test_an_answer_stops_where_the_positions_do(
    tiny_bundle: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Without a length of one's own the answer just ends: sampling options ask for no length."""
    command = ["run", str(tiny_bundle), "--image", str(SCENE), "--json", "--seed", "1"]
    capfd.readouterr()
    assert main([*command, "--prompt", "star " * 4062]) == 0
    turn = json.loads(capfd.readouterr().out)["turns"][0]
    assert len(turn["ids"]) + turn["prompt_tokens"] + 16 <= 4096
    assert turn["finish"] in ("stop", "length")


def test_one_line_and_exit_code_2_of_a_real_process(tiny_bundle: Path, tmp_path: Path) -> None:
    command = [*COMMAND, "run", str(tiny_bundle), "--image", str(tmp_path / "nosuch.png")]
    done = subprocess.run([*command, *QUESTION], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"edgeprune: there is no image at {tmp_path / 'nosuch.png'}; check the path\n"
    )


def test_json_is_all_that_stdout_gets(tiny_bundle: Path) -> None:
    bundles = [str(tiny_bundle), str(tiny_bundle)]
    command = [*COMMAND, "run", *bundles, "--image", str(SCENE), *QUESTION, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert [record["bundle"] for record in records] == ["tiny", "tiny"]
    assert done.stderr.startswith("tiny (ort-cpu)\n")


@pytest.mark.parametrize("command", ["run", "methods"])
def test_a_reader_that_has_gone_is_no_error(command: str, tiny_bundle: Path) -> None:
    options = [str(tiny_bundle), "--image", str(SCENE), *QUESTION] if command == "run" else []
    process = subprocess.Popen(
        [*COMMAND, command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 0, err
    assert "Error" not in err and "Traceback" not in err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_stdout_that_is_full_is_one_line() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [*COMMAND, "methods"], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 2
    assert done.stderr.startswith("edgeprune: ") and "No space left" in done.stderr
    assert done.stderr.count("\n") == 1
