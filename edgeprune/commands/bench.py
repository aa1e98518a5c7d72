"""`edgeprune bench`: time bundles side by side, on one backend or several."""

from __future__ import annotations

import argparse
from pathlib import Path

from edgeprune import terminal
from edgeprune.commands import _common


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "bench",
        help="time bundles side by side",
        description="Time vision, prefill and decode of bundles, all in every round. The first is"
        " the one that the others are compared to: give the dense bundle first. With several"
        " backends each bundle runs on all of them that are here, and what they say is compared;"
        " the others are listed with the reason.",
    )
    command.add_argument("bundles", nargs="+", type=Path, metavar="BUNDLE", help="exported folder")
    command.add_argument(
        "--backends",
        default="ort-cpu",
        metavar="NAME,...",
        help="backends: ort-cpu (default), ort-cuda, trt, trt-rtx",
    )
    command.add_argument(
        "--text-tokens", type=int, default=64, metavar="N", help="tokens of text (default 64)"
    )
    command.add_argument(
        "--new-tokens", type=int, default=32, metavar="N", help="tokens to decode (default 32)"
    )
    length = command.add_mutually_exclusive_group()
    length.add_argument(
        "--rounds", type=int, default=10, metavar="N", help="timed rounds (default 10)"
    )
    length.add_argument(
        "--duration",
        type=float,
        metavar="SECONDS",
        help="in place of --rounds: rounds without a pause for this time; heat, clocks and what"
        " slows the machine down are shown for each tenth of it",
    )
    command.add_argument(
        "--warmup", type=int, default=2, metavar="N", help="rounds before, not timed (default 2)"
    )
    command.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all)")
    command.add_argument(
        "--cr",
        type=_common.ratios,
        default=(),
        metavar="CR,...",
        help="ratios at which bundles with several are timed (default: their first)",
    )
    command.add_argument("--json", type=Path, metavar="FILE", help="also write every round as JSON")
    command.add_argument("--figure", type=Path, metavar="FILE", help="also draw it (.png or .svg)")
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from edgeprune.bench import sustained
    from edgeprune.bench.bench import BenchRequest, bench
    from edgeprune.bench.table import table
    from edgeprune.drawing.image_files import check_target
    from edgeprune.progress import Bar

    request = BenchRequest(
        bundles=tuple(args.bundles),
        backends=tuple(dict.fromkeys(args.backends.split(","))),
        text_tokens=args.text_tokens,
        new_tokens=args.new_tokens,
        rounds=args.rounds,
        duration=args.duration,
        warmup=args.warmup,
        threads=args.threads,
        ratios=args.cr,
    )
    if args.figure:
        check_target(args.figure)
    for file in (args.json, args.figure):
        if file:
            _common.check_output(file)
    with Bar() as bar:
        result = bench(request, bar)
    print(table(result))
    if result.sustained is not None:
        print("\n" + sustained.table(result))
    machine = ", ".join(f"{name} {value}" for name, value in result.machine.items())
    rounds = len(result.rows[0].rounds.prefill)
    terminal.note(f"median (p10-p90) of {rounds} rounds; {machine}")
    if args.json:
        _common.write_output(args.json, result.to_json() + "\n")
    if args.figure:
        from edgeprune.bench.figure import figure
        from edgeprune.drawing.image_files import save

        save(figure(result), args.figure)
    return 0
