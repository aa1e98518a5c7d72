"""What comes in: who may ask, and the body of a request, bounded in size and in time."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from starlette.requests import Request

from edgeprune.serve.errors import HttpError
from edgeprune.serve.images import ImageDoors

AT_ONCE = 4
"""Bodies of the largest size that may be in memory together; smaller ones are more."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Who may ask, and for how much."""

    api_key: str | None  # None: anybody
    local: bool  # whether only this machine reaches the server
    images: ImageDoors
    body_bytes: int
    receive_seconds: float  # until a request is there
    seconds: float  # until its answer is complete


class Admission:
    """Lets requests in; HttpError says why not."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._held = 0  # bytes of bodies that are in memory

    def check(self, request: Request) -> None:
        """The key, or where there is none the name by which a local server is called."""
        if self.limits.api_key is not None:
            self._check_key(request, self.limits.api_key)
        else:
            self.check_name(request)

    def check_name(self, request: Request) -> None:
        """The name by which a local server without a key is called."""
        if (
            self.limits.api_key is None
            and self.limits.local
            and not _is_local(request.url.hostname or "")
        ):
            # A page in a browser may let its own name point to this machine.
            raise HttpError(
                403,
                "without --api-key this server is called by an address or as localhost; got the"
                f" name {(request.url.hostname or '')[:80]!r}",
            )

    @asynccontextmanager
    async def body(self, request: Request) -> AsyncIterator[bytes]:
        """The whole body, which counts as held until the block ends."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise HttpError(415, f"the body is application/json; got {kind[:80]!r}")
        length = request.headers.get("content-length", "")
        if length.isdigit():
            self._check_size(int(length))
        parts, seconds = list[bytes](), self.limits.receive_seconds
        try:
            try:
                await asyncio.wait_for(self._read(request, parts), seconds)
            except asyncio.TimeoutError as error:
                raise HttpError(408, f"the body did not come within {seconds:g} s") from error
            yield b"".join(parts)
        finally:
            self._held -= sum(map(len, parts))

    async def _read(self, request: Request, parts: list[bytes]) -> None:
        size = 0
        async for part in request.stream():
            size += len(part)
            self._check_size(size)
            if self._held + len(part) > AT_ONCE * self.limits.body_bytes:
                raise HttpError(
                    429,
                    "the requests that are here fill the memory for them; ask again in a second",
                    code="memory_full",
                    headers={"Retry-After": "1"},
                )
            parts.append(part)
            self._held += len(part)

    def _check_size(self, size: int) -> None:
        if size > (most := self.limits.body_bytes):
            raise HttpError(
                413,
                f"a request may have {most} bytes, this one has {size} or more; send smaller"
                " images, or start the server with a larger --max-body",
            )

    def _check_key(self, request: Request, key: str) -> None:
        given = request.headers.get("authorization", "")
        if not hmac.compare_digest(given.encode(), f"Bearer {key}".encode()):
            raise HttpError(
                401,
                "the API key is missing or wrong; send the header Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )


def _is_local(name: str) -> bool:
    if name == "localhost":
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
