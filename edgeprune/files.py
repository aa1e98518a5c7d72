"""Files and folders written whole or not at all: under a hidden name beside their place, renamed.

Renaming is what makes it so: at every moment there is the old one or the new one, and what a
process that was killed left half-written never has the name that others read.
"""

from __future__ import annotations

import glob
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from edgeprune.errors import SpecError

if sys.platform != "win32":
    import fcntl

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
        target = file.resolve()
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
    return SpecError(f"{file} cannot be written ({why}); choose another place")


@contextmanager
def replaced(target: Path) -> Iterator[Path]:
    """A new folder that becomes `target` when the block ends well, and vanishes otherwise.

    What a process that was killed left behind is swept by the next one to the same place.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    _sweep(target)
    work = Path(tempfile.mkdtemp(prefix=_prefix(target), dir=target.parent))
    lock = _lock(work)
    try:
        draft = work / "new"
        draft.mkdir()
        yield draft
        if target.exists():
            target.rename(work / KEPT)
        draft.rename(target)
    finally:
        _discard(work, target)
        if lock is not None:
            os.close(lock)


def _prefix(target: Path) -> str:
    return f".{target.name}.draft-"


def _discard(work: Path, target: Path) -> None:
    """Remove a draft; what it was to replace goes back where nothing has come in its place."""
    if (work / KEPT).exists() and not target.exists():
        (work / KEPT).rename(target)
    shutil.rmtree(work, ignore_errors=True)


def _sweep(target: Path) -> None:
    """Remove drafts for `target` whose process no longer runs: nobody holds their lock."""
    for work in target.parent.glob(f"{glob.escape(_prefix(target))}????????"):
        lock = _lock(work)
        if lock is not None:
            _discard(work, target)
            os.close(lock)


def _lock(folder: Path) -> int | None:
    """Lock a folder until closed or until this process ends; None where that cannot be done."""
    if sys.platform == "win32":
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor
