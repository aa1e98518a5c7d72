"""What runs on a device needs nothing that only POSIX systems have.

No Windows is at hand. `tests/typecheck.py` asks mypy for names that are missing there; here imports
are read, and a bundle is asked in a process that has no such module and says that it is Windows.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_layers import sources

POSIX = ("fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty")
GUARD = "sys.platform != 'win32'"

PRETEND = f"""
import sys
# What is not ours may look at the platform, so it is imported before that is another one.
import asyncio, concurrent.futures, ctypes, logging, multiprocessing, subprocess, tempfile
import numpy, onnxruntime, PIL.Image, PIL.ImageDraw, PIL.ImageFont, tokenizers
import h11, starlette.applications, starlette.responses, starlette.routing, uvicorn
for name in {POSIX}:
    sys.modules[name] = None
sys.platform = "win32"

import pkgutil
from importlib import import_module
import edgeprune
for package in ("bench", "drawing", "report", "runtime", "serve", "watch", "commands"):
    found = import_module("edgeprune." + package)
    for module in pkgutil.walk_packages(found.__path__, found.__name__ + "."):
        import_module(module.name)

from pathlib import Path
from edgeprune.files import replaced
from edgeprune.runtime import Session
with replaced(Path(sys.argv[2]) / "folder") as draft:
    (draft / "file").write_text("written")
with Session.open(sys.argv[1]) as session:
    answer = session.ask(PIL.Image.new("RGB", (40, 40)), "what color is the star ?")
print(answer.finish, (Path(sys.argv[2]) / "folder" / "file").read_text())
"""


def unguarded(node: ast.AST) -> Iterator[str]:
    """Modules of POSIX that are imported outside of the block that Windows passes over."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.name in POSIX)
    elif isinstance(node, ast.ImportFrom) and node.module in POSIX:
        yield node.module
    guarded = isinstance(node, ast.If) and ast.unparse(node.test) == GUARD
    parts = node.orelse if isinstance(node, ast.If) and guarded else ast.iter_child_nodes(node)
    for part in parts:
        yield from unguarded(part)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("import resource", ["resource"]),
        ("def f():\n    from pwd import getpwnam", ["pwd"]),
        ("if sys.platform != 'win32':\n    import fcntl", []),
        ("if sys.platform != 'win32':\n    pass\nelse:\n    import fcntl", ["fcntl"]),
        ("import os", []),
    ],
)
def test_imports_are_found(text: str, found: list[str]) -> None:
    assert list(unguarded(ast.parse(text))) == found


def test_modules_of_posix_are_imported_where_they_are() -> None:
    wrong = {
        name: found
        for name, file in sources()
        if (found := list(unguarded(ast.parse(file.read_text(encoding="utf-8")))))
    }
    assert not wrong


def test_a_bundle_answers_without_modules_of_posix(tiny_jetpack7: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", PRETEND, str(tiny_jetpack7), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() in (["length", "written"], ["stop", "written"])
