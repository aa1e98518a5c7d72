"""Files and folders are there whole or not at all, and what was there before until then."""

from __future__ import annotations

import os
from importlib import metadata
from pathlib import Path

import pytest

from edgeprune.commands._common import check_output, write_output
from edgeprune.errors import SpecError
from edgeprune.files import replaced, write_whole
from edgeprune.versions import installed

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


@pytest.mark.parametrize("moved", [True, False], ids=["old one moved", "new one not moved"])
def test_an_interrupt_between_two_renames_leaves_the_folder_before(
    moved: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (target := tmp_path / "bundle").mkdir()
    (target / "file").write_text("before")
    rename, calls = Path.rename, list[Path]()

    def interrupted(self: Path, to: Path) -> Path:
        calls.append(self)
        if len(calls) == 2 and not moved:
            raise KeyboardInterrupt
        renamed = rename(self, to)
        if len(calls) == 1 and moved:
            raise KeyboardInterrupt
        return renamed

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), replaced(target) as draft:
        (draft / "file").write_text("after")
    assert (target / "file").read_text() == "before"
    assert list(tmp_path.iterdir()) == [target]


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
