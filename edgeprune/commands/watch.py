"""`edgeprune watch`: ask a bundle about the frames of a camera, a stream, a file or a folder."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from edgeprune.commands import _common
from edgeprune.errors import InputError, SpecError

if TYPE_CHECKING:
    from edgeprune.runtime.frames import DeltaOptions


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "watch",
        help="ask a bundle about the frames of a camera, stream, file or folder",
        description="Ask one question about frames, one after the other. Each answer is a line of"
        " JSON on stdout. Of a live source the newest frame is asked; what came meanwhile is"
        " dropped and counted. A stream that ends is opened again.",
    )
    command.add_argument("bundle", type=Path, metavar="BUNDLE", help="exported folder")
    command.add_argument(
        "source",
        metavar="SOURCE",
        help="/dev/video0, an RTSP address, a video file, an image, a folder of images, or - for"
        " raw frames on stdin",
    )
    command.add_argument("--prompt", required=True, help="question about every frame")
    command.add_argument("--system", metavar="TEXT", help="system message")
    command.add_argument(
        "--every", type=float, default=0.0, metavar="SECONDS", help="ask no more often than this"
    )
    command.add_argument(
        "--on-change",
        type=float,
        metavar="T",
        help="ask only where a part of the frame changed by T, from 0 (any change) to 1 (from black"
        " to white), since the last frame that was asked; 0.05 suits most cameras",
    )
    command.add_argument(
        "--delta",
        type=float,
        metavar="T",
        help="for a fixed camera, and a bundle exported with --delta: of a frame encode only"
        " patches that changed by T, from 0 (any) to 1, which is not exact; 0.02 suits most"
        " cameras. Frames of which more changed are encoded as a whole",
    )
    command.add_argument(
        "--refresh",
        type=int,
        metavar="N",
        help="with --delta: encode a whole frame at least every N frames (default 100)",
    )
    form = command.add_mutually_exclusive_group()
    _common.add_answer_format(form)
    form.add_argument(
        "--choices", metavar="A,B,...", help="answers to choose from, with probabilities"
    )
    command.add_argument(
        "--alarm",
        metavar="CONDITION",
        help="such as 'yes>0.8': each answer says whether it holds; --choices are yes,no unless"
        " given",
    )
    command.add_argument("--max-new-tokens", type=int, metavar="N", help="longest answer")
    command.add_argument(
        "--frames",
        choices=("newest", "all"),
        help="which frames of the source: newest (default of live sources), all (of files)",
    )
    command.add_argument(
        "--size", type=_common.image_size, metavar="WxH", help="size of raw frames, in pixels"
    )
    command.add_argument(
        "--pixels",
        default="rgb",
        choices=("rgb", "bgr", "rgbx", "bgrx", "gray"),
        help="bytes of a pixel of raw frames (default rgb)",
    )
    command.add_argument(
        "--backend", default="ort-cpu", help="ort-cpu (default), ort-cuda, trt, trt-rtx"
    )
    command.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all)")
    _common.add_tile_memory(command)
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from edgeprune.bundle import Bundle
    from edgeprune.runtime import Session
    from edgeprune.watch.alarm import Alarm
    from edgeprune.watch.sources import find
    from edgeprune.watch.watching import Watch, WatchRequest

    choices: tuple[str, ...] = ()
    if args.choices is not None or args.alarm is not None:
        choices = _choices("yes,no" if args.choices is None else args.choices)
    size = None if args.size is None else (args.size.width, args.size.height)
    request = WatchRequest(
        args.prompt,
        args.system,
        choices,
        None if args.alarm is None else Alarm.parse(args.alarm, choices),
        _common.answer_format(args),
        args.max_new_tokens,
        args.every,
        args.on_change,
        None if args.frames is None else args.frames == "all",
        _delta(args),
    )
    with open(0, "rb", buffering=0, closefd=False) as pipe:
        source = find(args.source, size, args.pixels, pipe)
        record = Bundle.open(args.bundle, verify=False).manifest.image
        if record.frames is not None or record.images != 1:
            raise InputError(f"watch asks about one image at a time; {args.bundle} takes more")
        with Session.open(
            args.bundle,
            backend=args.backend,
            threads=args.threads,
            tile_memory_mb=args.tile_memory,
        ) as session:
            session.warm_up()
            for found in Watch(session, request).records(source):
                print(json.dumps(found), flush=True)
    return 0


def _delta(args: argparse.Namespace) -> DeltaOptions | None:
    from edgeprune.runtime.frames import DeltaOptions

    if args.delta is None:
        if args.refresh is not None:
            raise SpecError("--refresh is for --delta; give both, or leave it out")
        return None
    if args.refresh is None:
        return DeltaOptions(args.delta)
    return DeltaOptions(args.delta, args.refresh)


def _choices(text: str) -> tuple[str, ...]:
    from edgeprune.runtime.choosing import check

    choices = tuple(choice.strip() for choice in text.split(","))
    try:
        check(choices)
    except SpecError as error:
        raise SpecError(f"--choices: {error}") from error
    return choices
