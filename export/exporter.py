"""`export`: one checkpoint, one policy, one bundle."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from edgeprune.bundle import MANIFEST, Bundle, atomic_folder, check_target, record_files
from edgeprune.dial import widest
from edgeprune.encoder_methods import DENSE
from edgeprune.errors import BundleError, ExportError, SpecError
from edgeprune.export import ranges
from edgeprune.export.comparison import Models, compare, compare_frames
from edgeprune.export.dialects import dialect_of
from edgeprune.export.frame_graphs import changed_of, delta_record
from edgeprune.export.generation import read_generation
from edgeprune.export.prompts import read_text
from edgeprune.export.ratios import Setting, named, prune_record, range_of, ratio_records
from edgeprune.export.weighing import weigh, weights_notes, weights_record
from edgeprune.export.writing import copy_text, modules_of, write_graphs
from edgeprune.graphs import GraphRecord
from edgeprune.lowering import TARGETS, Lowering, resolve
from edgeprune.manifest import DecoderRecord, EncoderRecord, ImageRecord, Manifest, TextRecord
from edgeprune.measured import ChoiceRecord, ParityRecord, TimingRecord
from edgeprune.models import Adapter
from edgeprune.models._encoder_operations import Blocks, encoder_operations
from edgeprune.models._frames import ChangedConfig
from edgeprune.models._processor import Processor, Prompt
from edgeprune.models._rounding import TORCH
from edgeprune.models._tuning import UNTUNED, Tuning
from edgeprune.policies import Policy
from edgeprune.progress import Progress, silent
from edgeprune.spec import Plan, PruneSpec
from edgeprune.versions import installed

PACKAGES = ("edgeprune", "torch", "transformers", "onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True)
class ExportRequest:
    """All that decides what a bundle holds."""

    model: str
    spec: PruneSpec
    plan: Plan
    output: Path
    target: str = "cpu"
    dtype: str | None = None
    weights: str = "float"  # as --weights says it
    schedule: dict[str, Any] | None = None
    no_parity: str = ""  # why parity is not checked; empty where it is
    keep_fp32: str = "none"  # or auto: parts that float16 cannot hold stay in float32
    tuning: Tuning = UNTUNED  # what samples say of the weights that are quantised
    timing: TimingRecord | None = None  # the time that was asked for
    choice: ChoiceRecord | None = None  # how encoder and decoder were chosen together
    profilable: bool = False  # whether a block of the encoder is written too, to be timed
    delta: float | None = None  # share of patches that are encoded of a frame of which few changed
    dial: tuple[Setting, ...] = ()  # where counts are an input: every ratio, on common sites

    @property
    def settings(self) -> tuple[Setting, ...]:
        """All ratios, the default first."""
        return self.dial or (Setting(self.spec, self.plan, self.schedule),)

    @property
    def traced(self) -> Plan:
        """What the graphs are made for."""
        return widest([setting.plan for setting in self.dial]) if self.dial else self.plan

    @property
    def lowering(self) -> Lowering:
        return resolve(self.target, self.dtype, self.weights)


@dataclass(frozen=True)
class Exported:
    """What `export` reports to its user."""

    path: Path
    manifest: Manifest
    notes: tuple[str, ...] = ()  # what was assumed or left out of the checkpoint


def preflight(output: Path, lowering: Lowering, adapter: Adapter) -> None:
    """Refuse at once what would otherwise fail at the end of a calibration or an export."""
    check_target(output)
    parent = next(folder for folder in output.absolute().parents if folder.exists())
    zero_points = lowering.target.zero_points
    need = adapter.weight_bytes(lowering.weights, lowering.dtype.bytes, zero_points=zero_points)
    disk = shutil.disk_usage(parent)
    if need > disk.free and disk.total:  # some file systems count nothing
        raise ExportError(
            f"{output} needs {need / 1e6:,.1f} MB of disk, {parent} has {disk.free / 1e6:,.1f} MB"
            " free; make room there or choose another --output"
        )


def check_topk(what: str, ranked: int, target: str) -> None:
    """SpecError where a method puts more tokens in order at once than a target's engines can."""
    limit = TARGETS[target].topk_limit
    if limit is not None and ranked > limit:
        raise SpecError(
            f"{what} ranks {ranked} visual tokens at once, engines of --target {target}"
            f" rank {limit} at most; use a smaller image, a larger --cr or another method"
        )


@dataclass(frozen=True)
class Records:
    """What the checkpoint's small files decide of a bundle, and notes on the checkpoint."""

    image: ImageRecord
    text: TextRecord
    notes: tuple[str, ...]


def read_records(adapter: Adapter, processor: Processor) -> Records:
    """Read a checkpoint's small files; ModelError names what a bundle cannot take over."""
    folder, config, media = adapter.checkpoint.folder, adapter.config, adapter.media
    ends, tokenizer = adapter.read_ends(), processor.tokenizer
    generation = read_generation(folder, config, tokenizer, adapter.shape, ends)
    image = replace(
        adapter.image_record(processor),
        images=adapter.asked.images,
        frames=adapter.asked.frames,
    )
    visual_ids = adapter.vision_config.layout.ids(media.token)
    rows = adapter.decoder_config.rows
    text = read_text(processor, config, generation, rows, media, visual_ids)
    return Records(image, text.record, (*adapter.all_notes, *processor.chat.notes, *text.notes))


def export(
    request: ExportRequest,
    adapter: Adapter,
    policy: Policy,
    processor: Processor,
    prompts: Iterable[Prompt],
    report: Progress = silent,
) -> Exported:
    """Trace, write weights, check parity, and rename the whole into place."""
    compared = not request.no_parity
    preflight(request.output, request.lowering, adapter)
    check_topk(f"method {request.spec.method}", policy.largest_topk(request.traced), request.target)
    if (site := adapter.vision_config.site) is not None:
        check_topk(f"--encoder {site.method}", adapter.encoder_topk, request.target)
    changed = changed_of(adapter, request.traced, request.lowering, request.delta)
    dialect, dtype = dialect_of(request.lowering), TORCH[request.lowering.dtype.name]
    records = read_records(adapter, processor)
    exact, adapter = adapter, _with_weights(request.lowering, adapter, request.tuning)
    samples = [] if request.no_parity else list(prompts)
    proofs = _prove(request, adapter, policy, samples, report)
    held = range_of(proofs)
    wide = held.float32 if held else ()
    try:
        with atomic_folder(request.output) as draft:
            modules = modules_of(request.traced, adapter, policy, dialect, dtype, wide)
            written = write_graphs(
                draft,
                modules,
                adapter,
                dialect,
                dtype,
                report,
                profilable=request.profilable,
                patches=changed.patches if changed else 0,
            )
            graphs, stored = written.graphs, written.stored
            copy_text(adapter.checkpoint.folder, draft, processor)
            checked = [ParityRecord(0, request.no_parity)] * len(request.settings)
            weights = weights_record(request.lowering, stored, request.tuning.kinds)
            if compared:
                models = [
                    Models(adapter, policy, setting.plan, dtype, samples, report, proof)
                    for setting, proof in zip_longest(request.settings, proofs)
                ]
                checked = list(_compared(request, draft, graphs, models))
                if changed:
                    apart = compare_frames(draft, graphs, models[0])
                    checked = [replace(one, delta=apart) for one in checked]
                weights = weigh(weights, request.lowering, exact, draft, graphs, models[0])
            report("hash files", 0, 1)
            manifest = replace(
                _manifest(request, adapter, policy, records, graphs, draft, changed),
                parity=checked[0],
                range=held,
                weights=weights,
                parts=written.parts,
                ratios=ratio_records(request.dial, checked[: len(request.dial)], adapter, policy),
            )
            (draft / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
            _open_again(draft)
    except OSError as error:
        raise ExportError(
            f"cannot write {request.output} ({error.strerror or error}); nothing was left there"
        ) from error
    told = weights_notes(request.lowering, stored, request.tuning)
    notes = dict.fromkeys(note for proof in proofs for note in proof.notes)
    return Exported(request.output, manifest, (*records.notes, *told, *notes))


def _compared(
    request: ExportRequest, draft: Path, graphs: dict[str, GraphRecord], models: Sequence[Models]
) -> Iterator[ParityRecord]:
    """What parity says of each ratio."""
    for setting, one in zip(request.settings, models, strict=True):
        with named(setting, several=bool(request.dial)):
            yield compare(draft, graphs, one)


def _with_weights(lowering: Lowering, adapter: Adapter, tuning: Tuning) -> Adapter:
    """The checkpoint with its weights as a bundle of this kind has them."""
    dtype, target = TORCH[lowering.dtype.name], lowering.target
    return adapter.with_weights(
        lowering.weights,
        dtype,
        tuning,
        zero_points=target.zero_points,
        largest=target.largest_code,
    )


def _open_again(draft: Path) -> None:
    """ExportError where the runtime would refuse what was written."""
    try:
        Bundle.open(draft, verify=False)
    except BundleError as error:
        raise ExportError(
            f"the export wrote a bundle that edgeprune itself does not open ({error}); please"
            " report it: edgeprune/graph_contract.py says what a bundle may hold"
        ) from error


def _prove(
    request: ExportRequest,
    adapter: Adapter,
    policy: Policy,
    samples: Sequence[Prompt],
    report: Progress,
) -> list[ranges.Proof]:
    """What float16 holds of the model at each ratio; none where that is not asked."""
    if request.lowering.dtype.name != "fp16" or request.no_parity:
        return []
    given = samples, request.keep_fp32, report
    return [ranges.prove(adapter, policy, one.plan, *given) for one in request.settings]


def _manifest(
    request: ExportRequest,
    adapter: Adapter,
    policy: Policy,
    records: Records,
    graphs: dict[str, GraphRecord],
    draft: Path,
    changed: ChangedConfig | None,
) -> Manifest:
    """All but what was compared."""
    dialect, packed = dialect_of(request.lowering), adapter.checkpoint.packed
    return Manifest(
        name=request.output.name,
        model=request.model,
        family=adapter.shape.family,
        target=request.target,
        dialect=dialect.name,
        dtype=request.lowering.dtype.name,
        opset=dialect.opset,
        prune=prune_record(request.settings[0], adapter, policy),
        encoder=_encoder_record(adapter, changed),
        decoder=_decoder_record(adapter, request.plan, dialect.cache),
        graphs=graphs,
        image=records.image,
        text=records.text,
        files=record_files(draft),
        parity=ParityRecord(0),
        versions={package: installed(package) for package in PACKAGES},
        timing=request.timing,
        choice=request.choice,
        checkpoint_weights=str(packed.form) if packed else "",
    )


def _encoder_record(adapter: Adapter, changed: ChangedConfig | None) -> EncoderRecord:
    encoder, site = adapter.vision_config.encoder, adapter.vision_config.site
    tiles, _, height, width = adapter.pixels
    patches = (height // encoder.patch) * (width // encoder.patch)
    tiles = tiles // encoder.spans
    every = tiles // adapter.tiling.tiles * adapter.tiling.all_tiles if adapter.tiling else tiles
    whole, loss = site.units.count if site else patches, site.loss if site else None
    return EncoderRecord(
        method=str(site.method) if site else DENSE,
        blocks=encoder.blocks,
        width=encoder.width,
        patches=patches,
        tiles=tiles,
        extra=int(encoder.cls),
        window=_window(encoder),
        shown=adapter.shown,
        operations=tiles * encoder_operations(encoder, patches, site),
        dense_operations=every * encoder_operations(encoder, patches),
        units=whole,
        kept=site.kept_units if site else whole,
        samples=loss.samples if loss else 0,
        r2=loss.r2 if loss else None,
        angle=loss.angle if loss else None,
        delta=delta_record(encoder, changed),
    )


def _window(encoder: Blocks) -> int:
    """Patches of a window in the blocks that have some, 0 where none has."""
    runs = [encoder.windows(block)[0] for block in range(encoder.blocks)]
    return next((size for windows, size in runs if windows > 1), 0)


def _decoder_record(adapter: Adapter, plan: Plan, cache: str) -> DecoderRecord:
    shape = adapter.shape
    return DecoderRecord(
        layers=shape.layers,
        kv_heads=shape.kv_heads,
        head_size=shape.head_size,
        width=shape.width,
        mlp_width=shape.mlp_width,
        attention_heads=shape.attention_heads,
        vocabulary=shape.vocabulary,
        max_positions=shape.max_positions,
        cache=cache,
        image_positions=adapter.decoder_config.span(plan),
        deepstack=adapter.decoder_config.deepstack,
        convolutions=shape.convolutions,
        kernel=shape.kernel,
        linear=shape.linear,
        output_gate=shape.output_gate,
    )
