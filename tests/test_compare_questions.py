"""Questions of a user's own, from a file."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from edgeprune.compare.questions import Questions
from edgeprune.errors import InputError


def test_own_questions_are_read_with_their_kinds(own: Path) -> None:
    asked = list(Questions(file=own))
    assert [(q.kind, q.answers) for q in asked] == [
        ("all", ("red",)),
        ("all", ("blue",)),
        ("count", ("0", "1")),
    ]
    assert len(Questions(2, own)) == len(list(Questions(2, own))) == 2
    elsewhere = own.parent / "images"
    elsewhere.mkdir()
    with pytest.raises(
        InputError, match=r"own\.jsonl:1: there is no image at .*--questions-image-dir"
    ):
        list(Questions(file=own, image_dir=elsewhere))


def test_the_fingerprint_is_of_questions_and_images(own: Path) -> None:
    before = Questions(file=own).fingerprint
    assert Questions(file=own).fingerprint == before != Questions(2, own).fingerprint
    Image.new("RGB", (60, 60), "green").save(own.parent / "b.png")
    assert Questions(file=own).fingerprint != before
    assert Questions(8).fingerprint != Questions(9).fingerprint


@pytest.mark.parametrize(
    "line", ["{", "[]", "7", '{"image": "a.png"}', '{"image": 1, "question": "", "answer": ""}']
)
def test_a_line_that_is_no_question_is_refused(line: str, own: Path) -> None:
    own.write_text(line)
    with pytest.raises(InputError, match=r"own\.jsonl:1 is no question"):
        len(Questions(file=own))
    own.write_text("\n")
    with pytest.raises(InputError, match="holds no question"):
        len(Questions(file=own))
