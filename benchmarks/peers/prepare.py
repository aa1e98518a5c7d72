"""The checkpoint, twice, and our bundles of it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from benchmarks.peers.job import OURS, SHAPE, VISUAL
from benchmarks.schedules import declining
from benchmarks.shapes import SHAPES, write
from edgeprune.bundle import MANIFEST
from edgeprune.export.exporter import ExportRequest, export
from edgeprune.models import open_model
from edgeprune.models._processor import Processor, random_prompt
from edgeprune.policies import make
from edgeprune.spec import Plan, PruneSpec, plan_from_counts


def prepare(work: Path, cr: float, *, int4: bool) -> None:
    """Write the checkpoint twice, as LLaVA and as a text model, and our two bundles: dense and
    pruned, or dense in floats and in 4 bits."""
    checkpoint, layers = work / SHAPE, SHAPES[SHAPE].layers
    if not (checkpoint / "config.json").is_file():
        write(SHAPES[SHAPE], checkpoint)
    _write_text(checkpoint, work / "text")
    dense = "none", Plan(VISUAL, layers), 1
    _export(checkpoint, work / "dense", *dense)
    if int4:
        for name, weights in OURS.items():
            _export(checkpoint, work / name, *dense, weights=weights)
        return
    pruned = plan_from_counts(VISUAL, declining(VISUAL, layers, cr))
    _export(checkpoint, work / f"utp-cr{cr:g}", "utp", pruned, cr)


def _write_text(source: Path, folder: Path) -> None:
    """The decoder of the LLaVA checkpoint as `Qwen2ForCausalLM`: it has no output bias."""
    if (folder / "config.json").is_file():
        return
    prefix, weights = "language_model.", {}
    for shard in sorted(source.glob("*.safetensors")):
        for name, tensor in load_file(shard).items():
            if name.startswith(prefix) and not name.endswith("o_proj.bias"):
                weights[name.removeprefix(prefix)] = tensor.float()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    text = json.loads((source / "config.json").read_text())["text_config"]
    for name in ("attention_bias", "mlp_bias", "pretraining_tp", "head_dim"):
        del text[name]
    text |= {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "torch_dtype": "float32",  # older readers' names: genai and optimum
        "rope_theta": text["rope_parameters"]["rope_theta"],
        "use_sliding_window": False,
    }
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / name, folder / name)
    ids = {name: text[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (folder / "generation_config.json").write_text(json.dumps(ids))
    (folder / "config.json").write_text(json.dumps(text, indent=1))


def _export(
    checkpoint: Path, output: Path, method: str, plan: Plan, cr: float, weights: str = "float"
) -> None:
    if (output / MANIFEST).is_file():
        return
    adapter: Any = open_model(str(checkpoint))
    decoder = adapter.decoder_config
    layers = tuple(replace(layer, output_bias=False) for layer in decoder.layers)
    adapter.decoder_config = replace(decoder, layers=layers)
    spec = PruneSpec(method, cr)
    processor = Processor(adapter)
    prompts = [random_prompt(adapter.pixels, adapter.shape.vocabulary, 0)]
    request = ExportRequest(SHAPE, spec, plan, output, weights=weights)
    export(request, adapter, make(spec), processor, prompts)
