"""Files and folders are there whole or not at all, and what was there before until then."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from threading import Event, Thread

import pytest

from edgeprune import files
from edgeprune.bundle import Bundle, check_target
from edgeprune.commands._common import check_output, write_output
from edgeprune.demo import SAMPLES_DIR
from edgeprune.errors import BundleError, SpecError
from edgeprune.files import replaced, write_whole
from edgeprune.versions import installed
from tests.conftest import Refused

posix = pytest.mark.skipif(os.name != "posix", reason="POSIX links and pipes")


@pytest.mark.parametrize(
    ("failure", "raised"),
    [(KeyboardInterrupt(), KeyboardInterrupt), (OSError(28, "No space left"), SpecError)],
)
def test_a_result_that_cannot_be_finished_leaves_the_one_before(
    failure: BaseException,
    raised: type[BaseException],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_output(file := tmp_path / "out" / "schedule.json", "before")

    def fail(*_: object) -> None:
        raise failure

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(raised):
        write_output(file, "after")
    assert file.read_text() == "before"
    assert list(file.parent.iterdir()) == [file]


@posix
def test_links_are_followed_and_pipes_written_to(tmp_path: Path) -> None:
    file, link, pipe = tmp_path / "file", tmp_path / "link", tmp_path / "pipe"
    link.symlink_to(file)
    write_whole(link, b"through the link")
    assert link.is_symlink() and file.read_bytes() == b"through the link"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    check_output(pipe)
    write_whole(pipe, b"through the pipe")
    assert pipe.is_fifo() and os.read(reader, 100) == b"through the pipe"
    os.close(reader)


@pytest.fixture(params=["exchanged", "renamed twice"])
def each_way(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Folders that change names at one moment, and what is done where they cannot."""
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    able = files.exchange(tmp_path / "one", tmp_path / "other")
    for name in ("one", "other"):
        (tmp_path / name).rmdir()
    if request.param == "exchanged" and not able:
        pytest.skip("this system cannot exchange two folders")
    with pytest.MonkeyPatch.context() as patch:
        if request.param != "exchanged":
            patch.setattr(files, "exchange", lambda one, other: False)
        yield request.param


@pytest.mark.parametrize("moved", [True, False], ids=["old one moved", "new one not moved"])
def test_an_interrupt_between_two_renames_leaves_the_folder_before(
    moved: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (target := tmp_path / "bundle").mkdir()
    (target / "file").write_text("before")
    rename, calls = Path.rename, list[Path]()

    def interrupted(self: Path, to: Path) -> Path:
        calls.append(self)
        if len(calls) == 3 and not moved:
            raise KeyboardInterrupt
        renamed = rename(self, to)
        if len(calls) == 2 and moved:
            raise KeyboardInterrupt
        return renamed

    monkeypatch.setattr(files, "exchange", lambda one, other: False)
    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), replaced(target) as draft:
        (draft / "file").write_text("after")
    assert len(calls) >= 3
    assert (target / "file").read_text() == "before"
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_is_replaced_whole(each_way: str, tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    for text in ("first", "second"):
        with replaced(target) as draft:
            (draft / text).write_text(text)
        assert [file.name for file in target.iterdir()] == [text]
        assert list(tmp_path.iterdir()) == [target]


def test_several_at_once_to_one_place(each_way: str, tmp_path: Path) -> None:
    """All end well, and one of them stays; where folders are exchanged, one is always there."""
    target, failed, over = tmp_path / "bundle", list[BaseException](), Event()

    def write(number: int) -> None:
        try:
            for _ in range(50):
                with replaced(target) as draft:
                    (draft / "file").write_text(str(number))
        except BaseException as error:
            failed.append(error)

    def watch() -> None:
        while not over.is_set() and each_way == "exchanged":
            if not os.path.lexists(target):
                failed.append(FileNotFoundError("a moment without a folder"))

    with replaced(target) as draft:
        (draft / "file").write_text("0")
    watching = Thread(target=watch)
    watching.start()
    writing = [Thread(target=write, args=(number,)) for number in range(4)]
    for thread in writing:
        thread.start()
    for thread in writing:
        thread.join()
    over.set()
    watching.join()
    assert not failed
    assert (target / "file").read_text() in set("0123")
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.slow
def test_two_exports_at_once_to_one_place(tiny_checkpoint: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "edgeprune.cli", "export", "--model", str(tiny_checkpoint)]
    command += ["--method", "none", "--parity", "0", "-o", str(tmp_path / "b")]
    for _ in range(3):
        both = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
        assert [process.communicate()[1].count("Error") for process in both] == [0, 0]
        assert [process.returncode for process in both] == [0, 0]
        Bundle.open(tmp_path / "b", verify=True)
        assert list(tmp_path.iterdir()) == [tmp_path / "b"]


def test_what_a_killed_process_had_put_aside_comes_back(tmp_path: Path) -> None:
    target, work = tmp_path / "bundle", tmp_path / ".bundle.draft-abcdefgh"
    (work / "old").mkdir(parents=True)
    (work / "old" / "file").write_text("before")
    with pytest.raises(SpecError, match="stop here"), replaced(target):
        raise SpecError("stop here")
    assert (target / "file").read_text() == "before"
    assert list(tmp_path.iterdir()) == [target]
    with replaced(target) as draft:
        (draft / "file").write_text("after")
    assert (target / "file").read_text() == "after"
    assert list(tmp_path.iterdir()) == [target]


def test_a_module_may_come_from_a_package_of_another_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = tmp_path / "onnxruntime_gpu-9.8.7.dist-info"
    record.mkdir()
    (record / "METADATA").write_text("Name: onnxruntime-gpu\nVersion: 9.8.7\n")
    (record / "top_level.txt").write_text("onnxruntime\n")
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    assert installed("onnxruntime") == "9.8.7"
    with pytest.raises(metadata.PackageNotFoundError, match="onnxscript"):
        installed("onnxscript")


PATHS = {
    "not UTF-8": (b"caf\xe9", "its name is not UTF-8"),
    "in no UTF-8": (b"caf\xe9/b", "its name is not UTF-8"),
    "a circle of links": (b"circle", "oo many"),  # levels of symbolic links, as each system says
    "below a circle": (b"circle/b", "circle is no folder"),
    "below a file": (b"file/b", "file is no folder"),
    "a long name": (b"n" * 250, "a name of it is too long"),
    "a long folder": (b"n" * 300 + b"/b", "a name of it is too long"),
    "a long path": (b"n/" * 2500 + b"b", "oo long"),
}


@posix
@pytest.mark.parametrize(("path", "says"), PATHS.values(), ids=PATHS.keys())
def test_a_place_where_nothing_can_be_written_is_found_before_any_work(
    path: bytes, says: str, tmp_path: Path, tiny_bundle: Path, refused: Refused
) -> None:
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    (tmp_path / "file").touch()
    target = tmp_path / os.fsdecode(path)
    with pytest.raises(BundleError, match="choose another --output") as error:
        check_target(target)
    assert says in str(error.value)
    assert says in refused("bench", tiny_bundle, "--json", target)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["circle", "file"]


@posix
def test_a_link_that_leads_nowhere_is_no_place_for_a_bundle(tmp_path: Path) -> None:
    (link := tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(BundleError, match="is a link that leads nowhere, a bundle is a folder"):
        check_target(link)


@posix
def test_a_bundle_whose_name_is_not_utf_8(
    copy_bundle: Callable[[], Path], refused: Refused
) -> None:
    bundle = copy_bundle()
    moved = bundle.rename(bundle.parent / os.fsdecode(b"caf\xe9"))
    line = refused("run", moved, "--image", SAMPLES_DIR / "scene-1.png", "--prompt", "?")
    assert "is not UTF-8, which engines want; rename the folder" in line


@pytest.mark.parametrize("number", ["99999999999", "1000", str(1 << 70)])
def test_threads_have_a_bound(number: str, tiny_bundle: Path, refused: Refused) -> None:
    most = 4 * (os.cpu_count() or 1)
    asked = ["--image", SAMPLES_DIR / "scene-1.png", "--prompt", "?", "--threads", number]
    for command in (["run", tiny_bundle, *asked], ["bench", tiny_bundle, "--threads", number]):
        assert f"--threads is at most {most}, 4 for each CPU; got {number}" in refused(*command)


@pytest.mark.parametrize("option", ["--samples=--", "--cr=--", "-o--", "-o=--", "--set=--"])
def test_an_option_without_a_value(option: str, refused: Refused) -> None:
    assert f"{option!r} gives an option no value" in refused("export", option)


def test_an_argument_with_a_nul_is_refused(refused: Refused) -> None:
    line = refused("export", "--samples-file", "a\0b")
    assert "'a\\x00b' holds a NUL character" in line


@pytest.mark.parametrize("number", [0, -1, 4097, 10**20])
@pytest.mark.parametrize("option", ["--num-images", "--frames"])
def test_numbers_of_images_and_frames_have_bounds(
    option: str, number: int, refused: Refused
) -> None:
    line = refused("models", "--model", "demo", option, number)
    assert f"are from 1 to 4,096; got {number}" in line
