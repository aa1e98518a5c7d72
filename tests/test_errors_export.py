"""An export that cannot end well: the folder, the disk, a signal. Nothing half-written is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import onnxruntime
import pytest
from conftest import TINY, Refused

from benchmarks.shapes import write
from edgeprune.bundle import Bundle, atomic_folder
from edgeprune.cli import main
from edgeprune.errors import BundleError
from edgeprune.export.exporter import check_topk
from edgeprune.spec import flat_plan

if sys.platform != "win32":
    import resource

posix = pytest.mark.skipif(os.name != "posix", reason="POSIX signals and limits")


@pytest.fixture
def command(tiny_checkpoint: Path) -> list[str]:
    """The quickest export there is."""
    return ["export", "--model", str(tiny_checkpoint), "--method", "none", "--parity", "0"]


def _tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too, with its content."""
    files = (file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def test_a_place_that_is_taken(command: list[str], tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "manifest.json").write_text("{}")  # of some other program
    before = _tree(tmp_path)
    assert "file is a file, a bundle is a folder" in refused(*command, "-o", tmp_path / "file")
    assert "folder exists and is no bundle" in refused(*command, "-o", tmp_path / "folder")
    assert "choose another --output" in refused(*command, "-o", tmp_path / "file" / "bundle")
    assert _tree(tmp_path) == before


@pytest.mark.parametrize("output", [".", "..", "folder/.."])
def test_a_place_without_a_name_is_refused_at_once(
    output: str,
    command: list[str],
    tmp_path: Path,
    refused: Refused,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "empty" / "folder").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "empty")
    line = refused(*command, "-o", output)
    assert (
        f"has no name of its own; choose another --output, such as {Path(output, 'bundle')}" in line
    )


def test_a_place_that_cannot_be_written(
    command: list[str], tmp_path: Path, refused: Refused
) -> None:
    folder = tmp_path / "closed"
    folder.mkdir(0o555)
    if os.access(folder, os.W_OK):  # we are root; /proc says no even to root
        folder = Path("/proc")
        if not folder.is_dir():
            pytest.skip("nothing here is closed to root")
    line = refused(*command, "-o", folder / "bundle")
    assert str(folder) in line and ("cannot write" in line or "nothing can be written" in line)


@contextmanager
def _largest_file(size: int) -> Iterator[None]:
    """As on a disk that fills up: what grows beyond `size` bytes fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@posix
@pytest.mark.parametrize("size", [200_000, 2_500], ids=["weights", "text"])
def test_a_file_that_cannot_grow(
    size: int,
    command: list[str],
    copy_bundle: Callable[[], Path],
    tmp_path: Path,
    refused: Refused,
) -> None:
    """And the bundle that was to be replaced is still there, whole."""
    bundle = copy_bundle()
    before = _tree(tmp_path)
    with _largest_file(size):
        line = refused(*command, "-o", bundle)
    assert f"cannot write {bundle} (File too large); nothing was left" in line
    assert _tree(tmp_path) == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mounts a file system of so many bytes; only root may."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("only root on Linux mounts a small disk")
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(size: int) -> Path:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)], check=False
        )
        if done.returncode:
            pytest.skip("this machine lets nobody mount a small disk")
        return disk

    yield mount
    if disk.is_mount():
        subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_is_too_small_is_told_at_once(
    small_disk: Callable[[int], Path], command: list[str], refused: Refused
) -> None:
    disk = small_disk(1 << 19)
    line = refused(*command, "-o", disk / "out" / "bundle")
    assert f"needs 1.0 MB of disk, {disk} has 0.5 MB free; make room there" in line
    assert not any(disk.iterdir())


def test_a_disk_that_fills_up(
    small_disk: Callable[[int], Path], command: list[str], tiny_bundle: Path, refused: Refused
) -> None:
    disk = small_disk((tiny_bundle / "weights.bin").stat().st_size + (1 << 13))
    line = refused(*command, "-o", disk / "bundle")
    assert f"cannot write {disk / 'bundle'} (No space left on device); nothing was left" in line
    assert not any(disk.iterdir())


def _start(command: list[str], output: Path, seen: str) -> subprocess.Popen[str]:
    """An export of its own process, under way: the first file of this pattern is there."""
    process = subprocess.Popen(
        [sys.executable, "-m", "edgeprune.cli", *command, "-o", str(output)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A test run in the background inherits an ignored Ctrl-C, and would hand it on.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not any(output.parent.glob(seen)):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.002)
    return process


@posix
@pytest.mark.parametrize(
    ("number", "seen"),
    [(signal.SIGINT, ".bundle.*/new"), (signal.SIGTERM, ".bundle.*/new/weights.bin")],
    ids=["ctrl-c", "kill"],
)
def test_an_export_that_is_told_to_end(
    number: signal.Signals, seen: str, command: list[str], tmp_path: Path
) -> None:
    process = _start([*command, "--parity", "40"], tmp_path / "bundle", seen)  # seconds of work
    process.send_signal(number)
    out, err = process.communicate(timeout=300)
    assert (process.returncode, out) == (130, "")
    assert err == "edgeprune: interrupted; nothing half-written is left\n"
    assert not any(tmp_path.iterdir())


@posix
def test_an_export_that_is_killed(command: list[str], tmp_path: Path) -> None:
    """No bundle appears, and the next export sweeps the draft, but no draft that is worked on."""
    bundle = tmp_path / "bundle"
    process = _start(command, bundle, ".bundle.*/new/weights.bin")
    (draft,) = tmp_path.iterdir()
    with pytest.raises(BundleError, match="stop here"), atomic_folder(bundle):
        assert draft.is_dir(), "its export is alive"
        raise BundleError("stop here")
    process.kill()
    process.communicate()
    assert [entry.name for entry in tmp_path.iterdir()] == [draft.name]
    (tmp_path / ".bundle.notes").mkdir()  # not ours
    assert main([*command, "-o", str(bundle)]) == 0
    assert {entry.name for entry in tmp_path.iterdir()} == {"bundle", ".bundle.notes"}


def test_onnxruntime_may_be_of_another_package(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where onnxruntime-gpu was installed in its place."""
    found = metadata.distribution

    def other(name: str) -> metadata.Distribution:
        if name == "onnxruntime":
            raise metadata.PackageNotFoundError(name)
        return found(name.removesuffix("-gpu"))

    monkeypatch.setattr(metadata, "distribution", other)
    packages = {"onnxruntime": ["onnxruntime-gpu"]}
    monkeypatch.setattr(metadata, "packages_distributions", lambda: packages)
    assert main([*command, "-o", str(tmp_path / "bundle")]) == 0
    versions = Bundle.open(tmp_path / "bundle").manifest.versions
    assert versions["onnxruntime"] == onnxruntime.__version__


def test_what_the_exporter_assumed_is_told(
    copy_checkpoint: Callable[[], Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (checkpoint := copy_checkpoint()).joinpath("chat_template.jinja").unlink()
    command = ["export", "--model", str(checkpoint), "--method", "uniform", "--cr", "16"]
    capfd.readouterr()
    assert main([*command, "--dtype", "bf16", "-o", str(tmp_path / "bundle")]) == 0
    out, err = capfd.readouterr()
    assert out == f"{tmp_path / 'bundle'}\n"
    assert "note: the checkpoint has no chat template; LLaVA-1.5's is used" in err
    assert "the bf16 graph itself was not run: ONNX Runtime has no kernels for it" in err


def test_more_tokens_than_a_targets_engines_can_rank(tmp_path: Path, refused: Refused) -> None:
    """Of TensorRT alone: a plan for ONNX Runtime may keep as many as there are."""
    checkpoint = write(replace(TINY, image=882), tmp_path / "wide")  # 3,969 visual tokens
    options = ["--model", checkpoint, "--method", "uniform", "--cr", "1.02", "-o", tmp_path / "b"]
    line = refused("export", *options, "--target", "rtx")
    assert "method uniform ranks 3891 visual tokens at once" in line
    assert "engines of --target rtx rank 3840 at most; use a smaller image" in line
    for target in ("cpu", "cuda"):
        check_topk("uniform", flat_plan(8000, 24, 2).entering, target)
