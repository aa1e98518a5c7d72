"""`export`: one checkpoint, one policy, one bundle."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx
import onnx_ir as ir
import torch

from edgeprune.bundle import (
    MANIFEST,
    Bundle,
    DecoderRecord,
    ImageRecord,
    Manifest,
    ParityRecord,
    PruneRecord,
    TextRecord,
    atomic_folder,
    check_target,
    record_files,
)
from edgeprune.errors import BundleError, ExportError, SpecError
from edgeprune.export import parity, precision
from edgeprune.export.dialects import Dialect, for_target
from edgeprune.export.dialogue import Graphs
from edgeprune.export.generation import read_generation
from edgeprune.export.preprocess import image_record
from edgeprune.export.prompts import read_text, save_tokenizer
from edgeprune.export.trace import decoder_graph, hollow, vision_graph
from edgeprune.export.upcast import upcast
from edgeprune.export.weights import WeightsFile
from edgeprune.graphs import DECODER, VISION, GraphRecord
from edgeprune.models import Adapter
from edgeprune.models._layers import set_tables
from edgeprune.models._processor import Processor, Prompt
from edgeprune.models._reference import Reference
from edgeprune.policies import Policy
from edgeprune.spec import Plan, PruneSpec
from edgeprune.versions import installed

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TEXT_FILES = ("chat_template.jinja", "generation_config.json")
PACKAGES = ("edgeprune", "torch", "transformers", "onnx", "onnxscript", "onnxruntime")

Report = Callable[[str, int, int], None]  # step, done, total


@dataclass(frozen=True)
class ExportRequest:
    """All that decides what a bundle holds."""

    model: str
    spec: PruneSpec
    plan: Plan
    output: Path
    target: str = "cpu"
    dtype: str | None = None
    schedule: dict[str, Any] | None = None
    no_parity: str = ""  # why parity is not checked; empty where it is

    @property
    def lowering(self) -> tuple[Dialect, str]:
        return lowering(self.target, self.dtype)


@dataclass(frozen=True)
class Exported:
    """What `export` tells its user."""

    path: Path
    manifest: Manifest
    notes: tuple[str, ...] = ()  # what was assumed or left out of the checkpoint


def lowering(target: str, dtype: str | None) -> tuple[Dialect, str]:
    """The dialect of a target and the dtype asked for, or the target's own."""
    dialect, default = for_target(target)
    chosen = dtype or default
    if chosen not in DTYPES:
        raise SpecError(f"--dtype is one of {', '.join(DTYPES)}; got {chosen!r}")
    return dialect, chosen


def preflight(
    output: Path, target: str, dtype: str | None, adapter: Adapter, *, compared: bool
) -> None:
    """Refuse at once what would otherwise fail at the end of a calibration or an export.

    A half-precision bundle that is `compared` needs disk for its float32 copy too.
    """
    chosen = DTYPES[lowering(target, dtype)[1]]
    check_target(output)
    place = next(folder for folder in output.absolute().parents if folder.exists())
    copy = torch.float32.itemsize if compared and chosen != torch.float32 else 0
    need = adapter.checkpoint.elements() * (chosen.itemsize + copy)
    disk = shutil.disk_usage(place)
    if need > disk.free and disk.total:  # some file systems count nothing
        raise ExportError(
            f"{output} needs {need / 1e6:,.1f} MB of disk, {place} has {disk.free / 1e6:,.1f} MB"
            " free; make room there or choose another --output"
        )


@dataclass(frozen=True)
class Records:
    """What the checkpoint's small files decide of a bundle, and what to tell of the checkpoint."""

    image: ImageRecord
    text: TextRecord
    notes: tuple[str, ...]


def read_records(adapter: Adapter, processor: Processor) -> Records:
    """Read a checkpoint's small files; ModelError names what a bundle cannot take over."""
    folder, config, media = adapter.checkpoint.folder, adapter.config, adapter.media
    generation = read_generation(folder, config, processor.tokenizer, adapter.shape)
    image = replace(
        image_record(processor, adapter.tiling, adapter.frozen),
        pictures=adapter.asked.pictures,
        frames=adapter.asked.frames,
    )
    visual_ids = adapter.vision_config.layout.ids(media.token)
    rows = adapter.shape.vocabulary
    text = read_text(processor, config, generation, rows, media, visual_ids)
    return Records(image, text.record, (*adapter.remarks, *processor.chat.remarks, *text.notes))


def export(
    request: ExportRequest,
    adapter: Adapter,
    policy: Policy,
    processor: Processor,
    prompts: Iterable[Prompt],
    report: Report = lambda step, done, total: None,
) -> Exported:
    """Trace, write weights, check parity, and rename the whole into place."""
    compared = not request.no_parity
    preflight(request.output, request.target, request.dtype, adapter, compared=compared)
    dialect, dtype = request.lowering
    records = read_records(adapter, processor)
    try:
        with atomic_folder(request.output) as draft:
            graphs = _write_graphs(
                draft, request.plan, adapter, policy, dialect, DTYPES[dtype], report
            )
            _copy_text(adapter.checkpoint.folder, draft, processor)
            checked = _check(
                draft, request, adapter, policy, DTYPES[dtype], graphs[DECODER], prompts, report
            )
            report("hash files", 0, 1)
            manifest = _manifest(request, adapter, policy, records, graphs, draft, checked)
            (draft / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
            _open_again(draft)
    except OSError as error:
        raise ExportError(
            f"cannot write {request.output} ({error.strerror or error}); nothing was left there"
        ) from error
    return Exported(request.output, manifest, records.notes)


def _open_again(draft: Path) -> None:
    """ExportError where the runtime would refuse what was written."""
    try:
        Bundle.open(draft, verify=False)
    except BundleError as error:
        raise ExportError(
            f"the export wrote a bundle that edgeprune itself does not open ({error}); please"
            " report it: edgeprune/graph_contract.py says what a bundle may hold"
        ) from error


def _write_graphs(
    draft: Path,
    plan: Plan,
    adapter: Adapter,
    policy: Policy,
    dialect: Dialect,
    dtype: torch.dtype,
    report: Report,
) -> dict[str, GraphRecord]:
    """Trace both graphs and write them with their weights; what the manifest says of them."""
    ops = dialect.ops()
    with torch.device("meta"):
        vision, decoder = adapter.vision(policy, plan, ops), adapter.decoder(policy, plan, ops)
    hollow(vision, dtype)
    hollow(decoder, dtype)
    for module in (vision, decoder):
        set_tables(module, dtype)
        adapter.sources(module)  # a tensor that is missing or misshapen is named now
    report("trace vision", 0, 1)
    graphs = {VISION: vision_graph(vision, adapter.pixels, dtype, dialect.opset)}
    report("trace decoder", 0, 1)
    graphs[DECODER] = decoder_graph(decoder, dtype, dialect)
    with WeightsFile(draft) as weights:
        for name, module in ((VISION, vision), (DECODER, decoder)):
            step = partial(report, f"{name.removesuffix('.onnx')} weights")
            weights.fill(graphs[name].model, module, adapter, dtype, step)
    for name, traced in graphs.items():
        model = traced.model
        model.producer_name, model.producer_version = "edgeprune", installed("edgeprune")
        ir.save(model, draft / name)
        onnx.checker.check_model(str(draft / name))
    return {name: traced.record for name, traced in graphs.items()}


def _copy_text(folder: Path, draft: Path, processor: Processor) -> None:
    """The checkpoint's text files, and the tokenizer as transformers runs it."""
    for name in TEXT_FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, draft / name)
    save_tokenizer(processor, draft / "tokenizer.json")


def _check(
    draft: Path,
    request: ExportRequest,
    adapter: Adapter,
    policy: Policy,
    dtype: torch.dtype,
    record: GraphRecord,  # of decoder.onnx
    prompts: Iterable[Prompt],
    report: Report,
) -> ParityRecord:
    """Compare the draft with the eager model; ParityError where it is not the same."""
    if request.no_parity:
        return ParityRecord(0, request.no_parity)
    report("load the eager reference", 0, 1)
    reference = Reference.build(adapter, policy, request.plan)
    chosen = list(prompts)

    def compared(done: int) -> None:
        report("parity", done, len(chosen))

    if dtype == torch.float32:
        return parity.check(Graphs(draft, record, reference.decoder), reference, chosen, compared)
    half = Reference.build(adapter, policy, request.plan, dtype)
    runs = dtype in precision.RUNS
    exported = Graphs(draft, record, half.decoder, dtype) if runs else None
    eager, graph = precision.measure(exported, reference, half, chosen, compared)
    del exported
    del half
    reference.round_weights(dtype)
    with TemporaryDirectory(dir=draft) as folder:
        upcast(draft, Path(folder))
        copied = Graphs(Path(folder), record, reference.decoder)
        checked = parity.check(copied, reference, chosen, compared)
    return replace(checked, eager=eager, graph=graph)


def _manifest(
    request: ExportRequest,
    adapter: Adapter,
    policy: Policy,
    records: Records,
    graphs: dict[str, GraphRecord],
    draft: Path,
    checked: ParityRecord,
) -> Manifest:
    dialect, dtype = request.lowering
    return Manifest(
        name=request.output.name,
        model=request.model,
        family=adapter.shape.family,
        target=request.target,
        dialect=dialect.name,
        dtype=dtype,
        opset=dialect.opset,
        prune=_prune_record(request, adapter, policy),
        decoder=_decoder_record(adapter, request.plan, dialect.cache),
        graphs=graphs,
        image=records.image,
        text=records.text,
        files=record_files(draft),
        parity=checked,
        versions={package: installed(package) for package in PACKAGES},
    )


def _prune_record(request: ExportRequest, adapter: Adapter, policy: Policy) -> PruneRecord:
    plan, spec = request.plan, request.spec
    return PruneRecord(
        method=spec.method,
        cr=spec.cr,
        cr_reached=plan.cr,
        visual_tokens=plan.visual_tokens,
        grid=adapter.shape.grid,
        counts=plan.counts,
        stages=plan.stages,
        reads_text=policy.reads_text and bool(plan.in_decoder),
        options=dict(spec.options),
        schedule=request.schedule,
    )


def _decoder_record(adapter: Adapter, plan: Plan, cache: str) -> DecoderRecord:
    shape, mrope = adapter.shape, adapter.decoder_config.mrope
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
        image_positions=mrope.span if mrope else plan.entering,
    )
