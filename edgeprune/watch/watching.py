"""Frames in, answers out: which frames are asked, and a record for each answer."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from typing import Any

from PIL import Image

from edgeprune import terminal
from edgeprune.errors import InputError, SpecError
from edgeprune.images import read_image
from edgeprune.runtime import AnswerFormat, Session
from edgeprune.runtime.backend import EncodedImage
from edgeprune.runtime.frames import DeltaOptions
from edgeprune.runtime.media import Prepared, prepare
from edgeprune.watch.alarm import Alarm
from edgeprune.watch.changes import Levels, change, levels
from edgeprune.watch.latest import Latest
from edgeprune.watch.sources import Frame, Source


@dataclass(frozen=True, slots=True)
class WatchRequest:
    """What is asked of every frame, and of which frames; SpecError where it cannot be."""

    prompt: str
    system: str | None = None
    choices: tuple[str, ...] = ()  # empty: whatever the model says
    alarm: Alarm | None = None
    answer_format: AnswerFormat | None = None
    max_new_tokens: int | None = None
    every: float = 0.0  # seconds between two questions, at least
    on_change: float | None = None  # least change since the last frame that was asked; None: any
    all_frames: bool | None = None  # None: of a live source the newest alone
    delta: DeltaOptions | None = None  # None: every frame is encoded as a whole

    def __post_init__(self) -> None:
        if not 0 <= self.every < 1e9:
            raise SpecError(f"--every is a number of seconds from 0; got {self.every:g}")
        if self.on_change is not None and not 0 <= self.on_change <= 1:
            raise SpecError(f"--on-change is a share from 0 to 1; got {self.on_change:g}")
        if self.choices and (self.answer_format or self.max_new_tokens is not None):
            raise SpecError("choices are scored; leave out what else says how an answer looks")


class Watch:
    """Asks one session about frames; `records` yields what it says."""

    def __init__(self, session: Session, request: WatchRequest) -> None:
        self._session, self._request = session, request
        self._camera = None if request.delta is None else session.engine.camera(request.delta)
        self._asked: Levels | None = None  # of the last frame that was asked
        self._due, self._unchanged, self._ringing = float("-inf"), 0, False

    def records(self, source: Source) -> Iterator[dict[str, Any]]:
        """A record for each frame that is asked; of one that cannot be read, its error."""
        latest = None if self._takes_all(source) else Latest(source)
        dropped = 0
        for frame in (latest or source).frames():
            if frame.seconds < self._due:
                continue
            try:
                record = self._record(frame)
            except InputError as error:
                record = {**_head(frame), "error": str(error)}
            if record is not None:
                if latest is not None:
                    record["dropped"], dropped = latest.dropped - dropped, latest.dropped
                yield record

    def _takes_all(self, source: Source) -> bool:
        wanted = self._request.all_frames
        return not source.live if wanted is None else wanted

    def _record(self, frame: Frame) -> dict[str, Any] | None:
        """The answer; None where the frame did not change."""
        read = read_image(frame.image)
        changed = self._change(read.image)
        if changed is None:
            self._unchanged += 1
            return None
        started, head = time.perf_counter(), _head(frame)
        prepared = prepare(read.image, self._session.manifest.image)
        image = self._encoded(prepared)
        said = self._said(image)
        record = head | said | {"total_ms": 1e3 * (time.perf_counter() - started)}
        record |= {"tiles_encoded": image.tiles_encoded, "unchanged": self._unchanged}
        if self._request.on_change is not None:
            record["change"] = changed
        if image.patches_encoded is not None:
            record["patches_encoded"] = image.patches_encoded
        if notes := [*read.warnings, *image.warnings]:
            record["warnings"] = notes
        self._unchanged, self._due = 0, frame.seconds + self._request.every
        return record

    def _change(self, image: Image.Image) -> float | None:
        """Since the last frame that was asked, 1 for the first; None where it is too little."""
        if self._request.on_change is None:
            return 1.0
        now = levels(image)
        found = 1.0 if self._asked is None else change(now, self._asked)
        if self._asked is not None and (not found or found < self._request.on_change):
            return None
        self._asked = now
        return found

    def _encoded(self, prepared: Prepared) -> EncodedImage:
        engine = self._session.engine
        if self._camera is None:
            return engine.encode_pixels(prepared.pixels, prepared.warnings)
        return engine.encode_frame(self._camera, prepared.pixels, prepared.warnings)

    def _said(self, image: EncodedImage) -> dict[str, Any]:
        session, request = self._session, self._request
        if not request.choices:
            sampling = None
            if request.max_new_tokens is not None:
                sampling = replace(session.sampling, max_new_tokens=request.max_new_tokens)
            answer = session.ask(
                image, request.prompt, sampling, request.system, request.answer_format
            )
            return {"text": answer.text, "finish": answer.finish}
        choice = session.choose(image, request.prompt, request.choices, request.system)
        found: dict[str, Any] = {"text": choice.text, "probabilities": choice.probabilities}
        if request.alarm is not None:
            found["alarm"] = request.alarm.rings(choice.probabilities)
            self._tell(found["alarm"])
        return found

    def _tell(self, rings: bool) -> None:
        """A line on stderr where an alarm begins or ends."""
        if rings != self._ringing:
            terminal.note("alarm" if rings else "alarm is over")
        self._ringing = rings


def _head(frame: Frame) -> dict[str, Any]:
    now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
    return {"time": now, "frame": frame.number, "seconds": round(frame.seconds, 3)}
