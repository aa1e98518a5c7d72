"""Files and folders written whole or not at all: under a hidden name beside their path, renamed.

Renaming is what makes it so: at every moment there is the old one or the new one, and what a
process that was killed left half-written never has the name that others read. Where Linux can
exchange two folders at once, there is no moment without one.
"""

from __future__ import annotations

import ctypes
import errno
import glob
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from edgeprune.errors import SpecError
from edgeprune.records import is_utf8

if sys.platform != "win32":
    import fcntl

DRAFT = ".draft-"
KEPT = "old"
"""In a draft's folder, what the draft is to replace."""


def write_whole(file: Path, data: bytes) -> None:
    """Write a file whole or not at all; SpecError where it cannot be written.

    Links are followed. A device or a pipe, such as /dev/stdout, cannot be renamed over: it is
    written to.
    """
    draft = None
    try:
        if file.exists() and not file.is_file():
            file.write_bytes(data)
            return
        target = real(file)
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        draft = Path(name)
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
        draft.chmod(0o644)  # mkstemp's are their owner's alone
        draft.replace(target)
    except OSError as error:
        raise unwritable(file, error.strerror or str(error)) from error
    finally:
        if draft is not None:
            with suppress(OSError):
                draft.unlink()


def unwritable(file: Path, why: str) -> SpecError:
    """The error where a result cannot be written."""
    return SpecError(f"{file} cannot be written ({why}); choose another path")


def real(path: Path) -> Path:
    """A path without links; one whose links run in a circle stays as it is."""
    return Path(os.path.realpath(path))


def obstacle(target: Path) -> str:
    """Why nothing can be written at a path, as far as can be seen now; empty where it can be."""
    if not is_utf8(str(target)):
        return "its name is not UTF-8"
    parent = next(folder for folder in target.absolute().parents if os.path.lexists(folder))
    if not parent.is_dir():
        return f"{parent} is no folder"
    if not os.access(parent, os.W_OK):
        return f"nothing can be written in {parent}"
    names = target.absolute().relative_to(parent).parts
    longest = os.pathconf(parent, "PC_NAME_MAX") if hasattr(os, "pathconf") else 255
    draft = len(os.fsencode(_prefix(target))) + 8
    if max(draft, *(len(os.fsencode(name)) for name in names)) > longest:
        return f"a name of it is too long, beyond {longest} bytes with what a draft adds"
    try:
        target.stat()
    except FileNotFoundError:
        pass
    except OSError as error:  # a circle of links; all of it longer than any path may be
        return error.strerror or str(error)
    return ""


@contextmanager
def replaced(target: Path) -> Iterator[Path]:
    """A new folder that becomes `target` when the block ends well, and vanishes otherwise.

    Of several processes that replace one target the last to end is the one that stays. What a
    process that was killed left behind is swept by the next one to the same path.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    _sweep(target)
    work, lock = _workshop(target)
    try:
        draft = work / "new"
        draft.mkdir()
        yield draft
        _put(draft, target, work / KEPT)
    finally:
        _discard(work, target)
        if lock is not None:
            os.close(lock)


def _put(draft: Path, target: Path, kept: Path) -> None:
    """Rename a draft to its path; what stands there goes to `kept` or to the draft's path."""
    while not exchange(draft, target):
        try:
            draft.rename(target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
        else:
            return
        shutil.rmtree(kept, ignore_errors=True)  # another process came in between
        with suppress(FileNotFoundError):
            target.rename(kept)


def exchange(one: Path, other: Path) -> bool:
    """Exchange two paths at one moment; False where one is absent or nothing can do it."""
    done = False
    if sys.platform == "linux":
        here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
        with suppress(OSError, AttributeError):  # a C library without it
            rename = ctypes.CDLL(None, use_errno=True).renameat2
            done = rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0
    return done


def _prefix(target: Path) -> str:
    return f".{target.name}{DRAFT}"


def _workshop(target: Path) -> tuple[Path, int | None]:
    """A folder beside a target for its draft, and the lock that keeps others away."""
    while True:
        work = Path(tempfile.mkdtemp(prefix=_prefix(target), dir=target.parent))
        try:
            return work, _lock(work)
        except BlockingIOError:  # another process took it for a dead one's, and removes it
            continue
        except FileNotFoundError:
            continue


def _discard(work: Path, target: Path) -> None:
    """Remove a draft; what it was to replace goes back where nothing else has come there."""
    if (work / KEPT).exists() and not target.exists():
        with suppress(OSError):  # something has come just now
            (work / KEPT).rename(target)
    shutil.rmtree(work, ignore_errors=True)


def _sweep(target: Path) -> None:
    """Remove drafts for `target` whose process no longer runs: nobody holds their lock."""
    for work in target.parent.glob(f"{glob.escape(_prefix(target))}????????"):
        with suppress(OSError):  # held, or removed by another process
            lock = _lock(work)
            if lock is not None:
                _discard(work, target)
                os.close(lock)


def _lock(folder: Path) -> int | None:
    """Lock a folder until closed or until this process ends; None where nothing can be locked.

    BlockingIOError where another process holds it, FileNotFoundError where it is gone.
    """
    held = None
    if sys.platform != "win32":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            folder.stat()
            held = descriptor
        except OSError as error:
            os.close(descriptor)
            if isinstance(error, (BlockingIOError, FileNotFoundError)):
                raise  # any other: a file system without locks
    return held
