"""Which bundles are in memory where not all fit: the longest unused idle one makes room.

Only weights are counted. A bundle that is answering stays. Bundles that wait get their room in the
order in which they came; until then those that answer finish what they began (`contended`).
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Holder(Protocol):
    """What takes memory while it is used, and may give it back in between."""

    @property
    def size(self) -> int:
        """Bytes that it takes."""
        ...

    def unload(self) -> None:
        """Give them back."""
        ...


class Memory:
    """Bytes that holders share; any thread may use it."""

    def __init__(self, limit: int | None = None) -> None:
        """`limit` in bytes; None: there is enough for all."""
        self._limit, self._changed = limit, threading.Condition()
        self._users: OrderedDict[int, int] = OrderedDict()  # the longest unused holder first
        self._holders: dict[int, Holder] = {}
        self._waiting = deque[object]()  # one for each that waits, the first to be served first

    @contextmanager
    def using(self, holder: Holder) -> Iterator[None]:
        """A block in which a holder has its room; waits until others are idle where need be.

        A holder that is in use enters at once, however many wait: its thread must go on.
        """
        key = id(holder)
        with self._changed:
            if not self._users.get(key):
                self._wait(holder)
            self._holders[key] = holder
            self._users[key] = self._users.get(key, 0) + 1
            self._users.move_to_end(key)
        try:
            yield
        finally:
            with self._changed:
                self._users[key] -= 1
                self._changed.notify_all()

    @property
    def contended(self) -> bool:
        """Whether a holder waits for room: those that are in use then begin nothing new."""
        return bool(self._waiting)

    def forget(self, holder: Holder) -> None:
        """A holder has gone for good."""
        with self._changed:
            self._users.pop(id(holder), None)
            self._holders.pop(id(holder), None)
            self._changed.notify_all()

    def _wait(self, holder: Holder) -> None:
        """Until it is this one's turn and there is room."""
        self._waiting.append(ticket := object())
        try:
            while self._waiting[0] is not ticket or not self._has_room(holder):
                self._changed.wait()
        finally:
            self._waiting.remove(ticket)
            self._changed.notify_all()

    def _has_room(self, holder: Holder) -> bool:
        """Unload others until it fits; whether it does."""
        while id(holder) not in self._users and not self._fits(holder):
            if not self._make_room():
                return False
        return True

    def _fits(self, holder: Holder) -> bool:
        held = sum(one.size for one in self._holders.values())
        return self._limit is None or held + holder.size <= self._limit

    def _make_room(self) -> bool:
        """Unload the longest unused holder that is idle; whether there was one."""
        for key, users in self._users.items():
            if not users:
                self._holders.pop(key).unload()
                del self._users[key]
                return True
        return False
