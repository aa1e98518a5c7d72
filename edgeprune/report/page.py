"""The whole page: head, contents, sections, what the words mean. It loads and runs nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources

from edgeprune import __version__
from edgeprune.report import proof, sections
from edgeprune.report.html import Markup, element, join
from edgeprune.report.sources import Sources
from edgeprune.report.summary import summary

POLICY = "default-src 'none'; style-src 'unsafe-inline'"
WORDS = {
    "CR": "compression ratio: visual tokens times decoder layers, over the sum of what enters each"
    " layer. At CR 4 the decoder computes and caches a quarter of the visual tokens.",
    "vision, prefill, decode": "encoding the image; reading image and prompt; making one token.",
    "TTFT": "time to first token: vision and prefill together.",
    "p10-p90": "the middle 80% of rounds.",
    "KV": "the decoder's caches of keys and values.",
    "parity": "the exported graphs keep the same tokens as the eager model and say the same.",
    "limit, reached": "the speed-up that counting operations allows, and the part of it measured.",
}


@dataclass(frozen=True)
class Heading:
    """What stands at the top of a page."""

    title: str = "Pruned vision-language models"
    date: str = ""


def render(sources: Sources, heading: Heading) -> str:
    """The page as one file of HTML."""
    named = {name: list(parts) for name, parts in _sections(sources)}
    shown = {name: parts for name, parts in named.items() if parts}
    links = (element("li", element("a", name, href=f"#{_anchor(name)}")) for name in shown)
    made = f"edgeprune {__version__}" + (f", {heading.date}" if heading.date else "")
    body = element(
        "main",
        join([element("h1", heading.title), element("p", made, class_="made")]),
        element("nav", element("ul", join(links)), aria_label="Contents"),
        join(
            element("section", element("h2", name, id=_anchor(name)), join(parts))
            for name, parts in shown.items()
        ),
    )
    page = element("html", _head(heading.title), element("body", body), lang="en")
    return f"<!doctype html>\n{page}\n"


def _head(title: str) -> Markup:
    style = resources.files(__package__).joinpath("style.css").read_text(encoding="utf-8")
    return join(
        [
            Markup('<head>\n<meta charset="utf-8">'),
            Markup(f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'),
            Markup('<meta name="viewport" content="width=device-width, initial-scale=1">'),
            Markup('<meta name="color-scheme" content="light dark">'),
            element("title", title),
            Markup(f"<style>\n{style}</style>\n</head>"),
        ]
    )


def _sections(found: Sources) -> Iterator[tuple[str, Iterator[Markup]]]:
    yield "Summary", summary(found)
    yield "Accuracy", sections.accuracy(found.comparisons)
    if found.evaluations:
        yield "Benchmarks", sections.tasks(found.evaluations)
    yield "Times", sections.times(found.timings)
    yield "Memory and energy", sections.memory(found.timings)
    if found.bundles:
        yield "What was pruned", sections.pruned(found.bundles)
        yield "Parity", proof.parity(found.bundles)
    yield "Versions and machines", proof.versions(found.bundles, found.timings, found.comparisons)
    yield "Words", _words()
    yield "Files", proof.files(found.files, found.left_out)


def _words() -> Iterator[Markup]:
    pairs = ([element("dt", word), element("dd", meaning)] for word, meaning in WORDS.items())
    yield element("dl", join(part for pair in pairs for part in pair))


def _anchor(name: str) -> str:
    return name.lower().replace(" ", "-")
