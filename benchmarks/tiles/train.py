"""Train the model from scratch on one processor core, in three stages.

    python -m benchmarks.tiles.train --out RUN --save out/tiles-model

`language` teaches the decoder to answer from ideal visual tokens: the sum of the word embeddings of
what a token shows. Those of the overview show no digits. `vision` teaches tower and projector to
make such tokens from pixels. `tune` puts both together and trains the decoder on pixels. An image
has 2 to 9 tiles in the first stage, as a model that is to be asked about images of any size learns
it; nothing is left out of any of them.

A stage ends after its steps or its minutes of processor time, whichever comes first. Its state is
in RUN/STAGE.pt; a run that is started again goes on from there. A batch follows from the seed, the
stage and the step.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.demo.build import PAD, WORDS
from benchmarks.tiles import symbols as data
from benchmarks.tiles.model import make_model, save
from benchmarks.tiles.scenes import KINDS

STAGES = {  # steps, scenes a step, rate
    "language": (420, 24, 4e-3),
    "vision": (1300, 8, 3e-3),
    "tune": (60, 16, 1.5e-3),
}
Scores = dict[str, float]


@dataclass
class Run:
    stage: str
    model: Any
    table: Tensor
    steps: int
    batch: int
    seed: int


def answer_loss(run: Run, tokens: Tensor, talk: data.Dialogues) -> tuple[Tensor, Scores]:
    """Cross-entropy of answers and ends given visual tokens, and what was right by kind."""
    language = run.model.model.language_model
    first, last = (language.embed_tokens(ids).expand(len(tokens), -1, -1) for ids in data.around())
    embeds = torch.cat([first, tokens, last, language.embed_tokens(talk.ids)], 1)
    hidden = language(inputs_embeds=embeds, use_cache=False).last_hidden_state
    start = embeds.shape[1] - talk.ids.shape[1]
    logits = run.model.lm_head(hidden[talk.rows, talk.columns + start]).float()
    right = (logits.argmax(-1) == talk.answers).float()
    scores = {
        kind: right[talk.kinds == number].mean().item()
        for number, kind in enumerate(KINDS)
        if (talk.kinds == number).any()
    }
    losses = F.cross_entropy(logits, talk.answers, reduction="none")
    weights = torch.tensor([*[1.0] * len(KINDS), 0.1, 0.5])[talk.kinds]  # -2 and -1 from the end
    return (losses * weights).sum() / (talk.kinds >= 0).sum(), scores


def language_loss(run: Run, step: int, rng: np.random.Generator) -> tuple[Tensor, Scores]:
    grids = data.GRIDS[:3] if step < 0.4 * run.steps else data.GRIDS
    rows, columns = grids[rng.integers(len(grids))]
    if len(grids) == len(data.GRIDS) and rng.random() < 0.4:
        rows, columns = grids[-1]
    made = [data.symbolic_scene(rng, rows, columns) for _ in range(run.batch)]
    tokens = run.table[torch.from_numpy(np.stack([own for _, own in made]))].sum(2)
    strength = 0.15 * torch.from_numpy(rng.random((run.batch, 1, 1)).astype(np.float32))
    noise = torch.from_numpy(rng.standard_normal(tokens.shape, np.float32))
    talk = data.dialogues([things for things, _ in made], rng)
    return answer_loss(run, tokens + strength * noise, talk)


def visual_tokens(model: Any, pixels: Tensor) -> Tensor:
    """[tiles, 3, H, W] -> [tiles, 16, width], as the model itself does it."""
    inner = model.model
    hidden = inner.vision_tower(pixels).last_hidden_state[:, 1:]
    side = round(hidden.shape[1] ** 0.5)
    joined = inner.pixel_shuffle(hidden.reshape(len(hidden), side, side, -1), scale_factor=0.5)
    found: Tensor = inner.multi_modal_projector(joined.flatten(1, 2))
    return found


def vision_loss(run: Run, step: int, rng: np.random.Generator) -> tuple[Tensor, Scores]:
    """Distance from ideal tokens, and classification by the words themselves."""
    made = [data.drawn(step * run.batch + i, crowded=i % 3 != 0) for i in range(run.batch)]
    truth = torch.from_numpy(np.concatenate([own for _, _, own in made]))
    pixels = torch.cat([shown for _, shown, _ in made])
    tokens = visual_tokens(run.model, pixels).flatten(0, 1).float()
    weight = torch.where(truth[:, 0] == data.GROUND, 1.0, 4.0)
    far = (tokens - run.table[truth].sum(1)).square().sum(-1) / data.NORM**2
    loss, scores = (far * weight).mean() / 2, {"distance": far.mean().item()}
    for column, (name, words) in enumerate(data.classes().items()):
        shown = truth[:, column].ne(PAD) & truth[:, 0].ne(data.GROUND)
        logits = tokens[shown] @ run.table[words].T
        wanted = (truth[shown, column][:, None] == words).int().argmax(-1)
        loss = loss + F.cross_entropy(logits, wanted) * (1.0 if name == "digit" else 0.5)
        scores[name] = (logits.argmax(-1) == wanted).float().mean().item()
    return loss, scores


def tune_loss(run: Run, step: int, rng: np.random.Generator) -> tuple[Tensor, Scores]:
    first = 10**7 + step * run.batch
    made = [data.drawn(first + i, crowded=False) for i in range(run.batch)]
    with torch.no_grad():
        tokens = visual_tokens(run.model, torch.cat([shown for _, shown, _ in made]))
    talk = data.dialogues([things for things, _, _ in made], rng)
    return answer_loss(run, tokens.reshape(run.batch, -1, tokens.shape[-1]), talk)


LOSSES: dict[str, Callable[[Run, int, np.random.Generator], tuple[Tensor, Scores]]] = {
    "language": language_loss,
    "vision": vision_loss,
    "tune": tune_loss,
}


def trained(run: Run) -> dict[str, nn.Parameter]:
    """What a stage trains; word embeddings stay as the table."""
    named = dict(run.model.named_parameters())
    language = {n for n in named if "language_model" in n or "lm_head" in n}
    if run.stage == "vision":
        return {n: p for n, p in named.items() if n not in language}
    return {n: p for n, p in named.items() if n in language and "embed_tokens" not in n}


def optimizers(parameters: dict[str, nn.Parameter], rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside, AdamW for everything else."""
    inside = [n for n, p in parameters.items() if p.ndim == 2 and ("layer" in n or "project" in n)]
    muon = torch.optim.Muon(
        [parameters[n] for n in inside], lr=rate, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"
    )
    rest = [p for n, p in parameters.items() if n not in inside]
    return [muon, torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.98), weight_decay=0.0)]


def train(run: Run, rate: float, minutes: float, file: Path, *, half: bool) -> None:
    """The stage, to its end, from its saved state where there is one."""
    parameters = trained(run)
    makers = optimizers(parameters, rate)
    step, spent = _resume(file, parameters, makers)
    began, saved = time.process_time(), time.monotonic()
    history = list[Scores]()
    while step < run.steps and spent < 60 * minutes:
        progress = max((step + 1) / run.steps, spent / (60 * minutes))
        rng = np.random.default_rng([run.seed, list(STAGES).index(run.stage), step])
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss, scores = LOSSES[run.stage](run, step, rng)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        for maker in makers:
            for group in maker.param_groups:
                group["lr"] = rate * min((step + 1) / 20, 1.0, 0.02 + (1 - progress) / 0.5)
            maker.step()
            maker.zero_grad()
        history.append(scores | {"loss": loss.item()})
        step, now = step + 1, time.process_time()
        spent, began = spent + now - began, now
        if step % 25 == 0:
            _report(run.stage, step, spent, history)
            history.clear()
        if time.monotonic() - saved > 120:
            _store(file, step, spent, parameters, makers)
            saved = time.monotonic()
    _store(file, step, spent, parameters, makers)


def _report(stage: str, step: int, seconds: float, history: list[Scores]) -> None:
    names = sorted({name for scores in history for name in scores})
    means = {n: np.mean([scores[n] for scores in history if n in scores]) for n in names}
    shown = (f"{name} {mean:.3f}" for name, mean in means.items())
    print(stage, step, f"{seconds:.0f}s", *shown, flush=True)


def _store(
    file: Path,
    step: int,
    spent: float,
    parameters: dict[str, nn.Parameter],
    makers: list[torch.optim.Optimizer],
) -> None:
    weights = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    state = {"step": step, "spent": spent, "weights": weights}
    state["optimizers"] = [maker.state_dict() for maker in makers]
    draft = file.with_suffix(".draft")
    torch.save(state, draft)
    draft.replace(file)


def _resume(
    file: Path, parameters: dict[str, nn.Parameter], makers: list[torch.optim.Optimizer]
) -> tuple[int, float]:
    if not file.is_file():
        return 0, 0.0
    state = torch.load(file)
    _load(state, parameters)
    for maker, saved in zip(makers, state["optimizers"], strict=True):
        maker.load_state_dict(saved)
    return state["step"], state["spent"]


def _load(state: dict[str, Any], parameters: dict[str, nn.Parameter]) -> None:
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state["weights"][name])


def fresh(seed: int) -> tuple[Any, Tensor]:
    """A model whose word embeddings are the table of symbols, and that table."""
    model, table = make_model(seed), data.symbol_table(seed)
    model.set_attn_implementation("eager")  # faster backwards
    with torch.no_grad():
        words = table[: len(WORDS)]
        model.model.language_model.embed_tokens.weight[: len(WORDS)].copy_(words)
        model.lm_head.weight[: len(WORDS)].copy_(words / data.NORM)
    return model, table


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small InternVL that needs its tiles.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the training state")
    parser.add_argument("--save", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--stages", default=",".join(STAGES))
    parser.add_argument(
        "--minutes", type=float, nargs=3, default=[60.0] * 3, help="of each stage, processor time"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--float32", action="store_true", help="no products in bfloat16")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    model, table = fresh(args.seed)
    limits = dict(zip(STAGES, args.minutes, strict=True))
    for stage in args.stages.split(","):
        steps, batch, rate = STAGES[stage]
        run = Run(stage, model, table, steps, batch, args.seed)
        for other in ("language", "vision") if stage == "tune" else ():
            _load(torch.load(args.out / f"{other}.pt"), trained(replace(run, stage=other)))
        train(run, rate, limits[stage], args.out / f"{stage}.pt", half=not args.float32)
    save(model, args.save)


if __name__ == "__main__":
    main()
