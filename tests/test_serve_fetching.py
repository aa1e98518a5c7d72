"""Images from addresses: nothing but public hosts is reached, within bounds of size and time."""

from __future__ import annotations

import http.server
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgeprune.serve import fetching
from edgeprune.serve.errors import HttpError
from edgeprune.serve.fetching import Fetcher, is_public
from edgeprune.serve.images import ImageDoors
from tests.server import SCENE

CERTIFICATE = Path(__file__).with_name("images.example.pem")
"""Of images.example and other.example, signed by itself; with its key."""
PUBLIC, OTHER = "93.184.216.34", "2606:2800:220:1::5"
LIMIT = 1 << 20


class Site(http.server.BaseHTTPRequestHandler):
    """What a host answers, by path."""

    def do_GET(self) -> None:
        path = self.path
        if path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", path[len("/to/") :])
            self.end_headers()
        elif path == "/slow":
            self.send_response(200)
            self.end_headers()
            for _ in range(200):
                self.wfile.write(b"a")
                time.sleep(0.02)
        elif path == "/cut":
            self.send_response(200)
            self.send_header("Content-Length", "100")
            self.end_headers()
            self.wfile.write(b"ab")
        elif path == "/large":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(bytes(LIMIT + 1))
        elif path == "/scene.png":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(SCENE)
        else:
            self.send_error(404)

    def log_message(self, *message: Any) -> None:
        pass


class Internet:
    """Names and addresses of a small internet, all on one port of this machine."""

    def __init__(self, port: int) -> None:
        self.port, self.reached = port, list[str]()
        self.names: dict[str, list[list[str]]] = {
            "images.example": [[PUBLIC]],
            "other.example": [[OTHER]],
        }

    def resolve(self, name: str) -> list[str]:
        """What a name means now; the last meaning stays."""
        meanings = self.names.get(name)
        if meanings is None:
            raise socket.gaierror("there is no such name")
        return meanings.pop(0) if len(meanings) > 1 else meanings[0]

    def connect(self, address: str, seconds: float) -> socket.socket:
        self.reached.append(address)
        return socket.create_connection(("127.0.0.1", self.port), timeout=seconds)


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(CERTIFICATE)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site)
    server.handle_error = lambda *told: None  # type: ignore[method-assign] # clients leave
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()


@pytest.fixture
def internet(port: int) -> Internet:
    return Internet(port)


@pytest.fixture
def fetcher(internet: Internet) -> Fetcher:
    context = ssl.create_default_context(cafile=str(CERTIFICATE))
    return Fetcher(internet.resolve, internet.connect, context)


@pytest.fixture
def read(fetcher: Fetcher) -> Callable[[str], bytes]:
    return lambda url: ImageDoors(LIMIT, fetcher=fetcher).open().read(url)


def refusal(read: Callable[[str], bytes], url: str, status: int = 400) -> str:
    with pytest.raises(HttpError) as caught:
        read(url)
    assert (caught.value.status, caught.value.param) == (status, "messages")
    assert "\n" not in caught.value.message
    return caught.value.message


def test_an_image_of_a_public_host_is_fetched(
    internet: Internet, read: Callable[[str], bytes]
) -> None:
    assert read("https://images.example/scene.png") == SCENE
    assert read("https://images.example/to//scene.png") == SCENE
    assert read("https://images.example/to/https://other.example/scene.png") == SCENE
    assert internet.reached == [PUBLIC, PUBLIC, PUBLIC, PUBLIC, OTHER]


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "10.1.2.3", "192.168.0.1", "172.16.0.1", "169.254.169.254", "0.0.0.0"),
        *("100.64.0.1", "224.0.0.1", "255.255.255.255", "198.18.0.1", "192.0.0.1", "240.0.0.1"),
        *("::1", "::", "fe80::1%eth0", "fc00::1", "ff02::1", "::ffff:127.0.0.1", "::127.0.0.1"),
        *("64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "2002:7f00:1::", "2001:db8::1", "localhost"),
        *("fec0::1", "4000::1"),  # site-local, reserved
        "2001:0:7f00:1::8081:fefe",  # Teredo of 127.126.1.1
    ],
)
def test_no_private_address_is_reached(
    address: str, internet: Internet, read: Callable[[str], bytes]
) -> None:
    assert not is_public(address)
    for meaning in ([address], [PUBLIC, address]):
        internet.names["images.example"] = [meaning]
        assert "no public address" in refusal(read, "https://images.example/scene.png")
    assert internet.reached == []


def test_an_address_in_place_of_a_name_is_looked_at_too(internet: Internet, port: int) -> None:
    real = Fetcher(connect=internet.connect)  # the system's own look-up
    for host in ("127.0.0.1", "[::1]", "2130706433", "0x7f.1", "localhost", "[::ffff:7f00:1]"):
        url = f"https://{host}/scene.png"
        told = refusal(ImageDoors(LIMIT, fetcher=real).open().read, url)
        assert "no public address" in told or "cannot be fetched" in told
    assert internet.reached == []


def test_the_address_that_was_looked_at_is_the_one_that_is_reached(
    internet: Internet, read: Callable[[str], bytes]
) -> None:
    """A name that means another address a moment later (DNS rebinding)."""
    internet.names["images.example"] = [[PUBLIC], ["127.0.0.1"]]
    assert read("https://images.example/scene.png") == SCENE
    assert internet.reached == [PUBLIC]
    internet.names["images.example"] = [[PUBLIC], ["127.0.0.1"]]
    url = "https://images.example/to/https://images.example/scene.png"
    assert "no public address" in refusal(read, url)
    assert internet.reached == [PUBLIC, PUBLIC]


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("http://images.example/scene.png", "https://HOST/PATH"),
        ("https://images.example:8443/scene.png", "https://HOST/PATH"),
        ("https://me:pw@images.example/scene.png", "https://HOST/PATH"),
        ("https://images.example:99999999/", "no https address"),
        ("https:///scene.png", "https://HOST/PATH"),
        ("https://images.example/a b", "percent-encoded"),
        ("https://images.example/a\r\nHost: b", "percent-encoded"),
        ("https://images.example/nosuch", "has status 404"),
        ("https://nosuch.example/a", "cannot be fetched (gaierror)"),
        ("https://images.example/to/http://127.0.0.1/", "https://HOST/PATH"),
        ("https://images.example/to/file:///etc/passwd", "https://HOST/PATH"),
        ("https://images.example/to/https://127.0.0.1/", "cannot be fetched (gaierror)"),
        ("https://images.example/to//to//to//to//to//scene.png", "more than 3 times"),
        ("https://images.example/cut", "cannot be fetched (IncompleteRead)"),
    ],
)
def test_what_is_not_fetched_is_one_line(
    url: str, says: str, read: Callable[[str], bytes], internet: Internet
) -> None:
    assert says in refusal(read, url)
    assert "127.0.0.1" not in internet.reached


def test_size_time_and_number_are_bounded(
    read: Callable[[str], bytes], fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "may have" in refusal(read, "https://images.example/large", 413)
    hasty = ImageDoors(LIMIT, fetcher=replace(fetcher, seconds=0.3)).open()
    started = time.monotonic()
    assert "cannot be fetched" in refusal(hasty.read, "https://images.example/slow")
    assert "cannot be fetched (TimeoutError)" in refusal(hasty.read, "https://images.example/a")
    stuck = replace(fetcher, seconds=0.2, resolve=lambda name: [time.sleep(3), PUBLIC][1:])
    told = refusal(ImageDoors(LIMIT, fetcher=stuck).open().read, "https://images.example/a")
    assert "cannot be fetched" in told
    assert time.monotonic() - started < 2.5
    monkeypatch.setattr(fetching, "MOST", 2)
    one = ImageDoors(LIMIT, fetcher=fetcher).open()
    assert [one.read("https://images.example/scene.png") for _ in range(2)] == [SCENE, SCENE]
    assert "may hold 2 addresses" in refusal(one.read, "https://images.example/scene.png")


def test_a_certificate_is_checked(internet: Internet) -> None:
    strict = ImageDoors(LIMIT, fetcher=Fetcher(internet.resolve, internet.connect)).open()
    told = refusal(strict.read, "https://images.example/scene.png")
    assert "cannot be fetched (SSLCertVerificationError)" in told


def test_without_the_option_nothing_is_fetched() -> None:
    told = refusal(ImageDoors(LIMIT).open().read, "https://images.example/scene.png")
    assert "fetches no images from addresses (--allow-urls)" in told
