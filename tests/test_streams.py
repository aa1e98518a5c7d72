"""Standard streams of the real command: closed, full, and with what others would have it print."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgeprune.cli import main
from edgeprune.commands import run as run_command
from edgeprune.terminal import Printable, note, plain_streams, printable
from tests.test_errors_bundle import QUESTION
from tests.test_layers import sources

pytestmark = pytest.mark.skipif(os.name != "posix", reason="POSIX shells and devices")

ESCAPE = "\x1b]0;taken over\x07\x1b[31m"


def shell(command: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """A line of sh; `$E` is edgeprune, `$@` the arguments."""
    environment = {**os.environ, "E": f"{sys.executable} -m edgeprune.cli"}
    return subprocess.run(
        ["sh", "-c", command, "sh", *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )


def test_stderr_that_is_closed_leaves_stdout_to_the_answer(tiny_bundle: Path) -> None:
    done = shell('$E run "$@" --json --max-new-tokens 2 2>&-', tiny_bundle, *QUESTION)
    assert json.loads(done.stdout)["turns"][0]["ids"] and done.returncode == 0


def test_all_streams_closed_but_stdout(tiny_bundle: Path) -> None:
    """No file of the bundle is opened under the number of a standard stream."""
    done = shell('$E run "$@" --json --max-new-tokens 2 <&- 2>&-', tiny_bundle, *QUESTION)
    assert json.loads(done.stdout)["turns"][0]["ids"] and done.returncode == 0


def test_stdout_that_is_closed() -> None:
    done = shell("$E methods >&-")
    assert done.returncode == 2
    assert done.stderr == (
        "edgeprune: stdout is closed, where the answer goes; send it to a file or to /dev/null\n"
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("command", ["--help", "methods"])
def test_stdout_that_is_full(command: str) -> None:
    done = shell(f"$E {command} >/dev/full")
    assert done.returncode == 2
    assert done.stderr == (
        "edgeprune: stdout cannot be written (No space left on device); make room there\n"
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_an_answer_that_finds_no_room(tiny_bundle: Path) -> None:
    done = shell('$E run "$@" --json --max-new-tokens 2 >/dev/full', tiny_bundle, *QUESTION)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("edgeprune: stdout cannot be written (")


def test_native_libraries_are_not_heard(capfd: pytest.CaptureFixture[str]) -> None:
    def noisy(args: Any) -> int:
        os.write(2, b"\x1b[0;93m[W:onnxruntime] coloured\n")
        print("answer")
        note("ours")
        return 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_command, "run", noisy)
        assert main(["run", "b", "--image", "i", "--prompt", "p"]) == 0
        assert capfd.readouterr() == ("answer\n", "ours\n")
        patch.setenv("EDGEPRUNE_DEBUG", "1")
        assert main(["run", "b", "--image", "i", "--prompt", "p"]) == 0
        assert "coloured" in capfd.readouterr().err
    os.write(2, b"heard again\n")
    assert capfd.readouterr().err == "heard again\n"


def test_warnings_do_not_precede_the_one_line(tmp_path: Path) -> None:
    """A warning of numpy's or Pillow's is for programmers."""
    code = (
        "import sys, warnings\n"
        "from edgeprune.commands import run\n"
        "from edgeprune.cli import main\n"
        "def warn(args):\n"
        "    warnings.warn('overflow encountered in cast', RuntimeWarning)\n"
        "    raise OSError('the one line')\n"
        "run.run = warn\n"
        "sys.exit(main(['run', 'b', '--image', 'i', '--prompt', 'p']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "edgeprune: the one line\n")


def test_control_characters_of_a_manifest(
    copy_bundle: Callable[[], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    manifest = json.loads((file := copy_bundle() / "manifest.json").read_text())
    file.write_text(json.dumps(manifest | {"name": ESCAPE, "model": ESCAPE}))
    bundle = str(file.parent)
    assert main(["run", bundle, bundle, *map(str, QUESTION), "--max-new-tokens", "1"]) == 0
    out, err = capfd.readouterr()
    assert main(["check", bundle]) == 0
    more, _ = capfd.readouterr()
    for text in (out, err, more):
        assert "\\x1b]0;taken over\\x07\\x1b[31m" in text and "\x1b" not in text


def test_control_characters_of_an_answer(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Lines and tabs stay, all else is an escape; JSON has the text as it is, in ASCII."""
    from edgeprune.runtime.text import Prompter

    monkeypatch.setattr(Prompter, "pieces", lambda self, ids: [list(ids), f"a\n\tb{ESCAPE}"][1:])
    arguments = ["run", str(tiny_bundle), *map(str, QUESTION), "--max-new-tokens", "1"]
    assert main(arguments) == 0
    assert capfd.readouterr().out == "a\n\tb\\x1b]0;taken over\\x07\\x1b[31m\n"
    assert main([*arguments, "--json"]) == 0
    out = capfd.readouterr().out
    assert json.loads(out)["turns"][0]["text"] == f"a\n\tb{ESCAPE}" and "\x1b" not in out


def test_control_characters_of_a_command_line(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([ESCAPE])
    assert "\x1b" not in capfd.readouterr().err
    assert main(["run", ESCAPE, "--image", str(QUESTION[1]), "--prompt", "p"]) == 2
    assert "\x1b" not in capfd.readouterr().err


def test_what_is_printable() -> None:
    assert printable("a\tb\n\u00e9\u4e2d \U0001f600") == "a\tb\n\u00e9\u4e2d \U0001f600"
    assert printable("\r\x00\x7f\x9b\u202e") == "\\r\\x00\\x7f\\x9b\\u202e"


def test_a_stream_of_another_encoding(tmp_path: Path) -> None:
    with (tmp_path / "out").open("w", encoding="ascii") as stream:
        print("caf\u00e9 \udcff", file=Printable(stream))  # type: ignore[call-overload]
    assert (tmp_path / "out").read_text() == "caf\\xe9 \\udcff\n"


def test_streams_are_given_back() -> None:
    before = sys.stdout, sys.stderr, os.fstat(2)
    with plain_streams(native=False):
        assert sys.stdout is not before[0]
    assert (sys.stdout, sys.stderr, os.fstat(2)) == before


def test_one_module_speaks_to_people() -> None:
    """What goes to stderr is made printable, so nobody else writes there."""
    allowed = {"edgeprune.terminal", "edgeprune.progress", "edgeprune.bench.worker"}
    for name, file in sources():
        tree = ast.parse(file.read_text(encoding="utf-8"))
        uses = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
        if any(node.attr in ("stderr", "__stderr__") for node in uses):
            assert name in allowed, f"{name} writes to stderr; use edgeprune.terminal.note"
