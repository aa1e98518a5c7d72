"""Our dense decoder against the same decoder from other exporters, all on one ONNX Runtime.

    python -m benchmarks.peers prepare                      # here: checkpoints and our bundles
    PEERS/bin/python -m benchmarks.peers build genai        # where that peer is installed
    PEERS/bin/python -m benchmarks.peers build mobius mobius-standard mobius-static
    OPTIMUM/bin/python -m benchmarks.peers build optimum
    python -m benchmarks.peers race                         # here: what was built, lap by lap

The decoder is Qwen2-0.5B's with a vocabulary of 8,192 and random weights, fp32: peers get it as
`Qwen2ForCausalLM`, we as the decoder of a LLaVA. Everybody is fed the same tokens; embeddings of
the middle ones stand for visual tokens where a graph of ours wants some. Before anything is timed,
all must give the same logits. A second heat feeds peers the average number of tokens that our
pruned bundle has in its layers: the floor that pruning inside the decoder can reach.

Every graph has a process of its own, and processes take turns. Equal graphs were seen to decode at
speeds 10% apart for as long as they were open, within one process and across several, so all are
opened anew a few times, in another order each time. `again` is our dense bundle a second time: what
it differs by is noise. All together hold some 13 GB.

Peers' pins differ from ours, so they are installed apart:

    PEERS    pip install mobius-onnx==0.1.0 onnxruntime-genai==0.18.0 onnxruntime==1.31.1
    OPTIMUM  pip install "optimum-onnx[onnxruntime]==0.1.0" onnxruntime==1.31.1
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
Array = NDArray[Any]

SHAPE = "0.5b"
VISUAL, TEXT = 576, 64
PREFIX = 5  # of the text tokens, those before the picture
CLOSE = 1e-4  # largest difference of two logits, as a share of the largest logit

PEERS = {
    "genai": "shared",
    "mobius": "shared",
    "mobius-standard": "grown",
    "mobius-static": "static",
    "optimum": "grown",
}
"""Peers, and what their caches do: past and present in one buffer, copied every step, written at
an index into a buffer whose size is part of the graph."""

STATIC = 704  # slots of mobius-static's caches: 640 tokens and an answer


# --- prepare: in our environment ------------------------------------------------------------------


def prepare(work: Path, cr: float) -> None:
    """Write the checkpoint twice, as LLaVA and as a text model, and our two bundles."""
    from benchmarks.shapes import SHAPES, write
    from benchmarks.speed import declining
    from edgeprune.spec import Plan, plan_from_counts

    checkpoint, layers = work / SHAPE, SHAPES[SHAPE].layers
    if not (checkpoint / "config.json").is_file():
        write(SHAPES[SHAPE], checkpoint)
    _write_text(checkpoint, work / "text")
    _export(checkpoint, work / "dense", "none", Plan(VISUAL, layers), 1)
    pruned = plan_from_counts(VISUAL, declining(VISUAL, layers, cr))
    _export(checkpoint, work / f"utp-cr{cr:g}", "utp", pruned, cr)


def _write_text(source: Path, folder: Path) -> None:
    """The decoder of the LLaVA checkpoint as `Qwen2ForCausalLM`: it has no output bias."""
    from safetensors.torch import load_file, save_file

    if (folder / "config.json").is_file():
        return
    stem, weights = "language_model.", {}
    for shard in sorted(source.glob("*.safetensors")):
        for name, tensor in load_file(shard).items():
            if name.startswith(stem) and not name.endswith("o_proj.bias"):
                weights[name.removeprefix(stem)] = tensor.float()
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


def _export(checkpoint: Path, output: Path, method: str, plan: Any, cr: float) -> None:
    from edgeprune.bundle import MANIFEST
    from edgeprune.export.exporter import ExportRequest, export
    from edgeprune.models import open_model
    from edgeprune.models._processor import Processor, random_prompt
    from edgeprune.policies import make
    from edgeprune.spec import PruneSpec

    if (output / MANIFEST).is_file():
        return
    adapter: Any = open_model(str(checkpoint))
    adapter.decoder_config = replace(adapter.decoder_config, output_bias=False)
    spec = PruneSpec(method, cr)
    processor = Processor(adapter)
    prompts = [random_prompt(adapter.pixels, adapter.shape.vocabulary, 0)]
    export(ExportRequest(SHAPE, spec, plan, output), adapter, make(spec), processor, prompts)


# --- build: in a peer's environment ---------------------------------------------------------------


def build(work: Path, peer: str) -> None:
    """Have one peer build its graph below `work`, unless it is there."""
    output = work / peer
    if (output / "model.onnx").is_file():
        return
    draft = work / f".{peer}"
    shutil.rmtree(draft, ignore_errors=True)
    command = _command(peer, work / "text", draft)
    print("$", *command, flush=True)
    subprocess.run(command, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    draft.rename(output)


def _command(peer: str, text: Path, output: Path) -> list[str]:
    tools = Path(sys.executable).parent
    if peer == "genai":
        module = "onnxruntime_genai.models.builder"
        places = ["-i", str(text), "-o", str(output), "-c", f"{output}/cache"]
        # Logits of the last token only, as ours.
        options = ["-p", "fp32", "-e", "cpu", "--extra_options", "prune_lm_head=true"]
        return [sys.executable, "-m", module, *places, *options]
    if peer == "optimum":
        options = ["--task", "text-generation-with-past", "--dtype", "fp32"]
        tool = [str(tools / "optimum-cli"), "export", "onnx"]
        return [*tool, "--model", str(text), *options, str(output)]
    options = {
        "mobius": ["--ep", "cpu"],
        "mobius-standard": ["--ep", "default"],
        "mobius-static": ["--ep", "cpu", "--static-cache", "--max-seq-len", str(STATIC)],
    }[peer]
    tool = [str(tools / "mobius"), "build", "--config", str(text), "--dtype", "f32"]
    return [*tool, *options, str(output)]


# --- race: in our environment ---------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """A prompt [1, N] and the tokens that follow it, the same for everybody."""

    prompt: Ids
    following: Ids

    @property
    def tokens(self) -> int:
        return int(self.prompt.shape[1])


class Runner(Protocol):
    """One graph; `begin` may take its time, `prefill` and `decode` are on the clock."""

    def begin(self, job: Job) -> None: ...
    def prefill(self) -> None: ...
    def decode(self, token: int) -> None: ...
    def logits(self) -> Array:
        """Those of the last token."""
        ...


class Ours:
    """A bundle, run by the backend that `edgeprune run` uses."""

    def __init__(self, bundle: Path, threads: int | None) -> None:
        from safetensors import safe_open

        from edgeprune.bundle import Bundle
        from edgeprune.runtime.ort import OrtBackend

        opened = Bundle.open(bundle, verify=False)
        self.counts = np.array(opened.manifest.prune.counts)
        self.backend = OrtBackend(opened, "cpu", threads)
        with safe_open(bundle.parent / "text" / "model.safetensors", "np") as stored:
            self.embedding = stored.get_tensor("model.embed_tokens.weight")

    def begin(self, job: Job) -> None:
        """As a session is that has answered such a prompt before."""
        self.job, backend = job, self.backend
        # Stands for what the vision graph leaves behind.
        backend._visual = backend._host(self.embedding[job.prompt[:, PREFIX : PREFIX - TEXT]])
        self.lengths, self.position = np.zeros_like(self.counts), 0
        backend.reserve((TEXT + self._kept() + len(job.following)).tolist())

    def prefill(self) -> None:
        prompt, visual = self.job.prompt, self.job.tokens - TEXT
        self._run(prompt[:, :PREFIX], prompt[:, PREFIX - TEXT :], self._kept(), visual)

    def decode(self, token: int) -> None:
        self._run(np.zeros((1, 0), np.int64), np.array([[token]]), np.zeros_like(self.counts), 0)

    def _kept(self) -> Ids:
        """Visual tokens in each layer."""
        kept: Ids = np.minimum(self.counts, self.job.tokens - TEXT)
        return kept

    def _run(self, prefix: Ids, text: Ids, kept: Ids, visual: int) -> None:
        from edgeprune.runtime.backend import Chunk

        words = prefix.shape[1] + text.shape[1]
        after = self.lengths + words + kept
        self.backend.reserve(after.tolist())
        self.backend.run(Chunk(prefix, text, self.position, self.lengths, visual > 0))
        self.lengths, self.position = after, self.position + words + visual

    def logits(self) -> Array:
        found: Array = self.backend.logits().copy()
        return found


class Peer:
    """A peer's graph, each fed as suits it best; what stays the same is bound once."""

    def __init__(self, folder: Path, cache: str, threads: int | None) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
        providers = ["CPUExecutionProvider"]
        self.session = ort.InferenceSession(folder / "model.onnx", options, providers)
        self.value, self.cache = ort.OrtValue, cache
        self.inputs = [put.name for put in self.session.get_inputs()]
        self.pairs = {
            name: _present(name) for name in self.inputs if "key" in name or "value" in name
        }
        rows, vocabulary = self.session.get_outputs()[0].shape[1:]
        self.last_only, self.vocabulary = rows == 1, int(vocabulary)
        config = json.loads((folder.parent / "text" / "config.json").read_text())
        heads = config["num_key_value_heads"]
        size = config["hidden_size"] // config["num_attention_heads"]
        self.cells = (heads * size,) if cache == "static" else (heads, size)

    def begin(self, job: Job) -> None:
        self.job, self.position, self.bound = job, 0, 0
        room = {"shared": job.tokens + len(job.following), "grown": 0, "static": STATIC}[self.cache]
        shape = (1, *self.cells[:-1], room, self.cells[-1])
        self.caches = {name: self._host(np.zeros(shape, np.float32)) for name in self.pairs}

    def prefill(self) -> None:
        self._run(self.job.prompt)

    def decode(self, token: int) -> None:
        self._run(np.array([[token]]))

    def logits(self) -> Array:
        found: Array = self.out.numpy()[0, -1].copy()
        return found

    def _run(self, ids: Ids) -> None:
        total = self.position + ids.shape[1]
        if self.bound != ids.shape[1] or self.cache == "grown":
            self._bind(ids.shape[1])
        self._put("input_ids", ids)
        self._put("attention_mask", np.ones((1, total), np.int64))
        self._put("position_ids", np.arange(self.position, total)[None])
        self._put("write_indices", np.array([self.position]))
        self._put("nonpad_kv_seqlen", np.array([total]))
        self.session.run_with_iobinding(self.binding)
        self.position = total
        if self.cache == "grown":
            self.caches = dict(zip(self.pairs, self.binding.get_outputs()[1:], strict=True))

    def _bind(self, count: int) -> None:
        """Bind logits and caches for calls of `count` tokens."""
        self.bound, self.binding = count, self.session.io_binding()
        rows = 1 if self.last_only else count
        self.out = self._host(np.zeros((1, rows, self.vocabulary), np.float32))
        self.binding.bind_ortvalue_output("logits", self.out)
        for name, present in self.pairs.items():
            self.binding.bind_ortvalue_input(name, self.caches[name])
            if self.cache == "grown":
                self.binding.bind_output(present, "cpu")
            else:
                self.binding.bind_ortvalue_output(present, self.caches[name])

    def _put(self, name: str, array: Array) -> None:
        if name in self.inputs:
            self.binding.bind_ortvalue_input(name, self._host(array))

    def _host(self, array: Array) -> Any:
        return self.value.ortvalue_from_numpy(np.ascontiguousarray(array))


def _present(past: str) -> str:
    """past_key_values.3.key -> present.3.key; key_cache.3 -> updated_key_cache.3."""
    if past.startswith("past_key_values"):
        return past.replace("past_key_values", "present")
    return f"updated_{past}"


@dataclass(frozen=True)
class Lap:
    """Seconds of a prefill and per decoded token, and the logits of every call."""

    prefill: float
    decode: float
    logits: tuple[Array, ...]


def lap(runner: Runner, job: Job) -> Lap:
    clock = time.perf_counter
    runner.begin(job)
    begun = clock()
    runner.prefill()
    prefill, decode = clock() - begun, 0.0
    found = [runner.logits()]
    for token in job.following:
        begun = clock()
        runner.decode(int(token))
        decode += clock() - begun
        found.append(runner.logits())
    return Lap(prefill, decode / len(job.following), tuple(found))


class Lane:
    """A process that holds one graph and runs a lap when told to; opened as often as one likes."""

    def __init__(self, folder: Path, cache: str | None, threads: int | None) -> None:
        self.arguments = (folder, cache, threads)

    def open(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        arguments = (theirs, *self.arguments)
        self.process = context.Process(target=_serve, args=arguments, daemon=True)
        self.process.start()
        theirs.close()
        self.pipe.recv()  # loaded

    def close(self) -> None:
        self.pipe.close()
        self.process.join()

    def lap(self, job: Job) -> Lap:
        self.pipe.send(job)
        found: Lap = self.pipe.recv()
        return found


def _serve(pipe: Connection, folder: Path, cache: str | None, threads: int | None) -> None:
    runner: Runner = Peer(folder, cache, threads) if cache else Ours(folder, threads)
    pipe.send(None)
    while True:
        try:
            asked = pipe.recv()
        except EOFError:  # the race is over
            return
        pipe.send(lap(runner, asked))


@dataclass
class Entry:
    """A lane with a job, and what its laps took."""

    name: str
    lane: Lane
    job: Job
    peer: bool = False
    pruned: bool = False  # its logits are its own
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    difference: float = 0.0

    def run(self) -> None:
        found = self.lane.lap(self.job)
        self.prefill.append(found.prefill)
        self.decode.append(found.decode)


def check(heat: Sequence[Entry]) -> None:
    """A lap of each that does not count; all that run the whole decoder must answer the same."""
    laps = [(entry, entry.lane.lap(entry.job)) for entry in heat]
    whole = [(entry, found.logits) for entry, found in laps if not entry.pruned]
    for entry, logits in whole:
        pairs = zip(whole[0][1], logits, strict=True)
        entry.difference = max(float(abs(a - b).max() / abs(a).max()) for a, b in pairs)
        if not entry.difference < CLOSE:
            sys.exit(f"{entry.name} differs by {entry.difference:.1e}: that is no race")


def heats(work: Path, names: Sequence[str], request: argparse.Namespace) -> list[list[Entry]]:
    """Everybody on the full prompt; ours pruned against everybody on the average one."""
    vocabulary = json.loads((work / "text" / "config.json").read_text())["vocab_size"]
    rng = np.random.default_rng(0)
    ids = rng.integers(3, vocabulary, (1, TEXT + VISUAL))
    following = rng.integers(3, vocabulary, request.new_tokens)
    average = TEXT + round(VISUAL / request.cr)
    full, short = Job(ids, following), Job(ids[:, :average], following)
    threads = request.threads
    dense, again = (Lane(work / "dense", None, threads) for _ in range(2))
    peers = {name: Lane(work / name, PEERS[name], threads) for name in names}
    found = []
    for job in (full, short):
        entries = [Entry("edgeprune none", dense, job), Entry("again", again, job)]
        found.append([*entries, *(Entry(n, lane, job, peer=True) for n, lane in peers.items())])
    if not request.pruned:
        return found[:1]
    lane = Lane(work / f"utp-cr{request.cr:g}", None, threads)
    found[1].insert(0, Entry(f"edgeprune utp CR {request.cr:g}", lane, full, pruned=True))
    return found


def race(work: Path, request: argparse.Namespace) -> None:
    """Time everything that was built, in turn; tables, and one line of JSON last."""
    import onnxruntime as ort

    names = [n for n in request.peers or PEERS if (work / n / "model.onnx").is_file()]
    if not names:
        sys.exit(f"there is no peer's model below {work}: build one first")
    lines = heats(work, names, request)
    entries = [entry for heat in lines for entry in heat]
    order = np.random.default_rng(0)  # nobody is always opened first or runs after the same one
    for opening in range(request.opens):
        _open(list({entry.lane for entry in entries}), lines, order)
        for number in range(request.laps):
            for turn in order.permutation(len(entries)):
                entries[turn].run()
            done = opening * request.laps + number + 1
            print(f"lap {done} of {request.opens * request.laps}", file=sys.stderr, flush=True)
        for lane in {entry.lane for entry in entries}:
            lane.close()
    for heat in lines:
        print(_table(heat), end="\n\n")
    print(
        json.dumps(
            {
                "shape": SHAPE,
                "opens": request.opens,
                "laps": request.laps,
                "new_tokens": request.new_tokens,
                "threads": request.threads,
                "onnxruntime": ort.__version__,
                "processor": f"{_processor()}, {os.cpu_count()} threads",
                "heats": [[_row(entry, heat[0]) for entry in heat] for heat in lines],
            }
        )
    )


def _open(lanes: list[Lane], lines: list[list[Entry]], order: np.random.Generator) -> None:
    """A process for each lane, and its first lap."""
    lanes.sort(key=lambda lane: str(lane.arguments))  # sets have no order, `again` is its equal
    for turn in order.permutation(len(lanes)):
        lanes[turn].open()
    for heat in lines:
        check(heat)


def _row(entry: Entry, first: Entry) -> dict[str, Any]:
    return {
        "name": entry.name,
        "tokens": entry.job.tokens,
        "prefill_ms": [round(1e3 * s, 2) for s in entry.prefill],
        "decode_ms": [round(1e3 * s, 3) for s in entry.decode],
        "ours_over_it_prefill": round(_quantile(_ratios(first.prefill, entry.prefill), 0.5), 4),
        "ours_over_it_decode": round(_quantile(_ratios(first.decode, entry.decode), 0.5), 4),
        "logit_difference": None if entry.pruned else entry.difference,
    }


def _table(heat: Sequence[Entry]) -> str:
    """Medians and p10-p90; ratios of the first row to the others, taken lap by lap."""
    first = heat[0]
    lines = [["", "tokens", "prefill ms", "first / it", "decode ms", "first / it", "logits"]]
    for entry in heat:
        lines.append(
            [
                entry.name,
                str(entry.job.tokens),
                _spread([1e3 * s for s in entry.prefill], "{:.1f}"),
                _spread(_ratios(first.prefill, entry.prefill), "{:.3f}"),
                _spread([1e3 * s for s in entry.decode], "{:.2f}"),
                _spread(_ratios(first.decode, entry.decode), "{:.3f}"),
                "pruned" if entry.pruned else f"{entry.difference:.0e}",
            ]
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    table = ["  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) for line in lines]
    return "\n".join([*table, _verdict(heat, "prefill"), _verdict(heat, "decode")])


def _verdict(heat: Sequence[Entry], phase: str) -> str:
    seconds: dict[str, list[float]] = {entry.name: getattr(entry, phase) for entry in heat}
    peers = [entry.name for entry in heat if entry.peer]
    best = min(peers, key=lambda name: _quantile(seconds[name], 0.5))
    ratio = _quantile(_ratios(seconds[heat[0].name], seconds[best]), 0.5)
    return f"{phase}: {heat[0].name} takes {ratio:.3f} of the best peer's time ({best})"


def _ratios(first: Sequence[float], other: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(first, other, strict=True)]


def _quantile(numbers: Sequence[float], at: float) -> float:
    return float(np.quantile(numbers, at))


def _spread(numbers: Sequence[float], form: str) -> str:
    low, middle, high = (form.format(_quantile(numbers, at)) for at in (0.1, 0.5, 0.9))
    return f"{middle} ({low}-{high})"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description="Race our dense decoder against other exporters'.")
    steps = parser.add_subparsers(dest="step", required=True)
    for name in ("prepare", "build", "race"):
        step = steps.add_parser(name)
        step.add_argument("--work", type=Path, default=Path("out/peers"))
        if name != "build":
            step.add_argument("--cr", type=float, default=4)
        if name == "build":
            step.add_argument("peers", nargs="+", choices=PEERS)
        if name == "race":
            step.add_argument("--peers", nargs="+", choices=PEERS, help="all that were built")
            step.add_argument("--opens", type=int, default=4, help="times that all are opened anew")
            step.add_argument("--laps", type=int, default=3, help="each time")
            step.add_argument("--new-tokens", type=int, default=16)
            step.add_argument("--threads", type=int)
            step.add_argument("--no-pruned", dest="pruned", action="store_false")
    args = parser.parse_args()
    if args.step == "prepare":
        prepare(args.work, args.cr)
    elif args.step == "build":
        for peer in args.peers:
            build(args.work, peer)
    else:
        race(args.work, args)


if __name__ == "__main__":
    main()
