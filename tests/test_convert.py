"""`edgeprune convert`: pickles become safetensors, and nothing of them is run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Refused

from edgeprune.cli import main
from edgeprune.models import open_model
from tests import qwen_vl


class Planted:
    """A pickle of it runs a command when it is read as Python reads pickles."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.file}",)


def test_a_converted_checkpoint_opens_with_the_same_weights(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = qwen_vl.checkpoint(tmp_path / "published", pickled=True)
    (model.folder / "modeling_qwen.py").write_text("raise SystemExit")
    assert main(["convert", str(model.folder)]) == 0
    told = capfd.readouterr()
    folder = tmp_path / "published-safetensors"
    assert told.out.strip() == str(folder)
    assert f"{len(model.tensors)} tensors of 2 files" in told.err and "weights-only" in told.err
    assert not list(folder.glob("*.bin*")) and not list(folder.glob("*.py"))
    checkpoint = open_model(str(folder)).checkpoint
    assert checkpoint.files.keys() == model.tensors.keys()
    assert all(torch.equal(checkpoint.read(n), t) for n, t in model.tensors.items())


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "older form"])
def test_planted_code_is_refused_and_not_run(
    zipped: bool, tmp_path: Path, refused: Refused
) -> None:
    model = qwen_vl.checkpoint(tmp_path / "a", pickled=True)
    file, ran = model.folder / "pytorch_model-00002-of-00002.bin", tmp_path / "ran"
    held = {"a": torch.ones(2), "b": Planted(ran)}
    torch.save(held, file, _use_new_zipfile_serialization=zipped)
    said = refused("convert", model.folder)
    assert f"{file} holds more than tensors, or is damaged (it names posix.system)" in said
    assert "nothing of it was run" in said
    assert not ran.exists() and not (tmp_path / "a-safetensors").exists()
    torch.load(file, weights_only=False)
    assert ran.exists(), "so it would have"


def test_tensors_that_share_memory_are_written_apart(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.json").write_text("{}")
    whole = torch.arange(6.0)
    held = {"whole": whole, "same": whole, "part": whole[2:4], "turned": whole.view(2, 3).T}
    torch.save(held, tmp_path / "a" / "pytorch_model.bin")
    assert main(["convert", str(tmp_path / "a"), "-o", str(tmp_path / "b")]) == 0
    from safetensors.torch import load_file

    found = load_file(tmp_path / "b" / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in held.items())


def test_what_is_wrong_is_told(tmp_path: Path, refused: Refused) -> None:
    model = qwen_vl.checkpoint(tmp_path / "a", pickled=True)
    said = refused("models", "--model", model.folder)
    assert "only safetensors are read, not pickles (pytorch_model*.bin): write them as saf" in said
    assert f"edgeprune convert {model.folder}" in said
    file = model.folder / "pytorch_model-00001-of-00002.bin"
    file.write_bytes((whole := file.read_bytes())[:999])
    assert f"{file} is damaged" in refused("convert", model.folder)
    torch.save({"a": 3}, file)
    assert "is no table of tensors by name" in refused("convert", model.folder)
    file.unlink()
    assert f"{file} is missing" in refused("convert", model.folder)
    file.write_bytes(whole)
    said = refused("convert", model.folder, "-o", tmp_path)
    assert f"{tmp_path} exists; remove it, or choose another --output" in said
    assert "nothing to convert" in refused("convert", qwen_vl.checkpoint(tmp_path / "b").folder)
