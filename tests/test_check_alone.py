"""`check` on a device: it looks through graphs where onnx is, and says what to install if not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


def run(bundle: Path, *missing: str) -> subprocess.CompletedProcess[str]:
    """`check` in a process in which these packages cannot be imported."""
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({missing!r}))\n"
        "from edgeprune.cli import main; sys.exit(main(['check', sys.argv[1]]))"
    )
    command = [sys.executable, "-c", code, str(bundle)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("what", ["bundle", "file"])
def test_a_bundle_is_looked_through_without_torch(tiny_jetpack7: Path, what: str) -> None:
    asked = tiny_jetpack7 if what == "bundle" else tiny_jetpack7 / "decoder.onnx"
    done = run(asked, "torch", "transformers", "onnx_ir", "onnxscript", "safetensors")
    assert done.returncode == 0, done.stderr
    assert "TensorRT 10.3 (JetPack 6.2)" in done.stdout


def test_without_onnx_one_line_says_what_to_install(tiny_jetpack7: Path) -> None:
    done = run(tiny_jetpack7, "onnx")
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert "check BUNDLE needs the package onnx" in line and "pip install '.[check]'" in line
