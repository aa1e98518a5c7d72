"""GLM-4.1V and GLM-4.6V against transformers' own model: images, videos, answers, layouts."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import Refused
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.nn import functional as F
from transformers import AutoModelForImageTextToText
from transformers.models.glm4v.processing_glm4v import Glm4vProcessor
from transformers.models.glm46v.processing_glm46v import Glm46VProcessor
from transformers.video_utils import VideoMetadata

from edgeprune.commands._common import image_size
from edgeprune.errors import ModelError
from edgeprune.models import Adapter, open_model
from edgeprune.models._position_grid import PositionGrid
from edgeprune.models._processor import Processor
from edgeprune.models._reference import Reference
from edgeprune.models.glm4v import halves
from edgeprune.policies import make
from edgeprune.runtime import Session, media
from edgeprune.spec import PruneSpec, plan_from_counts
from edgeprune.tiling import Size
from tests import glm
from tests.dialogues import assert_same_answers, exported
from tests.engines import GPUS, assert_accepted
from tests.essence import essence
from tests.frozen import frozen
from tests.qwen import QUESTION, assert_same_dialogue, drawn_image
from tests.test_families import block

SIZE = Size(84, 168)
ASKED: dict[str, dict[str, Any]] = {
    **{size: {"size": image_size(size)} for size in glm.IMAGE_SIZES},
    "2 images": {"size": SIZE, "images": 2},
    "6 frames": {"size": SIZE, "frames": 6},
}


@pytest.fixture(scope="module", params=glm.KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def checkpoint(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return glm.checkpoint(tmp_path_factory.mktemp(kind), kind=kind)


def opened(checkpoint: Path, asked: str) -> tuple[Adapter, list[Image.Image], torch.Tensor]:
    """And what is shown, images or frames, and their pixels as the runtime makes them."""
    adapter = open_model(str(checkpoint), **ASKED[asked])
    shape = glm.IMAGE_SIZES.get(asked, (160, 90))
    images = [drawn_image(*shape, seed) for seed in range(adapter.shown)]
    record = replace(adapter.image_record(Processor(adapter)), images=len(images))
    prepared = media.prepare(images, record)
    assert prepared.warnings == ()
    return adapter, images, torch.from_numpy(prepared.pixels)


@pytest.mark.parametrize("asked", essence(ASKED, ("84x168", "2 images", "6 frames")))
def test_the_dense_model_is_that_of_transformers(asked: str, checkpoint: Path) -> None:
    """Pixels, answers of 64 tokens, and logits over two turns."""
    adapter, images, pixels = opened(checkpoint, asked)
    assert torch.equal(Processor(adapter)(images, QUESTION).pixels, pixels)
    theirs: Any = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32)
    assert_same_dialogue(adapter, images, theirs.eval())


def test_the_prompt_of_a_video_is_that_of_the_processor(kind: str, checkpoint: Path) -> None:
    """A time behind each pair of frames, which GLM-4.6V writes otherwise."""
    adapter, _, _ = opened(checkpoint, "6 frames")
    processor: Any = {"glm4v": Glm4vProcessor, "glm46v": Glm46VProcessor}[kind]
    own = SimpleNamespace(image_token="<|image|>", video_processor=SimpleNamespace(merge_size=2))
    own.replace_frame_token_id = lambda *a, **k: processor.replace_frame_token_id(own, *a, **k)
    shown = VideoMetadata(total_num_frames=6, fps=2, duration=3, frames_indices=list(range(6)))
    grid = torch.tensor([[3, SIZE.height // 14, SIZE.width // 14]])
    given = {"video_grid_thw": grid, "video_metadata": [shown]}
    written = processor.replace_video_token(own, given, 0)
    tokenizer = adapter.chat.tokenizer
    parts = [{"type": "video"}, {"type": "text", "text": QUESTION}]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=False
    ).replace("<|video|>", written)
    prefix, _, later = adapter.chat.split(adapter.media, QUESTION)
    ids = torch.cat([prefix, torch.tensor([block(adapter)]), later], dim=1)
    assert ids[0].tolist() == tokenizer(text)["input_ids"]
    assert written.endswith("2.0 seconds" if kind == "glm46v" else "<|end_of_image|>2")


@given(st.integers(1, 9), st.integers(1, 9), st.integers(2, 8))
def test_positions_are_resampled_as_torch_does(rows: int, columns: int, side: int) -> None:
    config = SimpleNamespace(rows=rows, columns=columns, position_side=side, width=3, cubic=True)
    grid = PositionGrid(config)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(side)
    grid.weight.data = torch.randn(side**2, 3, generator=generator)
    found = grid(torch.zeros(1, rows * columns, 3))[0]
    down, across = (((torch.arange(n) + 0.5) / n) * 2 - 1 for n in (rows, columns))
    at = torch.stack(torch.meshgrid(down, across, indexing="ij")[::-1], dim=-1)[None]
    image = grid.weight.view(1, side, side, 3).permute(0, 3, 1, 2)
    options: Any = {"mode": "bicubic", "padding_mode": "border", "align_corners": False}
    wanted = F.grid_sample(image, at, **options)[0].flatten(1).T
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_adjacent_numbers_come_to_stand_half_a_head_apart() -> None:
    assert halves(8, 4) == [0, 2, 4, 5, 1, 3, 6, 7]
    assert halves(8, 8) == [0, 2, 4, 6, 1, 3, 5, 7]
    assert halves(128, 64)[:33] == [*range(0, 64, 2), 64]


@pytest.mark.parametrize(
    "asked",
    ["84x168", *(pytest.param(a, marks=pytest.mark.slow) for a in ("2 images", "6 frames"))],
)
@pytest.mark.parametrize("kind", ["glm46v"], indirect=True, scope="module")
def test_a_pruned_bundle_answers_as_its_reference(
    kind: str, asked: str, checkpoint: Path, tmp_path: Path
) -> None:
    """And a second turn, on the same caches."""
    adapter, images, _ = opened(checkpoint, asked)
    spec, layout = PruneSpec("utp", 4), adapter.vision_config.layout
    policy, count, fixed = make(spec), layout.visual_tokens, len(layout.fixed)
    plan = plan_from_counts(count, (count - 5, fixed + 6, 3))
    made = exported(adapter, spec, plan, tmp_path / "b")
    session, reference = Session.open(made.path), Reference.build(adapter, policy, plan)
    answer = assert_same_answers(session, reference, adapter, images, QUESTION)
    assert set(layout.fixed) <= set(answer.vision_kept.tolist())


def test_a_checkpoint_of_transformers_4_is_the_same(checkpoint: Path, tmp_path: Path) -> None:
    """As GLM-4.1V and GLM-4.6V are published: rotary settings of text under their old names, those
    of the tower not at all; the template in chat_template.json."""
    folder = Path(shutil.copytree(checkpoint, tmp_path / "old"))
    config = json.loads((folder / "config.json").read_text())
    rope = config["text_config"].pop("rope_parameters")
    config["vision_config"].pop("rope_parameters")
    config["text_config"] |= {
        "rope_theta": rope["rope_theta"],
        "partial_rotary_factor": rope["partial_rotary_factor"],
        "rope_scaling": {"rope_type": "default", "mrope_section": rope["mrope_section"]},
    }
    (folder / "config.json").write_text(json.dumps(config))
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    ours, again = (open_model(str(path), size=SIZE) for path in (checkpoint, folder))
    assert again.decoder_config == ours.decoder_config
    assert again.vision_config == ours.vision_config
    assert again.all_notes == ours.all_notes == ()


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("vision_config", {"attention_bias": True}, "biases of attention in the vision tower"),
        ("vision_config", {"out_hidden_size": 32}, "out_hidden_size 32 for a decoder of 64"),
        ("vision_config", {"hidden_act": "gelu"}, "merger activation 'gelu'"),
    ],
)
@pytest.mark.parametrize("kind", ["glm46v"], indirect=True, scope="module")
def test_what_is_not_supported_is_named(
    part: str, change: dict[str, Any], message: str, checkpoint: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "changed"))
    config = json.loads((folder / "config.json").read_text())
    config[part] |= change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=f"glm46v checkpoint has .*{message}"):
        open_model(str(folder))


def test_what_cannot_be_shown_is_refused(tmp_path: Path, refused: Refused) -> None:
    folder = glm.checkpoint(tmp_path)
    said = refused("models", "--model", folder, "--image-size", "100x84")
    assert "multiples of 28; the nearest such size is 112x84" in said
    said = refused("models", "--model", folder, "--frames", "3")
    assert "--frames of a glm46v is a multiple of 2; got 3" in said
    said = refused("export", "--model", folder, "--image-size", "56x56", "-o", tmp_path / "b")
    assert "3,136 pixels, the checkpoint's image processor makes 6,272 to" in said


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("method", ["none", "utp"])
@pytest.mark.parametrize("target", GPUS)
def test_engines_take_it(target: str, method: str, dtype: str, tmp_path: Path) -> None:
    """`check` accepts the bundle, and TensorRT-RTX compiles that for RTX cards."""
    model = glm.checkpoint(tmp_path / "deep", layers=5, positions=1024)
    cr = 4 if method == "utp" else 1
    options: dict[str, Any] = {"model": model, "target": target, "dtype": dtype}
    bundle = frozen(tmp_path / "b", method, cr, **options, size=Size(140, 140))
    assert_accepted(bundle, target)
