"""Videos whose prompts say when each frame is seen: Qwen3-VL and SmolVLM2 against transformers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import Refused
from PIL import Image
from transformers import AutoModelForImageTextToText
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.models.smolvlm import processing_smolvlm
from transformers.models.smolvlm.processing_smolvlm import SmolVLMProcessor
from transformers.video_utils import VideoMetadata

from edgeprune.models import Adapter, open_model
from edgeprune.models._processor import Processor
from edgeprune.models._reference import Reference
from edgeprune.models._smolvlm_video import in_words
from edgeprune.policies import make
from edgeprune.runtime import Session, media
from edgeprune.spec import PruneSpec, plan_from_counts
from edgeprune.tiling import Size
from tests import qwen, smolvlm
from tests.dense import dense
from tests.dialogues import assert_same_answers, exported
from tests.families import QUESTION, Family
from tests.test_families import block, drawn_image, generated

SIZE = Size(192, 384)
FRAMES = 6


@pytest.fixture(scope="module")
def stacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qwen.stacked_checkpoint(tmp_path_factory.mktemp("qwen3_vl"))


@pytest.fixture(scope="module")
def smol() -> Family:
    return smolvlm.smolvlm()


@pytest.fixture(scope="module")
def smol_checkpoint(smol: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = smol.save(tmp_path_factory.mktemp("smolvlm"))
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    sampling = {"fps": 2, "max_frames": 64, "video_size": {"longest_edge": 96}}
    (folder / "preprocessor_config.json").write_text(
        json.dumps({**settings, "video_sampling": sampling})
    )
    return folder


def frames_of(size: Size) -> list[Image.Image]:
    return [drawn_image(size, seed) for seed in range(FRAMES)]


def seen(adapter: Adapter, frames: list[Image.Image]) -> torch.Tensor:
    """Pixels as the runtime makes them."""
    record = replace(adapter.image_record(Processor(adapter)), images=len(frames))
    return torch.from_numpy(media.prepare(frames, record).pixels)


def metadata(fps: float) -> VideoMetadata:
    """Of frames that a video was sampled at."""
    own = {"duration": FRAMES / fps, "frames_indices": list(range(FRAMES))}
    return VideoMetadata(total_num_frames=FRAMES, fps=fps, **own)


def test_qwens_prompt_is_that_of_its_processor(stacked: Path) -> None:
    adapter = open_model(str(stacked), size=SIZE, frames=FRAMES)
    own = SimpleNamespace(
        video_token="<|video_pad|>",
        vision_start_token="<|vision_start|>",
        vision_end_token="<|vision_end|>",
        video_processor=SimpleNamespace(merge_size=2, temporal_patch_size=2),
    )
    own._calculate_timestamps = lambda *a: Qwen3VLProcessor._calculate_timestamps(own, *a)
    rows, columns = SIZE.height // 16, SIZE.width // 16
    given = {"video_grid_thw": torch.tensor([[FRAMES // 2, rows, columns]])}
    written = Qwen3VLProcessor.replace_video_token(
        own, {**given, "video_metadata": [metadata(2)]}, 0
    )
    tokenizer = adapter.chat.tokenizer
    parts = [{"type": "video"}, {"type": "text", "text": "what is it ?"}]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=False
    ).replace(own.video_token, written)
    prefix, _, later = adapter.chat.split(adapter.media, "what is it ?")
    ids = torch.cat([prefix, torch.tensor([block(adapter)]), later], dim=1)
    assert ids[0].tolist() == tokenizer(text)["input_ids"]
    assert "<0.2 seconds>" in written and "<2.2 seconds>" in written


def test_qwens_video_is_that_of_transformers(stacked: Path) -> None:
    """Answers of 64 tokens and logits over two turns; each pair of frames starts at time 0."""
    adapter = open_model(str(stacked), size=SIZE, frames=FRAMES)
    frames = frames_of(Size(190, 380))
    pixels, prompt = seen(adapter, frames), Processor(adapter)(frames, qwen.QUESTION)
    assert torch.equal(prompt.pixels, pixels)
    theirs: Any = AutoModelForImageTextToText.from_pretrained(stacked, dtype=torch.float32).eval()
    qwen.assert_same_dialogue(adapter, frames, theirs)


def test_smolvlms_prompt_is_that_of_its_processor(
    smol_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = open_model(str(smol_checkpoint), frames=FRAMES)
    own = SimpleNamespace(
        image_seq_len=16,
        image_token="<image>",
        fake_image_token="<fake_token_around_image>",
        global_image_token="<global-img>",
    )
    monkeypatch.setattr(processing_smolvlm, "num2words", {FRAMES: "six"}.get)
    shown = {"pixel_values": torch.zeros(1, FRAMES), "video_metadata": [metadata(2)]}
    written = SmolVLMProcessor.replace_video_token(own, shown, 0)
    assert "six frames from a 0:00:03 [H:MM:SS] video" in written
    parts = [{"type": "video"}, {"type": "text", "text": QUESTION}]
    text = adapter.chat.tokenizer.apply_chat_template(
        [{"role": "user", "content": parts}],
        chat_template=processing_smolvlm.DEFAULT_CHAT_TEMPLATE,
        add_generation_prompt=True,
        tokenize=False,
    ).replace("<video>", written)
    prefix, _, later = adapter.chat.split(adapter.media, QUESTION)
    ids = torch.cat([prefix, torch.tensor([block(adapter)]), later], dim=1)
    assert ids[0].tolist() == adapter.chat.tokenizer(text)["input_ids"]


def test_smolvlms_video_is_that_of_transformers(smol: Family, smol_checkpoint: Path) -> None:
    """Answers of 64 tokens; frames of three shapes, in Pillow's pixels."""
    adapter = open_model(str(smol_checkpoint), frames=FRAMES)
    ours = dense(adapter)
    for size in smol.sizes:
        frames = frames_of(size)
        own = replace(smol, image_processor=Processor(adapter).image_processor)
        wanted = own.look(frames)
        pixels, prompt = seen(adapter, frames), Processor(adapter)(frames, QUESTION)
        assert torch.equal(pixels, wanted["pixel_values"].flatten(0, 1))
        assert torch.equal(prompt.pixels, pixels)
        answer = generated(smol, adapter, prompt, tokens=64, **wanted)
        assert ours.generate(prompt, 64, lambda token: False) == answer


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smolvlm", "qwen3_vl"])
def test_a_pruned_bundle_answers_as_its_reference(
    name: str, stacked: Path, smol_checkpoint: Path, tmp_path: Path
) -> None:
    """And a second turn, on the same caches; the times between frames are never dropped."""
    asked: dict[str, Any] = {"frames": FRAMES}
    asked |= {"size": SIZE} if name == "qwen3_vl" else {}
    adapter = open_model(str(stacked if name == "qwen3_vl" else smol_checkpoint), **asked)
    spec = PruneSpec("utp", 4)
    policy, layout, layers = make(spec), adapter.vision_config.layout, adapter.shape.layers
    fixed, count = len(layout.fixed), layout.visual_tokens
    plan = plan_from_counts(count, (count - 8, fixed + 6, *(3,) * (layers - 2)))
    made = exported(adapter, spec, plan, tmp_path / "b")
    assert any("taken to be sampled at 2 frames a second" in note for note in made.notes)
    session, reference = Session.open(made.path), Reference.build(adapter, policy, plan)
    frames = frames_of(Size(190, 380))
    answer = assert_same_answers(session, reference, adapter, frames, QUESTION)
    assert set(layout.fixed) <= set(answer.vision_kept.tolist())


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (8, "eight"),
        (12, "twelve"),
        (30, "thirty"),
        (64, "sixty-four"),
        (100, "one hundred"),
        (312, "three hundred and twelve"),
    ],
)
def test_numbers_in_words(number: int, words: str) -> None:
    assert in_words(number) == words


def test_what_cannot_be_shown_is_refused(
    stacked: Path, smol_checkpoint: Path, tmp_path: Path, refused: Refused
) -> None:
    said = refused("models", "--model", stacked, "--frames", "5")
    assert "--frames of a qwen3_vl is a multiple of 2; got 5" in said
    said = refused("models", "--model", smol_checkpoint, "--frames", "1000")
    assert "--frames of a smolvlm are at most 999; got 1000" in said
    said = refused("models", "--model", smolvlm.idefics3().save(tmp_path), "--frames", "4")
    assert "idefics3 bundles take images, not videos" in said
    sampling = {"video_sampling": {"fps": 0, "video_size": {"longest_edge": 96}}}
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps(sampling))
    (tmp_path / "config.json").write_text((smol_checkpoint / "config.json").read_text())
    said = refused("models", "--model", tmp_path, "--frames", "4")
    assert "video_sampling is {'fps': 0" in said and "fps as a positive number" in said
