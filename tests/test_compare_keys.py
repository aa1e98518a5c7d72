"""What decides whether a stored result of `compare` still counts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from edgeprune.compare.bundles import _checkpoint
from edgeprune.compare.store import key_of


def test_keys_tell_apart_what_differs() -> None:
    keys = {key_of(*parts) for parts in ((), (1,), ("1",), (1, 2), ([1, 2],), ({"a": 1},))}
    assert len(keys) == 6
    assert key_of({"a": 1, "b": 2}) == key_of({"b": 2, "a": 1})


@pytest.mark.parametrize("name", ["tokenizer.json", "processor_config.json"])
def test_what_reads_text_and_images_is_part_of_a_checkpoint(
    copy_checkpoint: Callable[[], Path], name: str
) -> None:
    folder, key = copy_checkpoint(), _checkpoint.__wrapped__  # not what this process remembers
    first = key(str(folder), None, None)
    assert key(str(folder), None, None) == first
    (folder / name).write_bytes((folder / name).read_bytes() + b"\n")
    assert key(str(folder), None, None) != first
    beside = folder / "beside"
    beside.mkdir()
    for file in folder.glob("*.json"):
        (beside / file.name).write_bytes(file.read_bytes())
    first = key(str(folder), None, beside)
    (beside / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes() + b"\n")
    assert key(str(folder), None, beside) != first, "a tokenizer of another folder counts too"
