"""dev.py, the repository's own two commands."""

from __future__ import annotations

import runpy
import sys
import venv
from pathlib import Path
from typing import Any

import pytest

DEV = Path(__file__).resolve().parents[1] / "dev.py"


def test_an_older_python_is_refused_before_anything_is_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never(*arguments: Any, **options: Any) -> None:
        raise AssertionError("something was made or started")

    install: Any = runpy.run_path(str(DEV))["install"]
    monkeypatch.setattr("subprocess.call", never)
    monkeypatch.setattr(venv, "create", never)
    monkeypatch.setattr(sys, "version_info", (3, 10, 4))
    with pytest.raises(SystemExit, match=r"need Python 3\.11"):
        install("export")
