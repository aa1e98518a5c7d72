"""`edgeprune serve`: answer requests in the form of OpenAI's chat completions."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from edgeprune.commands import _common

KEY = "EDGEPRUNE_API_KEY"


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "serve",
        help="answer over HTTP, as OpenAI's chat completions",
        description="Serve bundles over HTTP with the interface of OpenAI's chat completions:"
        " /v1/chat/completions, /v1/models, /health, /metrics. It stops at SIGTERM or Ctrl-C, once"
        " the answers that were begun are complete.",
    )
    command.add_argument("bundles", nargs="+", type=Path, metavar="BUNDLE", help="exported folder")
    command.add_argument(
        "--backend", default="ort-cpu", help="ort-cpu (default), ort-cuda, trt, trt-rtx"
    )
    command.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all)")
    command.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)"
    )
    command.add_argument(
        "--port", type=int, default=8000, help="port to listen on (default 8000; 0: any free one)"
    )
    command.add_argument(
        "--sequences",
        type=int,
        default=4,
        metavar="N",
        help="requests of a bundle that are answered at a time, taking turns (default 4)",
    )
    command.add_argument(
        "--kept-memory",
        type=int,
        default=256,
        metavar="MB",
        help="memory for caches of a bundle's dialogues that may go on; as many as --sequences are"
        " kept in any case (default 256)",
    )
    command.add_argument(
        "--queue",
        type=int,
        default=64,
        metavar="N",
        help="requests of a bundle that may wait; the next gets status 429 (default 64)",
    )
    command.add_argument(
        "--timeout",
        type=float,
        default=300.0,
        metavar="SECONDS",
        help="longest time for one answer, waiting included (default 300)",
    )
    command.add_argument(
        "--receive",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="longest time for a request to arrive (default 30)",
    )
    command.add_argument(
        "--drain",
        type=int,
        default=30,
        metavar="SECONDS",
        help="longest time to complete answers after a signal to stop (default 30)",
    )
    command.add_argument(
        "--max-body", type=int, default=32, metavar="MB", help="largest request (default 32)"
    )
    command.add_argument(
        "--memory",
        type=int,
        metavar="MB",
        help="most memory for weights of all bundles: those that are not asked are closed to make"
        " room",
    )
    _common.add_tile_memory(command)
    command.add_argument(
        "--media", type=Path, metavar="DIR", help="requests may name image files below DIR"
    )
    command.add_argument(
        "--allow-urls",
        action="store_true",
        help="requests may name images by https addresses of the internet, which are fetched",
    )
    command.add_argument(
        "--api-key",
        metavar="KEY",
        help=f"only requests with this key are answered; better in the environment, as {KEY}",
    )
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from edgeprune.serve.hangups import hangups

    with hangups() as heard:  # before what takes long to import
        from edgeprune.serve.server import ServeRequest, serve

        request = ServeRequest(
            bundles=tuple(args.bundles),
            backend=args.backend,
            host=args.host,
            port=args.port,
            threads=args.threads,
            sequences=args.sequences,
            kept_memory_mb=args.kept_memory,
            queue=args.queue,
            timeout=args.timeout,
            receive=args.receive,
            drain=args.drain,
            max_body_mb=args.max_body,
            memory_mb=args.memory,
            tile_memory_mb=args.tile_memory,
            media=args.media,
            allow_urls=args.allow_urls,
            api_key=os.environ.get(KEY) if args.api_key is None else args.api_key,
        )
        serve(request, heard)
    return 0
