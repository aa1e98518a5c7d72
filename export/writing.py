"""The files of a draft: its graphs with their weights, and the checkpoint's text files."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import onnx
import onnx_ir as ir
import torch

from edgeprune.export.block_graph import Block, block_graph
from edgeprune.export.dialects import Dialect
from edgeprune.export.integers import INTEGERS
from edgeprune.export.part_graphs import part_graphs
from edgeprune.export.products import FORMS
from edgeprune.export.prompts import save_tokenizer
from edgeprune.export.quantised_table import TABLES
from edgeprune.export.trace import decoder_graph, strip_weights
from edgeprune.export.vision_graphs import vision_graphs
from edgeprune.export.weights import Stored, WeightsFile
from edgeprune.graphs import BLOCK, DECODER, GraphRecord, PartRecord
from edgeprune.models import Adapter
from edgeprune.models._decoder import Decoder
from edgeprune.models._layers import compute_buffers, widen
from edgeprune.models._processor import Processor
from edgeprune.models._vision import Vision
from edgeprune.policies import Policy
from edgeprune.progress import Progress
from edgeprune.spec import Plan
from edgeprune.versions import installed

TEXT_FILES = ("chat_template.jinja", "generation_config.json")


@dataclass(frozen=True)
class Written:
    """What the manifest says of a draft's graphs and weights."""

    graphs: dict[str, GraphRecord]
    stored: Stored
    parts: tuple[PartRecord, ...]  # graphs that are only timed


def modules_of(
    plan: Plan,
    adapter: Adapter,
    policy: Policy,
    dialect: Dialect,
    dtype: torch.dtype,
    wide: Collection[str],
) -> tuple[Vision, Decoder]:
    """Vision and decoder as they are traced, without their weights; `wide` parts in float32."""
    ops = dialect.ops()
    with torch.device("meta"):
        vision, decoder = adapter.vision(policy, plan, ops), adapter.decoder(policy, plan, ops)
    for name, module in (("vision", vision), ("decoder", decoder)):
        strip_weights(module, dtype)
        compute_buffers(module, dtype)
        widen(name, module, wide)
        adapter.sources(module)  # a tensor that is missing or misshapen is named now
    return vision, decoder


def write_graphs(
    draft: Path,
    modules: tuple[Vision, Decoder],
    adapter: Adapter,
    dialect: Dialect,
    dtype: torch.dtype,
    report: Progress,
    *,
    profilable: bool = False,
    patches: int = 0,
) -> Written:
    """Trace all graphs and write them with their weights; what the manifest says of them. Where
    `profilable` parts of the model are graphs too, with the same weights; with `patches` the
    encoder for so many patches of a frame."""
    vision, decoder = modules
    report("trace vision", 0, 1)
    both = vision_graphs(vision, adapter.pixels, dtype, dialect.opset, patches)
    report("trace decoder", 0, 1)
    graphs = both.traced | {DECODER: decoder_graph(decoder, dtype, dialect)}
    parts = list[PartRecord]()
    forms = FORMS[dialect.codes], INTEGERS.get(dialect.integers)
    with WeightsFile(draft, *forms, TABLES[dialect.rows]) as weights:
        for name, module in (both.modules | {DECODER: decoder}).items():
            step = partial(report, f"{name.removesuffix('.onnx')} weights")
            weights.fill(graphs[name].model, module, adapter, dtype, step)
        models = {name: traced.model for name, traced in graphs.items()}
        if profilable:
            block, width = Block(vision), adapter.vision_config.encoder.width
            models[BLOCK] = block_graph(block, width, dtype, dialect.opset)
            weights.fill(models[BLOCK], block, adapter, dtype, partial(report, "block weights"))
            for part in part_graphs(vision, decoder, adapter, dtype, dialect):
                step = partial(report, f"{part.record.file.removesuffix('.onnx')} weights")
                weights.fill(part.model, part.module, adapter, dtype, step)
                models[part.record.file] = part.model
                parts.append(part.record)
    for name, model in models.items():
        model.producer_name, model.producer_version = "edgeprune", installed("edgeprune")
        ir.save(model, draft / name)
        onnx.checker.check_model(str(draft / name))
    records = {name: traced.record for name, traced in graphs.items()}
    return Written(records, weights.stored, tuple(parts))


def copy_text(folder: Path, draft: Path, processor: Processor) -> None:
    """The checkpoint's text files, and the tokenizer as transformers runs it."""
    for name in TEXT_FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, draft / name)
    save_tokenizer(processor, draft / "tokenizer.json")
