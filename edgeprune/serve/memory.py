"""Which bundles are in memory where not all fit: the longest unused idle one makes room.

Only weights are counted. A bundle that is answering stays.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
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

    @contextmanager
    def using(self, holder: Holder) -> Iterator[None]:
        """A block in which a holder has its room; waits until others are idle where need be."""
        key = id(holder)
        with self._changed:
            while key not in self._users and not self._fits(holder):
                if not self._make_room():
                    self._changed.wait()
            self._holders[key] = holder
            self._users[key] = self._users.get(key, 0) + 1
            self._users.move_to_end(key)
        try:
            yield
        finally:
            with self._changed:
                self._users[key] -= 1
                self._changed.notify_all()

    def forget(self, holder: Holder) -> None:
        """A holder has gone for good."""
        with self._changed:
            self._users.pop(id(holder), None)
            self._holders.pop(id(holder), None)
            self._changed.notify_all()

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
