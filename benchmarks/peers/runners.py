"""One graph each, ours or a peer's, fed in the way that suits it best."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from safetensors import safe_open

from benchmarks.peers.job import PREFIX, STATIC, TEXT, Array, Ids, Job
from edgeprune.bundle import Bundle
from edgeprune.runtime.backend import DecoderInputs, EncodedImage
from edgeprune.runtime.backends._ort import OrtBackend


class Ours:
    """A bundle, run by the backend that `edgeprune run` uses."""

    def __init__(self, bundle: Path, threads: int | None) -> None:
        opened = Bundle.open(bundle, verify=False)
        self.counts = np.array(opened.manifest.prune.counts)
        self.backend = OrtBackend(opened, "cpu", threads)
        self.caches = self.backend.caches()
        with safe_open(bundle.parent / "text" / "model.safetensors", "np") as stored:
            self.embedding = stored.get_tensor("model.embed_tokens.weight")

    def begin(self, job: Job) -> None:
        """As a session is that has answered such a prompt before."""
        self.job, backend = job, self.backend
        # Stands for what the vision graph leaves behind.
        visual = backend._host(self.embedding[job.prompt[:, PREFIX : PREFIX - TEXT]])
        self.image = EncodedImage(visual, None, np.arange(job.tokens - TEXT))
        self.lengths, self.position = np.zeros_like(self.counts), 0
        self.caches.reserve(self.lengths, TEXT + self._kept() + len(job.following))

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
        words = prefix.shape[1] + text.shape[1]
        after = self.lengths + words + kept
        image = self.image if visual else None
        inputs = DecoderInputs(prefix, text, image, self.position, self.lengths, after)
        self.found = self.backend.run(inputs, self.caches).logits
        self.lengths, self.position = after, self.position + words + visual

    def logits(self) -> Array:
        assert self.found is not None  # every call asks for them
        return self.found


class Peer:
    """A peer's graph, each fed as suits it best; what stays the same is bound once."""

    def __init__(self, folder: Path, cache: str, threads: int | None) -> None:
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
