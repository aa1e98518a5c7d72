"""The baseline: the same shapes in eager torch on the GPU.

    python -m benchmarks.gpu.eager 7b-576-dense-cuda 7b-576-utp-cr4-cuda

Weights are random, drawn on the GPU. Prints one line of JSON, with the rates of a large copy and a
large product beside the cells: no engine is faster than those allow. Dense is what a user has
today: transformers with its fused attention and a cache that grows. Pruned is edgeprune's own eager
model, which selects as its graphs do.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.cells import Cell, cells, tiny
from benchmarks.schedules import planned
from benchmarks.shapes import write
from edgeprune.bench.worker import PREFIX
from edgeprune.models import open_model
from edgeprune.models._layers import compute_buffers
from edgeprune.models._processor import Prompt
from edgeprune.models._reference import Reference
from edgeprune.policies import make
from edgeprune.spec import PruneSpec

TEXT = 64
PhaseSeconds = tuple[float, float, float]  # seconds of vision, of prefill, of one decode step


def measure(cell: Cell, rounds: int, new_tokens: int, device: str) -> dict[str, Any]:
    """Median seconds of each part."""
    torch.manual_seed(0)
    if device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = write(cell.sized, Path(folder), sparse=True)
        run = (_dense if cell.method == "none" else _pruned)(cell, checkpoint, new_tokens, device)
    for _ in range(3):
        run()
    found = [run() for _ in range(rounds)]
    names = ("vision", "prefill", "decode")
    medians = {
        name: statistics.median(phases[index] for phases in found)
        for index, name in enumerate(names)
    }
    peak = torch.cuda.max_memory_allocated() if device != "cpu" else None
    return {"cell": cell.name, "peak_bytes": peak, **medians}


def ceilings(device: str) -> dict[str, float]:
    """Bytes a second that a copy reads and writes, operations a second of a float16 product."""
    side = 8192 if device != "cpu" else 256
    source, matrix = torch.randn(side, 8 * side), torch.randn(side, side).half()
    target = torch.empty_like(source)
    moved = _per_second(lambda: target.copy_(source), device) * 2 * source.nbytes
    counted = _per_second(lambda: matrix @ matrix, device) * 2 * side**3
    return {"copy_bytes": moved, "product_operations": counted}


def _per_second(call: Callable[[], object], device: str, calls: int = 20) -> float:
    for _ in range(3):
        call()
    begin = _clock(device)
    for _ in range(calls):
        call()
    return calls / (_clock(device) - begin)


def _clock(device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()


def _dense(
    cell: Cell, checkpoint: Path, new_tokens: int, device: str
) -> Callable[[], PhaseSeconds]:
    """transformers, as it comes."""
    from transformers import AutoConfig, LlavaForConditionalGeneration

    config = AutoConfig.from_pretrained(checkpoint)
    torch.set_default_dtype(torch.float16 if device != "cpu" else torch.float32)
    model = LlavaForConditionalGeneration(config).eval()
    torch.set_default_dtype(torch.float32)
    pixels = torch.randn(1, 3, cell.side, cell.side).to(model.dtype)
    ids = torch.randint(5, cell.sized.vocabulary, (1, TEXT))
    image = torch.full((1, cell.visual), config.image_token_id)
    whole = torch.cat([ids[:, :PREFIX], image, ids[:, PREFIX:]], 1)
    embed = model.get_input_embeddings()

    @torch.inference_mode()
    def time_round() -> PhaseSeconds:
        begin = _clock(device)
        features = model.get_image_features(pixel_values=pixels)
        features = getattr(features, "pooler_output", features)
        seen = _clock(device)
        inputs = embed(whole)
        inputs[:, PREFIX : PREFIX + cell.visual] = features[0]
        found = model.model.language_model(inputs_embeds=inputs, use_cache=True)
        token = model.lm_head(found.last_hidden_state[:, -1:]).argmax(-1)
        filled = _clock(device)
        for _ in range(new_tokens):
            found = model.model.language_model(
                input_ids=token, past_key_values=found.past_key_values, use_cache=True
            )
            token = model.lm_head(found.last_hidden_state[:, -1:]).argmax(-1)
            int(token)  # whoever stops at an end token has to look
        return seen - begin, filled - seen, (_clock(device) - filled) / new_tokens

    return time_round


def _pruned(
    cell: Cell, checkpoint: Path, new_tokens: int, device: str
) -> Callable[[], PhaseSeconds]:
    """edgeprune's eager model."""
    adapter, policy = open_model(str(checkpoint)), make(PruneSpec(cell.method, cell.cr))
    plan = planned(policy, adapter.shape, cell.cr)
    dtype = torch.float16 if device != "cpu" else torch.float32
    with torch.device("meta"):
        vision, decoder = adapter.vision(policy, plan, None), adapter.decoder(policy, plan, None)
    for module in (vision, decoder):
        _draw(module, dtype, device)
    model = Reference(vision, decoder)
    pixels = torch.randn(adapter.pixels)
    ids = torch.randint(5, cell.sized.vocabulary, (1, TEXT))
    prompt = Prompt(pixels, ids[:, :PREFIX], ids[:, PREFIX:])

    @torch.inference_mode()
    def time_round() -> PhaseSeconds:
        begin = _clock(device)
        model.vision(pixels.to(dtype))
        seen = _clock(device)
        token = int(model.prefill(prompt).logits.argmax())  # vision once more
        filled = _clock(device)
        for _ in range(new_tokens):
            token = int(model.step(torch.tensor([[token]])).logits.argmax())
        vision_time = seen - begin
        return vision_time, filled - seen - vision_time, (_clock(device) - filled) / new_tokens

    return time_round


def _draw(module: nn.Module, dtype: torch.dtype, device: str) -> None:
    """Random weights in place of those on the meta device."""
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            size = tuple(parameter.shape)
            weight: Tensor = torch.randn(size, dtype=dtype, device=device)
            gain = 1 / math.sqrt(math.prod(size) / size[-1]) if len(size) > 1 else 0.02
            weight.mul_(gain)
            if "norm" in type(owner).__name__.lower() and name == "weight":
                weight.fill_(1)
            setattr(owner, name, nn.Parameter(weight, requires_grad=False))
    compute_buffers(module, dtype)
    module.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description="Eager torch on some cells.")
    known = {cell.name: cell for cell in (*cells(), *tiny())}
    parser.add_argument("cells", nargs="+", choices=known, metavar="CELL")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    torch.set_default_device(args.device)
    found = []
    for name in args.cells:
        found.append(measure(known[name], args.rounds, args.new_tokens, args.device))
        print(found[-1], file=sys.stderr, flush=True)
    rates = ceilings(args.device)
    print(json.dumps({"torch": torch.__version__, "ceilings": rates, "cells": found}))


if __name__ == "__main__":
    main()
