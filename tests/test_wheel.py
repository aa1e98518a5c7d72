"""The wheel, installed in a clean environment with the runtime's dependencies and nothing more."""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

import pytest

from edgeprune.demo import MODEL_DIR

ROOT = Path(__file__).resolve().parents[1]

WALK = """
import importlib, pkgutil, sys
import edgeprune.runtime, edgeprune.demo
names = [f"edgeprune.{n}" for n in ("bundle", "spec", "errors", "cost", "cli")]
for package in (edgeprune.runtime, edgeprune.demo):
    names += [m.name for m in pkgutil.walk_packages(package.__path__, package.__name__ + ".")]
for name in names:
    importlib.import_module(name)
assert edgeprune.runtime.__file__.startswith(sys.prefix), edgeprune.runtime.__file__
for name in ("torch", "transformers", "onnx", "export", "runtime", "calib"):
    assert importlib.util.find_spec(name) is None, name
print(len(names))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "-w",
        str(folder),
        str(ROOT),
    ]
    subprocess.run(command, check=True, capture_output=True)
    (built,) = folder.glob("edgeprune-*.whl")
    return built


@pytest.fixture(scope="module")
def clean(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with edgeprune[cpu]; the path of its python."""
    folder = tmp_path_factory.mktemp("env")
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    pins = ["-c", str(ROOT / "constraints.txt")]
    command = [str(python), "-m", "pip", "install", "-q", *pins, f"{wheel}[cpu]"]
    subprocess.run(command, check=True, capture_output=True)
    return python


def test_a_wheel_holds_every_module_and_the_demo_model(wheel: Path) -> None:
    import zipfile

    names = set(zipfile.ZipFile(wheel).namelist())
    for folder in ("edgeprune", "export", "runtime", "calib"):
        for file in (ROOT / folder).rglob("*.py"):
            inside = file.relative_to(ROOT).as_posix()
            assert (inside if folder == "edgeprune" else f"edgeprune/{inside}") in names
    assert f"edgeprune/demo/model/{next(MODEL_DIR.glob('*.safetensors')).name}" in names
    for file in (ROOT / "edgeprune/serve/static").iterdir():
        assert f"edgeprune/serve/static/{file.name}" in names
    assert not {n for n in names if n.startswith(("export/", "runtime/", "calib/", "tests/"))}


def test_the_runtime_works_without_torch(clean: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [str(clean), "-c", "import importlib.util\n" + WALK],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 12


def test_a_bundle_answers_without_torch(clean: Path, demo_utp: Path, tmp_path: Path) -> None:
    from edgeprune.demo.questions import held_out

    image, question = next(held_out(1))
    image.save(tmp_path / "scene.png")
    command = [str(clean), "-m", "edgeprune.cli", "run", str(demo_utp)]
    done = subprocess.run(
        [*command, "--image", "scene.png", "--prompt", question.text],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == question.answer


def test_a_missing_extra_is_named(clean: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [str(clean), "-m", "edgeprune.cli", "export"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "pip install '.[export]'" in done.stderr
    assert done.stderr.count("\n") == 1
