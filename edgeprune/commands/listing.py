"""`edgeprune methods` and `edgeprune models`: what there is to choose from."""

from __future__ import annotations

import argparse
import itertools
from typing import TYPE_CHECKING

from edgeprune.commands import _common
from edgeprune.errors import SpecError
from edgeprune.tables import plain

if TYPE_CHECKING:
    from edgeprune.models import Adapter
    from edgeprune.policies import Policy
    from edgeprune.spec import ModelShape, PruneSpec


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    methods = commands.add_parser(
        "methods",
        help="list the pruning methods, or show all about one",
        description="List the pruning methods: where each prunes and what it needs beside the"
        " image. With a name: its paper, options and equations, and where it deviates from them."
        " With a model: the visual tokens that enter its layers, or why a method cannot prune it.",
    )
    methods.add_argument("name", nargs="?", metavar="NAME", help="show all about this one")
    _common.add_model(methods, default=None)
    _common.add_media(methods)
    methods.add_argument(
        "--cr", type=float, help="compression ratio to try with --model (default 4)"
    )
    methods.set_defaults(run=run_methods)
    models = commands.add_parser(
        "models",
        help="list the model families, or show a checkpoint's sizes",
        description="List the model families. With a model: its decoder, and the visual tokens of"
        " an image of the size that a bundle would be frozen for.",
    )
    _common.add_model(models, default=None)
    _common.add_media(models)
    models.set_defaults(run=run_models)


def run_methods(args: argparse.Namespace) -> int:
    from edgeprune import encoder_methods, policies

    _common.check_model(args, "methods")
    if args.cr is not None and not args.model:
        raise SpecError("--cr asks about a model; name it: edgeprune methods --model M --cr 4")
    if args.name and args.model:
        raise SpecError(
            f"give a NAME or --model: with --model all methods are listed, {args.name} too"
        )
    if args.name in encoder_methods.names():
        print(_described_encoder(args.name))
        return 0
    if args.name:
        print(_described(args.name, policies.load(args.name)))
        return 0
    if args.model:
        print(plain(_verdicts(args)))
        return 0
    rows = [("method", "prunes at", "needs", "what stays")]
    for name in policies.names():
        policy = policies.load(name)
        sites, needs = ", ".join(policy.sites), ", ".join(policy.needs)
        rows.append((name, sites or "-", needs or "-", policy.summary))
    print(plain(rows))
    shorter = [("--encoder", "what leaves")]
    shorter += [(name, encoder_methods.load(name).summary) for name in encoder_methods.names()]
    print(f"\n{plain(shorter)}")
    return 0


def _verdicts(args: argparse.Namespace) -> list[tuple[str, ...]]:
    """What each method does to a model at a ratio, or why it cannot."""
    from edgeprune import policies
    from edgeprune.spec import PruneSpec

    shape, cr = _common.model(args).shape, 4.0 if args.cr is None else args.cr
    rows: list[tuple[str, ...]] = [("method", "runs", "visual tokens, or why not")]
    for name in policies.names():
        spec = PruneSpec(name, 1 if name == "none" else cr)
        try:
            rows.append((name, "yes", _entering(policies.make(spec), shape, spec)))
        except SpecError as error:
            rows.append((name, "no", str(error)))
    return rows


def _entering(policy: Policy, shape: ModelShape, spec: PruneSpec) -> str:
    """Tokens that enter layers 1 .. L, equal ones once, as `576 x 2, 120 x 30`."""
    from edgeprune.spec import budget, check_cr, check_reach, check_separators

    check_reach(spec, shape)
    first = policy.entry_tokens(shape, spec.cr)
    if first is not None:
        total = budget(shape.visual_tokens, shape.layers, spec.cr)
        return f"{first}, and {total} over all layers: the calibration says where"
    plan = policy.plan(shape, spec.cr)
    check_cr(plan, spec.cr)
    check_separators(plan, shape)
    runs = ((count, len(list(same))) for count, same in itertools.groupby(plan.counts))
    return ", ".join(f"{count} x {layers}" for count, layers in runs)


def _options(policy: type[Policy]) -> list[str]:
    """Each with its default, as `K=2`, but for those that every method has."""
    from dataclasses import fields

    from edgeprune.policies import Policy as Base

    common = {f.name for f in fields(Base)}
    return [f"{f.name}={_word(f.default)}" for f in fields(policy) if f.name not in common]


def _word(default: object) -> str:
    """A default as --set takes it."""
    return ("off", "on")[default] if isinstance(default, bool) else str(default)


def _described(name: str, policy: type[Policy]) -> str:
    """Everything that a method's file says of itself."""
    import inspect
    import re
    import sys

    from edgeprune.policies._policy import EVERY

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
    return "\n".join([*lines, "", text, *(["", EVERY.rstrip()] if policy.sites else [])])


def _described_encoder(name: str) -> str:
    """Everything that the file of a method of the encoder says of itself."""
    import inspect
    import re
    import sys
    from dataclasses import fields

    from edgeprune import encoder_methods
    from edgeprune.encoder_methods import EncoderMethod

    method = encoder_methods.load(name)
    source = re.sub(r"\n    # ", " ", inspect.getsource(EncoderMethod))
    lines = [name, "leaves at  encoder"]
    for number, field in enumerate(fields(method)):
        comment = re.search(rf"^    {field.name}: .*?  # (.*)$", source, re.MULTILINE)
        label = "" if number else "options"
        lines.append(f"{label:<10} {field.name}={field.default}  {comment[1] if comment else ''}")
    text = inspect.getdoc(sys.modules[method.__module__]) or ""
    return "\n".join([*lines, "", text])


def run_models(args: argparse.Namespace) -> int:
    from importlib import import_module

    from edgeprune import models

    _common.check_model(args, "models")
    if args.model:
        from edgeprune.export.exporter import read_records
        from edgeprune.models._processor import Processor

        adapter = _common.model(args)
        notes = read_records(adapter, Processor(adapter)).notes  # or what export would refuse
        print(plain([*_sizes(adapter), *(("note", note) for note in notes)]))
        return 0
    rows = []
    for name in models.names():
        summary = (import_module(f"edgeprune.models.{name}").__doc__ or "").strip()
        rows.append((name, summary.splitlines()[0]))
    rows.append(("demo", "the embedded demo checkpoint, a small trained LLaVA: --model demo"))
    for other in models.elsewhere():
        why = f"its code is in the checkpoint, not in transformers; nearest is {other.nearest}"
        rows.append(("-", f"{other.name}: {why}"))
    for family, near in models.nearby():
        rows.append(
            ("-", f"{near.name}: not supported; nearest is {family}; missing: {near.missing}")
        )
    print(plain(rows))
    return 0


def _sizes(adapter: Adapter) -> list[tuple[str, str]]:
    """Family, decoder, image and visual tokens of a checkpoint."""
    shape, text = adapter.shape, adapter.config.text_config
    tiles, _, height, width = adapter.pixels
    image = f"{width} x {height} pixels" + (f", {tiles} times" if tiles > 1 else "")
    if adapter.asked.frames is not None:
        image = f"video of {adapter.asked.frames} frames, {width} x {height} pixels"
    if (tiling := adapter.tiling) is not None:
        grid = f"{tiling.columns} x {tiling.rows} tiles of {tiling.tile}"
        whole = "" if tiling.overview == "none" else " and the whole"
        whole += f"; {tiling.choice}" if tiling.kept else ""
        image = f"{tiling.width} x {tiling.height} pixels: {grid}{whole}"
    if adapter.asked.images > 1:
        image = f"{adapter.asked.images} of {image}"
    own = f", {shape.separators} of them the model's own" if shape.separators else ""
    heads = f"{shape.attention_heads} heads, {shape.kv_heads} of keys and values"
    return [
        ("family", shape.family),
        ("decoder", f"{text.model_type}, {shape.layers} layers, {shape.width} wide, {heads}"),
        ("positions", f"{shape.max_positions}"),
        ("[CLS]", "yes" if shape.has_cls else "no"),
        ("image", image),
        ("visual tokens", f"{shape.visual_tokens}{own}"),
    ]
