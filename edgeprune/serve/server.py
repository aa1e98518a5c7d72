"""Open the bundles, listen, answer until a signal comes, then finish what was begun."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from edgeprune import terminal
from edgeprune.bundle import read_manifest
from edgeprune.errors import SpecError
from edgeprune.graph_contract import WEIGHTS
from edgeprune.runtime.engine import Engine
from edgeprune.serve import systemd
from edgeprune.serve.admission import Limits
from edgeprune.serve.app import Service
from edgeprune.serve.fetching import Fetcher
from edgeprune.serve.hangups import Hangups
from edgeprune.serve.images import ImageDoors
from edgeprune.serve.memory import Memory
from edgeprune.serve.model import ServedBundle
from edgeprune.serve.replacing import ServedBundles
from edgeprune.tiling import TILE_MEMORY_MB

SPARE = 16
"""Connections beyond those that wait and are answered: health, metrics, bodies that come."""


@dataclass(frozen=True, slots=True)
class ServeRequest:
    """What `edgeprune serve` was asked; SpecError where a value cannot be used."""

    bundles: tuple[Path, ...]
    backend: str = "ort-cpu"
    host: str = "127.0.0.1"
    port: int = 8000
    threads: int | None = None
    sequences: int = 4
    kept_memory_mb: int = 256
    queue: int = 64
    timeout: float = 300.0
    receive: float = 30.0
    drain: int = 30
    max_body_mb: int = 32
    memory_mb: int | None = None
    tile_memory_mb: int = TILE_MEMORY_MB
    media: Path | None = None
    allow_urls: bool = False
    api_key: str | None = None

    def __post_init__(self) -> None:
        for name, least in (
            ("sequences", 1),
            ("queue", 1),
            ("kept_memory_mb", 0),
            ("tile_memory_mb", 0),
            ("max_body_mb", 1),
            ("drain", 0),
        ):
            if getattr(self, name) < least:
                option = name.replace("_mb", "").replace("_", "-")
                raise SpecError(f"--{option} is at least {least}; got {getattr(self, name)}")
        for name, seconds in (("timeout", self.timeout), ("receive", self.receive)):
            if not 0 < seconds < 1e6:
                raise SpecError(f"--{name} is a number of seconds above 0; got {seconds:g}")
        if self.memory_mb is not None and self.memory_mb < 1:
            raise SpecError(f"--memory is a number of megabytes; got {self.memory_mb}")
        if not 0 <= self.port < 1 << 16:
            raise SpecError(f"--port is from 0 (any free one) to 65535; got {self.port}")
        if self.media is not None and not self.media.is_dir():
            raise SpecError(f"--media is a folder with images; there is none at {self.media}")
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.strip()):
            raise SpecError("the API key is empty or holds letters that no header takes")

    def limits(self, address: str) -> Limits:
        """What requests may ask for of a server that listens at an IP address."""
        return Limits(
            self.api_key,
            ipaddress.ip_address(address).is_loopback,
            ImageDoors(
                self.max_body_mb << 20,
                None if self.media is None else self.media.resolve(),
                Fetcher() if self.allow_urls else None,
            ),
            self.max_body_mb << 20,
            self.receive,
            self.timeout,
        )


def serve(request: ServeRequest, hangups: Hangups) -> None:
    """Serve until SIGTERM or Ctrl-C; answers that were begun are finished before it returns. At
    each of the `hangups` bundles are replaced that changed."""
    with ExitStack() as stack:
        listener = stack.enter_context(_listen(request.host, request.port))
        memory = Memory(request.memory_mb and request.memory_mb << 20)
        bundles = ServedBundles(partial(_open, request=request, memory=memory))
        stack.callback(bundles.close)
        for path in request.bundles:
            bundles.add(path)
        host, port = listener.getsockname()[:2]
        service = Service(bundles.by_name, request.limits(host))
        server = uvicorn.Server(_config(request, service))
        shown = f"[{host}]" if ":" in host else host
        terminal.note(f"serving {', '.join(bundles.by_name)} on http://{shown}:{port}/v1")
        with suppress(KeyboardInterrupt):  # uvicorn raises the signal again once it has stopped
            asyncio.run(_run(server, listener, request.receive, bundles, hangups))
        terminal.note("stopped")


def _open(path: Path, *, request: ServeRequest, memory: Memory) -> ServedBundle:
    """A bundle, ready to answer; SpecError where it alone is more than fits."""
    size = _weights(path)
    if request.memory_mb is not None and size > request.memory_mb << 20:
        raise SpecError(
            f"the weights of {path} take {size / (1 << 20):.0f} MB, --memory is"
            f" {request.memory_mb}; give more"
        )
    open_engine = partial(
        Engine.open,
        path,
        request.backend,
        threads=request.threads,
        tile_memory_mb=request.tile_memory_mb,
    )
    kept = request.kept_memory_mb << 20
    return ServedBundle(open_engine, request.sequences, request.queue, memory, size, kept)


def _weights(path: Path) -> int:
    """Bytes of a bundle's weights: engines hold as much where the file itself was removed."""
    return read_manifest(path).files[WEIGHTS].bytes


async def _run(
    server: uvicorn.Server,
    listener: socket.socket,
    seconds: float,
    bundles: ServedBundles,
    hangups: Hangups,
) -> None:
    sweep = asyncio.create_task(_sweep(server, seconds))
    replacing = set[asyncio.Task[None]]()

    def replace_changed() -> None:
        task = asyncio.create_task(bundles.replace_changed())
        replacing.add(task)
        task.add_done_callback(replacing.discard)

    hangups.listen(partial(asyncio.get_running_loop().call_soon_threadsafe, replace_changed))
    watchdog = asyncio.create_task(systemd.watch(bundles.longest_step))
    systemd.notify("READY=1")
    try:
        await server.serve([listener])
    finally:
        hangups.ignore()
        systemd.notify("STOPPING=1")
        sweep.cancel()
        watchdog.cancel()
        await asyncio.gather(*replacing, return_exceptions=True)


async def _sweep(server: uvicorn.Server, seconds: float) -> None:
    """Close connections that have sent no whole head of a request for so long; uvicorn lets them
    wait without an end."""
    idle = set[H11Protocol]()
    while True:
        await asyncio.sleep(seconds)
        connections = [c for c in server.server_state.connections if isinstance(c, H11Protocol)]
        waiting = {one for one in connections if one.conn.our_state is h11.IDLE}
        for connection in waiting & idle:
            connection.transport.close()
        idle = waiting


def _config(request: ServeRequest, service: Service) -> uvicorn.Config:
    connections = len(request.bundles) * (request.queue + request.sequences) + SPARE
    return uvicorn.Config(
        service.app(),
        log_config=None,
        log_level="critical",  # errors are told by the app
        access_log=False,
        lifespan="off",
        ws="none",
        http="h11",
        loop="asyncio",
        server_header=False,
        proxy_headers=False,
        limit_concurrency=connections,
        timeout_graceful_shutdown=request.drain,
    )


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens; SpecError where the address cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        # asyncio sends small pieces at once (TCP_NODELAY) only on a socket that says it is TCP's.
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except BaseException:
            listener.close()
            raise
    except OSError as error:
        raise SpecError(
            f"{host}:{port} cannot be listened on ({error.strerror}); choose another --host or"
            " --port"
        ) from error
    return listener
