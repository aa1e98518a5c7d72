"""Other weights have another fingerprint, and large files are not read whole for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgeprune.models._checkpoint import Checkpoint, fingerprint_blocks

MIB = 1 << 20


def _made(folder: Path, size: int) -> Checkpoint:
    """A checkpoint of one file of zeros that takes no disk."""
    (folder / "config.json").write_text("{}")
    file = folder / "model.safetensors"
    with file.open("wb") as stream:
        stream.truncate(size)
    return Checkpoint({"tensor": file}, folder, {})


@pytest.mark.parametrize(("size", "changed"), [(3 * MIB, 1), (100 * MIB, MIB // 4)])
def test_weights_that_differ_anywhere_have_another_fingerprint(
    size: int, changed: int, tmp_path: Path
) -> None:
    """A byte of what is read whole; of a larger file, what a small matrix takes."""
    checkpoint = _made(tmp_path, size)
    found = {checkpoint.fingerprint()}
    for start in (0, size // 3, size // 2, size - changed):
        with checkpoint.files["tensor"].open("r+b") as stream:
            stream.seek(start)
            stream.write(b"\1" * changed)
        found.add(checkpoint.fingerprint())
    assert len(found) == 5


def test_a_large_file_is_not_read_whole(tmp_path: Path) -> None:
    checkpoint = _made(tmp_path, 26_000 * MIB)
    assert sum(map(len, fingerprint_blocks(checkpoint.files["tensor"]))) <= 65 * MIB
