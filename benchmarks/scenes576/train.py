"""Train the model of this benchmark within a given time, on one GPU or (to try it) on a CPU.

    python -m benchmarks.scenes576.train --minutes 5 --carry FOLDER --out OUT

Three stages, each a share of the time:
- `language`: LoRA factors of the language model, on ideal visual tokens, from 4 x 4 patches to
  24 x 24. A grid ends once its answers are right, or when its share of the time is over.
- `vision`: tower and projector, from pixels towards the ideal tokens.
- `joint`: everything, on pixels.

Other processes draw scenes from the start. State is saved every 30 seconds. OUT then holds
vision.safetensors (tower and projector), adapter_model.safetensors, adapter_config.json,
settings.json, log.jsonl and, at the end, validation.json. `--resume OUT --shares 0,0,1` goes on
from there with the last stage.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from benchmarks.scenes576 import symbols
from benchmarks.scenes576.decoder import Lora, adapter_tensors, unpacked
from benchmarks.scenes576.losses import Model, Scores, joint_loss, language_loss, vision_loss
from benchmarks.scenes576.pools import SLOT, Makers, Plan, Pool, Reader, Resident, empty_batch
from benchmarks.scenes576.scenes import GRID
from benchmarks.scenes576.tower import Sight, TowerShape
from benchmarks.scenes576.trainer import (
    BEGAN,
    Options,
    Rescue,
    Trainer,
    follow,
    record,
    save,
    validate,
)

SHARES = {"language": 0.40, "vision": 0.20, "joint": 0.40}
RESERVE = 9.0  # seconds at the end, for validation and the last files; at most a tenth of all
# Share of the language stage after which a grid ends, its patches per side, most objects.
CURRICULUM = ((0.10, 4, 3), (0.18, 4, 5), (0.27, 6, 6), (0.36, 8, 8), (0.48, 12, 10),
              (0.60, 16, 10), (1.0, GRID, 10))  # fmt: skip
ENOUGH = 0.9  # share of right answers at which a grid ends before its time
LEAST_STEPS = 40  # on a grid
SCENES_TO_START = 64  # of a pool


def fused(device: torch.device) -> dict[str, Any]:
    """Arguments of AdamW."""
    return {"betas": (0.9, 0.95), "weight_decay": 0.0, "fused": device.type == "cuda"}


def language_rate(options: Options, now: float, start: float, end: float) -> float:
    """Learning rate of the factors: warm-up, level, linear decay over the second half of all."""
    progress = (now - start) / (end - start)
    return options.rate * max(0.01, min(1.0, progress / 0.01, (1 - progress) / 0.5))


def language_stage(trainer: Trainer, optimizer: torch.optim.Optimizer, begin: float, until: float,
                   end: float) -> None:  # fmt: skip
    """Answers from ideal tokens on a growing grid."""
    options, at, steps = trainer.options, 0, 0
    factors = list(trainer.model.lora.parameters())
    while (now := time.monotonic()) < until:
        progress = (now - begin) / (until - begin)
        share, grid, most = CURRICULUM[at]
        if at + 1 < len(CURRICULUM) and (
            progress > share or (steps >= LEAST_STEPS and trainer.ema > ENOUGH)
        ):
            trainer.say("language", 0.0, grid=grid, most=most, ema=round(trainer.ema, 3))
            at, steps, trainer.ema, trainer.rescue.top = at + 1, 0, 0.0, 0.0
            continue
        name = "drawn" if grid == GRID else f"{grid}x{grid}-{most}"
        pool = trainer.pools[name]
        pool.bring(0.05)
        pool.wait(SCENES_TO_START)
        length = grid * grid + options.slots * SLOT
        batch = trainer.batch(name, max(1, min(options.most, options.tokens // length)),
                              options.slots)  # fmt: skip
        for group in optimizer.param_groups:
            group["lr"] = trainer.rescue.scale * language_rate(options, now, begin, end)
        fresh = Scores.fresh(options.device)
        loss = language_loss(trainer.model, batch, min(1.0, progress / 0.6), trainer.rng, fresh)
        trainer.update(loss, [optimizer])
        follow(trainer, fresh, factors)
        steps += 1
        trainer.pools["drawn"].bring(0.01)
        trainer.say("language", grid=grid, most=most, drawn=trainer.pools["drawn"].scenes)
        trainer.keep()


def vision_optimizers(trainer: Trainer) -> list[torch.optim.Optimizer]:
    """Muon for matrices inside layers and the projector, AdamW for the rest."""
    options, model = trainer.options, trainer.model
    named = [*model.sight.named_parameters(), *model.heads.named_parameters()]
    hidden = [p for n, p in named if p.ndim == 2 and ("layers." in n or "projector" in n)]
    ids = {id(p) for p in hidden}
    rest = [p for _, p in named if id(p) not in ids]
    muon = torch.optim.Muon(hidden, lr=options.vision_rate, weight_decay=0.02,
                            adjust_lr_fn="match_rms_adamw", ns_steps=5)  # fmt: skip
    return [muon, torch.optim.AdamW(rest, lr=options.vision_rate, **fused(options.device))]


def vision_stage(trainer: Trainer, begin: float, until: float) -> None:
    """Ideal tokens from pixels."""
    options, model = trainer.options, trainer.model
    optimizers = vision_optimizers(trainer)
    pool = trainer.pools["drawn"]
    pool.wait(SCENES_TO_START)
    while (now := time.monotonic()) < until:
        progress = (now - begin) / (until - begin)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = options.vision_rate * max(
                    0.02, min(1.0, progress / 0.03, (1 - progress) / 0.5)
                )
        batch = trainer.batch("drawn", options.images, 1)
        trainer.update(vision_loss(model, batch, trainer.scores), optimizers)
        pool.bring(0.02)
        trainer.say("vision", drawn=pool.scenes)
        trainer.keep()


def joint_stage(trainer: Trainer, optimizer: torch.optim.Optimizer, begin: float, until: float,
                start: float) -> None:  # fmt: skip
    """Answers from pixels."""
    options, model = trainer.options, trainer.model
    parts = [*model.sight.parameters(), *model.heads.parameters()]
    adam = torch.optim.AdamW(parts, lr=options.joint_rate, **fused(options.device))
    trained = [*model.lora.parameters(), *parts]
    trainer.ema, trainer.rescue = 0.0, Rescue(trainer.rescue.scale)
    length = GRID * GRID + options.slots * SLOT
    scenes = max(1, options.tokens // length)
    pool = trainer.pools["drawn"]
    pool.wait(SCENES_TO_START)
    while (now := time.monotonic()) < until:
        progress = (now - begin) / (until - begin)
        for group in optimizer.param_groups:
            group["lr"] = trainer.rescue.scale * language_rate(options, now, start, until)
        for group in adam.param_groups:
            group["lr"] = options.joint_rate * max(0.02, min(1.0, progress / 0.03, 1 - progress))
        batch = trainer.batch("drawn", scenes, options.slots)
        fresh = Scores.fresh(options.device)
        trainer.update(joint_loss(model, batch, fresh), [optimizer, adam])
        follow(trainer, fresh, trained)
        pool.bring(0.02)
        trainer.say("joint", drawn=pool.scenes)
        trainer.keep(check=True)


def rehearse(trainer: Trainer) -> None:
    """One step of every stage on an empty batch that changes nothing: an error shows at once."""
    options, model = trainer.options, trainer.model
    length = GRID * GRID + options.slots * SLOT
    while True:
        try:
            scenes = max(1, options.tokens // length)
            batch = empty_batch(scenes, options.slots, options.device)
            nothing = [torch.optim.AdamW(model.lora.parameters(), lr=0.0, **fused(options.device))]
            scores = Scores.fresh(options.device)
            trainer.update(language_loss(model, batch, 1.0, trainer.rng, scores), nothing)
            trainer.update(joint_loss(model, batch, scores), nothing)
            still = vision_optimizers(trainer)
            for optimizer in still:
                for group in optimizer.param_groups:
                    group["lr"] = 0.0
            batch = empty_batch(options.images, 1, options.device)
            trainer.update(vision_loss(model, batch, scores), still)
            break
        except torch.OutOfMemoryError:
            fewer(options)
    for part in (model.lora, model.sight, model.heads):
        part.zero_grad()
    trainer.steps = trainer.window = trainer.skipped = 0


def fewer(options: Options) -> None:
    """Half as much a step, after an error for lack of memory."""
    options.tokens, options.images = options.tokens // 2, options.images // 2
    options.most = max(1, options.most // 2)
    torch.cuda.empty_cache()
    print(f"out of memory: {options.tokens} tokens a step", flush=True)


def guarded(trainer: Trainer, stage: Callable[[], None]) -> None:
    """Run a stage; where the memory is too small, with fewer scenes; an error ends it alone."""
    for _ in range(3):
        try:
            return stage()
        except torch.OutOfMemoryError:
            fewer(trainer.options)
        except Exception:
            traceback.print_exc()
            return None
    return None


def plans(options: Options) -> list[Plan]:
    """Pools in the order in which they are filled."""
    coarse = [Plan(f"{g}x{g}-{m}", options.symbolic, g, m) for _, g, m in CURRICULUM[:-1]]
    drawn = Plan("drawn", options.scenes, GRID, split="train", pixels=True)
    checked = Plan("validation", options.checked, GRID, split="validation", pixels=True)
    return [*coarse, checked, drawn]


def build(options: Options, reader: Reader) -> Model:
    """The language model with fresh factors, a fresh tower and projector, on the device."""
    cpu = unpacked(sorted(options.carry.glob("decoder-*.safetensors")))
    table = symbols.make_table(cpu.embed, reader.word, options.seed)
    on_gpu = options.device.type == "cuda"
    lora = Lora(cpu, options.rank, options.alpha, options.seed)
    decoder = cpu.to(options.device, torch.bfloat16 if on_gpu or has_bf16() else torch.float32)
    shape = TowerShape()
    sight = Sight(shape, decoder.width, options.seed)
    heads = nn.ModuleList(nn.Linear(shape.width, symbols.PRESENT) for _ in range(2))
    if options.resume is not None:
        adapter_tensors(load_file(options.resume / "adapter_model.safetensors"), lora)
        stored = load_file(options.resume / "vision.safetensors")
        sight.load_state_dict({name: tensor.float() for name, tensor in stored.items()})
    rows, places = (t.to(options.device) for t in (table.rows, table.places))
    prefix = torch.tensor(reader.prefix(), device=options.device)
    modules = (m.to(options.device) for m in (lora, sight, heads))
    return Model(decoder, *modules, symbols.Table(rows, places), prefix)  # type: ignore[arg-type]


def has_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices by instructions of its own."""
    return "bf16" in Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else False


def train(options: Options) -> dict[str, Any]:
    """Run all stages; what validation says."""
    options.out.mkdir(parents=True, exist_ok=True)
    if options.device.type == "cuda":
        torch.set_num_threads(2)  # the other cores draw
        torch.backends.cuda.enable_cudnn_sdp(False)  # flash for images, memory-efficient for text
    reader = Reader(options.carry / "tokenizer.json")
    pools = [Pool.make(plan) for plan in plans(options)]
    makers = Makers(pools)
    makers.start(options.workers, reader)
    try:
        return _train(options, reader, pools)
    finally:
        makers.stop()


def _train(options: Options, reader: Reader, pools: list[Pool]) -> dict[str, Any]:
    model = build(options, reader)
    residents = {pool.plan.name: Resident(pool, options.device) for pool in pools}
    rng = torch.Generator(options.device).manual_seed(options.seed)
    trainer = Trainer(options, model, residents, rng)
    optimizer = torch.optim.AdamW(model.lora.parameters(), lr=options.rate,
                                  **fused(options.device))  # fmt: skip
    rehearse(trainer)
    begin, end = time.monotonic(), BEGAN + 60 * options.minutes
    end -= min(RESERVE, 6 * options.minutes)
    first = begin + options.shares["language"] * (end - begin)
    second = first + options.shares["vision"] * (end - begin)
    record(options.out, {"seconds": round(begin - BEGAN, 1), "stage": "start"})
    # The rate's schedule leaves out the vision stage, in which the factors rest.
    rest = second - first
    guarded(trainer, lambda: language_stage(trainer, optimizer, begin, first, end - rest))
    trainer.say("language", 0.0)
    if options.shares["language"]:
        right, _ = validate(trainer, min(64, options.checked), ideal=True)
        record(options.out, {"stage": "language", "validation": right})
    guarded(trainer, lambda: vision_stage(trainer, first, second))
    trainer.say("vision", 0.0)
    guarded(trainer, lambda: joint_stage(trainer, optimizer, second, end, begin + rest))
    trainer.say("joint", 0.0)
    save(trainer)
    right, asked = validate(trainer, options.checked)
    on_ideal, _ = validate(trainer, min(64, options.checked), ideal=True)
    result = {"right": right, "asked": asked, "on_ideal_tokens": on_ideal, "steps": trainer.steps,
              "seconds": round(time.monotonic() - BEGAN, 1)}  # fmt: skip
    (options.out / "validation.json").write_text(json.dumps(result, indent=1))
    record(options.out, {"validation": result})
    return result


def parse() -> Options:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--minutes", type=float, required=True, help="from start to last file")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--carry", type=Path, required=True, help="what `pack` wrote")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=max(1, min(14, cores - 2)))
    parser.add_argument("--scenes", type=int, default=60000)
    parser.add_argument("--symbolic", type=int, default=6144)
    parser.add_argument("--checked", type=int, default=256)
    parser.add_argument("--slots", type=int, default=14)
    parser.add_argument("--tokens", type=int, default=27000)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--most", type=int, default=48)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--alpha", type=float, default=32.0)
    parser.add_argument("--rate", type=float, default=1.5e-3)
    parser.add_argument("--vision-rate", type=float, default=3e-3)
    parser.add_argument("--joint-rate", type=float, default=3e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", type=Path, help="OUT of a run to go on from")
    parser.add_argument("--shares", default="0.40,0.20,0.40", help="language, vision, joint")
    args = vars(parser.parse_args())
    args["device"] = torch.device(args["device"])
    shares = [float(part) for part in args["shares"].split(",")]
    args["shares"] = dict(zip(SHARES, shares, strict=True))
    return Options(**args)


if __name__ == "__main__":
    train(parse())
