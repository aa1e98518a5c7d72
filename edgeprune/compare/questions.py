"""What is asked: the demo's held-out questions, or a user's own images with their answers.

A user's file is JSONL, a record each line: `image` (a path within the image folder),
`question`, `answer` (a text, or a list of which one is enough), and optionally `kind`. An answer is
right where it is the expected one to the letter, but for blanks around it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune import demo
from edgeprune.errors import InputError, SpecError
from edgeprune.images import check_file, image_in

if TYPE_CHECKING:
    from PIL.Image import Image

HELD_OUT = 2400
"""Questions of the demo benchmark where no number is asked for."""


@dataclass(frozen=True)
class EvalQuestion:
    """One question: about which image, of which kind, and what is right."""

    image: Path | Image
    kind: str
    text: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Questions:
    """The first `count` questions of a file, or of the demo where there is no file."""

    count: int | None = None
    file: Path | None = None
    image_dir: Path | None = None  # where the images of `file` are; None: beside it

    def __post_init__(self) -> None:
        if self.count is not None and self.count < 1:
            raise SpecError(f"--questions is at least 1; got {self.count}")
        if self.image_dir is not None and self.file is None:
            raise SpecError(
                "--questions-image-dir is the folder of images of --questions-file; give that too"
            )

    def __len__(self) -> int:
        return len(self._records) if self.file else self.count or HELD_OUT

    def __iter__(self) -> Iterator[EvalQuestion]:
        if self.file:
            yield from self._records
        else:
            for image, question in demo.held_out(len(self)):
                yield EvalQuestion(image, question.kind, question.text, (question.answer,))

    @cached_property
    def fingerprint(self) -> str:
        """One hash over all questions, answers and images."""
        digest = hashlib.sha256(str(len(self)).encode())
        if self.file:
            digest.update(self.file.read_bytes())
            files = sorted({Path(str(asked.image)) for asked in self._records})
        else:
            folder = Path(demo.__file__).parent
            files = sorted([*folder.glob("*.py"), *folder.glob("*.npz")])
        for file in files:
            digest.update(file.read_bytes())
        return digest.hexdigest()

    @cached_property
    def _records(self) -> list[EvalQuestion]:
        assert self.file is not None
        try:
            lines = self.file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--questions-file {self.file} cannot be read ({error})") from error
        numbered = [(n, line) for n, line in enumerate(lines, start=1) if line.strip()]
        if not numbered:
            raise InputError(
                f"--questions-file {self.file} holds no question; want a JSON object a line"
            )
        folder = self.image_dir or self.file.parent
        return [_asked(f"{self.file}:{n}", line, folder) for n, line in numbered[: self.count]]


def _asked(where: str, line: str, folder: Path) -> EvalQuestion:
    try:
        record: dict[str, Any] = json.loads(line)
        answers = record["answer"]
        answers = answers if isinstance(answers, list) else [answers]
        name, question = record["image"], record["question"]
        if not (isinstance(name, str) and isinstance(question, str)):
            raise TypeError
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f"{where} is no question; want a JSON object with image, question and answer"
        ) from error
    try:
        check_file(image := image_in(folder, name), "image")
    except InputError as error:
        raise InputError(f"{where}: {error} (its folder: --questions-image-dir)") from error
    expected = tuple(str(answer).strip() for answer in answers)
    return EvalQuestion(image, str(record.get("kind", "all")), question, expected)
