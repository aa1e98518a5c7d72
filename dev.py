#!/usr/bin/env python3
"""The repository's two commands; needs Python 3.11+ and pip only, makes an environment in .venv.

python3 dev.py demo    install, export the demo model dense and pruned, ask both about an image
python3 dev.py test    install what tests need and run every check and test
"""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
ENV = ROOT / ".venv"
BIN = ENV / ("Scripts" if os.name == "nt" else "bin")
PYTHON = BIN / "python"
SAMPLE = "edgeprune/demo/samples/scene-1.png"
QUESTION = "what digit is on the purple card ?"


def run(*command: str | Path, **environment: str) -> None:
    """Run one command from the root; leave with its exit code where it fails."""
    print("$", " ".join(str(part) for part in command).replace(f"{BIN}{os.sep}", ""), flush=True)
    code = subprocess.call([str(c) for c in command], cwd=ROOT, env={**os.environ, **environment})
    if code:
        sys.exit(code)


def install(extra: str) -> None:
    """Create .venv where there is none and install the pinned dependencies of an extra."""
    if sys.version_info < (3, 11):
        found = ".".join(map(str, sys.version_info[:3]))
        sys.exit(f"ONNX Runtime and transformers need Python 3.11; {sys.executable} is {found}")
    if not PYTHON.exists():
        venv.create(ENV, with_pip=True)
    run(PYTHON, "-m", "pip", "install", "-q", "--disable-pip-version-check",
        "-c", "constraints.txt", "-e", f".[{extra}]")  # fmt: skip


def demo() -> None:
    install("export")
    edgeprune = BIN / "edgeprune"
    run(edgeprune, "export", "--method", "none")
    run(edgeprune, "export", "--method", "utp", "--cr", "4")
    run(edgeprune, "run", "out/demo-none", "out/demo-utp-cr4", "--image", SAMPLE,
        "--prompt", QUESTION)  # fmt: skip


def test() -> None:
    install("dev")
    run(PYTHON, "-m", "ruff", "format", "--check", ".")
    run(PYTHON, "-m", "ruff", "check", ".")
    run(PYTHON, "tests/typecheck.py")
    # A process per core, one thread in each: several would only wait for each other.
    run(PYTHON, "-m", "pytest", "-q", "-n", "auto", "--dist", "loadfile",
        "--randomly-seed=1", *sys.argv[2:],
        OMP_NUM_THREADS="1")  # fmt: skip


if __name__ == "__main__":
    commands = {"demo": demo, "test": test}
    if len(sys.argv) < 2 or sys.argv[1] not in commands:
        sys.exit(__doc__)
    commands[sys.argv[1]]()
