"""Images from https addresses, for servers that are started with `--allow-urls`.

Whoever asks names the address, so it must not reach what only this machine can: each address that
a name has is public, and the connection goes to the address that was looked at, not to whatever the
name means a moment later. Each redirect is looked at anew. Size and time are bounded.
"""

from __future__ import annotations

import http.client
import ipaddress
import queue
import socket
import ssl
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from urllib.parse import urljoin, urlsplit

from edgeprune.serve.errors import HttpError, refused

PARAM = "messages"
PORT = 443
HOPS = 3
"""Redirects that are followed."""
SECONDS = 10.0
"""For all images of a request, name look-ups included."""
MOST = 32
"""Addresses in a request."""
PIECE = 1 << 16
NAT64 = ipaddress.ip_network("64:ff9b::/96")

Resolve = Callable[[str], list[str]]
Connect = Callable[[str, float], socket.socket]


def resolve(name: str) -> list[str]:
    """The addresses of a name, as the system knows them."""
    found = socket.getaddrinfo(name, PORT, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in found]


def connect(address: str, seconds: float) -> socket.socket:
    """A connection to an address, which is no name."""
    return socket.create_connection((address, PORT), timeout=seconds)


@dataclass(frozen=True)
class Fetcher:
    """Fetches images; what names mean, and how addresses are reached, may be replaced."""

    resolve: Resolve = resolve
    connect: Connect = connect
    context: ssl.SSLContext = field(default_factory=ssl.create_default_context)
    seconds: float = SECONDS

    def begin(self) -> Fetching:
        """The fetches of one request."""
        return Fetching(self, time.monotonic() + self.seconds)


class Fetching:
    """The addresses of one request, which share its time."""

    def __init__(self, fetcher: Fetcher, end: float) -> None:
        self._fetcher, self._end, self._count = fetcher, end, 0

    def get(self, url: str, limit: int) -> bytes:
        """At most `limit` bytes; HttpError where the address is not allowed, or not answered."""
        self._count += 1
        if self._count > MOST:
            raise refused(f"a request may hold {MOST} addresses of images", PARAM)
        for _ in range(HOPS + 1):
            host, path = _parts(url)
            try:
                status, location, content = self._once(host, path, limit)
            except (OSError, http.client.HTTPException, ValueError, queue.Empty) as error:
                raise refused(
                    f"the image at {host[:80]} cannot be fetched ({type(error).__name__}); check"
                    " its address, or send a data URI",
                    PARAM,
                ) from error
            if status == 200:
                return content
            if status not in (301, 302, 303, 307, 308) or not location:
                raise refused(f"the image at {host[:80]} has status {status}", PARAM)
            url = urljoin(url, location)
        raise refused(f"the image's address is redirected more than {HOPS} times", PARAM)

    def _left(self) -> float:
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left

    def _once(self, host: str, path: str, limit: int) -> tuple[int, str, bytes]:
        """Status, where a redirect leads, and the content of a 200."""
        address = self._address(host)
        plain = self._fetcher.connect(address, self._left())
        with (
            plain,
            self._fetcher.context.wrap_socket(
                plain, server_hostname=host, do_handshake_on_connect=False
            ) as secure,
        ):
            secure.settimeout(self._left())
            # A server that sends a byte now and then lets no time-out pass: the end is cut.
            timer = threading.Timer(self._left(), _cut, [secure])
            timer.start()
            try:
                secure.do_handshake()
                return self._exchange(secure, host, path, limit)
            finally:
                timer.cancel()

    def _exchange(
        self, secure: socket.socket, host: str, path: str, limit: int
    ) -> tuple[int, str, bytes]:
        connection = http.client.HTTPConnection(host)
        connection.sock = secure
        headers = {"Accept": "image/*", "Accept-Encoding": "identity", "Connection": "close"}
        connection.request("GET", path, headers=headers)
        with connection.getresponse() as reply:
            if reply.status != 200:
                return reply.status, reply.headers.get("Location", ""), b""
            return 200, "", self._content(reply, limit)

    def _content(self, reply: http.client.HTTPResponse, limit: int) -> bytes:
        content = bytearray()
        while part := reply.read(PIECE):
            self._left()
            content += part
            if len(content) > limit:
                raise HttpError(413, f"an image may have {limit} bytes; this one has more", PARAM)
        self._left()
        if reply.length:  # it was cut
            raise http.client.IncompleteRead(bytes(content), reply.length)
        return bytes(content)

    def _address(self, host: str) -> str:
        """An address of a host; HttpError unless all that it has are public."""
        looked_up: queue.SimpleQueue[list[str] | Exception] = queue.SimpleQueue()

        def look_up() -> None:
            try:
                looked_up.put(self._fetcher.resolve(host))
            except Exception as error:  # handed to the thread that waits
                looked_up.put(error)

        # The system's look-up knows no time-out: the thread is left behind.
        threading.Thread(target=look_up, name="edgeprune look-up", daemon=True).start()
        found = looked_up.get(timeout=self._left())
        if isinstance(found, Exception):
            raise found
        if not found or not all(map(is_public, found)):
            raise refused(
                f"{host[:80]} is no public address; images are fetched from the internet alone",
                PARAM,
            )
        return found[0]


def is_public(text: str) -> bool:
    """Whether an address is of the internet, also where it stands for another one."""
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo or (None, None))[1]
        if inner is None and address in NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
        if int(address) >> 32 == 0 or address.is_site_local:  # ::a.b.c.d: an old form of the same
            return False
    return address.is_global and not address.is_multicast and not address.is_reserved


def _parts(url: str) -> tuple[str, str]:
    """Host and path of an address; HttpError unless it is https, without a port or a user."""
    try:
        split = urlsplit(url)
        host, port = split.hostname or "", split.port
        host.encode("idna")
    except (ValueError, UnicodeError) as error:
        raise refused("the address of an image is no https address", PARAM) from error
    if split.scheme != "https" or not host or port not in (None, PORT) or "@" in split.netloc:
        raise refused(
            "an image's address is https://HOST/PATH, without a port, a user or a password", PARAM
        )
    path = split.path or "/"
    path += f"?{split.query}" if split.query else ""
    if not path.isascii() or any(ord(letter) <= 32 or letter == "\x7f" for letter in path):
        raise refused("the address of an image has letters that are not percent-encoded", PARAM)
    return host, path


def _cut(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
