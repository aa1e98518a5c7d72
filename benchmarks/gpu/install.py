"""Installs edgeprune from a folder of wheels, where there is no package index.

`--wheels DIR` makes an environment beside the wheels, installs from them alone, and runs the same
command in it. What the machine itself has, such as JetPack's TensorRT, is seen from there.

This file needs the standard library alone.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = "environment"
"""In the folder of wheels."""
OPTION = "--wheels"
EXTRAS = {"ort-cpu": "cpu", "ort-cuda": "gpu", "trt-rtx": "trt-rtx"}
"""What a backend needs; TensorRT itself comes with JetPack, or is installed by hand."""
BUILDS = "setuptools>=77"
"""What an installation from a checkout is made with."""


def add(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        OPTION, type=Path, metavar="DIR", help="install from this folder first, without an index"
    )


def asked(arguments: Sequence[str]) -> Path | None:
    """The folder that a command line names; None where it names none."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(OPTION, type=Path)
    found: Path | None = parser.parse_known_args(list(arguments))[0].wheels
    return found


def again(folder: Path, arguments: Sequence[str]) -> int:
    """Install, and run the same command in the environment; its exit status."""
    python = installed(folder, extras(arguments))
    rest = list(arguments)
    for place, argument in enumerate(rest):
        if argument == OPTION:
            del rest[place : place + 2]
            break
    rest = [argument for argument in rest if not argument.startswith(f"{OPTION}=")]
    command = [str(python), "-m", "benchmarks.gpu", *rest]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


def extras(arguments: Sequence[str]) -> list[str]:
    """The extras of the backends that a command line names; those of its default where none."""
    named = [EXTRAS[argument] for argument in arguments if argument in EXTRAS]
    return named or ["cpu" if "--dry" in arguments else "gpu"]


def installed(folder: Path, wanted: Sequence[str]) -> Path:
    """The Python of an environment that has edgeprune with these extras."""
    if not any(folder.glob("*.whl")):
        raise SystemExit(
            f"{folder} holds no wheels; fill it where there is an index: python -m benchmarks.gpu"
            f" wheels {folder}"
        )
    home = folder / ENVIRONMENT
    place = home / ("Scripts" if sys.platform == "win32" else "bin")
    python = place / Path(sys.executable).name
    if not python.is_file():
        _run([sys.executable, "-m", "venv", "--system-site-packages", str(home)])
    source = ["--no-index", "--find-links", str(folder.resolve())]
    checkout = f"{ROOT}[{','.join(wanted)}]"
    _run([str(python), "-m", "pip", "install", "-q", *source, "-e", checkout])
    return python.absolute()  # not resolved: the link's target is the machine's own Python


def add_download(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser("wheels", help="fill a folder for --wheels; needs an index")
    command.add_argument("folder", type=Path)
    command.add_argument("--extras", nargs="+", default=["gpu"], metavar="EXTRA")
    command.add_argument("--python", metavar="X.Y", help="of the device (default: as here)")
    command.add_argument("--platform", metavar="TAG", help="of the device (default: as here)")


def download(
    folder: Path, wanted: Sequence[str], python: str | None = None, platform: str | None = None
) -> None:
    """Fetch all wheels that the extras need, for another Python or platform where one is named."""
    other = [f"--python-version={python}"] if python else []
    other += [f"--platform={platform}"] if platform else []
    base = [sys.executable, "-m", "pip", "download", "-q", "-d", str(folder)]
    listed = [*requirements(wanted), BUILDS]
    _run([*base, "--only-binary=:all:", *other, *listed])


def requirements(wanted: Sequence[str]) -> list[str]:
    """What pyproject.toml lists for the base and for these extras."""
    import tomllib  # Python 3.11; the device's own may be older

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    offered = project["optional-dependencies"]
    if unknown := [name for name in wanted if name not in offered]:
        raise SystemExit(f"no extra {unknown[0]!r}; there are: {', '.join(sorted(offered))}")
    found = [*project["dependencies"], *(line for name in wanted for line in offered[name])]
    return [line for line in found if not re.match(r"edgeprune\[", line)]


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        why = lines[-1] if lines else done.stderr.strip() or done.stdout.strip()
        raise SystemExit(f"{' '.join(command[1:4])} failed: {why}")
