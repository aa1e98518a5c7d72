"""`edgeprune methods` and `edgeprune models`: what there is to choose from."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgeprune.policies import Policy


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    methods = commands.add_parser(
        "methods",
        help="list the pruning methods, or tell all about one",
        description="List the pruning methods: where each prunes and what it needs beside the"
        " picture. With a name: its paper, options and equations, and where it deviates from them.",
    )
    methods.add_argument("name", nargs="?", metavar="NAME", help="tell all about this one")
    methods.set_defaults(run=run_methods)
    models = commands.add_parser("models", help="list the model families")
    models.set_defaults(run=run_models)


def run_methods(args: argparse.Namespace) -> int:
    from edgeprune import policies

    if args.name:
        print(_described(args.name, policies.load(args.name)))
        return 0
    rows = [("method", "prunes at", "needs", "what stays")]
    for name in policies.names():
        policy = policies.load(name)
        sites, needs = ", ".join(policy.sites), ", ".join(policy.needs)
        rows.append((name, sites or "-", needs or "-", policy.summary))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip())
    return 0


def _options(policy: type[Policy]) -> list[str]:
    """Each with its default, as `K=2`."""
    from dataclasses import fields

    return [f"{f.name}={_word(f.default)}" for f in fields(policy)]


def _word(default: object) -> str:
    """A default as --set takes it."""
    return ("off", "on")[default] if isinstance(default, bool) else str(default)


def _described(name: str, policy: type[Policy]) -> str:
    """Everything that a method's file says of itself."""
    import inspect
    import re
    import sys

    source = inspect.getsource(policy)
    lines = [
        name,
        f"paper      {policy.paper or '-'}",
        f"prunes at  {', '.join(policy.sites) or '-'}",
        f"needs      {', '.join(policy.needs) or '-'}",
    ]
    for number, option in enumerate(_options(policy)):
        field = option.partition("=")[0]
        comment = re.search(rf"^    {field}: .*?  # (.*)$", source, re.MULTILINE)
        label = "" if number else "options"
        lines.append(f"{label:<10} --set {option}" + (f"  {comment[1]}" if comment else ""))
    text = inspect.getdoc(sys.modules[policy.__module__]) or ""
    return "\n".join([*lines, "", text])


def run_models(args: argparse.Namespace) -> int:
    from importlib import import_module

    from edgeprune import models

    for name in models.names():
        summary = (import_module(f"edgeprune.models.{name}").__doc__ or "").strip()
        print(f"{name:<10} {summary.splitlines()[0]}")
    print(f"{'demo':<10} the embedded demo checkpoint, a small trained LLaVA: --model demo")
    return 0
