"""Try many selections of visual tokens quickly: which layer, which score, how much diversity.

    python -m benchmarks.scenes576.search CHECKPOINT OUT.jsonl --questions 800

A plain torch forward pass of many questions at once, on validation scenes; nothing here is
exported. A question is right where the model predicts each token of its answer given those before,
which is what greedy decoding needs. Each line of OUT is one plan with its marks, question by
question. What does well here is then built as a method and confirmed on test scenes.
"""

from __future__ import annotations

import argparse
import json
import time
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
from benchmarks.scenes576.scenes import draw, make_scene
from benchmarks.scenes576.search_plans import VISUAL, Plan, plans
from benchmarks.scenes576.selections import Seen, selection, turned


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
