"""The newest frame of a live source: what came while the model was busy is dropped and counted."""

from __future__ import annotations

import threading
from collections.abc import Iterator

from edgeprune.watch.sources import Frame, Source


class Latest:
    """Reads a source on a thread of its own; `frames` yields the newest one each time."""

    def __init__(self, source: Source) -> None:
        self._source, self._changed = source, threading.Condition()
        self._newest: Frame | None = None
        self._ended, self._error = False, None  # type: tuple[bool, BaseException | None]
        self.dropped = 0  # since the start

    def frames(self) -> Iterator[Frame]:
        """Frames until the source ends; its error comes once the last frame was taken."""
        threading.Thread(target=self._read, name="edgeprune frames", daemon=True).start()
        while True:
            with self._changed:
                while self._newest is None and not self._ended:
                    self._changed.wait(1.0)  # so that Ctrl-C is heard
                frame, self._newest = self._newest, None
            if frame is None:
                if self._error is not None:
                    raise self._error
                return
            yield frame

    def _read(self) -> None:
        try:
            for frame in self._source.frames():
                with self._changed:
                    self.dropped += self._newest is not None
                    self._newest = frame
                    self._changed.notify()
        except BaseException as error:  # handed to the thread that waits
            self._error = error
        with self._changed:
            self._ended = True
            self._changed.notify()
