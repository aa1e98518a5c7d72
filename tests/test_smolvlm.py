"""SmolVLM and Idefics3, one tile or many: pixels, prompts and answers are those of transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from text_cases import built, byte_level
from transformers import Idefics3Processor
from transformers.image_utils import SizeDict

from edgeprune.cli import main
from edgeprune.errors import ModelError, SpecError
from edgeprune.export import prompts
from edgeprune.export.exporter import ExportRequest, export, read_records
from edgeprune.export.generation import Generation
from edgeprune.models import open_model
from edgeprune.models._checkpoint import Checkpoint
from edgeprune.models._media import InputOptions, Media
from edgeprune.models._processor import Processor, random_prompt
from edgeprune.models.smolvlm import IMAGE, Adapter, in_order, squeezed
from edgeprune.policies import make
from edgeprune.runtime import Session
from edgeprune.runtime.images import to_pixels
from edgeprune.runtime.sampling import Sampling
from edgeprune.runtime.text import Prompter
from edgeprune.spec import Plan, PruneSpec
from edgeprune.tiling import Size, longest, round_up_grid
from tests import smolvlm
from tests.engines import GPUS, assert_accepted
from tests.families import QUESTION, Family
from tests.frozen import frozen
from tests.test_families import drawn_image, generated, prompted

KINDS: dict[str, Callable[..., Family]] = {
    "smolvlm": smolvlm.smolvlm,
    "idefics3": smolvlm.idefics3,
}

TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


@pytest.fixture(scope="module", params=KINDS)
def family(request: pytest.FixtureRequest) -> Family:
    return KINDS[request.param]()


@pytest.fixture(scope="module")
def checkpoint(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return family.save(tmp_path_factory.mktemp(family.name) / "tiny")


@pytest.fixture(scope="module")
def idefics3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return smolvlm.idefics3().save(tmp_path_factory.mktemp("refused") / "tiny")


@pytest.mark.parametrize("size", [(48, 48), (70, 150), (181, 60), (500, 1), (1, 500), (7, 5)])
def test_pixels_are_those_of_the_processor(family: Family, size: tuple[int, int]) -> None:
    """The image is resized twice: to a longest edge, which enlarges too, and to the tile."""
    image = drawn_image(Size(*size))
    seen = family.look(image)
    wanted = seen["pixel_values"].flatten(0, -4).numpy()
    pixels = to_pixels(image, squeezed(family.image_processor, 48))
    assert pixels.shape == (1, 3, 48, 48)
    np.testing.assert_array_equal(pixels, wanted)
    assert seen["pixel_attention_mask"].min() == 1


@pytest.mark.parametrize("size", [(84, 84), (70, 150), (181, 60), (500, 1), (1, 500), (192, 96)])
def test_tiles_are_those_of_the_processor(
    family: Family, checkpoint: Path, size: tuple[int, int]
) -> None:
    image, split = drawn_image(Size(*size)), replace(family, tiled=True)
    wanted = split.look(image)["pixel_values"].flatten(0, -4).numpy()
    adapter = open_model(str(checkpoint), size=Size(*size))
    assert adapter.tiling is not None and adapter.tiling.suits(*size)
    record = adapter.image_record(Processor(adapter))
    assert adapter.pixels == record.shape == wanted.shape
    np.testing.assert_array_equal(to_pixels(image, record), wanted)
    np.testing.assert_array_equal(Processor(adapter)(image, QUESTION).pixels, wanted)


@given(st.integers(1, 3000), st.integers(1, 3000), st.sampled_from([(192, 48), (2048, 512)]))
def test_the_grid_is_that_of_the_processor(height: int, width: int, sides: tuple[int, int]) -> None:
    edge, tile = sides
    processor, seen = smolvlm.smolvlm().image_processor, list[Size]()
    processor_module = type(processor).__mro__[1]
    image = np.broadcast_to(np.uint8(0), (3, height, width))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(
            processor_module,
            "resize",
            lambda self, image, size, **_: (
                seen.append(Size(size.height, size.width))
                or np.broadcast_to(np.uint8(0), (3, size.height, size.width))
            ),
        )
        image = processor.resize(image, SizeDict(longest_edge=edge))
        processor.resize_for_vision_encoder(image, tile)
    rows, columns = round_up_grid(Size(height, width), edge, tile)
    assert seen == [longest(Size(height, width), edge), Size(rows * tile, columns * tile)]


@pytest.mark.parametrize("size", [None, Size(60, 90)])
def test_a_prompt_is_written_as_the_processor_writes_it(
    family: Family, checkpoint: Path, size: Size | None
) -> None:
    for images in (1, 2):
        adapter = open_model(str(checkpoint), images=images, size=size)
        ours = Processor(adapter)
        theirs = Idefics3Processor(
            family.image_processor,
            ours.tokenizer,
            image_seq_len=16,
            chat_template=ours.tokenizer.chat_template,
        )
        content = [{"type": "image"}] * images + [{"type": "text", "text": QUESTION}]
        text = theirs.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        shown = [drawn_image(Size(60, 90), seed) for seed in range(images)]
        wanted = theirs(
            images=[shown],
            text=[text],
            images_kwargs={"do_image_splitting": size is not None},
        )["input_ids"][0]
        prompt = ours(shown, QUESTION)
        block = [*[4] * 16, *(token for ids in adapter.between for token in [*ids, *[4] * 16])]
        assert [*prompt.prefix_ids[0].tolist(), *block, *prompt.text_ids[0].tolist()] == wanted
        text_record = read_records(adapter, ours).text
        (file := checkpoint / "run.json").write_text(
            ours.tokenizer.backend_tokenizer.to_str(), encoding="utf-8"
        )
        first = Prompter(file, text_record).first_turn(QUESTION)
        assert [ids.tolist() for ids in first] == [
            prompt.prefix_ids.tolist(),
            prompt.text_ids.tolist(),
        ]


def test_the_published_template_is_frozen() -> None:
    processor, config, _ = built(byte_level(), TEMPLATE)
    media = Media.of_images(config, 1, IMAGE)
    text = prompts.read_text(processor, config, Generation(Sampling(), (2,)), 1000, media)
    record, end = text.record, "<end_of_utterance>\n"
    assert record.first == "<|im_start|>User:{image}{prompt}" + end + "Assistant:"
    assert record.next == end + "User: {prompt}" + end + "Assistant:"
    around = "<fake_token_around_image>"
    assert record.around_image == (around + "<global-img>", around)


def test_a_dense_bundle_answers_as_transformers_does(idefics3: Path, tmp_path: Path) -> None:
    """64 greedy tokens on images of three aspect ratios."""
    session = Session.open(frozen(tmp_path / "dense", "none", model=idefics3))
    family, adapter = smolvlm.idefics3(), open_model(str(idefics3))
    assert session.manifest.family == "idefics3"
    for size in family.sizes:
        image = drawn_image(size)
        prompt = prompted(adapter, to_pixels(image, session.manifest.image))
        wanted = generated(family, adapter, prompt, tokens=64, **family.look(image))
        answer = session.ask(image, QUESTION, Sampling(max_new_tokens=64))
        ends = [n for n, token in enumerate(wanted, 1) if token == 2]
        assert list(answer.ids) == wanted[: ends[0] if ends else 64]
        assert answer.warnings == ()


def test_a_bundle_of_tiles_answers_as_transformers_does(idefics3: Path, tmp_path: Path) -> None:
    """64 greedy tokens of an image in 13 tiles with text between them, dense."""
    family, size = replace(smolvlm.idefics3(), tiled=True), Size(60, 80)
    adapter = open_model(str(idefics3), size=size)
    assert adapter.shape.visual_tokens == 13 * 16 + sum(map(len, adapter.between))
    spec, shape = PruneSpec("none"), adapter.shape
    prompts = [random_prompt(adapter.pixels, shape.vocabulary, 0)]
    request = ExportRequest("tiny", spec, Plan(shape.visual_tokens, shape.layers), tmp_path / "b")
    made = export(request, adapter, make(spec), Processor(adapter), prompts)
    assert (made.manifest.parity.ties, made.notes) == (0, ())
    session, image = Session.open(made.path), drawn_image(size)
    prompt = prompted(adapter, to_pixels(image, session.manifest.image))
    wanted = generated(family, adapter, prompt, tokens=64, **family.look(image))
    answer = session.ask(image, QUESTION, Sampling(max_new_tokens=64))
    ends = [n for n, token in enumerate(wanted, 1) if token == 2]
    assert list(answer.ids) == wanted[: ends[0] if ends else 64]
    assert answer.warnings == ()
    other = session.ask(drawn_image(Size(80, 60)), QUESTION, Sampling(max_new_tokens=1))
    assert "for such images export with --image-size 60x80" in other.warnings[0]


def test_a_pruned_bundle_equals_the_eager_reference(idefics3: Path, tmp_path: Path) -> None:
    """VisionZip at CR 4: without [CLS] it ranks by received attention. Parity compares."""
    options = ["--model", str(idefics3), "--method", "visionzip", "--cr", "4", "--parity", "2"]
    assert main(["export", *options, "-o", str(tmp_path / "zip")]) == 0
    session = Session.open(tmp_path / "zip")
    answer = session.ask(drawn_image(Size(60, 100)), QUESTION, Sampling(max_new_tokens=4))
    assert len(answer.vision_kept) == 4


def test_what_an_export_leaves_out_is_told(
    idefics3: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["models", "--model", str(idefics3)]) == 0
    said = capsys.readouterr().out
    assert "an image is one tile of 48 x 48 pixels: image splitting" in said
    assert "read by nothing" not in said


def test_a_config_of_transformers_4_is_read_as_well(idefics3: Path, tmp_path: Path) -> None:
    """As SmolVLM-256M is published: sizes left to the classes, theta without a record."""
    text = {
        "_flash_attn_2_enabled": True,
        "architectures": ["VLlama3ForCausalLM"],
        "head_dim": 64,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "is_llama_config": True,
        "max_position_embeddings": 8192,
        "model_type": "llama",
        "num_attention_heads": 9,
        "num_hidden_layers": 30,
        "num_key_value_heads": 3,
        "pad_token_id": 2,
        "pixel_shuffle_factor": 4,
        "qk_layer_norms": False,
        "rms_norm_eps": 1e-05,
        "rope_interleaved": False,
        "rope_theta": 100000,
        "torch_dtype": "bfloat16",
        "use_resampler": False,
        "vocab_size": 49280,
    }
    vision = {
        "hidden_size": 768,
        "image_size": 512,
        "max_image_size": {"longest_edge": 512},
        "model_type": "idefics3",
        "num_attention_heads": 12,
        "patch_size": 16,
        "size": {"longest_edge": 2048},
        "tie_word_embeddings": False,
        "use_base_siglip": False,
    }
    config = {
        "architectures": ["Idefics3ForConditionalGeneration"],
        "image_token_id": 49190,
        "model_type": "idefics3",
        "scale_factor": 4,
        "text_config": text,
        "tie_word_embeddings": False,
        "vision_config": vision,
        "vocab_size": 49280,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(idefics3 / "model.safetensors")
    with pytest.raises(ModelError, match=r"the two are not of one checkpoint|has no tensor"):
        open_model(str(tmp_path))  # only now are weights looked at
    adapter = Adapter(Checkpoint.open(tmp_path), InputOptions())
    encoder, decoder = adapter.encoder, adapter.decoder_config
    assert (encoder.blocks, encoder.mlp_width, encoder.side, encoder.eps) == (12, 3072, 32, 1e-6)
    assert encoder.activation == "gelu_pytorch_tanh"
    assert adapter.shape.visual_tokens == 64 and adapter.shape.grid == (8, 8)
    assert (len(decoder.layers), decoder.heads, decoder.kv_heads, decoder.eps) == (30, 9, 3, 1e-5)
    assert not decoder.tied


REFUSED: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "merge": (lambda c: c.update(scale_factor=3), "scale_factor 3 for 8 x 8 patches"),
    "no merge": (lambda c: c.update(scale_factor=0), "scale_factor 0 for 8 x 8 patches"),
    "patch": (
        lambda c: c["vision_config"].update(patch_size=0),
        "tiles of 48 pixels with patches of 0",
    ),
    "grid": (
        lambda c: c["vision_config"].update(image_size=114),
        "tiles of 114 pixels with patches of 6",
    ),
    "activation": (
        lambda c: c["vision_config"].update(hidden_act="relu"),
        "activation 'relu'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_config_asks_beyond_is_refused_by_name(
    name: str, idefics3: Path, tmp_path: Path
) -> None:
    change, says = REFUSED[name]
    config = json.loads((idefics3 / "config.json").read_text())
    change(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(idefics3 / "model.safetensors")
    with pytest.raises(ModelError, match=f"idefics3 checkpoint has .*{says}.*: not supported"):
        open_model(str(tmp_path))


def test_what_is_asked_beyond_is_refused(idefics3: Path) -> None:
    with pytest.raises(SpecError, match="idefics3 bundles take images, not videos"):
        open_model(str(idefics3), frames=4)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"max_image_size": {"longest_edge": 64}}, "max_image_size is 64, supported is the enc"),
        ({"size": {"height": 9, "width": 9}}, "size is None, supported is whole numbers"),
        ({"size": {"longest_edge": 5000}}, "size is 5000, supported is a longest edge of at mo"),
    ],
)
def test_settings_of_the_processor_that_make_no_tile_are_refused(
    change: dict[str, Any], says: str
) -> None:
    processor = smolvlm.idefics3().image_processor
    for name, value in change.items():
        setattr(processor, name, value)
    with pytest.raises(ModelError, match=says):
        squeezed(processor, 48)


def test_tiles_of_a_processor_that_does_not_resize_are_refused(idefics3: Path) -> None:
    adapter, processor = open_model(str(idefics3), size=Size(60, 80)), smolvlm.idefics3()
    processor.image_processor.do_resize = False
    with pytest.raises(ModelError, match="do_resize is False, supported is True"):
        adapter.image_record(processor.image_processor)


def test_positions_are_in_order_where_the_tower_says_so() -> None:
    """The published towers have 14, 16, 26, 27 and 32 patches a side."""
    model = smolvlm.idefics3().model.model.vision_model.embeddings
    assert all(in_order(patches) for patches in (8, 14, 16, 26, 27, 32))
    for patches in (8, 19):
        model.num_patches_per_side = patches
        model.position_embedding = torch.nn.Embedding(patches**2, 32)
        model.patch_embedding.weight.data.zero_()
        model.patch_embedding.bias.data.zero_()
        pixels = torch.zeros(1, 3, 6 * patches, 6 * patches)
        found = model(pixels, torch.ones(1, patches, patches, dtype=torch.bool))[0]
        assert torch.equal(found, model.position_embedding.weight) == in_order(patches)
    assert not in_order(19)


def test_every_stored_tensor_is_read(idefics3: Path) -> None:
    adapter = open_model(str(idefics3))
    assert adapter.all_notes == adapter.notes()


@pytest.mark.slow
@pytest.mark.parametrize("size", [None, Size(60, 80)])
@pytest.mark.parametrize("method", ["none", "utp"])
@pytest.mark.parametrize("target", GPUS)
def test_engines_take_it(target: str, method: str, size: Size | None, tmp_path: Path) -> None:
    """`check` accepts the bundle, and TensorRT-RTX compiles that for RTX cards."""
    model = smolvlm.idefics3(num_hidden_layers=5).save(tmp_path / "deep")
    cr, options = (4 if method == "utp" else 1), {"target": target, "dtype": "fp16"}
    bundle = frozen(tmp_path / "b", method, cr, model=model, size=size, **options)
    assert_accepted(bundle, target, 64)
