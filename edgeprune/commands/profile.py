"""`edgeprune profile`: what the parts of a model take on this machine."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgeprune import terminal
from edgeprune.commands import _common
from edgeprune.tables import plain

if TYPE_CHECKING:
    from edgeprune.timing import KindTimes, Profile, Table


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "profile",
        help="time the parts of a model on this machine, for plan and export --ttft",
        description="Time prefill as a function of visual tokens, an encoder block as a function of"
        " patches, choosing tokens and patches, and what comes before them, on the machine that"
        " will run the model. It needs the dense bundle, exported with --profilable, and no"
        " PyTorch.",
    )
    command.add_argument(
        "bundle", type=Path, metavar="BUNDLE", help="dense bundle, exported with --profilable"
    )
    command.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FILE", help="profile (JSON)"
    )
    command.add_argument("--backend", default="ort-cpu", help="ort-cpu (default) or ort-cuda")
    command.add_argument(
        "--text", type=int, default=64, metavar="N", help="text tokens of a prompt (default 64)"
    )
    command.add_argument(
        "--image",
        type=Path,
        metavar="FILE",
        help="image to time reading with (default: noise as JPEG)",
    )
    command.add_argument(
        "--rounds", type=int, default=9, metavar="N", help="timed rounds (default 9)"
    )
    command.add_argument(
        "--warmup", type=int, default=2, metavar="N", help="rounds before, not timed (default 2)"
    )
    command.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all)")
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from edgeprune.bench.profiling import ProfileRequest, profile
    from edgeprune.progress import Bar

    request = ProfileRequest(
        args.bundle,
        args.backend,
        args.text,
        args.rounds,
        args.warmup,
        args.threads,
        args.image,
    )
    _common.check_output(args.output)
    with Bar() as bar:
        found = profile(request, bar)
    _common.write_output(args.output, found.to_json())
    terminal.note(_told(found))
    print(args.output)
    return 0


def _told(found: Profile) -> str:
    parts = (("read", found.read), ("preprocess", found.preprocess), ("vision", found.vision))
    lines = [f"{name} {one.ms:.2f} ms ({one.low:.2f}-{one.high:.2f})" for name, one in parts]
    lines.append(f"prefill with {found.text_tokens} text tokens, by visual tokens:")
    lines.append(_rows(found.prefill))
    lines.append("encoder block, by tokens of each tile:")
    lines.append(_rows(found.block))
    if found.windowed is not None:
        lines.append("encoder block with windows, by tokens of each window:")
        lines.append(_rows(found.windowed))
    kinds = {
        "encoder site, by units of each tile that go on:": found.choices,
        "decoder site, by visual tokens before it:": found.sites,
        "decoder layer by itself, by visual tokens:": found.layers,
    }
    for title, times in kinds.items():
        if times:
            lines += [title, _columns(times)]
    lines.append(_whole(found))
    machine = ", ".join(f"{name} {value}" for name, value in found.machine.items())
    return "\n".join([*lines, f"median (p10-p90) of {found.rounds} rounds; {machine}"])


def _whole(found: Profile) -> str:
    """Whether the parts explain the profiled bundle."""
    whole, added = found.whole, found.added
    return (
        f"first token in one go {whole.ms:.2f} ms ({whole.low:.2f}-{whole.high:.2f}); its parts add"
        f" up to {added:.2f} ms ({added / whole.ms - 1:+.1%})"
    )


def _columns(times: Sequence[KindTimes]) -> str:
    """One column a kind; where one was not measured with a count, there is a dash."""
    counts = sorted({count for one in times for count in one.table.counts})
    rows = [("", *(one.kind for one in times))]
    for count in counts:
        tables = (one.table for one in times)
        held = (f"{t.at(count):.3f} ms" if count in t.counts else "-" for t in tables)
        rows.append((str(count), *held))
    return plain(rows)


def _rows(table: Table) -> str:
    rows = [
        (str(count), f"{ms:.3f} ms", f"({one.low:.3f}-{one.high:.3f})")
        for count, ms, one in zip(table.counts, table.ms, table.measured, strict=True)
    ]
    flat = ", ".join(f"{first} to {last}" for first, last in table.plateaus())
    return plain(rows) + (f"\nequal within 2%: {flat}" if flat else "")
