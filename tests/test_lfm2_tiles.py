"""LFM2-VL's tiles: pixels, prompts and answers are those of transformers.

The view of the whole has a shape of its own; it is encoded in a tile's place, beside padding.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.lfm2_vl.processing_lfm2_vl import Lfm2VlProcessor

from benchmarks.schedules import planned
from edgeprune import encoder_methods
from edgeprune.bundle import read_manifest
from edgeprune.errors import BundleError, ModelError, SpecError
from edgeprune.export.exporter import ExportRequest, export
from edgeprune.models import Adapter, open_model
from edgeprune.models._frames import changed_config
from edgeprune.models._lfm2_image import Settings
from edgeprune.models._processor import Processor
from edgeprune.models._reference import Reference
from edgeprune.policies import make
from edgeprune.runtime import Session
from edgeprune.runtime.images import to_pixels, warnings
from edgeprune.runtime.sampling import Sampling
from edgeprune.spec import PruneSpec
from edgeprune.tile_views import OF_NOTHING, OF_WHOLE
from edgeprune.tiling import Size
from tests import lfm2
from tests.families import QUESTION, Family
from tests.test_families import drawn_image, generated, prompted

SQUARE = lfm2.SPLIT[0]
TILE = 25  # tokens


@pytest.fixture(scope="module")
def family() -> Family:
    return lfm2.lfm2_vl_tiles()


@pytest.fixture(scope="module")
def checkpoint(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return family.save(tmp_path_factory.mktemp("lfm2") / "tiny")


def bundle_of(adapter: Adapter, method: str, cr: float, folder: Path) -> Path:
    """Parity with the eager model is checked on an image."""
    spec = PruneSpec(method, cr)
    policy, shape = make(spec), adapter.shape
    prompts = [Processor(adapter)(drawn_image(SQUARE, 3), QUESTION)]
    request = ExportRequest("tiny", spec, planned(policy, shape, spec.cr), folder)
    made = export(request, adapter, policy, Processor(adapter), prompts)
    assert made.manifest.parity.ties <= 1 and made.manifest.parity.logits < 1e-4
    return made.path


@pytest.mark.parametrize("size", [*lfm2.SPLIT, Size(200, 200), Size(161, 161)])
def test_pixels_are_those_of_the_processor(family: Family, checkpoint: Path, size: Size) -> None:
    """Its tiles one by one, its thumbnail token by token."""
    image, adapter = drawn_image(size), open_model(str(checkpoint), size=size)
    wanted = [view.numpy() for view in family.image_processor.views(image)]
    pixels = to_pixels(image, adapter.image_record(Processor(adapter)))
    assert adapter.pixels == pixels.shape and len(pixels) == len(wanted)
    np.testing.assert_array_equal(Processor(adapter)(image, QUESTION).pixels, pixels)
    np.testing.assert_array_equal(pixels[:-1, :3], wanted[:-1])
    (whole, marks), step = (pixels[-1, :3], pixels[-1, 3:]), 16
    height, width = wanted[-1].shape[1:]
    for token in range(TILE):
        row, column = (step * at for at in divmod(token, 5))
        block = slice(row, row + step), slice(column, column + step)
        top, left = (step * at for at in divmod(token, width // step))
        if top < height:
            own = wanted[-1][:, top : top + step, left : left + step]
            np.testing.assert_array_equal(whole[(slice(None), *block)], own)
        assert (marks[(slice(None), *block)] == (OF_WHOLE if top < height else OF_NOTHING)).all()


def test_a_thumbnail_as_large_as_a_tile_is_a_tile(checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "square")
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "max_image_tokens": TILE}))
    adapter = open_model(str(folder), size=Size(160, 160))
    assert adapter.pixels == (5, 3, 80, 80)
    assert adapter.shape.visual_tokens == 5 * TILE + 4


@given(st.integers(1, 3000), st.integers(1, 3000))
def test_the_grid_is_that_of_the_processor(height: int, width: int) -> None:
    oracle = lfm2.Oracle()
    settings = Settings(encoder_patch_size=8, min_image_tokens=4, max_image_tokens=24, tile_size=80)
    size = Size(height, width)
    large = oracle.is_large(height, width)
    assert settings.rule.splits(size) == large
    rows, columns = settings.rule.views(size).grid
    assert (columns, rows) == (oracle.grid(height, width) if large else (1, 1))
    if large:
        tiling = settings.tiling(size)
        assert tiling.views == settings.rule.views(size)
        assert tiling.suits(height, width)


@pytest.mark.parametrize("thumbnail", [True, False])
def test_a_prompt_is_written_as_the_processor_writes_it(
    checkpoint: Path, tmp_path: Path, *, thumbnail: bool
) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "c")
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "use_thumbnail": thumbnail}))
    adapter = open_model(str(folder), size=SQUARE)
    tokenizer, processor = adapter.chat.tokenizer, object.__new__(Lfm2VlProcessor)
    names = {"": "<image>", "_start": "<|image_start|>", "_end": "<|image_end|>"}
    names["_thumbnail"] = "<|img_thumbnail|>"
    for name, token in names.items():
        setattr(processor, f"image{name}_token", token)
    text = processor._build_image_tokens(2, 2, TILE, 20, thumbnail, True)
    wanted = tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = list(adapter.vision_config.layout.ids(adapter.media.token))
    around = [tokenizer.convert_tokens_to_ids(edge) for edge in adapter.media.around]
    first = tokenizer.convert_tokens_to_ids("<|img_row_1_col_1|>")
    assert wanted[1] == first and wanted[:1] + wanted[2:-1] == around[:0] + wanted[:1] + ids
    assert adapter.vision_config.layout.tiles == 4 + thumbnail


@pytest.fixture(scope="module")
def dense(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    adapter = open_model(str(checkpoint), size=SQUARE)
    return bundle_of(adapter, "none", 1, tmp_path_factory.mktemp("dense") / "b")


@pytest.mark.parametrize(
    "size", [SQUARE, *(pytest.param(s, marks=pytest.mark.slow) for s in lfm2.SPLIT[1:])]
)
def test_a_dense_bundle_answers_as_transformers_does(
    family: Family, checkpoint: Path, dense: Path, size: Size, tmp_path: Path
) -> None:
    """64 greedy tokens, of two images; tiles are encoded by one graph."""
    adapter = open_model(str(checkpoint), size=size)
    bundle = dense if size == SQUARE else bundle_of(adapter, "none", 1, tmp_path / "b")
    with Session.open(bundle, threads=1) as session:
        for image in (drawn_image(size), drawn_image(size, 1)):
            pixels = to_pixels(image, session.manifest.image)
            prompt = prompted(adapter, pixels)
            wanted = generated(family, adapter, prompt, tokens=64, **family.look(image))
            answer = session.ask(image, QUESTION, Sampling(max_new_tokens=64))
            assert (list(answer.ids), answer.warnings) == (wanted, ())


@pytest.mark.parametrize(
    ("method", "layers"),
    [
        ("visionzip", ()),
        pytest.param("utp", lfm2.PUBLISHED, marks=pytest.mark.slow),
        pytest.param("fastv", lfm2.PUBLISHED, marks=pytest.mark.slow),
    ],
)
def test_pruned_bundles_answer_as_their_references_do(
    method: str, layers: tuple[str, ...], tmp_path: Path
) -> None:
    """At CR 4; VisionZip looks at the encoder's attention, where padding is."""
    checkpoint = lfm2.lfm2_vl(layers).save(tmp_path / "tiny")
    adapter = open_model(str(checkpoint), size=SQUARE)
    spec = PruneSpec(method, 4)
    policy = make(spec)
    reference = Reference.build(adapter, policy, planned(policy, adapter.shape, 4))
    image = drawn_image(SQUARE)
    prompt = Processor(adapter)(image, QUESTION)
    wanted = reference.generate(prompt, 16, lambda token: False)
    with Session.open(bundle_of(adapter, method, 4, tmp_path / "b"), threads=1) as session:
        answer = session.ask(image, QUESTION, Sampling(max_new_tokens=16))
        assert list(answer.ids) == wanted


@torch.no_grad()
def test_padding_gives_and_gets_no_attention(family: Family, checkpoint: Path) -> None:
    """What the view of the whole receives is what it does where it is encoded alone."""
    adapter, image = open_model(str(checkpoint), size=SQUARE), drawn_image(SQUARE)
    alone = open_model(str(checkpoint), size=Size(64, 80))
    pixels = family.image_processor.view(image)[None]
    found = list[torch.Tensor]()
    for one, shown in ((adapter, Processor(adapter)(image, QUESTION).pixels), (alone, pixels)):
        plan = planned(make(PruneSpec("none")), one.shape, 1)
        vision = one.load(one.vision(make(PruneSpec("none")), plan))
        signals = vision.signals(vision.encoder(shown, None))
        found += [signals.received_attention(), signals.received_attention(from_others=True)]
        found += [signals.features[0]]
    for all_views, one_view in zip(found[:3], found[3:], strict=True):
        torch.testing.assert_close(all_views[-20:], one_view)


def test_an_image_of_another_shape_is_fitted_and_said_so(dense: Path, tmp_path: Path) -> None:
    with Session.open(dense, threads=1) as session:
        record = session.manifest.image
        answer = session.ask(drawn_image(Size(120, 160)), QUESTION, Sampling(max_new_tokens=1))
        assert "for such images export with --image-size 160x120" in answer.warnings[0]
    manifest = json.loads((dense / "manifest.json").read_text())
    assert record.tiling is not None and record.tiling.overview_size == (64, 80)
    manifest["image"]["tiling"]["overview_size"] = [96, 96]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="a view of the whole of 36 tokens, 25 in a tile"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("frozen", [SQUARE, Size(64, 80), None])
def test_an_image_that_the_processor_shows_otherwise_is_told(
    family: Family, checkpoint: Path, frozen: Size | None
) -> None:
    """Of images of a bundle's shape, at every scale."""
    adapter = open_model(str(checkpoint), size=frozen)
    record, processor = adapter.image_record(Processor(adapter)), family.image_processor
    tiles = record.views.grid.height * record.views.grid.width
    size, found = frozen or Size(record.height, record.width), set[bool]()
    for scale in (0.4, 0.7, 1, 1.1, 1.5, 2, 3):
        image = drawn_image(Size(round(size.height * scale), round(size.width * scale)))
        shapes = [view.shape[1:] for view in processor.views(image)]
        same = len(shapes) == tiles + (tiles > 1) and shapes[-1] == record.views.whole
        told = warnings(image, record)
        assert bool(told) != same
        found.add(same)
        if not same:
            assert f"--image-size {image.width}x{image.height}" in told[0]
    assert found == {True, False}


def test_what_the_processor_makes_of_an_image_is_said_in_words(checkpoint: Path) -> None:
    adapter = open_model(str(checkpoint), size=SQUARE)
    record = adapter.image_record(Processor(adapter))
    (larger,), (smaller,) = (
        warnings(drawn_image(size), record) for size in (Size(300, 320), Size(75, 80))
    )
    cut = "2 x 2 tiles (rows x columns) and one view of 20 tokens"
    assert f"makes {cut.replace('2 x 2', '3 x 3')}, the bundle {cut}; for such" in larger
    assert f"makes one view of 20 tokens, the bundle {cut}; for such" in smaller


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tile_size": 64}, "max_image_tokens is 24, supported is a tile's 16 or less"),
        ({"tile_size": 84}, "tile_size is 84, supported is a multiple of 16 pixels"),
        ({"min_tiles": 1}, "min_tiles is 1, supported is 2 or more, or do_image_splitting false"),
        ({"min_tiles": 4, "max_tiles": 3}, "max_tiles is 3, supported is 4 or more"),
    ],
)
def test_tiles_that_cannot_be_frozen_are_refused(
    settings: dict[str, object], message: str, checkpoint: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "other")
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
    assert open_model(str(folder)).tiling is None
    with pytest.raises(ModelError, match=message):
        open_model(str(folder), size=SQUARE)


def test_what_needs_views_of_one_size_is_refused(checkpoint: Path) -> None:
    adapter = open_model(str(checkpoint), size=SQUARE)
    method = encoder_methods.make("exit:at=1:keep=0.5")
    assert method is not None
    with pytest.raises(SpecError, match="the view of the whole image has fewer than a tile"):
        adapter.encoder_site(method)
    with pytest.raises(SpecError, match="--delta: the view of the whole image has fewer"):
        changed_config(adapter.vision_config, 0.3)
