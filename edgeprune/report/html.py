"""Elements of a page. Text is escaped wherever it enters; only what is built here is markup."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Iterator, Sequence

from edgeprune.drawing import svg
from edgeprune.drawing.canvas import Sheet
from edgeprune.tables import Table
from edgeprune.terminal import printable

LONGEST = 400
"""Characters of one text; what is longer ends in three dots."""
_NUMBER = re.compile(r"[-+]?\d[\d.,]*(?:e[-+]\d+)?(?![\w.])|-$")


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def text(content: str) -> Markup:
    """Any text as HTML: control characters are shown as escapes, a very long one is cut."""
    shown = content if len(content) <= LONGEST else content[:LONGEST] + "..."
    return Markup(html.escape(printable(shown)))


def element(tag: str, *content: str, **attributes: str) -> Markup:
    """An element; an attribute's name ends in an underscore where Python keeps the word."""
    inner = "".join(part if isinstance(part, Markup) else text(part) for part in content)
    said = (f' {k.rstrip("_").replace("_", "-")}="{text(v)}"' for k, v in attributes.items())
    return Markup(f"<{tag}{''.join(said)}>{inner}</{tag}>")


def join(parts: Iterable[str]) -> Markup:
    """Parts one behind the other."""
    return Markup("\n".join(p if isinstance(p, Markup) else text(p) for p in parts))


def table(content: Table) -> Markup:
    """A table that scrolls by itself where it is wider than the page; first cells head rows."""
    aligned = [_aligned(column) for column in zip(*content.rows, strict=True)]
    aligned = aligned or [{} for _ in content.heads]
    caption = element("caption", element("span", content.caption))
    heads = (
        element("th", h, scope="col", **a) for h, a in zip(content.heads, aligned, strict=True)
    )
    rows = join(element("tr", *_cells(row, aligned)) for row in content.rows)
    inner = join([caption, element("thead", element("tr", *heads)), element("tbody", rows)])
    return element(
        "div",
        element("table", inner),
        class_="scroll",
        role="region",
        tabindex="0",
        aria_label=content.caption,
    )


def _aligned(column: Sequence[str]) -> dict[str, str]:
    """To the right where a column holds numbers alone."""
    return {"class_": "number"} if all(map(_NUMBER.match, column)) else {}


def _cells(row: Sequence[str], aligned: Sequence[dict[str, str]]) -> Iterator[Markup]:
    yield element("th", row[0], scope="row", **aligned[0])
    for cell, attributes in zip(row[1:], aligned[1:], strict=True):
        yield element("td", cell, **attributes)


def figure(sheet: Sheet, caption: str) -> Markup:
    """A drawing that takes the page's colours, above its caption."""
    drawn = element("div", Markup(svg.inline(sheet, caption)), class_="scroll", tabindex="0")
    return element("figure", drawn, element("figcaption", caption))


def bullets(lines: Iterable[str]) -> Markup:
    return element("ul", join(element("li", line) for line in lines))
