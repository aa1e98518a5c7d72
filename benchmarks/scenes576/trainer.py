"""A training run under way: its options, steps, log, saved files and validation."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.scenes576.losses import Model, Scores, answer_loss
from benchmarks.scenes576.pools import PER_SCENE, SLOT, Batch, Resident
from benchmarks.scenes576.questions import KINDS
from benchmarks.scenes576.scenes import GRID

BEGAN = time.monotonic()
FALL = 0.2  # of the share of right answers, after which training goes back to the kept weights


@dataclass
class Options:
    """Sizes and rates of a run."""

    minutes: float
    out: Path
    carry: Path
    device: torch.device
    workers: int
    scenes: int  # drawn for training
    symbolic: int  # made for each coarse grid
    checked: int  # scenes of the validation
    slots: int  # questions of a scene in one step
    tokens: int  # of a step, at most
    images: int  # of a step of the vision stage
    most: int  # scenes of a step of the language stage
    rank: int
    alpha: float
    rate: float  # of the LoRA factors
    vision_rate: float
    joint_rate: float  # of tower and projector in the joint stage
    seed: int
    resume: Path | None  # what an earlier run wrote
    shares: dict[str, float]


@dataclass
class Rescue:
    """The way back when training diverges: kept weights, and a smaller learning rate."""

    scale: float = 1.0  # of the learning rate
    top: float = 0.0  # best share of right answers on this grid
    kept: list[Tensor] = field(default_factory=list)
    since: int = 0  # steps since weights were kept

    def watch(self, right: float, parts: list[nn.Parameter]) -> bool:
        """Keep weights every 100 steps while all is well; put them back after a fall."""
        self.top, self.since = max(self.top, right), self.since + 1
        if self.kept and right < self.top - FALL:
            with torch.no_grad():
                for part, kept in zip(parts, self.kept, strict=True):
                    part.copy_(kept)
            self.scale, self.top = self.scale / 2, 0.0
            return True
        if right > self.top - FALL / 4 and self.since >= 100:
            self.kept, self.since = [part.detach().clone() for part in parts], 0
        return False


@dataclass
class Trainer:
    """One run under way."""

    options: Options
    model: Model
    pools: dict[str, Resident]
    rng: torch.Generator
    steps: int = 0
    saved: float = 0.0
    logged: float = 0.0
    ema: float = 0.0
    best: float = 0.0
    window: int = 0
    skipped: int = 0
    rescue: Rescue = field(default_factory=lambda: Rescue())
    scores: Scores = field(init=False)

    def __post_init__(self) -> None:
        self.scores = Scores.fresh(self.options.device)
        self.saved = self.logged = time.monotonic()

    def batch(self, name: str, scenes: int, slots: int) -> Batch:
        """Random scenes of a pool."""
        pool = self.pools[name]
        device = self.options.device
        rows = torch.randint(pool.scenes, (scenes,), generator=self.rng, device=device)
        return pool.batch(rows, slots, self.rng)

    def update(self, loss: Tensor, optimizers: list[torch.optim.Optimizer]) -> None:
        """One step; a loss or gradient that is not finite changes nothing."""
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        parts = [p for o in optimizers for group in o.param_groups for p in group["params"]]
        norm = nn.utils.clip_grad_norm_(parts, 1.0)
        if bool(torch.isfinite(norm)):
            for optimizer in optimizers:
                optimizer.step()
        else:
            self.skipped += 1
        self.steps += 1
        self.window += 1

    def say(self, stage: str, every: float = 5.0, **more: Any) -> None:
        """Log the scores since the last time, where that is long enough ago."""
        now = time.monotonic()
        if now - self.logged < every:
            return
        line = {
            "seconds": round(now - BEGAN, 1),
            "stage": stage,
            "step": self.steps,
            "steps_per_s": round(self.window / (now - self.logged), 2),
            **more,
            **self.scores.summary(),
        }
        if self.options.device.type == "cuda":
            line["gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 1)
        if self.skipped:
            line["skipped"] = self.skipped
        record(self.options.out, line)
        self.scores = Scores.fresh(self.options.device)
        self.logged, self.window = time.monotonic(), 0

    def keep(self, every: float = 30.0, check: bool = False) -> None:
        """Save the state, where the last time is long enough ago and it has not got worse."""
        if time.monotonic() - self.saved < every:
            return
        if check:
            right = validate(self, 32, 8)[0]["all"]
            record(self.options.out, {"seconds": round(time.monotonic() - BEGAN, 1),
                                      "validation": right})  # fmt: skip
            if right < self.best - 0.08:
                self.saved = time.monotonic()
                return
            self.best = max(self.best, right)
        save(self)
        self.saved = time.monotonic()


def record(out: Path, line: dict[str, Any]) -> None:
    """One line to the log and to the terminal."""
    text = json.dumps(line)
    with (out / "log.jsonl").open("a") as file:
        file.write(text + "\n")
    print(text, flush=True)


def save(trainer: Trainer) -> None:
    """Write weights and settings; a file is replaced at once."""
    out, model = trainer.options.out, trainer.model
    for name, tensors in (
        ("vision.safetensors", model.sight.state()),
        ("adapter_model.safetensors", model.lora.state()),
    ):
        save_file(tensors, out / "fresh", metadata={"format": "pt"})
        (out / "fresh").replace(out / name)
    settings = {"tower": asdict(model.sight.vision_tower.shape)}
    (out / "settings.json").write_text(json.dumps(settings, indent=1))
    (out / "adapter_config.json").write_text(json.dumps(model.lora.config(), indent=1))


@torch.no_grad()
def validate(
    trainer: Trainer, scenes: int, slots: int = PER_SCENE, ideal: bool = False
) -> tuple[dict[str, float], dict[str, int]]:
    """Share of right answers of each kind and of all, on validation scenes; questions of each kind.

    A right answer is right in every token given the ones before, which is what greedy decoding
    needs.
    """
    model, pool = trainer.model, trainer.pools["validation"]
    pool.bring(1.0)
    scores = Scores.fresh(trainer.options.device)
    weights = model.lora.merged(model.decoder)
    length = GRID * GRID + slots * SLOT
    size = max(1, trainer.options.tokens // length)
    for first in range(0, min(scenes, pool.scenes), size):
        rows = torch.arange(first, min(first + size, scenes, pool.scenes),
                            device=trainer.options.device)  # fmt: skip
        batch = pool.batch(rows, slots, None)
        assert batch.pixels is not None
        if ideal:
            tokens = model.table.ideal(batch.symbols)
        else:
            tokens = model.sight(batch.pixels, model.dtype)[0]
        answer_loss(model, weights, tokens, batch, scores)
    asked = dict(zip(KINDS, (int(n) for n in scores.asked.tolist()), strict=True))
    found = scores.summary()
    found["all"] = round(float(scores.right.sum() / scores.asked.sum().clamp(min=1)), 4)
    return found, asked


def follow(trainer: Trainer, fresh: Scores, parts: list[nn.Parameter]) -> None:
    """Add a step's scores to those of the log, and follow the share of right answers."""
    trainer.scores.right += fresh.right
    trainer.scores.asked += fresh.asked
    for name, values in fresh.means.items():
        trainer.scores.means.setdefault(name, []).extend(values)
    right = float(fresh.right.sum() / fresh.asked.sum().clamp(min=1))
    trainer.ema += (right - trainer.ema) * (0.08 if trainer.ema else 1.0)
    if trainer.rescue.watch(trainer.ema, parts):
        trainer.ema = 0.0
        record(trainer.options.out, {"stage": "back", "step": trainer.steps,
                                     "scale": trainer.rescue.scale})  # fmt: skip
