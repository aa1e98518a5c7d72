"""`edgeprune run`: ask a bundle about an image."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune import terminal
from edgeprune.commands import _common
from edgeprune.errors import EdgepruneError, InputError, SpecError

if TYPE_CHECKING:
    from edgeprune.runtime import Session
    from edgeprune.runtime.answer import Answer, Choice
    from edgeprune.runtime.formats import AnswerFormat
    from edgeprune.runtime.sampling import Sampling

SAMPLING = (
    "max_new_tokens",
    "min_new_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "no_repeat_ngram_size",
    "seed",
    "stop",
)
"""Options that are settings of Sampling, by its names."""


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "run",
        help="ask a bundle about an image",
        description="Ask one bundle, or several in turn, about an image. The answer goes to"
        " stdout, timings to stderr.",
    )
    command.add_argument("bundles", nargs="+", type=Path, metavar="BUNDLE", help="exported folder")
    shown = command.add_mutually_exclusive_group(required=True)
    shown.add_argument(
        "--image",
        type=Path,
        action="append",
        dest="images",
        help="image file; once for each image of a bundle for several",
    )
    shown.add_argument("--video", type=Path, help="video file, for a bundle exported with --frames")
    command.add_argument(
        "--prompt",
        required=True,
        action="append",
        dest="prompts",
        help="question; given again, a follow-up question about the same image. The image"
        " stands before the first question or, where you write <image> into it, there",
    )
    command.add_argument(
        "--system", metavar="TEXT", help="system message in place of the chat template's own"
    )
    form = command.add_mutually_exclusive_group()
    _common.add_answer_format(form)
    form.add_argument(
        "--choices",
        type=_choices,
        metavar="A,B,...",
        help="answers to choose from: prints the likeliest, and the probability of each",
    )
    command.add_argument("--verify", action="store_true", help="hash large files too")
    command.add_argument("--json", action="store_true", help="one JSON object per bundle on stdout")
    command.add_argument("--max-new-tokens", type=int, metavar="N", help="longest answer")
    command.add_argument("--min-new-tokens", type=int, metavar="N", help="shortest answer")
    command.add_argument(
        "--temperature", type=float, help="0 takes the likeliest token (default: the checkpoint's)"
    )
    command.add_argument("--top-k", type=int, metavar="K", help="sample among the K likeliest")
    command.add_argument("--top-p", type=float, metavar="P", help="sample within probability P")
    command.add_argument(
        "--min-p", type=float, metavar="P", help="sample what is P as likely as the likeliest"
    )
    command.add_argument(
        "--repetition-penalty",
        type=float,
        metavar="R",
        help="above 1: fewer tokens that prompt or answer have already (default: the checkpoint's)",
    )
    command.add_argument(
        "--no-repeat-ngram-size", type=int, metavar="N", help="no run of N tokens comes twice"
    )
    command.add_argument("--seed", type=int, help="seed of sampling")
    command.add_argument(
        "--stop", action="append", metavar="TEXT", help="end the answer before TEXT"
    )
    command.add_argument(
        "--backend", default="ort-cpu", help="ort-cpu (default), ort-cuda, trt, trt-rtx"
    )
    command.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all)")
    _common.add_ratio(command)
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from edgeprune.images import check_file, read_image
    from edgeprune.runtime import Session
    from edgeprune.runtime.sampling import Sampling

    for image in args.images or ():
        read_image(image)  # a bad image is refused before gigabytes are read
    if args.video:
        check_file(args.video, "video")
    sampling, answer_format = Sampling(**_asked(args)), _common.answer_format(args)
    if answer_format is not None:
        from edgeprune.runtime.formats import check_settings

        check_settings(sampling)
    if args.choices is not None:
        _check_choices(args)
    for bundle in args.bundles:
        _check_shown(bundle, args.images, args.video, args.cr)
    for bundle in args.bundles:
        with Session.open(
            bundle,
            backend=args.backend,
            threads=args.threads,
            verify=args.verify or None,
            cr=args.cr,
        ) as session:
            if len(args.bundles) > 1:  # compared with each other, so none pays for starting up
                session.warm_up()
            answers: list[Answer | Choice] = []
            for turn in range(len(args.prompts)):
                if args.choices is None:
                    answers.append(_ask(session, args, turn, answer_format))
                else:
                    answers.append(_choose(session, args, turn))
            if args.json:
                print(json.dumps(_record(session, args.prompts, answers)))
    return 0


def _choices(text: str) -> tuple[str, ...]:
    """`yes,no`, with or without spaces behind the commas."""
    return tuple(choice.strip() for choice in text.split(","))


def _check_choices(args: argparse.Namespace) -> None:
    """SpecError where choices cannot be told apart, or options are given that they do not take."""
    from edgeprune.runtime.choosing import check

    check(args.choices)
    if asked := _asked(args):
        option = next(iter(asked)).replace("_", "-")
        raise SpecError(f"--{option} does nothing with --choices, which are scored; leave it out")


def _check_shown(
    bundle: Path, images: list[Path] | None, video: Path | None, cr: float | None
) -> None:
    """InputError where a bundle takes a video and images were given, or another number of them;
    SpecError where it does not run at a ratio."""
    from edgeprune.bundle import Bundle
    from edgeprune.runtime.media import check_count

    record = Bundle.open(bundle, verify=False).manifest.at(cr).image
    if (record.frames is None) != (video is None):
        takes = "images (--image)" if record.frames is None else "a video (--video)"
        raise InputError(f"{bundle} takes {takes}; give that, or export another bundle")
    if images is not None:
        check_count(len(images), record)


def _ask(
    session: Session, args: argparse.Namespace, turn: int, answer_format: AnswerFormat | None
) -> Answer:
    """One turn: streamed to stdout unless JSON is wanted, timings to stderr."""
    sampling = _sampling(session, args)
    prompt = args.prompts[turn]
    if turn == 0:
        shown = args.video or args.images
        pieces = session.stream(shown, prompt, sampling, args.system, answer_format)
    else:
        pieces = session.stream_follow_up(prompt, sampling, answer_format)
    label = f"{session.manifest.label}: " if len(args.bundles) > 1 and not args.json else ""
    print(label, end="", flush=True)
    begun = bool(label)
    try:
        for piece in pieces:
            if not args.json:
                print(piece, end="", flush=True)
                begun = True
    except EdgepruneError:
        print(end="\n" if begun else "", flush=True)  # the error has a line of its own
        raise
    assert session.answer is not None
    if not args.json:
        print(flush=True)
    terminal.note(_summary(session, session.answer, turn))
    return session.answer


def _choose(session: Session, args: argparse.Namespace, turn: int) -> Choice:
    """One turn: the likeliest choice to stdout unless JSON is wanted, probabilities to stderr."""
    prompt = args.prompts[turn]
    if turn == 0:
        choice = session.choose(args.video or args.images, prompt, args.choices, args.system)
    else:
        choice = session.choose_follow_up(prompt, args.choices)
    if not args.json:
        label = f"{session.manifest.label}: " if len(args.bundles) > 1 else ""
        print(f"{label}{choice.text}", flush=True)
    terminal.note(_summary(session, choice, turn))
    return choice


def _sampling(session: Session, args: argparse.Namespace) -> Sampling | None:
    """The checkpoint's defaults with what was asked on top; None where nothing was asked."""
    if not (asked := _asked(args)):
        return None
    return replace(session.sampling, **{"max_new_tokens": None, **asked})


def _asked(args: argparse.Namespace) -> dict[str, Any]:
    """The sampling options that were given."""
    asked = {name: getattr(args, name) for name in SAMPLING if getattr(args, name) is not None}
    if "stop" in asked:
        asked["stop"] = tuple(asked["stop"])
    return asked


def _summary(session: Session, answer: Answer | Choice, turn: int) -> str:
    times, prune = answer.timings, session.manifest.prune
    from edgeprune.runtime.answer import Answer

    lines = [f"{session.manifest.label} ({session.engine.backend.name})"]
    if turn == 0:
        lines += [f"note: {warning}" for warning in answer.warnings]
        counts = " ".join(str(n) for n in prune.counts)
        lines.append(
            f"visual tokens {prune.visual_tokens} -> {counts}  (CR {prune.cr_reached:.2f})"
        )
    lines.append(
        f"first token {times.first_token:.1f} ms (preprocess {times.preprocess:.1f}, vision"
        f" {times.vision:.1f}, prefill {times.prefill:.1f})"
    )
    if not isinstance(answer, Answer):
        likely = sorted(answer.probabilities.items(), key=lambda item: -item[1])
        lines.append(", ".join(f"{text} {share:.4f}" for text, share in likely))
        lines.append(f"scored in {times.score:.1f} ms")
    elif times.decode:
        mean = sum(times.decode) / len(times.decode)
        lines.append(f"decode {mean:.2f} ms/token, {len(answer.ids)} tokens, {answer.finish}")
    return "\n    ".join(lines)


def _record(
    session: Session, prompts: list[str], answers: Sequence[Answer | Choice]
) -> dict[str, object]:
    prune = session.manifest.prune
    turns = [_turn(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
    return {
        "bundle": session.manifest.label,
        "backend": session.engine.backend.name,
        "method": prune.method,
        "cr": prune.cr_reached,
        "counts": prune.counts,
        "turns": turns,
    }


def _turn(prompt: str, answer: Answer | Choice) -> dict[str, object]:
    from edgeprune.runtime.answer import Choice

    times = answer.timings
    record: dict[str, object] = {
        "prompt": prompt,
        "text": answer.text,
        "ids": answer.ids,
        "warnings": answer.warnings,
        "prompt_tokens": answer.prompt_tokens,
        "preprocess_ms": times.preprocess,
        "vision_ms": times.vision,
        "prefill_ms": times.prefill,
    }
    if isinstance(answer, Choice):
        return record | {
            "probabilities": answer.probabilities,
            "log_probabilities": answer.log_probabilities,
            "score_ms": times.score,
        }
    return record | {"finish": answer.finish, "decode_ms": times.decode}
