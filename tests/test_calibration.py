"""Calibration: what it collects against plain definitions, samples of users, the cache."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Refused
from PIL import EpsImagePlugin, Image

from edgeprune.bundle import Bundle
from edgeprune.calib.collect import collect
from edgeprune.calib.samples import Sample, demo_samples, user_samples
from edgeprune.calib.schedule import Schedule
from edgeprune.cli import main
from edgeprune.errors import InputError, ModelError
from edgeprune.export.generation import Generation
from edgeprune.export.prompts import read_text, save_tokenizer
from edgeprune.generation import Sampling
from edgeprune.models import Adapter, open_model
from edgeprune.models._chat import Chat
from edgeprune.models._processor import Processor
from edgeprune.models._reference import Reference
from edgeprune.policies import Policy, make
from edgeprune.runtime.text import Prompter
from edgeprune.spec import Plan, PruneSpec, plan_from_counts
from tests.qwen import plain_checkpoint


@dataclass(frozen=True)
class Demo:
    adapter: Adapter
    samples: list[Sample]
    policy: Policy


@pytest.fixture(scope="module")
def demo() -> Demo:
    adapter = open_model("demo")
    processor = Processor(adapter)
    return Demo(adapter, list(demo_samples(processor, 3)), make(PruneSpec("utp", 4)))


def test_losses_are_the_angle_without_visual_tokens_from_each_layer_on(demo: Demo) -> None:
    """ell_l by its definition: run with V tokens up to layer l - 1 and none from l on."""
    evidence = collect(demo.adapter, demo.policy, demo.samples)
    shape = demo.adapter.shape
    features: list[torch.Tensor] = []
    for layer in (None, 2, 5, shape.layers):
        counts = [shape.visual_tokens] * shape.layers
        if layer is not None:
            counts[layer - 1 :] = [0] * (shape.layers - layer + 1)
        plan = plan_from_counts(shape.visual_tokens, tuple(counts))
        reference = Reference.build(demo.adapter, demo.policy, plan)
        decoder = reference.decoder
        features.append(_features(reference, decoder, demo.samples))
    for column, layer in enumerate((2, 5, shape.layers), start=1):
        cosine = torch.cosine_similarity(features[column], features[0]).clamp(-1, 1)
        np.testing.assert_allclose(evidence.loss[:, layer - 1], cosine.acos(), atol=2e-3)
    assert (evidence.loss[:, 0] == 0).all()


def _features(reference: Reference, decoder: Any, samples: list[Sample]) -> torch.Tensor:
    found = []
    norm = decoder.ops.rms_norm

    def listen(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        out = norm(x, weight, eps)
        if weight is decoder.norm.weight:
            found.append(out[0, -1])
        return out

    decoder.ops.rms_norm = listen
    for sample in samples:
        reference.prefill(sample.prompt)
    return torch.stack(found)


def test_attention_is_that_of_transformers(demo: Demo) -> None:
    """From layer 4 on the score is the plain attention of the last prompt token."""
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(
        demo.adapter.checkpoint.folder, dtype=torch.float32, attn_implementation="eager"
    )
    evidence = collect(demo.adapter, demo.policy, demo.samples)
    for row, sample in enumerate(demo.samples):
        prompt = sample.prompt
        image = torch.full((1, demo.adapter.shape.visual_tokens), demo.adapter.image_token_id)
        ids = torch.cat([prompt.prefix_ids, image, prompt.text_ids], 1)
        with torch.no_grad():
            out = model(input_ids=ids, pixel_values=prompt.pixels, output_attentions=True)
        start = prompt.prefix_ids.shape[1]
        for layer in range(3, demo.adapter.shape.layers):
            wanted = out.attentions[layer][0, :, -1, start : start + image.shape[1]].mean(0)
            np.testing.assert_allclose(evidence.attention[row, layer], wanted, atol=1e-5)


def test_entry_scores_are_the_cls_attention_of_the_block_that_is_read(demo: Demo) -> None:
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(
        demo.adapter.checkpoint.folder, dtype=torch.float32, attn_implementation="eager"
    )
    evidence = collect(demo.adapter, demo.policy, demo.samples[:1])
    with torch.no_grad():
        tower = model.model.vision_tower(demo.samples[0].prompt.pixels, output_attentions=True)
    wanted = tower.attentions[-2][0, :, 0, 1:].mean(0)
    assert evidence.entry is not None
    np.testing.assert_allclose(evidence.entry[0], wanted, atol=1e-6)


@pytest.mark.parametrize("solver", ["joint", "exact", "paper"])
def test_users_samples_make_a_schedule_that_export_takes(
    solver: str, instruct: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    output = tmp_path / "schedule.json"
    model = ["--model", str(tiny_checkpoint), "--cr", "2"]
    samples = ["--samples-file", str(instruct), "--samples", "4", "--solver", solver]
    assert main(["calibrate", *model, *samples, "-o", str(output)]) == 0
    schedule = Schedule.from_json(output.read_text())
    assert schedule.sample_ids == ("s0", "s1", "s2", "s3")
    assert sum(schedule.counts) == 24
    bundle = tmp_path / "bundle"
    given = ["--schedule", str(output), "--parity", "2", "-o", str(bundle)]
    assert main(["export", *model, *given]) == 0
    assert Bundle.open(bundle).manifest.prune.counts == schedule.counts


def test_json_lines_are_read_too(instruct: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    lines = instruct.with_suffix(".jsonl")
    lines.write_text("\n".join(json.dumps(r) for r in json.loads(instruct.read_text())))
    output = tmp_path / "schedule.json"
    options = ["--model", str(tiny_checkpoint), "--cr", "2", "--samples-file", str(lines)]
    assert main(["calibrate", *options, "-o", str(output)]) == 0
    assert len(Schedule.from_json(output.read_text()).sample_ids) == 5


def test_what_was_solved_is_not_solved_again(
    instruct: Path,
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from edgeprune.calib import calibrate

    options = ["--model", str(tiny_checkpoint), "--cr", "2", "--samples-file", str(instruct)]
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    monkeypatch.setenv("EDGEPRUNE_CACHE", str(tmp_path / "cache"))
    assert main(["calibrate", *options, "-o", str(first)]) == 0

    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("measured or solved again")

    few = tmp_path / "few.json"  # the limit is part of what is stored
    assert main(["calibrate", *options, "--max-sites", "1", "-o", str(few)]) == 0
    counts = Schedule.from_json(few.read_text()).counts
    assert sum(after < before for before, after in pairwise(counts)) <= 1
    monkeypatch.setattr(calibrate, "collect", never)
    monkeypatch.setattr(calibrate, "solve", never)
    assert main(["calibrate", *options, "-o", str(second)]) == 0
    assert first.read_text() == second.read_text()


def _again(options: list[object], file: Path) -> tuple[int, ...]:
    """Counts that `calibrate` writes."""
    assert main(["calibrate", *map(str, options), "-o", str(file)]) == 0
    return Schedule.from_json(file.read_text()).counts


def test_what_is_damaged_in_the_cache_is_made_again(
    instruct: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEPRUNE_CACHE", str(cache := tmp_path / "cache"))
    options = ["--model", tiny_checkpoint, "--samples-file", instruct, "--samples", 1]
    other = _again([*options, "--cr", 3], tmp_path / "other.json")
    for file in cache.glob("*.json"):
        file.unlink()
    counts = _again([*options, "--cr", 2], tmp_path / "first.json")
    assert counts != other
    (evidence,), (schedule,) = cache.glob("*.npz"), cache.glob("*.json")
    whole, middle = evidence.read_bytes(), evidence.stat().st_size // 3
    with np.load(evidence) as arrays:
        flat = {name: array.ravel() for name, array in arrays.items()}
    np.savez(shaped := tmp_path / "flat.npz", **flat)
    altered = whole[:middle] + bytes(byte ^ 255 for byte in whole[middle:])
    for damaged in (b"", whole[:middle], altered, shaped.read_bytes()):
        evidence.write_bytes(damaged)
        schedule.unlink()
        assert _again([*options, "--cr", 2], tmp_path / "second.json") == counts
        assert len(evidence.read_bytes()) == len(whole), "measured again"
    for damaged in (b"", b"\xff", (tmp_path / "other.json").read_bytes()):
        schedule.write_bytes(damaged)
        assert _again([*options, "--cr", 2], tmp_path / "second.json") == counts


def test_a_schedule_for_images_is_none_for_frames(instruct: Path, tmp_path: Path) -> None:
    """Four images and four frames have the same pixels, but other visual tokens."""
    checkpoint = plain_checkpoint(tmp_path / "qwen")
    options = ["--model", checkpoint, "--samples-file", instruct, "--samples", 1, "--cr", 2]
    options += ["--method", "utp", "--image-size", "140x196"]
    images = _again([*options, "--num-images", 4], tmp_path / "images.json")
    frames = _again([*options, "--frames", 4], tmp_path / "frames.json")
    assert sum(images) > sum(frames)


def test_another_version_measures_again(
    instruct: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgeprune.calib import calibrate

    monkeypatch.setenv("EDGEPRUNE_CACHE", str(cache := tmp_path / "cache"))
    options = ["--model", tiny_checkpoint, "--samples-file", instruct, "--samples", 1, "--cr", 2]
    for version in ("1.0", "1.0", "2.0"):
        monkeypatch.setattr(calibrate, "__version__", version)
        _again(options, tmp_path / "schedule.json")
    assert len(list(cache.glob("*.npz"))) == 2


def _png(*chunks: tuple[bytes, bytes]) -> bytes:
    """A file of these chunks, their sums right."""
    parts = [b"\x89PNG\r\n\x1a\n"]
    for name, data in chunks:
        sum_ = zlib.crc32(name + data)
        parts += [len(data).to_bytes(4, "big"), name, data, sum_.to_bytes(4, "big")]
    return b"".join(parts)


def _header(side: int) -> tuple[bytes, bytes]:
    return b"IHDR", side.to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])


IMAGES = {
    "huge": (_png(_header(20_000), (b"IDAT", b"")), "at most 100,000,000 are read"),
    "broken": (
        _png(_header(60), (b"IDAT", zlib.compress(bytes(60))), (b"\xff" * 4, b"")),
        "cannot be read as an image (broken",
    ),
    "none": (b"text", "is not an image in a format that is read (PNG, "),
    "a program": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is not an image in a "),
}


@pytest.mark.parametrize(("content", "says"), IMAGES.values(), ids=IMAGES.keys())
def test_a_sample_whose_image_cannot_be_read(
    content: bytes,
    says: str,
    instruct: Path,
    tiny_checkpoint: Path,
    refused: Refused,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("it was run"))
    (instruct.parent / "0.png").write_bytes(content)
    options = ["--model", tiny_checkpoint, "--samples-file", instruct, "--samples", 1]
    line = refused("calibrate", *options, "-o", instruct.parent / "schedule.json")
    assert f"record 0 of {instruct}: {instruct.parent / '0.png'} " in line
    assert says in line


def _samples(file: Path, *names: object) -> list[Image.Image]:
    """What a processor is given for records with these images."""
    turns = [{"from": "human", "value": "what is it ?"}]
    records = [{"image": name, "conversations": turns} for name in names]
    file.write_text(json.dumps([{"conversations": turns}, *records]))
    found = user_samples(lambda image, question: image, file, file.parent, 9)  # type: ignore
    return [sample.prompt for sample in found]  # type: ignore[misc]


@pytest.mark.parametrize("name", ["../out.png", "/etc/out.png", "x/../../out.png", 7, None])
def test_a_sample_whose_image_lies_elsewhere(name: object, tmp_path: Path) -> None:
    (folder := tmp_path / "images").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "out.png")
    with pytest.raises(InputError, match=r"record 1 of .* inside the image folder"):
        _samples(folder / "samples.json", name)


def test_a_sample_whose_image_is_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(InputError, match=r"record 1 of .*pipe\.png is a device or a pipe"):
        _samples(tmp_path / "samples.json", "pipe.png")


def test_samples_are_seen_as_the_runtime_sees_them(tmp_path: Path) -> None:
    """Upright, on white, and at 8 bits; records without an image are passed over."""
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    Image.new("RGB", (20, 10)).save(tmp_path / "lying.jpg", exif=exif)
    Image.new("RGBA", (9, 9), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.fromarray(np.full((9, 9), 32768, np.uint16)).save(tmp_path / "deep.png")
    lying, clear, deep = _samples(tmp_path / "s.json", "lying.jpg", "clear.png", "deep.png")
    assert lying.size == (10, 20)
    assert clear.getpixel((0, 0)) == (255, 255, 255)
    assert deep.getpixel((0, 0)) == (128, 128, 128)


@pytest.mark.parametrize("text", ["[" * 100_000, "[{}]", "{}", "[7]", "", "[]"])
def test_what_is_no_samples_file_is_refused(text: str, tmp_path: Path) -> None:
    (file := tmp_path / "samples.json").write_text(text)
    with pytest.raises(InputError):
        list(user_samples(None, file, tmp_path, 9))  # type: ignore[arg-type]


def test_a_sample_whose_question_is_no_text(
    instruct: Path, tiny_checkpoint: Path, refused: Refused
) -> None:
    records = json.loads(instruct.read_text())
    records[0]["conversations"][0]["value"] = 7
    instruct.write_text(json.dumps(records))
    options = ["--model", tiny_checkpoint, "--samples-file", instruct]
    line = refused("calibrate", *options, "-o", instruct.parent / "schedule.json")
    assert f"record 0 of {instruct} lacks `image` or a human turn's text" in line


def test_a_checkpoint_without_a_template_is_asked_as_its_bundle_is(
    instruct: Path, copy_checkpoint: Callable[[], Path], tmp_path: Path
) -> None:
    (checkpoint := copy_checkpoint()).joinpath("chat_template.jinja").unlink()
    options = ["--model", checkpoint, "--samples-file", instruct, "--samples", 1, "--cr", 2]
    assert _again(options, tmp_path / "schedule.json")
    processor = Processor(adapter := open_model(str(checkpoint)))
    save_tokenizer(processor, file := tmp_path / "tokenizer.json")
    greedy = Generation(Sampling(), (2,))
    known = read_text(processor, adapter.config, greedy, 66, adapter.media)
    prompter = Prompter(file, known.record)
    question = "what {color} is it ?"
    prefix, _, text = processor.chat.split(adapter.media, question)
    wanted = prompter.first_turn(question)
    assert [prefix.tolist(), text.tolist()] == [ids.tolist() for ids in wanted]
    with pytest.raises(ModelError, match=r"no chat template; add chat_template\.jinja"):
        Chat(checkpoint).ids(replace(adapter.media, assumed=None), question)


def test_a_template_that_fails_is_named(
    instruct: Path, copy_checkpoint: Callable[[], Path], refused: Refused
) -> None:
    template = "{% for m in messages %}{{ m['role'] + ': <image>' + m['content'] }}{% endfor %}"
    (checkpoint := copy_checkpoint()).joinpath("chat_template.jinja").write_text(template)
    options = ["--model", checkpoint, "--samples-file", instruct]
    line = refused("calibrate", *options, "-o", instruct.parent / "schedule.json")
    assert "the chat template fails (" in line and "repair chat_template.jinja" in line


def test_a_model_that_is_not_the_demo_wants_samples(tiny_checkpoint: Path, capsys: Any) -> None:
    assert main(["export", "--model", str(tiny_checkpoint), "--cr", "2"]) == 2
    assert "--samples-file" in capsys.readouterr().err


def test_plans_are_dense_while_calibrating(demo: Demo) -> None:
    evidence = collect(demo.adapter, demo.policy, demo.samples[:1])
    shape = demo.adapter.shape
    assert evidence.attention.shape == (1, shape.layers, shape.visual_tokens)
    assert Plan(shape.visual_tokens, shape.layers).cr == 1
