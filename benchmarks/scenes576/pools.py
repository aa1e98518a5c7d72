"""Scenes and questions made ahead by other processes, in memory that they share.

Processes are forked before anything starts a GPU. Each fills its chunks of the pools, in the order
in which training wants them. Training takes what is ready; it never waits once the first chunk is
there.
"""

from __future__ import annotations

import mmap
import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from benchmarks.scenes576 import symbols
from benchmarks.scenes576.questions import KINDS, Question, ask
from benchmarks.scenes576.scenes import GRID, SIZE, Scene, coverage, draw, generator, make_scene

IMAGE = "<image>"
SLOT = 22  # tokens of a question with its answer, at most
ANSWER = 3  # tokens of an answer and its end, at most
PER_SCENE = 24  # questions made for a scene
CHUNK = 16  # scenes between two reports


def dialogue(question: str, answer: str = "") -> str:
    """A first turn as the chat template writes it, and what the model has to say."""
    end = f"{answer}<|im_end|>" if answer else ""
    return f"<|im_start|>user\n{IMAGE}\n{question}<|im_end|>\n<|im_start|>assistant\n{end}"


@dataclass
class Reader:
    """Words to token ids; the tokenizer is opened when it is first needed, in each process."""

    file: Path

    @property
    def tokenizer(self) -> Tokenizer:
        return _opened(self.file)

    def word(self, word: str) -> int:
        """The token of a word in mid-sentence; of a digit, the token itself."""
        return int(self.tokenizer.encode(word if word.isdigit() else f" {word}").ids[0])

    def prefix(self) -> list[int]:
        """Token ids before the image."""
        return self._around(dialogue(""))[0]

    def slot(self, question: Question) -> tuple[np.ndarray, int, int]:
        """Token ids [SLOT] after the image, the column that predicts the answer, its tokens."""
        _, asked = self._around(dialogue(question.text))
        _, whole = self._around(dialogue(question.text, question.answer))
        count = len(whole) - len(asked)
        if whole[: len(asked)] != asked or len(whole) > SLOT or count > ANSWER:
            raise ValueError(f"{question} takes {len(whole)} tokens, {count} of them the answer's")
        ids = np.zeros(SLOT, dtype=np.int32)
        ids[: len(whole)] = whole
        return ids, len(asked) - 1, count

    def _around(self, text: str) -> tuple[list[int], list[int]]:
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        at = ids.index(self.tokenizer.token_to_id(IMAGE))
        return ids[:at], ids[at + 1 :]


@cache
def _opened(file: Path) -> Tokenizer:
    return Tokenizer.from_file(str(file))


@dataclass(frozen=True)
class Plan:
    """What a pool holds: `scenes` of grid x grid patches; drawn ones where `split` is given."""

    name: str
    scenes: int
    grid: int
    most: int = 10
    split: str = ""
    pixels: bool = False


@dataclass
class Pool:
    """Shared arrays of a plan; all [scenes, ...]."""

    plan: Plan
    arrays: dict[str, np.ndarray]
    ready: np.ndarray  # uint8 [chunks]

    @classmethod
    def make(cls, plan: Plan) -> Pool:
        """Arrays in anonymous memory that forked processes share."""
        n = plan.scenes
        shapes: dict[str, tuple[tuple[int, ...], type]] = {
            "symbols": ((n, plan.grid**2, 5), np.uint8),
            "present": ((n, symbols.PRESENT), np.uint8),
            "ids": ((n, PER_SCENE, SLOT), np.int32),
            "first": ((n, PER_SCENE), np.int32),
            "count": ((n, PER_SCENE), np.int32),
            "kind": ((n, PER_SCENE), np.int32),
        }
        if plan.pixels:
            shapes["pixels"] = ((n, SIZE, SIZE, 3), np.uint8)
        arrays = {name: _shared(*shape) for name, shape in shapes.items()}
        return cls(plan, arrays, _shared((-(-n // CHUNK),), np.uint8))

    def fill(self, chunk: int, reader: Reader) -> None:
        """Make the scenes of one chunk."""
        for i in range(chunk * CHUNK, min((chunk + 1) * CHUNK, self.plan.scenes)):
            scene, owner = self._scene(i)
            row = {"symbols": symbols.symbols_of(scene, owner),
                   "present": symbols.presence_of(scene)}  # fmt: skip
            if self.plan.pixels:
                row["pixels"] = np.asarray(draw(scene))
            rng = generator(scene.seed, scene.split, 2)
            for j, question in enumerate(ask(scene, rng, PER_SCENE, symbols.AMONG)):
                ids, first, count = reader.slot(question)
                for name, value in zip(
                    ("ids", "first", "count", "kind"),
                    (ids, first, count, KINDS.index(question.kind)),
                    strict=True,
                ):
                    self.arrays[name][i, j] = value
            for name, value in row.items():
                self.arrays[name][i] = value
        self.ready[chunk] = 1

    def _scene(self, i: int) -> tuple[Scene, np.ndarray]:
        plan = self.plan
        if not plan.split:
            return symbols.symbolic_scene(i, plan.grid, plan.most)
        scene = make_scene(i, plan.split)
        return scene, coverage(scene)

    @property
    def chunks_ready(self) -> int:
        """Leading chunks that are finished."""
        missing = np.flatnonzero(self.ready == 0)
        return int(missing[0]) if len(missing) else len(self.ready)


def _shared(shape: tuple[int, ...], dtype: type) -> np.ndarray:
    size = max(1, int(np.prod(shape)) * np.dtype(dtype).itemsize)
    return np.frombuffer(mmap.mmap(-1, size), dtype=dtype, count=int(np.prod(shape))).reshape(shape)


@dataclass
class Makers:
    """Processes that fill pools, one after the other."""

    pools: list[Pool]
    processes: list[multiprocessing.process.BaseProcess] = field(default_factory=list)

    def start(self, workers: int, reader: Reader) -> None:
        """Fork the processes; before a GPU is used."""
        context = multiprocessing.get_context("fork")
        for number in range(workers):
            args = (self.pools, number, workers, reader)
            process = context.Process(target=_work, args=args, daemon=True)
            process.start()
            self.processes.append(process)

    def stop(self) -> None:
        """End those that still draw."""
        for process in self.processes:
            process.terminate()
            process.join()


def _work(pools: list[Pool], number: int, workers: int, reader: Reader) -> None:
    os.nice(5)  # training goes first
    for pool in pools:
        for chunk in range(number, len(pool.ready), workers):
            pool.fill(chunk, reader)


@dataclass
class Batch:
    """Scenes with questions on the device; `targets` is -100 where no token is asked for."""

    symbols: Tensor  # uint8 [batch, patches, 5]
    present: Tensor  # float32 [batch, PRESENT]
    ids: Tensor  # int64 [batch, slots, SLOT]
    columns: Tensor  # int64 [batch, slots, ANSWER]: where in the slot a token is predicted
    targets: Tensor  # int64 [batch, slots, ANSWER]
    kinds: Tensor  # int64 [batch, slots]
    pixels: Tensor | None  # uint8 [batch, SIZE, SIZE, 3]


def empty_batch(scenes: int, slots: int, device: torch.device) -> Batch:
    """Bare ground and questions of zeros, each answered by token 0."""

    def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.zeros(scenes, *shape, dtype=dtype, device=device)

    bare = zeros(GRID * GRID, 5, dtype=torch.uint8)
    bare[..., 4] = symbols.GROUND
    return Batch(
        symbols=bare,
        present=zeros(symbols.PRESENT, dtype=torch.float32),
        ids=zeros(slots, SLOT),
        columns=zeros(slots, ANSWER),
        targets=zeros(slots, ANSWER),
        kinds=zeros(slots),
        pixels=zeros(SIZE, SIZE, 3, dtype=torch.uint8),
    )


class Resident:
    """A pool's scenes on the device, as far as they are made and brought over."""

    def __init__(self, pool: Pool, device: torch.device) -> None:
        self.pool, self.device, self.chunks = pool, device, 0
        self.tensors = {
            name: torch.empty(array.shape, dtype=torch.from_numpy(array).dtype, device=device)
            for name, array in pool.arrays.items()
        }

    @property
    def scenes(self) -> int:
        """Scenes that can be used."""
        return min(self.chunks * CHUNK, self.pool.plan.scenes)

    def bring(self, seconds: float = 0.3) -> None:
        """Copy finished chunks over, for about this long."""
        began, ready = time.monotonic(), self.pool.chunks_ready
        while self.chunks < ready and time.monotonic() - began < seconds:
            end = min(ready, self.chunks + 6)
            part = slice(self.chunks * CHUNK, end * CHUNK)
            for name, tensor in self.tensors.items():
                tensor[part].copy_(torch.from_numpy(self.pool.arrays[name][part]))
            self.chunks = end

    def wait(self, scenes: int, seconds: float = 120.0,
             alive: Callable[[], bool] = lambda: True) -> None:  # fmt: skip
        """Until that many scenes are there; RuntimeError where they do not come."""
        deadline = time.monotonic() + seconds
        while self.scenes < min(scenes, self.pool.plan.scenes):
            self.bring()
            if time.monotonic() > deadline or not alive():
                raise RuntimeError(f"{self.scenes} scenes of {self.pool.plan.name}, want {scenes}")
            time.sleep(0.01)

    def batch(self, rows: Tensor, slots: int, rng: torch.Generator | None) -> Batch:
        """The scenes `rows` [batch], with `slots` of their questions (random, or the first)."""
        n = len(rows)
        t = {name: tensor[rows] for name, tensor in self.tensors.items() if name != "pixels"}
        if rng is None:
            chosen = torch.arange(slots, device=self.device).expand(n, -1)
        else:
            chosen = torch.rand(n, PER_SCENE, generator=rng, device=self.device).argsort(1)
            chosen = chosen[:, :slots]
        ids = t["ids"].gather(1, chosen[..., None].expand(-1, -1, SLOT)).long()
        first, count, kinds = (t[name].gather(1, chosen).long() for name in
                               ("first", "count", "kind"))  # fmt: skip
        step = torch.arange(ANSWER, device=self.device)
        columns = first[..., None] + step
        targets = ids.gather(2, (columns + 1).clamp(max=SLOT - 1))
        targets = targets.masked_fill(step >= count[..., None], -100)
        pixels = self.tensors["pixels"][rows] if "pixels" in self.tensors else None
        return Batch(t["symbols"], t["present"].float(), ids, columns.clamp(max=SLOT - 1), targets,
                     kinds, pixels)  # fmt: skip


assert GRID * GRID == 576
