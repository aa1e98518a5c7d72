"""Bundles as a model of lmms-eval: which settings and images a request has, and what is answered.

Where lmms-eval is not installed, a class with the interface of its base class stands in for it.
"""

from __future__ import annotations

import abc
import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tomllib
from PIL import Image

from benchmarks.lmms_task.write import write
from edgeprune.bundle import Bundle
from edgeprune.compare.questions import Questions
from edgeprune.errors import CapacityError, EdgepruneError, InputError, SpecError
from edgeprune.generation import Sampling
from edgeprune.lmms_eval import asking
from edgeprune.manifest import ImageRecord
from edgeprune.runtime import Session

INSTALLED = find_spec("lmms_eval") is not None
ROOT = Path(__file__).resolve().parents[1]
MODULES = ("lmms_eval", "lmms_eval.api", "lmms_eval.api.model", "edgeprune.lmms_eval.model")


class StandIn(abc.ABC):
    """What lmms-eval 0.7.3 gives to its models, and asks of them."""

    def __init__(self) -> None:
        self.task_dict: dict[str, Any] = {}
        self.cache_hook = SimpleNamespace(add_partial=lambda *what: None)

    @abc.abstractmethod
    def loglikelihood(self, requests: Any) -> Any: ...

    @abc.abstractmethod
    def generate_until(self, requests: Any) -> Any: ...

    @abc.abstractmethod
    def generate_until_multi_round(self, requests: Any) -> Any: ...


@dataclass(frozen=True)
class Manifest:
    """lmms-eval's record of a model."""

    model_id: str
    simple_class_path: str


@pytest.fixture
def model_class() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        if not INSTALLED:
            for name in MODULES[:3]:
                patch.setitem(sys.modules, name, ModuleType(name))
            patch.setattr(sys.modules["lmms_eval.api.model"], "lmms", StandIn, raising=False)
        patch.delitem(sys.modules, MODULES[3], raising=False)
        yield importlib.import_module(MODULES[3]).EdgepruneModel
    sys.modules.pop(MODULES[3], None)


def noise(seed: int) -> Image.Image:
    levels = np.random.default_rng(seed).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    return Image.fromarray(levels)


def request(number: int, text: str, **settings: Any) -> SimpleNamespace:
    def visuals(doc: dict[str, Any]) -> list[Any]:
        return list(doc["images"])

    return SimpleNamespace(args=(text, settings, visuals, number, "task", "test"))


def test_answers_are_those_of_a_session(model_class: Any, tiny_jetpack7: Path) -> None:
    model = model_class(bundle=str(tiny_jetpack7), batch_size="1", max_new_tokens=5)
    model.task_dict = {"task": {"test": [{"images": [noise(n)]} for n in range(2)]}}
    texts = ["what color is the star ?", "<image>\nis the heart red ?"]
    asked = [request(n, t, max_new_tokens=99, do_sample=False) for n, t in enumerate(texts)]
    greedy = replace(model.session.sampling, temperature=0, max_new_tokens=5)
    with Session.open(tiny_jetpack7) as session:
        wanted = [
            session.ask(noise(n), text.removeprefix("<image>\n"), greedy).text
            for n, text in enumerate(texts)
        ]
    assert model.generate_until(asked) == wanted
    assert model.is_simple


def test_what_a_bundle_cannot_do_is_said_with_the_question(
    model_class: Any, tiny_jetpack7: Path
) -> None:
    model = model_class(bundle=str(tiny_jetpack7))
    model.task_dict = {"task": {"test": [{"images": [noise(1)] * 2}, {"images": [noise(1)]}]}}
    with pytest.raises(InputError, match=r"question 0 of task: .* takes 1 image, .* has 2"):
        model.generate_until([request(0, "what ?")])
    with pytest.raises(SpecError, match=r"question 1 of task: .* no beam search"):
        model.generate_until([request(1, "what ?", num_beams=4)])
    with pytest.raises(CapacityError, match="question 1 of task"):
        model.generate_until([request(1, "what ?", max_new_tokens=10**6)])
    for method in (model.loglikelihood, model.generate_until_multi_round):
        with pytest.raises(EdgepruneError, match="task"):
            method([])


def test_what_lmms_eval_may_ask_for_and_no_bundle_has(
    model_class: Any, tiny_jetpack7: Path
) -> None:
    with pytest.raises(SpecError, match="one question at a time"):
        model_class(bundle=str(tiny_jetpack7), batch_size=8)
    with pytest.raises(SpecError, match="backend=ort-cuda"):
        model_class(bundle=str(tiny_jetpack7), device="cuda:0")


def test_settings_of_a_task_become_sampling() -> None:
    own = Sampling(temperature=0.7, repetition_penalty=1.1, max_new_tokens=40)
    greedy = replace(own, temperature=0.0)
    assert asking.sampling({}, own, None) == greedy
    assert asking.sampling({"temperature": 0, "top_p": None, "num_beams": 1}, own, None) == greedy
    assert asking.sampling({"temperature": 0.2, "do_sample": False}, own, None) == greedy
    assert asking.sampling({"temperature": 0.2}, own, None) == replace(own, temperature=0.2)
    assert asking.sampling({"do_sample": True}, own, None) == own
    asked = {"until": ["\n\n", ""], "max_new_tokens": 16, "top_p": 0.9}
    drawn = replace(greedy, stop=("\n\n",), max_new_tokens=16, top_p=0.9)
    assert asking.sampling(asked, own, None) == drawn
    assert asking.sampling(asked, own, 8) == replace(drawn, max_new_tokens=8)
    assert asking.sampling({"until": "\n"}, own, None).stop == ("\n",)
    with pytest.raises(SpecError, match="penalty_alpha"):
        asking.sampling({"penalty_alpha": 0.6}, own, None)


def test_images_are_as_many_as_the_bundle_takes(tiny_jetpack7: Path) -> None:
    record: ImageRecord = Bundle.open(tiny_jetpack7).manifest.image
    two, video = replace(record, images=2), replace(record, frames=4)
    images = [noise(1), noise(2)]
    assert asking.shown(images, two) == images
    assert asking.shown(["a.mp4"], video) == Path("a.mp4")
    assert asking.shown(images * 2, video) == images * 2
    for visuals, frozen in ((images, record), ([], record), (None, record), (images[:1], two)):
        with pytest.raises(InputError, match=r"export with --num-images|the question has none"):
            asking.shown(visuals, frozen)
    with pytest.raises(InputError, match="dict"):
        asking.shown([{"array": 1}], record)


def test_lmms_eval_finds_the_model_by_its_entry_point(model_class: Any) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, name = project["entry-points"]["lmms_eval.models"]["edgeprune"].split(":")
    registry = ModuleType("lmms_eval.models.registry_v2")
    with pytest.MonkeyPatch.context() as patch:
        if not INSTALLED:
            patch.setitem(sys.modules, "lmms_eval.models", ModuleType("lmms_eval.models"))
            patch.setitem(sys.modules, registry.__name__, registry)
            patch.setattr(registry, "ModelManifest", Manifest, raising=False)
        found = getattr(importlib.import_module(module), name)()
    assert found.model_id == "edgeprune"
    assert found.simple_class_path == f"{model_class.__module__}.{model_class.__name__}"


def test_the_local_task_asks_what_compare_asks(tmp_path: Path) -> None:
    write(tmp_path, 6)
    own, theirs = Questions(6), Questions(None, tmp_path / "questions.jsonl")
    for a, b in zip(own, theirs, strict=True):
        assert (a.kind, a.text, a.answers) == (b.kind, b.text, b.answers)
        assert isinstance(a.image, Image.Image) and isinstance(b.image, Path)
        with Image.open(b.image) as image:
            assert np.array_equal(np.asarray(a.image), np.asarray(image))
    assert f"test: {tmp_path}" in (tmp_path / "edgeprune_scenes.yaml").read_text()
