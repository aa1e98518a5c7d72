"""The page at `/`: files of `static/` and the demo's sample scenes, with headers that allow nothing
else. No script, style, font or image comes from another place; nothing is built."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response

from edgeprune.demo import SAMPLES_DIR
from edgeprune.serve.errors import HttpError

KINDS = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
    "png": "image/png",
}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self';"
    " img-src 'self' data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none';"
    " frame-ancestors 'none'",
    "Permissions-Policy": "camera=(self), microphone=(), geolocation=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
INDEX = "index.html"


async def page_file(request: Request) -> Response:
    """The page, or one of its files by name."""
    name = request.path_params.get("name", INDEX)
    if (content := _contents().get(name)) is None:
        raise HttpError(404, f"the page has no file {name[:80]!r}")
    return Response(content, headers=HEADERS, media_type=KINDS[name.rpartition(".")[2]])


@cache
def _contents() -> dict[str, bytes]:
    """All files by name; a name of a request is looked up here, never on disk."""
    static = files("edgeprune.serve").joinpath("static")
    found = {file.name: file.read_bytes() for file in static.iterdir() if file.is_file()}
    samples = {file.name: file.read_bytes() for file in sorted(SAMPLES_DIR.glob("*.png"))}
    return {name: data for name, data in (found | samples).items() if "." in name}
