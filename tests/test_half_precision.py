"""Exports in half precision: what is told of them, what is found in them, what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Refused
from safetensors.torch import load_file, save_file
from torch import Tensor

from edgeprune.bundle import Bundle
from edgeprune.cli import main
from edgeprune.errors import ParityError
from edgeprune.export import parity
from edgeprune.models import open_model
from edgeprune.models._processor import random_prompt
from edgeprune.policies import make
from edgeprune.spec import PruneSpec
from tests.families import llava
from tests.frozen import compared
from tests.graphs import scaled

METHOD = ["--method", "fastv", "--cr", "1.5", "--set", "K=1"]
HALF = ("fp16", "bf16")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llava().save(tmp_path_factory.mktemp("half") / "llava")


@pytest.fixture(scope="module")
def bundles(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The bundle of a dtype, exported once."""
    folder = tmp_path_factory.mktemp("bundles")

    def bundle(dtype: str) -> Path:
        if not (folder / dtype).exists():
            command = ["export", "--model", str(checkpoint), *METHOD, "--dtype", dtype]
            assert main([*command, "--target", "rtx", "-o", str(folder / dtype)]) == 0
        return folder / dtype

    return bundle


@pytest.mark.parametrize("dtype", HALF)
def test_the_distance_to_float32_is_told_and_kept(
    dtype: str, checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    capfd.readouterr()
    command = ["export", "--model", str(checkpoint), *METHOD, "--dtype", dtype]
    assert main([*command, "--target", "rtx", "-o", str(tmp_path / "bundle")]) == 0
    told = capfd.readouterr().err
    record = Bundle.open(tmp_path / "bundle").manifest.parity
    assert (record.samples, record.ties, record.tolerance) == (8, 0, parity.TOLERANCE)
    assert record.eager is not None and list(record.eager.overlap) == ["kept.2"]
    least, most = {"fp16": (1e-4, 1e-2), "bf16": (1e-3, 1e-1)}[dtype]
    assert least < record.eager.logits < most
    assert record.eager.tokens > 0.8
    assert (record.graph is None) == (dtype == "bf16")
    assert "both in float32 with rounded weights: 8 samples, 0 ties" in told
    shown = f"{dtype} beside float32, eager: kept tokens in common kept.2 "
    assert f"{shown}{record.eager.overlap['kept.2']:.3f}; logits {record.eager.logits:.1e}" in told
    assert ("the bf16 graph itself was not run" in told) == (dtype == "bf16")
    assert ("fp16 beside float32, graph: " in told) == (dtype == "fp16")


@pytest.mark.parametrize("dtype", ["fp32", *HALF])
def test_a_small_fault_in_one_tensor_is_found_in_every_dtype(
    dtype: str, bundles: Callable[[str], Path], checkpoint: Path
) -> None:
    bundle, adapter = bundles(dtype), open_model(str(checkpoint))
    spec = PruneSpec("fastv", 1.5, options={"K": "1"})
    prompts = [random_prompt(adapter.pixels, adapter.shape.vocabulary, n) for n in range(4)]

    def check() -> None:
        compared(bundle, adapter, make(spec), prompts)

    check()
    for name in ("layers.1.mlp.down.weight", "layers.2.attention.query.weight"):
        with scaled(bundle, "decoder", name, 1.01), pytest.raises(ParityError):
            check()
    with scaled(bundle, "vision", "encoder.blocks.1.up.weight", 1.01), pytest.raises(ParityError):
        check()
    check()


Edit = Callable[[dict[str, Tensor]], None]


@pytest.fixture
def edited(checkpoint: Path, tmp_path: Path) -> Callable[[Edit], Path]:
    """A copy of the checkpoint whose tensors were changed."""

    def copy(edit: Edit) -> Path:
        folder = Path(shutil.copytree(checkpoint, tmp_path / "edited"))
        tensors = load_file(folder / "model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder

    return copy


def _times(part: str, factor: float, row: int | None = None) -> Edit:
    """Multiply what has `part` in its name: a row, or all of it."""

    def edit(tensors: dict[str, Tensor]) -> None:
        names = [name for name in tensors if part in name]
        assert names
        for name in names:
            tensors[name][slice(None) if row is None else row] *= factor

    return edit


@pytest.mark.parametrize(
    "part", ["language_model.model.layers.1.mlp.down_proj.weight", "layers.1.mlp.fc2.weight"]
)
def test_a_model_that_overflows_is_refused_in_fp16_alone(
    part: str, edited: Callable[[Edit], Path], refused: Refused, tmp_path: Path
) -> None:
    """The weights fit, what is computed from them does not: in the decoder, in the encoder."""
    model, output = edited(_times(part, 1e5, row=5)), tmp_path / "bundle"
    command = ["export", "--model", model, *METHOD, "-o", output]
    line = refused(*command, "--target", "cuda")
    assert "fp16 ends at 65,504" in line and "--dtype bf16" in line
    assert not output.exists()
    assert main([str(word) for word in [*command, "--target", "rtx", "--dtype", "bf16"]]) == 0
    assert Bundle.open(output).manifest.parity.ties == 0


def test_numbers_that_vanish_in_fp16_are_another_model(
    edited: Callable[[Edit], Path], refused: Refused, tmp_path: Path
) -> None:
    """All is finite, and graph and eager model agree; only float32 shows that it is garbage."""
    small = ("embed_tokens", "o_proj", "down_proj", "multi_modal_projector")

    def shrink(tensors: dict[str, Tensor]) -> None:
        for part in small:
            _times(part, 1e-8)(tensors)

    model, output = edited(shrink), tmp_path / "bundle"
    config = json.loads((model / "config.json").read_text())
    config["text_config"]["rms_norm_eps"] = 1e-30
    (model / "config.json").write_text(json.dumps(config))
    command = ["export", "--model", model, "--method", "none", "-o", output]
    line = refused(*command, "--target", "cuda")
    assert "fp16 does not hold this model: the eager model's logits are" in line
    assert main([str(word) for word in [*command, "--target", "rtx", "--dtype", "bf16"]]) == 0
