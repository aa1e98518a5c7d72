"""Runtime and server import and work with neither torch nor transformers."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

WALK = """
import json, pkgutil, sys
from importlib import import_module

class Absent:
    '''Makes the heavy packages look as if they were not installed.'''
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HEAVY:
            raise ModuleNotFoundError(f"{name} must not be needed", name=name)

if HIDDEN:
    sys.meta_path.insert(0, Absent())
package = import_module(PACKAGE)
found = [m.name for m in pkgutil.walk_packages(package.__path__, PACKAGE + ".")]
for name in found:
    import_module(name)
loaded = sorted({name.partition(".")[0] for name in sys.modules} & HEAVY)
print(json.dumps([found, loaded]))
"""
HEAVY = {"torch", "torchvision", "transformers", "jinja2", "onnx", "onnxscript", "onnx_ir"}


NAMES = {
    "edgeprune.runtime": {"images", "sampling", "text"},
    "edgeprune.serve": {"app", "dialogues", "server"},
    "edgeprune.watch": {"sources", "watching"},
}


@pytest.mark.parametrize("package", NAMES)
@pytest.mark.parametrize("hidden", [False, True], ids=["installed", "hidden"])
def test_no_module_needs_torch(package: str, hidden: bool) -> None:
    if package == "edgeprune.serve":
        pytest.importorskip("starlette")
        pytest.importorskip("uvicorn")
    script = f"HEAVY, HIDDEN, PACKAGE = {HEAVY!r}, {hidden}, {package!r}\n{WALK}"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found, loaded = json.loads(done.stdout)
    assert {f"{package}.{name}" for name in NAMES[package]} <= set(found), "the walk must see them"
    assert loaded == [], "loaded although it must not be"
