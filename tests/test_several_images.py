"""Several images of Gemma 3 and PaliGemma against transformers: which tokens see each other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgeprune.models import Adapter, open_model
from edgeprune.models._ops import BidirectionalImages, Causal
from edgeprune.models._processor import Processor
from edgeprune.models._reference import Reference
from edgeprune.policies import make
from edgeprune.runtime import Session, media
from edgeprune.spec import PruneSpec, plan_from_counts
from edgeprune.tiling import Size
from tests.dense import assert_same_logits, dense
from tests.dialogues import assert_same_answers, exported
from tests.engines import GPUS, assert_accepted
from tests.families import QUESTION, Family
from tests.frozen import frozen
from tests.test_families import drawn_image, generated
from tests.test_gemma import KINDS, logits

SHOWN = [drawn_image(Size(84, 84)), drawn_image(Size(60, 101), seed=1)]


@pytest.fixture(scope="module", params=KINDS)
def family(request: pytest.FixtureRequest) -> Family:
    return KINDS[request.param]()


@pytest.fixture(scope="module")
def checkpoint(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return family.save(tmp_path_factory.mktemp(family.name) / "tiny")


def opened(checkpoint: Path) -> Adapter:
    return open_model(str(checkpoint), images=2)


def test_the_dense_model_is_that_of_transformers(family: Family, checkpoint: Path) -> None:
    """Pixels, answers of 64 tokens, and logits over two turns."""
    adapter = opened(checkpoint)
    record = replace(adapter.image_record(Processor(adapter)), images=2)
    pixels = media.prepare(SHOWN, record).pixels
    np.testing.assert_array_equal(pixels, family.look(SHOWN)["pixel_values"].numpy())
    prompt, ours = Processor(adapter)(SHOWN, QUESTION), dense(adapter)
    wanted = generated(family, adapter, prompt, tokens=64, **family.look(SHOWN))
    assert ours.generate(prompt, 64, lambda token: False) == wanted
    theirs = logits(family, adapter, prompt, SHOWN)
    assert_same_logits(ours, prompt, theirs, atol=2e-5)


def test_one_token_begins_a_prompt_of_several_images(checkpoint: Path) -> None:
    """A sample is tokenised as the runtime tokenises a prompt: where the template writes the begin
    token behind all images, the tokenizer adds none."""
    adapter = opened(checkpoint)
    prefix, _, text = adapter.chat.split(adapter.media, QUESTION)
    ids = [*prefix[0].tolist(), *text[0].tolist()]
    assert ids.count(adapter.chat.tokenizer.bos_token_id) == 1


def test_the_comparison_sees_whose_token_is_whose(tmp_path: Path) -> None:
    """Were both images of Gemma 3 one, or none, the answer would be another."""
    adapter = opened(KINDS["gemma3"]().save(tmp_path))
    prompt, config = Processor(adapter)(SHOWN, QUESTION), adapter.decoder_config
    wanted = dense(adapter).prefill(prompt).logits
    for images in ((0,) * len(config.image_of), (-1,) * len(config.image_of)):
        adapter.decoder_config = replace(config, image_of=images)
        found = dense(adapter).prefill(prompt).logits
        assert float((found - wanted).abs().max()) > 1e-2


@pytest.mark.parametrize("window", [None, 3])
def test_tokens_see_their_image_and_what_is_before_them(window: int | None) -> None:
    """Six new tokens behind two that the cache holds; its last slot is empty. A window hides."""
    start, of = torch.tensor([2]), [-1, 0, 0, -1, 1, 0]  # the last one as if it was merged
    causal = Causal(start, start + 6, window, BidirectionalImages(torch.tensor(of)))
    found = causal.seen(torch.zeros(1, 1, 6, 4), torch.zeros(1, 1, 9, 4))
    for new, image in enumerate(of):
        for slot in range(9):
            at = slot - 2
            alike = 0 <= at < 6 and image >= 0 and of[at] == image
            near = window is None or slot > new + 2 - window
            assert bool(found[new, slot]) == (near and (at <= new or alike))


@pytest.mark.parametrize(
    "family", ["gemma3", pytest.param("paligemma2", marks=pytest.mark.slow)], indirect=True
)
def test_a_pruned_bundle_answers_as_its_reference(
    family: Family, checkpoint: Path, tmp_path: Path
) -> None:
    """And a second turn, on the same caches."""
    adapter, policy = opened(checkpoint), make(PruneSpec("utp", 4))
    layout = adapter.vision_config.layout
    fixed, count = len(layout.fixed), layout.visual_tokens
    plan = plan_from_counts(count, (count - 8, fixed + 6, 3))
    made = exported(adapter, PruneSpec("utp", 4), plan, tmp_path / "b")
    session, reference = Session.open(made.path), Reference.build(adapter, policy, plan)
    assert_same_answers(session, reference, adapter, SHOWN, QUESTION)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("method", ["none", "utp"])
@pytest.mark.parametrize("target", GPUS)
def test_engines_take_it(
    family: Family, target: str, method: str, dtype: str, tmp_path: Path
) -> None:
    """`check` accepts the bundle, and TensorRT-RTX compiles that for RTX cards."""
    deep: Any = next(kind for kind in KINDS.values() if kind().name == family.name)
    model = deep(num_hidden_layers=5, max_position_embeddings=1024).save(tmp_path / "deep")
    options: dict[str, Any] = {"model": model, "target": target, "dtype": dtype, "images": 2}
    bundle = frozen(tmp_path / "b", method, 4 if method == "utp" else 1, **options)
    assert_accepted(bundle, target)
