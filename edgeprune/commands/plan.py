"""`edgeprune plan`: what times to the first token can be reached, before anything is exported."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgeprune import terminal
from edgeprune.commands import _common
from edgeprune.errors import SpecError
from edgeprune.tables import plain

if TYPE_CHECKING:
    from edgeprune.calib.ttft import Point

ROWS = 16


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "plan",
        help="show which times to the first token can be reached, and what each loses",
        description="Weigh shorter encoders and the decoder's counts under a profile of the device:"
        " the frontier of time to first token against predicted loss. export --ttft MS takes the"
        " best within a time.",
    )
    _common.add_model(command)
    _common.add_media(command)
    _common.add_method(command)
    _common.add_calibration(command)
    _common.add_execution(command)
    command.add_argument(
        "--profile",
        type=Path,
        required=True,
        metavar="FILE",
        help="times of the device, written by edgeprune profile",
    )
    command.add_argument(
        "--encoder",
        default="auto",
        metavar="METHOD",
        help="auto (default: weigh several), dense, or one method",
    )
    command.add_argument("--figure", type=Path, metavar="FILE", help="also draw it (.png or .svg)")
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from edgeprune import policies
    from edgeprune.calib.survey import Survey, Work, joint_spec
    from edgeprune.calib.ttft import open_costs, undominated
    from edgeprune.drawing.image_files import check_target
    from edgeprune.models._processor import Processor
    from edgeprune.progress import Bar
    from edgeprune.timing import read_profile

    if args.cr is not None:
        raise SpecError("plan shows all ratios; leave out --cr")
    if args.max_sites is not None:
        raise SpecError(
            "plan shows schedules with as many sites as are best; leave out --max-sites"
        )
    if args.figure:
        check_target(args.figure)
        _common.check_output(args.figure)
    profile, execution = read_profile(args.profile), _common.execution(args)
    adapter = _common.model(args).with_execution(execution)
    policy = policies.make(joint_spec(_common.spec(args)))
    costs = open_costs(adapter, profile, policy)
    request = _common.calibration(args, 1)
    with Bar() as bar:
        work = Work(request, adapter, policy, Processor(adapter), bar)
        found = undominated(Survey(work, costs, args.encoder).all_points())
    print(_table(found))
    dense = (
        costs.before
        + costs.vision(None)
        + costs.prefill((adapter.shape.visual_tokens,) * adapter.shape.layers)
    )
    first, last = found[0].spent, found[-1].spent
    terminal.note(
        f"{len(found)} points, {first:.1f} to {last:.1f} ms; dense {dense:.1f} ms;"
        f" read and preprocess {costs.before:.1f} ms of each; {profile.backend}, text"
        f" {profile.text_tokens} tokens"
    )
    if args.figure:
        from edgeprune.drawing.frontier import figure
        from edgeprune.drawing.image_files import save

        save(figure([(p.spent, p.loss, p.encoder) for p in found], dense), args.figure)
    return 0


def _table(found: Sequence[Point]) -> str:
    """Some of the points, the fastest and the best among them."""
    steps = max(1, len(found) - 1)
    count = min(ROWS, len(found))
    chosen = dict.fromkeys(round(i * steps / max(1, count - 1)) for i in range(count))
    rows: list[tuple[str, ...]] = [
        ("TTFT ms", "vision ms", "prefill ms", "encoder", "enter", "CR", "loss rad")
    ]
    for index in chosen:
        one = found[min(index, len(found) - 1)]
        rows.append(
            (
                f"{one.spent:.1f}",
                f"{one.vision:.1f}",
                f"{one.prefill:.1f}",
                one.encoder,
                f"{one.counts[0]}",
                f"{one.cr:.2f}",
                f"{one.loss:.4f}",
            )
        )
    return plain(rows)
