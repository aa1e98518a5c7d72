"""`edgeprune calibrate`: solve a schedule and write it to a file."""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path

from edgeprune import terminal
from edgeprune.commands import _common
from edgeprune.errors import SpecError


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "calibrate",
        help="solve a schedule, for export --schedule",
        description="Measure a model on samples and solve for the visual tokens of each layer."
        " While it searches for a bound, Ctrl-C ends the search; the schedule is written as it is.",
    )
    _common.add_model(command)
    _common.add_media(command)
    _common.add_method(command)
    _common.add_calibration(command)
    _common.add_execution(command)
    _common.add_ray(command, "samples")
    command.add_argument("--jobs", type=int, metavar="N", help="parts on Ray at once (default 4)")
    command.add_argument("-o", "--output", type=Path, required=True, help="schedule file (JSON)")
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from edgeprune import policies
    from edgeprune.calib.calibrate import calibrate
    from edgeprune.calib.resuming import beside
    from edgeprune.calib.spread import Spread
    from edgeprune.models._processor import Processor
    from edgeprune.progress import Bar
    from edgeprune.spec import check_reach

    if args.jobs is not None and args.ray is None:
        raise SpecError("--jobs is for --ray; give the address of a cluster or leave it out")
    if args.method == _common.AUTO:
        raise SpecError("--method auto chooses an encoder too: give it to export or plan")
    spec = _common.spec(args)
    policy = policies.make(spec)
    _common.check_output(args.output)
    execution = _common.execution(args, elsewhere=args.ray is not None)
    adapter = _common.model(args).with_execution(execution)
    check_reach(spec, adapter.shape)
    processor = Processor(adapter)
    with Bar() as bar:
        asked = replace(_common.calibration(args, spec.cr), patient=True)
        measure = None
        if cluster := _common.cluster(args):
            measure = Spread(
                cluster,
                asked,
                spec,
                args.model,
                args.revision,
                args.image_size,
                args.num_images,
                args.frames,
                args.tiles,
                args.tokenizer,
                execution,
            ).measure
        asked = replace(asked, work=beside(args.output))
        tell = partial(_common.tell, bar)
        schedule = calibrate(asked, adapter, policy, processor, bar, measure, tell)
    _common.write_output(args.output, schedule.to_json())
    print(" ".join(str(count) for count in schedule.counts))
    terminal.note(
        f"CR {schedule.cr_reached:.3f}, objective {schedule.objective:.4g}; no schedule can be"
        f" below {schedule.bound:.4g} ({schedule.gap:.1%} less); written to {args.output}"
    )
    return 0
