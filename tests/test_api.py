"""The public API: names are there, lazy, documented, and the example of its page runs."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import edgeprune

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")


def test_every_public_name_is_there_and_documented() -> None:
    assert sorted(edgeprune.__all__) == edgeprune.__dir__()
    table = PAGE.partition("| --- |")[2]
    for name in edgeprune.__all__:
        assert getattr(edgeprune, name) is not None
        assert name == "__version__" or f"`{name}`" in table
    folders = {item.name for item in (ROOT / "edgeprune").iterdir() if item.is_dir()}
    assert not {*edgeprune.__all__} & {*folders, "export", "runtime", "calib"}


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nosuch'"):
        _ = edgeprune.nosuch


def test_a_session_is_imported_without_what_export_needs() -> None:
    code = "import edgeprune, sys; edgeprune.Session, edgeprune.Engine; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert not loaded & {"torch", "transformers", "onnx", "onnx_ir", "safetensors"}


def test_the_example_of_the_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copyfile(ROOT / "edgeprune/demo/samples/scene-1.png", tmp_path / "scene.png")
    monkeypatch.chdir(tmp_path)
    found = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert found is not None
    exec(compile(found[1], "docs/api.md", "exec"), {})
    assert len(capsys.readouterr().out.splitlines()) == 4
