"""Bundles that are replaced while the server answers: a signal opens what has changed on disk.

The new bundle is opened beside the old one. Where that fails, the old one goes on. Else new
requests go to the new one, and the old one is closed once it has answered all that it was asked.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from edgeprune import terminal
from edgeprune.bundle import MANIFEST
from edgeprune.errors import EdgepruneError, SpecError
from edgeprune.serve.model import ServedBundle

Open = Callable[[Path], ServedBundle]


@dataclass
class ServedBundles:
    """The bundles of a server by name, each with the folder that it is from."""

    open: Open
    by_name: dict[str, ServedBundle] = field(default_factory=dict)
    _paths: dict[str, tuple[Path, str]] = field(default_factory=dict)  # and what it held
    _busy: asyncio.Lock = field(default_factory=asyncio.Lock)

    def add(self, path: Path) -> None:
        """Open one more; SpecError where there is one of its name."""
        state = _state(path)
        bundle = self.open(path)
        if bundle.name in self.by_name:
            bundle.close()
            raise SpecError(f"two bundles are called {bundle.name}; rename one and export it")
        self.by_name[bundle.name], self._paths[bundle.name] = bundle, (path, state)

    async def replace_changed(self) -> None:
        """Open anew what is another bundle than before; told on stderr."""
        async with self._busy:
            for name, (path, before) in list(self._paths.items()):
                if (state := _state(path)) != before:
                    await self._replace(name, path, state)

    def close(self) -> None:
        for bundle in self.by_name.values():
            bundle.close()

    def longest_step(self) -> float:
        """Seconds that a call of an engine has been running."""
        return max(bundle.scheduler.step_seconds for bundle in self.by_name.values())

    async def _replace(self, name: str, path: Path, state: str) -> None:
        try:
            bundle = await asyncio.to_thread(self.open, path)
        except EdgepruneError as error:
            terminal.note(f"edgeprune: {name} stays as it was: {error}")
            return
        if bundle.name != name and bundle.name in self.by_name:
            terminal.note(f"edgeprune: {name} stays as it was: there is a {bundle.name} already")
            await asyncio.to_thread(bundle.close)
            return
        # One by one, so that the order of the list stays.
        old, renamed = self.by_name[name], {name: bundle.name}
        places, served = dict(self._paths), dict(self.by_name)
        self.by_name.clear()
        self._paths.clear()
        for key, value in served.items():
            self.by_name[renamed.get(key, key)] = bundle if value is old else value
            self._paths[renamed.get(key, key)] = (path, state) if value is old else places[key]
        terminal.note(f"edgeprune: {name} is replaced by {bundle.name} of {path}")
        await asyncio.to_thread(old.close, finish=True)


def _state(path: Path) -> str:
    """Of a folder: it changes with every bundle, since a manifest holds the hashes of all files."""
    with suppress(OSError):
        return sha256((path / MANIFEST).read_bytes()).hexdigest()
    return ""
