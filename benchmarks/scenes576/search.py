"""Try many selections of visual tokens quickly: which layer, which score, how much diversity.

    python -m benchmarks.scenes576.search CHECKPOINT OUT.jsonl --questions 800

A plain torch forward pass of many questions at once, on validation scenes; nothing here is
exported. A question is right where the model predicts each token of its answer given those before,
which is what greedy decoding needs. Each line of OUT is one plan with its marks, question by
question. What does well here is then built as a method and confirmed on test scenes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.scenes576.decoder import Decoder, stacked
from benchmarks.scenes576.pools import ANSWER, SLOT, Reader
from benchmarks.scenes576.questions import KINDS, Question, benchmark
from benchmarks.scenes576.scenes import GRID, draw, make_scene

VISUAL = GRID * GRID
TAIL = 6
"""Tokens between a question and its answer: end of turn, newline, start of turn, role, newline."""


@dataclass(frozen=True)
class Asked:
    """Questions on the device, each about an image of its own."""

    visual: Tensor  # float32 [N, VISUAL, width], projected
    ids: Tensor  # int64 [N, SLOT], after the image: question, frame, answer
    last: Tensor  # int64 [N], the column of the last prompt token
    targets: Tensor  # int64 [N, ANSWER], -100 where there is none
    kinds: list[str]

    def part(self, rows: slice) -> Asked:
        return Asked(
            self.visual[rows], self.ids[rows], self.last[rows], self.targets[rows], self.kinds[rows]
        )


@dataclass(frozen=True)
class Seen:
    """What a selection may look at, after a layer (0: at the decoder's input)."""

    prefix: int
    visual: int  # live visual tokens
    hidden: Tensor  # [B, S, width]
    last: Tensor  # [B], column of the last prompt token among the text
    inputs: Tensor  # [B, visual, width], the live tokens as they entered
    words: Tensor  # [B, T, width], embeddings of the text after the image
    query: Tensor | None = None  # [B, heads, S, size], rotated
    key: Tensor | None = None
    bare_key: Tensor | None = None  # [B, heads, S, size], not rotated
    middle: tuple[Tensor, Tensor] | None = None  # cos, sin of the image's middle

    @property
    def text(self) -> Tensor:
        """Columns of the text: [T]."""
        return torch.arange(self.words.shape[1], device=self.hidden.device)

    def prompt(self) -> Tensor:
        """Which text tokens belong to the prompt: bool [B, T]."""
        return self.text[None] <= self.last[:, None]

    def question(self) -> Tensor:
        """Which belong to the question itself: bool [B, T]."""
        return (self.text[None] <= self.last[:, None] - TAIL) & (self.text[None] > 0)


Score = Callable[[Seen], Tensor]
Select = Callable[[Seen, int], Tensor]


def text_attention(seen: Seen, agnostic: bool) -> Tensor:
    """Attention of text tokens to visual tokens, softmax over all they see: [B, heads, T, n]."""
    assert seen.query is not None and seen.key is not None and seen.bare_key is not None
    start, end = seen.prefix, seen.prefix + seen.visual
    query = seen.query[:, :, end:].float()
    logits = query @ seen.key.float().transpose(-1, -2) / math.sqrt(query.shape[-1])
    if agnostic:
        assert seen.middle is not None
        moved = turned(seen.bare_key[:, :, start:end].float(), *(t.float() for t in seen.middle))
        logits[..., start:end] = query @ moved.transpose(-1, -2) / math.sqrt(query.shape[-1])
    places = torch.arange(logits.shape[-1], device=query.device)
    later = places[None] > places[end:, None]
    weights = logits.masked_fill(later, -torch.inf).softmax(-1)
    return weights[..., start:end]


def last_token(agnostic: bool) -> Score:
    def score(seen: Seen) -> Tensor:
        weights = text_attention(seen, agnostic).mean(1)  # [B, T, n]
        return weights.gather(1, seen.last[:, None, None].expand(-1, 1, weights.shape[-1]))[:, 0]

    return score


def of_words(which: str, agnostic: bool, over_heads: str = "mean") -> Score:
    """Mean over words (`question` or `prompt`) of the mean or largest over heads."""

    def score(seen: Seen) -> Tensor:
        weights = text_attention(seen, agnostic)
        weights = weights.mean(1) if over_heads == "mean" else weights.amax(1)
        mask = (seen.question() if which == "question" else seen.prompt()).float()
        mask = mask / mask.sum(1, keepdim=True)
        return (weights * mask[..., None]).sum(1)

    return score


def cosine(which: str) -> Score:
    """Mean cosine of the input embeddings of image and words; or the largest of the question."""

    def score(seen: Seen) -> Tensor:
        found = F.normalize(seen.inputs, dim=-1) @ F.normalize(seen.words, dim=-1).transpose(1, 2)
        mask = seen.prompt() if which == "prompt" else seen.question()
        if which == "largest":
            return found.masked_fill(~mask[:, None], -torch.inf).amax(-1)
        weight = mask.float() / mask.float().sum(1, keepdim=True)
        return (found * weight[:, None]).sum(-1)

    return score


SCORES: dict[str, Score] = {
    "last": last_token(False),
    "last-agnostic": last_token(True),
    "prompt": of_words("prompt", False),
    "prompt-agnostic": of_words("prompt", True),
    "question": of_words("question", False),
    "question-agnostic": of_words("question", True),
    "question-max": of_words("question", True, "max"),
    "prompt-max": of_words("prompt", True, "max"),
    "cosine": cosine("question"),
    "cosine-prompt": cosine("prompt"),
    "cosine-largest": cosine("largest"),
}


def top(score: str) -> Select:
    return lambda seen, keep: SCORES[score](seen).topk(keep, -1).indices.sort(-1).values


def diverse(features: str, score: str = "", power: float = 1.0) -> Select:
    """Greedy determinant of unit features, times relevance ** power where there is a score."""

    def select(seen: Seen, keep: int) -> Tensor:
        start, end = seen.prefix, seen.prefix + seen.visual
        if features == "input":
            vectors = seen.inputs
        elif features == "hidden":
            vectors = seen.hidden[:, start:end]
        else:
            assert seen.bare_key is not None
            vectors = seen.bare_key[:, :, start:end].transpose(1, 2).flatten(2)
        vectors = F.normalize(vectors.float(), dim=-1)
        if score:
            weight = SCORES[score](seen).float()
            low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
            weight = ((weight - low) / (high - low) + 1e-3) ** power
            vectors = vectors * weight[..., None]
        return determinant(vectors, keep)

    return select


def determinant(vectors: Tensor, keep: int) -> Tensor:
    """Greedy MAP, batched: [B, n, width] -> int64 [B, keep], rising."""
    batch = torch.arange(len(vectors), device=vectors.device)
    kernel = vectors @ vectors.transpose(1, 2)
    left = kernel.diagonal(dim1=1, dim2=2).clone()
    rows = vectors.new_zeros(len(vectors), keep, vectors.shape[1])
    chosen = torch.zeros(len(vectors), keep, dtype=torch.int64, device=vectors.device)
    for step in range(keep):
        best = left.argmax(1)
        chosen[:, step] = best
        row = kernel[batch, best]
        if step:
            before = rows[:, :step]
            row = row - torch.einsum("bk,bkn->bn", before[batch, :, best], before)
        row = row / left[batch, best].clamp(min=1e-12).sqrt()[:, None]
        rows[:, step] = row
        left = left - row * row
        left[batch, best] = -torch.inf
    return chosen.sort(1).values


def spread(seen: Seen, keep: int) -> Tensor:
    """Greedy max-min of cosine distances of the input embeddings (DivPrune)."""
    vectors = F.normalize(seen.inputs.float(), dim=-1)
    far = 1 - vectors @ vectors.transpose(1, 2)
    batch = torch.arange(len(far), device=far.device)
    itself = torch.eye(far.shape[1], device=far.device).bool()
    nearest = far.masked_fill(itself, torch.inf).amin(2)
    chosen = torch.zeros(len(far), keep, dtype=torch.int64, device=far.device)
    for step in range(keep):
        best = nearest.argmax(1)
        chosen[:, step] = best
        row = far[batch, best]
        nearest = torch.minimum(nearest, row) if step else row.clone()
        nearest[batch[:, None], chosen[:, : step + 1]] = -torch.inf
    return chosen.sort(1).values


@dataclass(frozen=True)
class Plan:
    """Which selection after which layer leaves how many visual tokens."""

    name: str
    sites: tuple[tuple[int, str, int], ...]  # layer (0: input), selection, tokens that stay
    renumber: bool = False  # whether tokens that are left stand one behind the other

    def cr(self, layers: int) -> float:
        total, live, rest = 0, VISUAL, list(self.sites)
        for layer in range(layers):
            while rest and rest[0][0] == layer:
                live = rest.pop(0)[2]
            total += live
        return VISUAL * layers / total


def selection(name: str) -> Select:
    """`top:SCORE`, `dpp:FEATURES[:SCORE:POWER]` or `spread`."""
    kind, *rest = name.split(":")
    if kind == "spread":
        return spread
    if kind == "top":
        return top(rest[0])
    return diverse(rest[0], *(rest[1:2]), *(float(power) for power in rest[2:3]))


class Model:
    """A checkpoint's decoder, many sequences at once, visual tokens leaving between layers."""

    def __init__(self, decoder: Decoder, prefix: Tensor) -> None:
        self.decoder, self.prefix = decoder, prefix
        names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
        self.weights = [dict(zip(names, parts, strict=True)) for parts in
                        zip(*(decoder.matrices[name] for name in names), strict=True)]  # fmt: skip
        self.size = self.weights[0]["q_proj"].shape[0] // decoder.heads

    @torch.no_grad()
    def right(self, asked: Asked, plan: Plan) -> Tensor:
        """Which questions are answered right: bool [N]."""
        decoder, start = self.decoder, len(self.prefix)
        words = decoder.embed[asked.ids]
        prefix = decoder.embed[self.prefix].expand(len(words), -1, -1)
        x, inputs, live = torch.cat([prefix, asked.visual, words], 1), asked.visual, VISUAL
        places = torch.arange(x.shape[1], device=x.device).expand(len(x), -1)
        middle = self.angles(torch.tensor([[start + VISUAL // 2]], device=x.device))
        rest = list(plan.sites)
        seen = Seen(start, live, x, asked.last, inputs, words)
        for layer, weight in enumerate(self.weights):
            while rest and rest[0][0] == layer:
                _, name, keep = rest.pop(0)
                at = selection(name)(seen, keep)
                inputs = inputs.gather(1, at[..., None].expand(-1, -1, inputs.shape[-1]))
                at = self.survivors(at, start, live, x.shape[1])
                x = x.gather(1, at[..., None].expand(-1, -1, x.shape[-1]))
                places, live = places.gather(1, at), keep
                if plan.renumber:
                    places = torch.arange(x.shape[1], device=x.device).expand(len(x), -1)
            x, states = self.layer(layer, weight, x, places)
            seen = Seen(start, live, x, asked.last, inputs, words, *states, middle)
        columns = asked.last[:, None] + torch.arange(ANSWER, device=x.device)
        at = (columns + start + live).clamp(max=x.shape[1] - 1)
        final = x.gather(1, at[..., None].expand(-1, -1, x.shape[-1]))
        final = F.rms_norm(final, (decoder.width,), decoder.last_norm, decoder.epsilon)
        said = F.linear(final, decoder.embed).argmax(-1)
        return ((said == asked.targets) | (asked.targets < 0)).all(1)

    @staticmethod
    def survivors(at: Tensor, start: int, live: int, total: int) -> Tensor:
        """Places that go on: prefix, chosen, text."""
        places = torch.arange(total, device=at.device).expand(len(at), -1)
        return torch.cat([places[:, :start], at + start, places[:, start + live :]], 1)

    def angles(self, places: Tensor) -> tuple[Tensor, Tensor]:
        steps = torch.arange(0, self.size, 2, device=places.device) / self.size
        angles = places[:, None, :, None].float() * self.decoder.theta**-steps
        angles = torch.cat([angles, angles], -1)
        return angles.cos(), angles.sin()

    def layer(
        self, index: int, weight: dict[str, Tensor], x: Tensor, places: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        decoder, (batch, length, _) = self.decoder, x.shape
        first, second = decoder.norms[index]
        y = F.rms_norm(x, (decoder.width,), first, decoder.epsilon)
        q, k, v = (
            F.linear(y, weight[f"{name}_proj"]).view(batch, length, -1, self.size).transpose(1, 2)
            for name in "qkv"
        )
        k, v = (t.repeat_interleave(decoder.heads // decoder.kv_heads, 1) for t in (k, v))
        turn = self.angles(places)
        rotated_q, rotated_k = turned(q, *turn), turned(k, *turn)
        mixed = F.scaled_dot_product_attention(rotated_q, rotated_k, v, is_causal=True)
        x = x + F.linear(mixed.transpose(1, 2).flatten(2), weight["o_proj"])
        y = F.rms_norm(x, (decoder.width,), second, decoder.epsilon)
        y = F.silu(F.linear(y, weight["gate_proj"])) * F.linear(y, weight["up_proj"])
        return x + F.linear(y, weight["down_proj"]), (rotated_q, rotated_k, k)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


def one_site(cr: float, layer: int, layers: int) -> int:
    """Tokens that stay behind one site after `layer` layers."""
    return int((VISUAL * layers / cr - layer * VISUAL) / (layers - layer))


def two_sites(cr: float, first: int, later: int, keep: int, layers: int) -> int:
    """Tokens behind a second site where `keep` stay behind the first."""
    used = first * VISUAL + (later - first) * keep
    return int((VISUAL * layers / cr - used) / (layers - later))


def plans(layers: int) -> Iterator[Plan]:
    """The plans of the search; those that cannot be are left out."""
    found = itertools.chain(
        _diverse(layers), _depths(layers), _causes(layers), _staged(layers), _mixed(layers)
    )
    yield Plan("dense", ())
    for plan in found:
        if all(keep >= 1 for _, _, keep in plan.sites):
            yield plan


def _depths(layers: int) -> Iterator[Plan]:
    """Which score after which layer. CR is not held here: 64 tokens stay wherever the site is."""
    scores = ("last", "last-agnostic", "prompt-agnostic", "question", "question-agnostic",
              "question-max")  # fmt: skip
    for layer, score in itertools.product((1, 2, 3, 4, 6, 8, 10, 12, 15, 18, 21), scores):
        yield Plan(f"64 by {score} after {layer}", ((layer, f"top:{score}", 64),))


def _diverse(layers: int) -> Iterator[Plan]:
    """Selections before the decoder, with and without tokens' own positions."""
    for cr, renumber in itertools.product((4, 8, 16, 32), (False, True)):
        keep, said = VISUAL // cr, ", renumbered" if renumber else ""
        names = ["spread", "dpp:input", *(f"top:{s}" for s in ("cosine", "cosine-largest"))]
        for score, power in itertools.product(
            ("cosine", "cosine-prompt", "cosine-largest"), (0.25, 0.5, 0.75, 1)
        ):
            names.append(f"dpp:input:{score}:{power}")
        for name in names:
            yield Plan(f"CR{cr} {name}{said}", ((0, name, keep),), renumber)


UTP = {4: (576,) * 3 + (109,) + (97,) * 3 + (96,) * 15 + (94,) * 8}
"""The schedule that calibration found for the exported model, by ratio."""


def _causes(layers: int) -> Iterator[Plan]:
    """UTP and FastV with other scores in place of their own, at their own counts."""
    scores = ("last", "last-agnostic", "prompt-agnostic", "question", "question-agnostic",
              "question-max")  # fmt: skip
    for cr, layer in itertools.product((4, 8), (1, 2, 3, 4)):
        keep = one_site(cr, layer, layers)
        for score in scores:
            yield Plan(f"CR{cr} {keep} by {score} after {layer}", ((layer, f"top:{score}", keep),))
    for cr, counts in UTP.items():
        for score in ("utp", *scores):
            sites = [
                (layer, f"top:{_utp(layer) if score == 'utp' else score}", counts[layer])
                for layer in range(1, layers)
                if counts[layer] < counts[layer - 1]
            ]
            yield Plan(f"CR{cr} UTP's counts by {score}", tuple(sites))


def _utp(layer: int) -> str:
    """UTP's score after a layer."""
    return "last-agnostic" if layer <= 3 else "last"


def _mixed(layers: int) -> Iterator[Plan]:
    """Relevance and diversity together after an early layer."""
    scores = ("last-agnostic", "question-agnostic")
    for cr, layer in itertools.product((4, 8), (1, 2, 3)):
        keep = one_site(cr, layer, layers)
        for features in ("hidden", "key"):
            name = f"CR{cr} dpp {features} after {layer}"
            yield Plan(name, ((layer, f"dpp:{features}", keep),))
            for score, power in itertools.product(scores, (0.25, 1)):
                select = f"dpp:{features}:{score}:{power}"
                yield Plan(f"{name} {score}^{power}", ((layer, select, keep),))


def _staged(layers: int) -> Iterator[Plan]:
    """Diversity at the input, relevance deeper."""
    scores = ("last-agnostic", "question-agnostic", "question-max")
    for cr, share, later in itertools.product((4, 8, 16), (1.5, 2, 3), (6, 9, 12, 15, 18)):
        first = int(VISUAL / cr * share)
        keep = two_sites(cr, 0, later, first, layers)
        for score in scores:
            for name in ("spread", "dpp:input"):
                sites = ((0, name, first), (later, f"top:{score}", max(keep, 0)))
                yield Plan(f"CR{cr} {name} {first}, {score} {keep} after {later}", sites)


def _drawn(question: Question) -> np.ndarray:
    return np.asarray(draw(make_scene(question.seed, question.split)))


def asked(checkpoint: Path, count: int, split: str, device: torch.device, processes: int) -> Asked:
    """Questions with their visual tokens, computed by transformers' LLaVA."""
    from transformers import LlavaForConditionalGeneration

    questions = list(benchmark(count, split))
    with get_context("fork").Pool(processes) as pool:
        images = pool.map(_drawn, questions, chunksize=8)
    reader = Reader(checkpoint / "tokenizer.json")
    slots = [reader.slot(question) for question in questions]
    llava = LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
    body = llava.model.to(device).eval()
    visual = []
    with torch.no_grad():
        for first in range(0, count, 64):
            pixels = torch.from_numpy(np.stack(images[first : first + 64])).to(device).float()
            mean, std = _normal(checkpoint)
            pixels = (pixels / 255 - mean.to(device)) / std.to(device)
            tower = body.vision_tower(pixels.permute(0, 3, 1, 2), output_hidden_states=True)
            features = tower.hidden_states[llava.config.vision_feature_layer][:, 1:]
            visual.append(body.multi_modal_projector(features))
    ids = torch.from_numpy(np.stack([slot[0] for slot in slots])).long().to(device)
    last = torch.tensor([slot[1] for slot in slots], device=device)
    size = torch.tensor([slot[2] for slot in slots], device=device)
    steps = torch.arange(ANSWER, device=device)
    targets = ids.gather(1, (last[:, None] + steps + 1).clamp(max=SLOT - 1))
    targets = targets.masked_fill(steps >= size[:, None], -100)
    return Asked(torch.cat(visual), ids, last, targets, [question.kind for question in questions])


def _normal(checkpoint: Path) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the checkpoint's processor."""
    for name in ("processor_config.json", "preprocessor_config.json"):
        if (checkpoint / name).is_file():
            found = json.loads((checkpoint / name).read_text())
            found = found.get("image_processor", found)
            return torch.tensor(found["image_mean"]), torch.tensor(found["image_std"])
    raise SystemExit(f"{checkpoint} has no image processor")


def decoder_of(checkpoint: Path, device: torch.device) -> Decoder:
    from transformers import LlavaForConditionalGeneration

    llava = LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
    return stacked(llava.model.language_model).to(device, torch.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--questions", type=int, default=800)
    parser.add_argument("--split", default="validation")
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=1e9, help="start nothing after so many")
    parser.add_argument("--only", default="", help="plans whose name has this in it")
    args = parser.parse_args()
    begin = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    questions = asked(args.checkpoint, args.questions, args.split, device, args.processes)
    decoder = decoder_of(args.checkpoint, device)
    prefix = torch.tensor(Reader(args.checkpoint / "tokenizer.json").prefix(), device=device)
    model, layers = Model(decoder, prefix), len(decoder.norms)
    print(f"ready after {time.monotonic() - begin:.1f} s", flush=True)
    known = {json.loads(line)["plan"] for line in _lines(args.out)}
    with args.out.open("a") as out:
        for plan in plans(layers):
            if time.monotonic() - begin > args.seconds:
                break
            if plan.name in known or args.only not in plan.name:
                continue
            marks = [
                model.right(questions.part(slice(first, first + args.batch)), plan)
                for first in range(0, args.questions, args.batch)
            ]
            right = torch.cat(marks).cpu()
            line = {"plan": plan.name, "cr": round(plan.cr(layers), 3), "sites": plan.sites,
                    "right": round(float(right.float().mean()), 4),
                    "marks": "".join(str(int(mark)) for mark in right)}  # fmt: skip
            by_kind = {
                kind: round(float(right[[k == kind for k in questions.kinds]].float().mean()), 3)
                for kind in KINDS
            }
            out.write(json.dumps({**line, **by_kind}) + "\n")
            out.flush()
    print(f"done after {time.monotonic() - begin:.1f} s", flush=True)


def _lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.is_file() else []


if __name__ == "__main__":
    main()
