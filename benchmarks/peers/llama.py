"""llama.cpp on the same decoder: its file, written where `gguf` is, and a process that runs it.

Nothing here imports what only our environment has.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.job import Array, Job
from benchmarks.peers.rounds import serve

MODEL, PYTHON = "model.gguf", "python.txt"
CONTEXT = 1024  # tokens: 640 and an answer

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""Modules of Qwen2ForCausalLM, those of a layer without its number, and llama.cpp's names."""


def write_q4_0(text: Path, output: Path) -> None:
    """A text checkpoint as GGUF: matrices in Q4_0, head and embedding too, vectors in float32."""
    import gguf
    from safetensors.numpy import load_file

    config = json.loads((text / "config.json").read_text())
    writer = gguf.GGUFWriter(output / MODEL, "qwen2")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    four = gguf.GGMLQuantizationType.Q4_0
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    for name, tensor in load_file(text / "model.safetensors").items():
        wide = tensor.astype(np.float32)
        if wide.ndim == 2:
            writer.add_tensor(_named(name), gguf.quants.quantize(wide, four), raw_dtype=four)
        else:
            writer.add_tensor(_named(name), wide)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _named(name: str) -> str:
    """model.layers.3.mlp.up_proj.weight -> blk.3.ffn_up.weight."""
    module, _, leaf = name.rpartition(".")
    if module in NAMES:
        return f"{NAMES[module]}.{leaf}"
    number, _, part = module.removeprefix("model.layers.").partition(".")
    return f"blk.{number}.{NAMES[part]}.{leaf}"


class Llama:
    """A GGUF file in llama.cpp, by its C interface; its cache holds float16."""

    def __init__(self, folder: Path, threads: int) -> None:
        import llama_cpp

        self.api: Any = llama_cpp
        self._quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        path = os.fsencode(folder / MODEL)
        model = llama_cpp.llama_model_load_from_file(path, llama_cpp.llama_model_default_params())
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = CONTEXT
        settings.n_threads = settings.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(model, settings)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))

    def begin(self, job: Job) -> None:
        self.job = job
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)

    def prefill(self) -> None:
        self._run(self.job.prompt[0].tolist())

    def decode(self, token: int) -> None:
        self._run([token])

    def logits(self) -> Array:
        found = self.api.llama_get_logits_ith(self.context, -1)
        return np.ctypeslib.as_array(found, (self.vocabulary,)).astype(np.float32)

    def _run(self, ids: list[int]) -> None:
        tokens = (self.api.llama_token * len(ids))(*ids)
        batch = self.api.llama_batch_get_one(tokens, len(ids))
        if code := self.api.llama_decode(self.context, batch):
            raise SystemExit(f"llama_decode of {len(ids)} tokens ended with {code}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Time rounds for the process that started this.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("threads", type=int)
    parser.add_argument("pipe", type=int, help="an open file descriptor")
    args = parser.parse_args()
    serve(Connection(args.pipe), Llama(args.folder, args.threads))


if __name__ == "__main__":
    main()
