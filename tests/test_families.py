"""Every model family: pixels and answers are those of transformers, pruned ones of the reference.

The checkpoints are tiny and random, in the layout that transformers saves. Where an image is cut
into tiles, three shapes of it are tried.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    GemmaConfig,
    GenerationConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from benchmarks.schedules import planned
from edgeprune.errors import InputError, ModelError, SpecError
from edgeprune.export.exporter import Exported, ExportRequest, export
from edgeprune.making import make as make_bundle
from edgeprune.models import Adapter, open_model
from edgeprune.models._layout import NEWLINE, Layout
from edgeprune.models._processor import Processor, Prompt, random_prompt
from edgeprune.models._reference import Reference
from edgeprune.models._vision import FixedTokens
from edgeprune.policies import make, names
from edgeprune.recipe import Recipe
from edgeprune.runtime import Session
from edgeprune.runtime.images import to_pixels, warnings
from edgeprune.runtime.sampling import Sampling
from edgeprune.runtime.survivors import drawn, seen, survivors
from edgeprune.spec import ModelShape, Plan, PruneSpec, check_separators
from edgeprune.tiling import Size
from tests import families
from tests.families import QUESTION, TEXT, Family
from tests.whole_model import advances

FAMILIES: dict[str, Callable[..., Family]] = {
    "internvl": families.internvl,
    "llava_next": families.llava_next,
    "llava_onevision": families.llava_onevision,
}
OTHERS = (
    families.granite_vision,
    families.llava,
    families.llava_next_video,
    families.video_llava,
)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]()


@pytest.fixture(scope="module")
def checkpoint(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return family.save(tmp_path_factory.mktemp(family.name) / "tiny")


def drawn_image(size: Size, seed: int = 0) -> Image.Image:
    """Smooth noise: the tiles differ, and resizing leaves something of it."""
    levels = np.random.default_rng(seed).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    return Image.fromarray(levels).resize((size.width, size.height), Image.Resampling.BICUBIC)


def ours(family: Family, checkpoint: Path, image: Image.Image) -> tuple[Adapter, np.ndarray]:
    """The adapter frozen for an image's size, and the pixels that the runtime makes of it."""
    adapter = open_model(str(checkpoint), size=family.frozen(Size(image.height, image.width)))
    record = adapter.image_record(Processor(adapter))
    assert record.shape == adapter.pixels
    return adapter, to_pixels(image, record)


def prompted(adapter: Adapter, pixels: np.ndarray) -> Prompt:
    prefix_ids, _, text_ids = Processor(adapter).chat.split(adapter.media, QUESTION)
    return Prompt(torch.from_numpy(pixels), prefix_ids, text_ids)


def block(adapter: Adapter) -> list[int]:
    """Ids of all that stands between the text before and the text after, as transformers sees it:
    visual tokens, and text between images."""
    layout = adapter.vision_config.layout
    first = int(layout.newline) + layout.tiles * layout.cls
    numbers = [-1 - source - first for source in layout.order]
    return [
        adapter.media.token if n < 0 or s >= 0 else layout.text[n]
        for n, s in zip(numbers, layout.order, strict=True)
    ]


def generated(
    family: Family,
    adapter: Adapter,
    prompt: Prompt,
    *,
    settings: GenerationConfig | None = None,
    tokens: int = 32,
    **seen: Any,
) -> list[int]:
    """Greedy tokens of transformers' model."""
    ids = torch.cat([prompt.prefix_ids, torch.tensor([block(adapter)]), prompt.text_ids], dim=1)
    known = (
        "pixel_values",
        "pixel_values_videos",
        "image_sizes",
        "batch_num_images",
        "pixel_attention_mask",
        "spatial_shapes",
        "token_type_ids",
    )
    seen |= family.kinds(ids, 0)
    found = family.model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        **{name: value for name, value in seen.items() if name in known},
        max_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
        generation_config=settings,
    )
    said: list[int] = found[0, ids.shape[1] :].tolist()
    assert len(said) == tokens
    return said


def answered(adapter: Adapter, prompt: Prompt) -> list[int]:
    """32 greedy tokens of the eager reference without pruning."""
    plan = Plan(adapter.shape.visual_tokens, adapter.shape.layers)
    reference = Reference.build(adapter, make(PruneSpec("none")), plan)
    return reference.generate(prompt, 32, stop=lambda token: False)


def test_pixels_are_those_of_the_checkpoints_processor(family: Family, checkpoint: Path) -> None:
    for size in family.sizes:
        image = drawn_image(size)
        wanted = family.look(image)["pixel_values"].flatten(0, -4).numpy()
        adapter, pixels = ours(family, checkpoint, image)
        np.testing.assert_array_equal(pixels, wanted)
        if adapter.tiling is not None:
            np.testing.assert_array_equal(Processor(adapter)(image, QUESTION).pixels, wanted)


def test_dense_answers_are_those_of_transformers(family: Family, checkpoint: Path) -> None:
    for size in family.sizes:
        image = drawn_image(size)
        adapter, pixels = ours(family, checkpoint, image)
        prompt = prompted(adapter, pixels)
        wanted = generated(family, adapter, prompt, **family.look(image))
        assert answered(adapter, prompt) == wanted


@pytest.mark.parametrize("make_one", OTHERS)
def test_other_families_see_and_answer_as_transformers_does(
    make_one: Callable[..., Family], tmp_path: Path
) -> None:
    family = make_one()
    checkpoint = family.save(tmp_path)
    test_pixels_are_those_of_the_checkpoints_processor(family, checkpoint)
    test_dense_answers_are_those_of_transformers(family, checkpoint)


def test_a_dense_bundle_answers_as_transformers_does(
    family: Family, checkpoint: Path, tmp_path: Path
) -> None:
    """Plainly, and by the checkpoint's own settings of generation."""
    checkpoint = Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))
    settings = families.with_settings(checkpoint)
    size = family.sizes[1]
    spec = PruneSpec("none")
    recipe = Recipe(spec, tmp_path / "dense", str(checkpoint), image_size=size, parity=1)
    exported = make_bundle(recipe)
    image, session = drawn_image(size), Session.open(exported.path)
    adapter, pixels = ours(family, checkpoint, image)
    answers = partial(generated, family, adapter, prompted(adapter, pixels), **family.look(image))
    wanted = answers()
    answer = session.ask(image, QUESTION, Sampling(max_new_tokens=32))
    assert list(answer.ids) == wanted
    assert answer.warnings == ()
    own = answers(settings=settings, tokens=64)
    answer = session.ask(image, QUESTION, replace(session.sampling, max_new_tokens=64))
    assert list(answer.ids) == own
    assert own[:32] != wanted


def pruned(checkpoint: Path, size: Size, method: str, folder: Path) -> Exported:
    """A bundle at CR 4 or near, its schedule made up; kept tokens and logits were compared."""
    spec = PruneSpec(method, 4, options={"K": "1"} if method in ("fastv", "dart") else {})
    adapter, policy = open_model(str(checkpoint), size=size), make(spec)
    shape = adapter.shape
    plan = planned(policy, shape, spec.cr, made_up(shape))
    check_separators(plan, shape)
    prompts = [random_prompt(adapter.pixels, shape.vocabulary, seed) for seed in range(2)]
    request = ExportRequest(method, spec, plan, folder / method)
    return export(request, adapter, policy, Processor(adapter), prompts)


def made_up(shape: ModelShape) -> tuple[int, ...]:
    """Counts that fall before the decoder and inside it."""
    start = shape.visual_tokens // 2
    return tuple(max(1, start >> layer) for layer in range(shape.layers))


def test_a_pruned_bundle_equals_the_eager_reference(
    family: Family, checkpoint: Path, tmp_path: Path
) -> None:
    """UTP prunes in the vision graph, here too, and in the decoder's."""
    exported = pruned(checkpoint, family.sizes[1], "utp", tmp_path)
    assert exported.manifest.parity.ties == 0
    answer = Session.open(exported.path).ask(drawn_image(family.sizes[1]), QUESTION)
    counts = exported.manifest.prune.counts
    assert (len(answer.vision_kept), *map(len, answer.layer_kept)) == counts
    assert (np.diff(answer.vision_kept) > 0).all()
    rows, columns = drawn(exported.manifest)
    levels = seen(drawn_image(family.sizes[1]), exported.manifest.image)
    assert levels.shape[0] * columns == levels.shape[1] * rows
    for site in survivors(answer, exported.manifest):
        assert site.kept <= set(np.ndindex(rows, columns)) and not site.extra


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted({*names()} - {"none", "vtw", "tome"}))
def test_every_method_on_every_family_equals_its_reference(
    family: Family, method: str, tmp_path: Path
) -> None:
    deep = FAMILIES[family.name](num_hidden_layers=8).save(tmp_path / "deep")
    if method == "visiontrim" and family.name in ("llava_next", "llava_onevision"):
        with pytest.raises(SpecError, match="separators"):
            pruned(deep, family.sizes[1], method, tmp_path)
        return
    exported = pruned(deep, family.sizes[1], method, tmp_path)
    assert exported.manifest.parity.ties == 0


def test_another_shape_is_fitted_and_remarked_an_extreme_one_refused(
    family: Family, checkpoint: Path
) -> None:
    wide, tall = family.sizes[1], family.sizes[2]
    adapter = open_model(str(checkpoint), size=wide)
    record = adapter.image_record(family.image_processor)
    assert to_pixels(drawn_image(tall), record).shape == adapter.pixels
    assert "black borders" in warnings(drawn_image(tall), record)[0]
    assert warnings(drawn_image(Size(2 * wide.height, 2 * wide.width)), record) == ()
    with pytest.raises(InputError, match="too long and narrow"):
        warnings(drawn_image(Size(600, 10)), record)


DECODERS = {
    "gemma": GemmaConfig(**TEXT, head_dim=16),
    "granite": GraniteConfig(
        **TEXT,
        embedding_multiplier=12,
        residual_multiplier=0.22,
        attention_multiplier=0.6,
        logits_scaling=8,
    ),
    "llama": LlamaConfig(**TEXT, attention_bias=True, hidden_act="gelu_pytorch_tanh"),
    "mistral": MistralConfig(**TEXT, sliding_window=400),
    "qwen2": Qwen2Config(**TEXT, attention_bias=True, mlp_bias=True),  # which its class ignores
    "qwen3": Qwen3Config(**TEXT, head_dim=16),
}


@pytest.mark.parametrize("name", DECODERS)
def test_decoders_of_other_kinds_answer_as_transformers_does(name: str, tmp_path: Path) -> None:
    family = families.internvl(config=DECODERS[name])
    test_dense_answers_are_those_of_transformers(family, family.save(tmp_path))


def test_a_policy_sees_attention_with_the_scale_of_the_layer(tmp_path: Path) -> None:
    """Granite's is 0.6, and not 8 ** -0.5."""
    family = families.internvl(config=DECODERS["granite"])
    adapter, pixels = ours(family, family.save(tmp_path), drawn_image(family.sizes[0]))
    plan, prompt = Plan(adapter.shape.visual_tokens, 3), prompted(adapter, pixels)
    reference = Reference.build(adapter, make(PruneSpec("none")), plan)
    heard = [layer.signals for layer in advances(reference, prompt)]
    assert len(heard) == 3
    for signals in heard:
        keys = signals.states.rotated_key[0].repeat_interleave(2, 0)  # two heads share one
        logits = 0.6 * (signals.states.rotated_query[0, :, -1:] * keys).sum(-1)
        first = signals.segments.prefix
        wanted = logits.softmax(-1).mean(0)[first : first + plan.visual_tokens]
        torch.testing.assert_close(signals.last_query_attention(), wanted)


def test_windows_of_some_layers_are_those_of_transformers(tmp_path: Path) -> None:
    """6 tokens in the second of three layers; the image alone has 4, the question more."""
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    config = Qwen2Config(**TEXT, use_sliding_window=True, sliding_window=6, layer_types=kinds)
    family, image = families.internvl(config=config), drawn_image(Size(56, 56))
    checkpoint = families.internvl().save(tmp_path)  # of the same weights, without windows
    adapter, pixels = ours(families.internvl(), checkpoint, image)
    prompt = prompted(adapter, pixels)
    wanted = generated(family, adapter, prompt, **family.look(image))
    assert answered(adapter, prompt) != wanted
    layers = list(adapter.decoder_config.layers)
    layers[1] = replace(layers[1], window=6)
    adapter.decoder_config = replace(adapter.decoder_config, layers=tuple(layers))
    assert answered(adapter, prompt) == wanted


def test_a_sliding_window_shorter_than_a_image_is_refused(tmp_path: Path) -> None:
    family = families.internvl(config=MistralConfig(**TEXT, sliding_window=12))
    folder = str(family.save(tmp_path))
    assert open_model(folder).shape.max_positions == 12
    with pytest.raises(ModelError, match="12 visual tokens, the decoder takes 12"):
        open_model(folder, size=Size(56, 112))


def test_sizes_that_cannot_be_frozen_are_refused(tmp_path: Path) -> None:
    folder = str(families.llava_onevision().save(tmp_path))
    with pytest.raises(SpecError, match="too long and narrow"):
        open_model(folder, size=Size(2000, 10))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps({**config, "vision_aspect_ratio": "anyres_max_1"})
    )
    with pytest.raises(SpecError, match="36 tokens of tiles, which this model shrinks"):
        open_model(folder, size=Size(84, 84))
    with pytest.raises(SpecError, match="takes every image as 168 x 168 pixels"):
        open_model("demo", size=Size(336, 336))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_config": {"use_absolute_position_embeddings": False}}, "no position embeddings"),
        ({"text_config": {"model_type": "gpt2"}}, "gpt2 decoder; supported: gemma, llama"),
        ({"vision_config": {"hidden_size": 64}}, "the two are not of one checkpoint"),
    ],
)
def test_what_a_config_asks_beyond_is_refused_by_name(
    change: dict[str, dict[str, Any]], message: str, tmp_path: Path
) -> None:
    families.internvl().save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for part, values in change.items():
        config[part] |= values
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=message):
        adapter = open_model(str(tmp_path))
        policy, plan = make(PruneSpec("none")), Plan(4, 3)
        with torch.device("meta"):
            vision = adapter.vision(policy, plan)
        adapter.sources(vision)


def test_kept_cls_tokens_of_several_tiles_follow_in_the_order_of_the_tiles() -> None:
    """They share an index, after all tokens of the image."""
    plain = Layout.plain(2, tiles=20)
    layout = replace(plain, order=(*plain.order, NEWLINE), grid=(1, 81), newline=True)
    fixed = FixedTokens(layout, 1)
    torch.nn.init.constant_(fixed.newline, -1)
    cls, kept = [80] * 20, [1, 7, 9]
    visual = torch.tensor([[*range(100, 120), *kept]])[..., None].float()
    found, indices = fixed(visual, torch.tensor(cls + kept), 0, None)
    assert found[0, :, 0].tolist() == [*kept, -1, *range(100, 120)]
    assert indices.tolist() == [*kept, 80, *[81] * 20]
