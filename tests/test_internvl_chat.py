"""InternVL in the authors' layout is the model that transformers has, in other words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Refused
from PIL import Image
from transformers import AutoTokenizer, LlamaConfig, Qwen3Config

from edgeprune.cli import main
from edgeprune.demo import MODEL_DIR, SAMPLES_DIR
from edgeprune.models import Adapter, open_model
from edgeprune.models._processor import Processor
from edgeprune.runtime.images import to_pixels
from edgeprune.tiling import Size
from tests import families, originals
from tests.families import TEXT, Family
from tests.test_families import drawn_image

SCENE = SAMPLES_DIR / "scene-1.png"
WIDE = Size(60, 170)
"""Three tiles side by side and the thumbnail."""


def chatml(folder: Path) -> None:
    """A tokenizer.json beside remote code, as checkpoints with Qwen decoders have."""
    tokens = {f"token_{n}": token for n, token in enumerate(originals.SPECIALS)}
    AutoTokenizer.from_pretrained(MODEL_DIR, extra_special_tokens=tokens).save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": ["tokenization_own.Tokenizer", None]}
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def made(folder: Path, kind: str, **config: Any) -> tuple[Family, Path]:
    """The same weights in both layouts: transformers' family, and the folder of the authors'."""
    folder.mkdir()
    if kind == "internlm2":
        vocabulary = originals.internlm_tokenizer(folder)
        text: Any = LlamaConfig(**{**TEXT, "vocab_size": vocabulary})
        family, template = families.internvl(config=text), "internlm2-chat"
    elif kind == "qwen3":
        chatml(folder)
        family, template = families.internvl(config=Qwen3Config(**TEXT, head_dim=8)), "internvl2_5"
    else:  # as of the largest towers, whose queries and keys have norms
        chatml(folder)
        family, template = families.internvl(rms_norms=True), "Hermes-2"
    return family, originals.internvl_chat(family, folder, template, **config)


@pytest.fixture(scope="module")
def internlm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("internlm2") / "tiny", "internlm2")[1]


def weights(adapter: Adapter) -> dict[str, torch.Tensor]:
    return {
        name: adapter.reader.read(source, torch.float32)
        for module in adapter.empty_modules()
        for name, source in adapter.sources(module).items()
    }


@pytest.mark.parametrize("kind", ["internlm2", "qwen3", "qwen2 and norms"])
def test_weights_and_settings_are_those_of_transformers_layout(kind: str, tmp_path: Path) -> None:
    """Which is compared with transformers' own answers in test_families.py."""
    family, folder = made(tmp_path / "chat", kind)
    theirs = open_model(str(family.save(tmp_path / "hf")), size=WIDE)
    ours = open_model(str(folder), size=WIDE)
    assert ours.all_notes == ()
    assert ours.vision_config == theirs.vision_config
    assert ours.decoder_config == theirs.decoder_config
    wanted, found = weights(theirs), weights(ours)
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)


def test_pixels_are_those_of_the_authors_code(internlm2: Path) -> None:
    """Tiles and thumbnail, ImageNet's levels, whatever preprocessor_config.json says."""
    adapter = open_model(str(internlm2), size=WIDE)
    image = drawn_image(WIDE)
    processor = Processor(adapter)
    record = adapter.image_record(processor)
    pixels = to_pixels(image, record)
    large = np.asarray(image.resize((168, 56), Image.Resampling.BICUBIC))
    parts = [large[:, x : x + 56] for x in (0, 56, 112)]
    parts.append(np.asarray(image.resize((56, 56), Image.Resampling.BICUBIC)))
    levels = (np.stack(parts) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(pixels, levels.transpose(0, 3, 1, 2), atol=1e-6)
    assert pixels.shape == adapter.pixels == (4, 3, 56, 56)


@pytest.mark.parametrize("shape", [WIDE, Size(56, 56)])
def test_calibration_sees_what_a_bundle_sees(internlm2: Path, shape: Size) -> None:
    adapter = open_model(str(internlm2), size=shape)
    image, processor = drawn_image(shape), Processor(adapter)
    seen = processor(image, "what color is?").pixels.numpy()
    np.testing.assert_array_equal(seen, to_pixels(image, adapter.image_record(processor)))


def test_the_thumbnail_and_the_tiles_are_the_configs(tmp_path: Path) -> None:
    _, folder = made(tmp_path / "a", "internlm2", use_thumbnail=False, max_dynamic_patch=2)
    adapter = open_model(str(folder), size=Size(56, 112))
    assert adapter.pixels == (2, 3, 56, 56)
    assert adapter.preprocess(Processor(adapter).image_processor, drawn_image(WIDE)).shape[0] == 2
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dynamic_image_size": False}))
    assert open_model(str(folder), size=Size(56, 112)).pixels == (1, 3, 56, 56)


PROMPT = "<|im_start|>system\n{system}{end}<|im_start|>user\n{image}\n{prompt}{end}<|im_start|>"
SYSTEM = "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL,"  # noqa: RUF001


@pytest.mark.parametrize("kind", ["internlm2", "qwen3"])
def test_a_prompt_is_written_as_the_authors_do(kind: str, tmp_path: Path) -> None:
    """Without a newline after a turn, but for `internvl2_5`."""
    from edgeprune.export.exporter import read_records

    folder = made(tmp_path / "a", kind)[1]
    adapter = open_model(str(folder))
    text = read_records(adapter, Processor(adapter)).text
    end = "<|im_end|>" + ("" if kind == "internlm2" else "\n")
    shown = {"image": "{image}", "prompt": "{prompt}", "end": end}
    assert text.with_system == PROMPT.format(system="{system}", **shown) + "assistant\n"
    own = SYSTEM if kind == "internlm2" else "你是书生·万象，英文名是InternVL"  # noqa: RUF001
    assert text.first.startswith("<|im_start|>system\n" + own)
    assert text.first.endswith(
        f"{end}<|im_start|>user\n{{image}}\n{{prompt}}{end}<|im_start|>assistant\n"
    )
    assert text.next == f"{end}<|im_start|>user\n{{prompt}}{end}<|im_start|>assistant\n"
    assert text.around_image == ("<img>", "</img>")
    assert text.add_special_tokens
    assert text.eos_token_ids == (adapter.chat.tokenizer.convert_tokens_to_ids("<|im_end|>"),)


def test_several_images_are_numbered(internlm2: Path) -> None:
    adapter = open_model(str(internlm2), images=2)
    ids = adapter.chat.ids(adapter.media, "what")
    wanted = "<img><IMG_CONTEXT></img>\n"
    text = adapter.chat.tokenizer.decode(ids).replace("> ", ">")  # each stretch has a space before
    assert f"Image-1: {wanted}Image-2: {wanted}what" in text


def test_a_video_is_frames_with_their_numbers(internlm2: Path) -> None:
    adapter = open_model(str(internlm2), frames=2)
    assert adapter.pixels == (2, 3, 56, 56)
    text = adapter.chat.tokenizer.decode(adapter.chat.ids(adapter.media, "what"))
    assert "Frame1: <img>" in text and "Frame2: <img>" in text


def test_a_question_and_an_answer(
    internlm2: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Exported and asked by the real commands; parity is checked on the way."""
    bundle = tmp_path / "bundle"
    options = ["--method", "divprune", "--cr", "2", "--parity", "2", "-o", str(bundle)]
    assert main(["export", "--model", str(internlm2), *options]) == 0
    asked = ["--image", str(SCENE), "--prompt", "what color?", "--system", "a", "--json"]
    assert main(["run", str(bundle), *asked, "--max-new-tokens", "3"]) == 0
    turn = json.loads(capfd.readouterr().out.splitlines()[-1])["turns"][0]
    assert 1 <= len(turn["ids"]) <= 3


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"template": "phi3-chat"}, "template 'phi3-chat' (known: Hermes-2, internlm2-chat, int"),
        ({"ps_version": "v1"}, "ps_version 'v1'"),
        ({"select_layer": -4}, "select_layer -4"),
        ({"llm_config": {"model_type": "phi3"}}, "a phi3 decoder"),
        ({"llm_config": None}, "config.json is damaged: 'NoneType' object"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    change: dict[str, Any], says: str, internlm2: Path, tmp_path: Path, refused: Refused
) -> None:
    for file in internlm2.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((internlm2 / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    assert says in refused("models", "--model", tmp_path)
