"""The runtime imports and works with neither torch nor transformers."""

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
runtime = import_module("edgeprune.runtime")
found = [m.name for m in pkgutil.walk_packages(runtime.__path__, "edgeprune.runtime.")]
for name in found:
    import_module(name)
loaded = sorted({name.partition(".")[0] for name in sys.modules} & HEAVY)
print(json.dumps([found, loaded]))
"""
HEAVY = {"torch", "torchvision", "transformers", "jinja2", "onnx", "onnxscript", "onnx_ir"}


@pytest.mark.parametrize("hidden", [False, True], ids=["installed", "hidden"])
def test_no_module_of_the_runtime_needs_torch(hidden: bool) -> None:
    script = f"HEAVY, HIDDEN = {HEAVY!r}, {hidden}\n{WALK}"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found, loaded = json.loads(done.stdout)
    names = {"edgeprune.runtime.images", "edgeprune.runtime.sampling", "edgeprune.runtime.text"}
    assert names <= set(found), "the walk must see the modules"
    assert loaded == [], "loaded although the runtime must not"
