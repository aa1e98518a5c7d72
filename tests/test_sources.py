"""A weight may be stored in several tensors, with another factor and offset than is meant."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import Refused
from safetensors.torch import load_file, save_file
from torch import Tensor

from edgeprune.models import open_model
from edgeprune.models._names import Stored
from edgeprune.models.llava import Adapter
from edgeprune.policies import make
from edgeprune.spec import Plan, PruneSpec
from tests import families
from tests.test_lora import ALPHA, RANK, adapt, noise
from tests.test_weights import SINGLE

QUERY = re.compile(r"layers\.\d+\.(self_attn\.q_proj|attention\.query)\.weight$")
NORM = re.compile(r"layers\.\d+\.\w+norm\.weight$")
DOWN = re.compile(r"layers\.\d+\.mlp\.down(_proj)?\.weight$")
ROWS = (8, 24)
"""Of the two tensors that a query's weight is stored as."""


def part(name: str, number: int) -> str:
    return name.replace(".weight", f".{number}.weight")


class Other(Adapter):
    """Queries in two tensors, norms less 1, the MLP's last product twice as large."""

    def stored(self, parameter: str) -> Stored:
        plain = super().stored(parameter)
        if QUERY.match(parameter):
            (names,) = plain.parts
            return replace(plain, parts=tuple(tuple(part(n, i) for n in names) for i in (0, 1)))
        if NORM.match(parameter):
            return replace(plain, offset=1.0)
        return replace(plain, factor=0.5) if DOWN.match(parameter) else plain


def rewritten(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As Other reads them."""
    found = {}
    for name, tensor in tensors.items():
        if "language_model" not in name:
            found[name] = tensor
        elif QUERY.search(name):
            pieces = enumerate(tensor.split(ROWS))
            found |= {part(name, number): piece.clone() for number, piece in pieces}
        elif NORM.search(name):
            found[name] = tensor - 1
        else:
            found[name] = tensor * 2 if DOWN.search(name) else tensor
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return families.llava().save(tmp_path / "tiny")


def rewrite(folder: Path, monkeypatch: pytest.MonkeyPatch, **more: Tensor) -> None:
    """Store the checkpoint as Other does, and open such checkpoints with it."""
    tensors = {**rewritten(load_file(folder / SINGLE)), **more}
    save_file(tensors, folder / SINGLE, {"format": "pt"})
    monkeypatch.setattr("edgeprune.models.llava.Adapter", Other)


def weights(folder: Path) -> dict[str, Tensor]:
    """What the decoder's parameters become."""
    adapter = open_model(str(folder))
    plan = Plan(adapter.shape.visual_tokens, adapter.shape.layers)
    with torch.device("meta"):
        module = adapter.decoder(make(PruneSpec("none")), plan)
    return adapter.load(module).state_dict()


def test_parts_factors_and_offsets_give_the_weights_that_are_meant(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = weights(folder)
    rewrite(folder, monkeypatch)
    assert open_model(str(folder)).all_notes == ()
    found = weights(folder)
    assert found.keys() == wanted.keys()
    for name, weight in wanted.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-7, msg=name)


def test_a_lora_adapter_changes_one_of_several_tensors(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    query = "layers.1.attention.query.weight"
    before = weights(folder)[query]
    names = [name for name in load_file(folder / SINGLE) if "layers.1.self_attn.q_proj" in name]
    rewrite(folder, monkeypatch)
    module = part(names[0], 1).removesuffix(".weight")
    first, second = noise(RANK, 32, seed=1), noise(ROWS[1], RANK, seed=2)
    adapt(folder, {f"{module}.lora_A.weight": first, f"{module}.lora_B.weight": second})
    change = (weights(folder)[query] - before).T
    torch.testing.assert_close(change[: ROWS[0]], torch.zeros(ROWS[0], 32))
    torch.testing.assert_close(change[ROWS[0] :], ALPHA / RANK * second @ first)


@pytest.mark.parametrize("shape", [(9, 32), (8, 31)])
def test_parts_that_do_not_make_the_whole_are_refused(
    shape: tuple[int, int], folder: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [name for name in load_file(folder / SINGLE) if "layers.1.self_attn.q_proj" in name]
    rewrite(folder, monkeypatch, **{part(names[0], 0): torch.ones(shape)})
    said = refused("models", "--model", folder)
    sizes = f"{part(names[0], 0)} is {list(shape)} and {part(names[0], 1)} is [24, 32],"
    assert f"{sizes} config.json says [32, 32]; the two are not of one checkpoint" in said


def test_a_large_embedding_comes_some_rows_at_a_time(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products and vectors come whole: they lie in another order, or are small."""
    monkeypatch.setattr("edgeprune.models._quantised.STRIP", 1024)
    adapter = open_model(str(folder))
    plan = Plan(adapter.shape.visual_tokens, adapter.shape.layers)
    with torch.device("meta"):
        module = adapter.decoder(make(PruneSpec("none")), plan)
    found = {
        name: list(adapter.reader.rows(source, torch.float32))
        for name, source in adapter.sources(module).items()
    }
    parts = {name: len(pieces) for name, pieces in found.items() if len(pieces) > 1}
    assert parts == {"embedding.weight": 3, "head.weight": 3}
    for name, weight in weights(folder).items():
        assert torch.equal(torch.cat(found[name]), weight), name
