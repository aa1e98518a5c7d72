"""The layers of ARCHITECTURE.md, held by reading every import statement, those in functions too."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

import edgeprune

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"export": "edgeprune.export", "runtime": "edgeprune.runtime", "calib": "edgeprune.calib"}
HEAVY = {"torch", "transformers", "onnx", "onnx_ir", "onnxscript", "safetensors", "highspy"}

# What a layer may not import. Runtime's allowance of the core is listed below.
ABOVE = {
    "edgeprune.bench",
    "edgeprune.commands",
    "edgeprune.compare",
    "edgeprune.drawing",
    "edgeprune.lmms_eval",
    "edgeprune.making",
    "edgeprune.recipe",
    "edgeprune.report",
    "edgeprune.serve",
    "edgeprune.watch",
}
TORCH_FREE = {"edgeprune.export", "edgeprune.calib", *HEAVY}
BANNED = {
    "edgeprune.compare": {"edgeprune.commands", "edgeprune.report"},
    "edgeprune.bench": {*ABOVE - {"edgeprune.bench", "edgeprune.drawing"}, *TORCH_FREE},
    "edgeprune.report": {
        "edgeprune.commands",
        "edgeprune.making",
        "edgeprune.recipe",
        "edgeprune.serve",
        *TORCH_FREE,
    },
    "edgeprune.lmms_eval": {*ABOVE - {"edgeprune.lmms_eval"}, *TORCH_FREE},
    "edgeprune.serve": {*ABOVE - {"edgeprune.serve"}, *TORCH_FREE},
    "edgeprune.watch": {*ABOVE - {"edgeprune.watch"}, *TORCH_FREE},
    "edgeprune.drawing": {*ABOVE - {"edgeprune.drawing"}, *TORCH_FREE},
    "edgeprune.making": {*ABOVE - {"edgeprune.making", "edgeprune.recipe"}, "edgeprune.runtime"},
    "edgeprune.recipe": {*ABOVE - {"edgeprune.recipe"}, "edgeprune.export", "edgeprune.runtime"},
    "edgeprune.export": {"edgeprune.runtime", "edgeprune.calib", *ABOVE},
    "edgeprune.runtime": {"edgeprune.export", "edgeprune.calib", *ABOVE, *HEAVY},
    "edgeprune.calib": {"edgeprune.export", "edgeprune.runtime", *ABOVE},
    "edgeprune.models": {
        "onnx",
        "onnx_ir",
        "onnxscript",
        "onnxruntime",
        "tensorrt",
        *FOLDERS.values(),
        *ABOVE,
    },
    "edgeprune.policies": {
        "onnx",
        "onnx_ir",
        "onnxscript",
        "onnxruntime",
        "edgeprune.models",
        *ABOVE,
    },
    "edgeprune.encoder_methods": {
        "onnx",
        "onnx_ir",
        "onnxscript",
        "onnxruntime",
        "edgeprune.models",
        *FOLDERS.values(),
        *ABOVE,
    },
    "edgeprune.demo": {*HEAVY, "edgeprune.models", *FOLDERS.values(), *ABOVE},
}
EXTRAS = {"edgeprune.serve": "starlette", "edgeprune.lmms_eval.model": "lmms_eval"}
"""What a part needs that not every installation has."""
IMAGING = {"images", "patches", "rgb", "tile_choice", "tile_views"}
"""Modules at the package's root that use NumPy and Pillow, which every installation has."""
OUTER = {"__init__", "__main__", "cli", "cluster", "making", "recipe"}
"""Those that may import layers below them."""
CORE = {file.stem for file in (ROOT / "edgeprune").glob("*.py")} - IMAGING - OUTER
"""All others: they use the standard library alone, so that runtime may use them."""


def sources() -> Iterator[tuple[str, Path]]:
    """Every module of the package by its installed name."""
    for file in sorted((ROOT / "edgeprune").rglob("*.py")):
        yield _name("edgeprune", file.relative_to(ROOT / "edgeprune")), file
    for folder, package in FOLDERS.items():
        for file in sorted((ROOT / folder).rglob("*.py")):
            yield _name(package, file.relative_to(ROOT / folder)), file


def _name(package: str, path: Path) -> str:
    parts = [package, *path.with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(file: Path) -> set[str]:
    """Full names that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


@pytest.mark.parametrize("layer", BANNED)
def test_imports_point_down(layer: str) -> None:
    modules = [(name, file) for name, file in sources() if within(name, layer)]
    assert modules
    for name, file in modules:
        wrong = {i for i in imports(file) for ban in BANNED[layer] if within(i, ban)}
        assert not wrong, f"{name} imports {wrong}"


def test_runtime_uses_no_more_of_the_core_than_it_may() -> None:
    allowed = {f"edgeprune.{name}" for name in CORE | IMAGING} | {"edgeprune.runtime"}
    for name, file in sources():
        if within(name, "edgeprune.runtime"):
            ours = {i for i in imports(file) if within(i, "edgeprune")}
            wrong = {i for i in ours if not any(within(i, a) for a in allowed)}
            assert not wrong, f"{name} imports {wrong}"


@pytest.mark.parametrize("module", sorted(CORE))
def test_the_core_is_standard_library(module: str) -> None:
    outside = {i.partition(".")[0] for i in imports(ROOT / "edgeprune" / f"{module}.py")}
    assert outside <= {*sys.stdlib_module_names, "edgeprune"}


def test_the_architecture_lists_the_core() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    lists = re.findall(r"edgeprune/\{([\w,\s]+)\}\.py", text)
    core, imaging = ({name.strip() for name in one.split(",")} for one in lists)
    assert (core, imaging) == (CORE, IMAGING)


@pytest.mark.parametrize("module", sorted(IMAGING))
def test_images_need_numpy_and_pillow_alone(module: str) -> None:
    found = imports(ROOT / "edgeprune" / f"{module}.py")
    assert {i.partition(".")[0] for i in found} <= {
        *sys.stdlib_module_names,
        "edgeprune",
        "numpy",
        "PIL",
    }
    ours = {i for i in found if within(i, "edgeprune")}
    assert all(any(within(i, f"edgeprune.{name}") for name in CORE | IMAGING) for i in ours)


def test_every_package_is_listed_for_the_wheel() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    block = re.search(r"^packages = \[(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    assert block is not None
    listed = re.findall(r'"([\w.]+)"', block[1])
    packages = {name for name, file in sources() if file.name == "__init__.py"}
    assert set(listed) == packages


def test_every_module_imports() -> None:
    names = [m.name for m in pkgutil.walk_packages(edgeprune.__path__, "edgeprune.")]
    for package in FOLDERS.values():
        names += [
            m.name
            for m in pkgutil.walk_packages(importlib.import_module(package).__path__, package + ".")
        ]
    assert len(names) > 30
    for name in names:
        if all(find_spec(needed) or not within(name, part) for part, needed in EXTRAS.items()):
            importlib.import_module(name)


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys\nfrom edgeprune.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stderr.split()}
    assert "export" in done.stdout
    assert not loaded & {*HEAVY, "numpy", "PIL", "onnxruntime", "tokenizers", "starlette"}
