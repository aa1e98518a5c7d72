"""Train the demo model from scratch on two processor cores, in three stages.

    python -m benchmarks.demo.train language --out RUN   # decoder, on ideal visual tokens
    python -m benchmarks.demo.train vision --out RUN     # tower and projector, towards them
    python -m benchmarks.demo.train tune --out RUN       # decoder, on pixels

The first two stages need nothing of each other and may run side by side.  They meet in a fixed
table of symbols: an ideal visual token is the sum of the word embeddings of its patch's color,
shape and digit, of a mark on the patch that holds a thing's centre, and of smooth functions of the
patch's place.  `language` learns to answer from such tokens, on 4x4 patches first and on 12x12 at
last, with noise; `vision` learns to make them from pixels, and its [CLS] to know what is there.
`tune` puts them together and trains the decoder on the images; the tower stays as it is, as in
LLaVA's second stage.

Every stage saves `RUN/<stage>.pt` now and then and goes on from there when started again; a batch
follows from the seed, the stage and the step alone.  `--save FOLDER` writes the checkpoint.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.demo import data, forward
from benchmarks.demo.build import PAD, WORDS, make_model, save
from edgeprune.demo.questions import KINDS
from edgeprune.demo.scenes import COLORS, GRID, SHAPES, Scene

STAGES = ("language", "vision", "tune")
STEPS = {"language": 2000, "vision": 2400, "tune": 400}
RATES = {"language": 4e-3, "vision": 3e-3, "tune": 2e-3}
# Share of the steps of `language` after which a grid ends, its patches per side, most things.
CURRICULUM = ((0.15, 4, 2), (0.24, 4, 4), (0.36, 6, 4), (0.48, 8, 5), (1.0, 12, 6))


@dataclass
class Run:
    """One stage under way."""

    stage: str
    out: Path
    steps: int
    batch: int
    rate: float
    seed: int
    model: Any
    heads: nn.ModuleList  # throwaway: two classifiers of [CLS], and places from decoder states
    table: Tensor
    places: Tensor


def ideal(run: Run, patches: Tensor) -> Tensor:
    """Ideal visual tokens float32 [batch, patches, width] of symbols [batch, patches, 5]."""
    grid = int(patches.shape[1] ** 0.5)
    return run.table[patches].sum(2) + data.waves(grid) @ run.places


def answer_loss(run: Run, tokens: Tensor, talk: data.Dialogues) -> tuple[Tensor, dict[str, float]]:
    """Cross-entropy of answers and ends given visual tokens, and accuracy of each kind."""
    embed = run.model.model.language_model.embed_tokens
    start = embed(data.prefix()).expand(len(tokens), -1, -1)
    middle, states = forward.decoder(run.model, torch.cat([start, tokens, embed(talk.ids)], 1))
    first = start.shape[1] + tokens.shape[1]
    states = states[talk.rows, talk.columns + first]
    named = middle[talk.named[:, 0], talk.named[:, 1] + first]
    places = run.heads[2](F.layer_norm(named, named.shape[-1:]))
    far = (places - talk.where).square().sum() / max(1, talk.where.numel())
    logits = run.model.lm_head(states)
    right = (logits.argmax(-1) == talk.answers).float()
    scores = {
        kind: right[talk.kinds == i].mean().item()
        for i, kind in enumerate(KINDS)
        if (talk.kinds == i).any()
    }
    sided = (talk.kinds == KINDS.index("relation")) & (talk.answers >= data.ID["left"])
    if sided.any():
        scores["side"] = right[sided].mean().item()
    losses = F.cross_entropy(logits, talk.answers, reduction="none")
    weights = torch.tensor([*[1.0] * len(KINDS), 0.5, 0.1])[talk.kinds]
    scores["far"] = far.item()
    return (losses * weights).sum() / (talk.kinds >= 0).sum() + far, scores


def spoil(tokens: Tensor, level: float, generator: torch.Generator) -> Tensor:
    """Imperfect visual tokens: noise, and some patches mixed with a neighbour in reading order."""
    n, patches, _ = tokens.shape
    mix = torch.rand(n, patches, 1, generator=generator) * 0.5
    mix *= torch.rand(n, patches, 1, generator=generator) < 0.3 * level
    tokens = tokens + mix * (tokens.roll(1, 1) - tokens)
    strength = 0.2 * level * torch.rand(n, 1, 1, generator=generator)
    return tokens + strength * torch.randn(tokens.shape, generator=generator)


def language_loss(run: Run, step: int, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
    """Answers from ideal visual tokens."""
    progress = step / run.steps
    _, grid, most = next(c for c in CURRICULUM if progress < c[0])
    made = [
        data.drawn_scene(step * run.batch + i)
        if grid == GRID
        else data.symbolic_scene(rng, grid, most)
        for i in range(run.batch)
    ]
    scenes, owners = [m[0] for m in made], [m[1] for m in made]
    tokens = ideal(run, data.symbols(scenes, owners).patches)
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
    tokens = spoil(tokens, min(1.0, progress / 0.6), generator)
    return answer_loss(run, tokens, data.dialogues(scenes, rng))


def patch_losses(run: Run, tokens: Tensor, patches: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Distance of visual tokens from ideal ones, and classification by the symbols themselves."""
    weight = torch.where(patches[..., 3] == data.GROUND, 1.0, 4.0)
    far = (tokens - ideal(run, patches)).square().sum(-1) / data.WORD_NORM**2
    loss, scores = (far * weight).mean() / 2, {"distance": far.mean().item()}
    groups = (COLORS, SHAPES, [str(i) for i in range(10)])
    for i, (name, words) in enumerate(zip(("color", "shape", "digit"), groups, strict=True)):
        rows = torch.tensor([data.ID[w] for w in words])
        shown = patches[..., i].ne(PAD)
        if not shown.any():
            continue
        logits = tokens[shown] @ run.table[rows].T
        truth = (patches[..., i][shown][:, None] == rows).int().argmax(-1)
        loss = loss + F.cross_entropy(logits, truth) * (1.0 if name == "digit" else 0.5)
        scores[name] = (logits.argmax(-1) == truth).float().mean().item()
    return loss, scores


def see(
    run: Run, step: int, many_cards: bool
) -> tuple[list[Scene], Tensor, Tensor, dict[str, float]]:
    """Scenes of a step, their visual tokens, the losses of tower and projector, and scores."""
    first = (1 + STAGES.index(run.stage)) * 10**8 + step * run.batch
    made = [data.drawn_scene(first + i, many_cards) for i in range(run.batch)]
    scenes, owners = [m[0] for m in made], [m[1] for m in made]
    truth = data.symbols(scenes, owners)
    before, last = forward.vision(run.model, data.pixels(scenes))
    tokens = forward.project(run.model, before[:, 1:])
    loss, scores = patch_losses(run, tokens, truth.patches)
    pooled = run.model.model.vision_tower.post_layernorm(last[:, 0])
    for head, cls in zip(run.heads[:2], (before[:, 0], pooled), strict=True):
        logits = head(F.layer_norm(cls, cls.shape[-1:]))
        loss = loss + 4 * F.binary_cross_entropy_with_logits(logits, truth.present)
        found = (logits > 0).float() * truth.present
        scores["cls"] = (found.sum() / truth.present.sum()).item()
    return scenes, tokens, loss, scores


def vision_loss(run: Run, step: int, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
    """Ideal visual tokens from pixels."""
    _, _, loss, scores = see(run, step, many_cards=True)
    return loss, scores


def tune_loss(run: Run, step: int, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
    """Answers from pixels; tower and projector stay as they are."""
    with torch.no_grad():
        scenes, tokens, _, scores = see(run, step, many_cards=False)
    loss, answers = answer_loss(run, tokens, data.dialogues(scenes, rng))
    return loss, answers | {"patch_" + name: score for name, score in scores.items()}


LOSSES: dict[str, Callable[[Run, int, np.random.Generator], tuple[Tensor, dict[str, float]]]] = {
    "language": language_loss,
    "vision": vision_loss,
    "tune": tune_loss,
}


def trained_parts(run: Run) -> list[tuple[str, nn.Parameter]]:
    """Named parameters that the stage trains; word embeddings stay as the table until `tune`."""
    named = list(run.model.named_parameters())
    of_language = [(n, p) for n, p in named if "language_model" in n or "lm_head" in n]
    names = {n for n, _ in of_language}
    heads = [("heads." + n, p) for n, p in run.heads.named_parameters()]
    if run.stage == "language":
        return [(n, p) for n, p in of_language if "embed_tokens" not in n] + heads[4:]
    if run.stage == "vision":
        return [(n, p) for n, p in named if n not in names] + heads[:4]
    return of_language + heads[4:]


def optimizers(run: Run) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside blocks and projector, AdamW for everything else."""
    named = trained_parts(run)
    hidden = [p for n, p in named if p.ndim == 2 and ("layers." in n or "projector" in n)]
    ids = {id(p) for p in hidden}
    rest = [p for _, p in named if id(p) not in ids]
    muon = torch.optim.Muon(
        hidden, lr=run.rate, weight_decay=0.02, adjust_lr_fn="match_rms_adamw", ns_steps=5
    )
    return [muon, torch.optim.AdamW(rest, lr=run.rate, betas=(0.9, 0.98), weight_decay=0.0)]


def rate_at(progress: float) -> float:
    """Share of the learning rate: warm-up over 2%, level, linear decay over the last 45%."""
    return min(progress / 0.02, 1.0, 0.02 + (1 - progress) / 0.45)


def start(args: argparse.Namespace) -> Run:
    """A fresh run; `tune` takes the decoder and the tower from the other stages' files."""
    model = make_model(args.seed)
    width = model.config.text_config.hidden_size
    heads = [nn.Linear(model.config.vision_config.hidden_size, data.PRESENT) for _ in range(2)]
    heads.append(nn.Linear(width, 2))
    table, places = data.symbol_table(width, args.seed)
    run = Run(args.stage, args.out, args.steps, args.batch, args.rate, args.seed, model,
              nn.ModuleList(heads), table, places)  # fmt: skip
    with torch.no_grad():
        words = table[: len(WORDS)]
        model.model.language_model.embed_tokens.weight.copy_(words)
        model.lm_head.weight.copy_(words / data.WORD_NORM)
    for stage in ("language", "vision") if args.stage == "tune" else ():
        part = Run(**{**vars(run), "stage": stage})
        weights = torch.load(args.out / f"{stage}.pt")["weights"]
        load(part, weights)
    return run


def load(run: Run, weights: dict[str, Tensor]) -> None:
    """Copy saved weights into the parts that the stage trains."""
    with torch.no_grad():
        for name, parameter in trained_parts(run):
            parameter.copy_(weights[name])


def train(run: Run, minutes_between_saves: float, folder: Path | None) -> None:
    """Run the stage to its end, from its saved state where there is one."""
    path = run.out / f"{run.stage}.pt"
    makers = optimizers(run)
    step = 0
    if path.exists():
        state = torch.load(path)
        load(run, state["weights"])
        for maker, saved in zip(makers, state["optimizers"], strict=True):
            maker.load_state_dict(saved)
        step = state["step"]
    parts = [p for _, p in trained_parts(run)]
    history: list[dict[str, float]] = []
    began = saved_at = time.time()
    while step < run.steps:
        rng = np.random.default_rng([run.seed, STAGES.index(run.stage), step])
        loss, scores = LOSSES[run.stage](run, step, rng)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parts, 1.0)
        for maker in makers:
            for group in maker.param_groups:
                group["lr"] = run.rate * rate_at((step + 1) / run.steps)
            maker.step()
            maker.zero_grad()
        history.append(scores | {"loss": loss.item()})
        step += 1
        if step % 50 == 0:
            report(step, time.time() - began, history)
            history.clear()
        if step == run.steps or time.time() - saved_at > 60 * minutes_between_saves:
            store(run, step, makers, path)
            saved_at = time.time()
            if folder is not None:
                save(run.model, folder)


def report(step: int, seconds: float, history: list[dict[str, float]]) -> None:
    """One line: means of the scores since the last one."""
    names = sorted({name for scores in history for name in scores})
    means = {n: np.mean([scores[n] for scores in history if n in scores]) for n in names}
    print(step, f"{seconds:.0f}s", *(f"{n} {m:.3f}" for n, m in means.items()), flush=True)


def store(run: Run, step: int, makers: list[torch.optim.Optimizer], path: Path) -> None:
    """Write the state from which the stage can go on."""
    weights = {name: p.detach().clone() for name, p in trained_parts(run)}
    state = {"step": step, "weights": weights, "optimizers": [m.state_dict() for m in makers]}
    fresh = path.with_suffix(".new")
    torch.save(state, fresh)
    fresh.replace(path)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--out", type=Path, required=True, help="folder of the training state")
    parser.add_argument("--save", type=Path, help="folder for the checkpoint")
    parser.add_argument("--steps", type=int, help=f"default: {STEPS}")
    parser.add_argument("--batch", type=int, default=32, help="scenes per step")
    parser.add_argument("--rate", type=float, help=f"default: {RATES}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save-minutes", type=float, default=3.0)
    args = parser.parse_args()
    args.steps = args.steps or STEPS[args.stage]
    args.rate = args.rate or RATES[args.stage]
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    train(start(args), args.save_minutes, args.save)


if __name__ == "__main__":
    main()
