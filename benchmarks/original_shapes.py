"""Checkpoints of the published sizes in layouts of authors' own code: InternVL2-8B, CogVLM-chat,
Qwen-VL-Chat.

    python -m benchmarks.published internvl2-8b checkpoints/internvl2-8b

Weights are zeros or random. Tokenizers are made up, of as many tokens as the published ones have.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from benchmarks.qwen_shapes import Sizes, linear, norm
from benchmarks.shapes import write_random, write_sparse
from edgeprune.demo import MODEL_DIR
from edgeprune.models import Adapter, open_model


@dataclass(frozen=True)
class Original:
    """One model: its config.json, its tensors, and what writes its small files."""

    config: dict[str, Any]
    tensors: Callable[[], Sizes]
    texts: Callable[[Path], None]

    def write(self, folder: Path, *, sparse: bool = True) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config, indent=1))
        self.texts(folder)
        if sparse:
            write_sparse(dict(self.tensors()), folder)
        else:
            write_random(dict(self.tensors()), folder, seed=0)
        return folder

    def open(self, folder: Path) -> Adapter:
        return open_model(str(folder))


def _internvl2_8b() -> Original:
    text = {
        "model_type": "internlm2",
        "bias": False,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_scaling": {"factor": 2.0, "type": "dynamic"},
        "rope_theta": 1000000,
        "tie_word_embeddings": False,
        "vocab_size": 92553,
    }
    vision = {
        "hidden_act": "gelu",
        "hidden_size": 1024,
        "image_size": 448,
        "intermediate_size": 4096,
        "layer_norm_eps": 1e-6,
        "norm_type": "layer_norm",
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "qk_normalization": False,
        "qkv_bias": True,
    }
    config = {
        "model_type": "internvl_chat",
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": 448,
        "llm_config": text,
        "max_dynamic_patch": 12,
        "ps_version": "v2",
        "select_layer": -1,
        "template": "internlm2-chat",
        "use_thumbnail": True,
        "vision_config": vision,
    }

    def tensors() -> Sizes:
        for layer in range(32):
            at = f"language_model.model.layers.{layer}."
            yield f"{at}attention.wqkv.weight", (6144, 4096)
            yield f"{at}attention.wo.weight", (4096, 4096)
            yield f"{at}feed_forward.w1.weight", (14336, 4096)
            yield f"{at}feed_forward.w3.weight", (14336, 4096)
            yield f"{at}feed_forward.w2.weight", (4096, 14336)
            yield f"{at}attention_norm.weight", (4096,)
            yield f"{at}ffn_norm.weight", (4096,)
        yield "language_model.model.norm.weight", (4096,)
        yield "language_model.model.tok_embeddings.weight", (92553, 4096)
        yield "language_model.output.weight", (92553, 4096)
        yield from norm("mlp1.0", 4096, bias=True)
        yield from linear("mlp1.1", 4096, 4096)
        yield from linear("mlp1.3", 4096, 4096)
        tower = "vision_model."
        yield f"{tower}embeddings.class_embedding", (1, 1, 1024)
        yield f"{tower}embeddings.position_embedding", (1, 1025, 1024)
        yield f"{tower}embeddings.patch_embedding.weight", (1024, 3, 14, 14)
        yield f"{tower}embeddings.patch_embedding.bias", (1024,)
        for block in range(24):
            at = f"{tower}encoder.layers.{block}."
            yield from linear(f"{at}attn.qkv", 3072, 1024)
            yield from linear(f"{at}attn.proj", 1024, 1024)
            yield from linear(f"{at}mlp.fc1", 4096, 1024)
            yield from linear(f"{at}mlp.fc2", 1024, 4096)
            for name in ("norm1", "norm2"):
                yield from norm(at + name, 1024, bias=True)
            for name in ("ls1", "ls2"):
                yield at + name, (1024,)

    tokens = ("<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>")
    return Original(config, tensors, lambda folder: _padded(folder, tokens))


def _cogvlm() -> Original:
    vision = {
        "hidden_act": "gelu",
        "hidden_size": 1792,
        "image_size": 490,
        "in_channels": 3,
        "intermediate_size": 15360,
        "layer_norm_eps": 1e-6,
        "num_heads": 16,
        "num_hidden_layers": 63,
        "num_positions": 1226,
        "patch_size": 14,
    }
    config = {
        "architectures": ["CogVLMForCausalLM"],
        "eos_token_id": 2,
        "pad_token_id": 0,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "max_position_embeddings": 2048,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "rms_norm_eps": 1e-5,
        "template_version": "chat",
        "vocab_size": 32000,
        "vision_config": vision,
    }

    def tensors() -> Sizes:
        yield "lm_head.weight", (32000, 4096)
        yield "model.embed_tokens.weight", (32000, 4096)
        yield "model.norm.weight", (4096,)
        for layer in range(32):
            at = f"model.layers.{layer}."
            for expert in ("language", "vision"):
                yield f"{at}self_attn.{expert}_expert_query_key_value.weight", (12288, 4096)
                yield f"{at}self_attn.{expert}_expert_dense.weight", (4096, 4096)
                for name in ("gate", "up"):
                    yield f"{at}mlp.{expert}_mlp.{name}_proj.weight", (11008, 4096)
                yield f"{at}mlp.{expert}_mlp.down_proj.weight", (4096, 11008)
            for name in ("input_layernorm", "post_attention_layernorm"):
                yield f"{at}{name}.weight", (4096,)
        tower = "model.vision."
        yield f"{tower}boi", (1, 1, 4096)
        yield f"{tower}eoi", (1, 1, 4096)
        yield f"{tower}linear_proj.linear_proj.weight", (4096, 1792)
        yield from norm(f"{tower}linear_proj.norm1", 4096, bias=True)
        yield f"{tower}linear_proj.gate_proj.weight", (11008, 4096)
        yield f"{tower}linear_proj.dense_h_to_4h.weight", (11008, 4096)
        yield f"{tower}linear_proj.dense_4h_to_h.weight", (4096, 11008)
        yield f"{tower}patch_embedding.cls_embedding", (1, 1792)
        yield f"{tower}patch_embedding.position_embedding.weight", (1226, 1792)
        yield f"{tower}patch_embedding.proj.weight", (1792, 3, 14, 14)
        yield f"{tower}patch_embedding.proj.bias", (1792,)
        for block in range(63):
            at = f"{tower}transformer.layers.{block}."
            yield from linear(f"{at}attention.query_key_value", 5376, 1792)
            yield from linear(f"{at}attention.dense", 1792, 1792)
            yield from linear(f"{at}mlp.fc1", 15360, 1792)
            yield from linear(f"{at}mlp.fc2", 1792, 15360)
            for name in ("input_layernorm", "post_attention_layernorm"):
                yield from norm(at + name, 1792, bias=True)

    return Original(config, tensors, lambda folder: _padded(folder, (), 32000))


def _qwen_vl() -> Original:
    vision = {
        "heads": 16,
        "image_size": 448,
        "image_start_id": 151857,
        "layers": 48,
        "mlp_ratio": 4.9231,
        "output_dim": 4096,
        "patch_size": 14,
        "width": 1664,
    }
    config = {
        "model_type": "qwen",
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "kv_channels": 128,
        "layer_norm_epsilon": 1e-6,
        "max_position_embeddings": 8192,
        "no_bias": True,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "rotary_emb_base": 10000,
        "rotary_pct": 1.0,
        "seq_length": 2048,
        "vocab_size": 151936,
        "visual": vision,
    }

    def tensors() -> Sizes:
        yield "lm_head.weight", (151936, 4096)
        yield "transformer.wte.weight", (151936, 4096)
        yield "transformer.ln_f.weight", (4096,)
        for layer in range(32):
            at = f"transformer.h.{layer}."
            yield from linear(f"{at}attn.c_attn", 12288, 4096)
            yield f"{at}attn.c_proj.weight", (4096, 4096)
            for name in ("w1", "w2"):
                yield f"{at}mlp.{name}.weight", (11008, 4096)
            yield f"{at}mlp.c_proj.weight", (4096, 11008)
            for name in ("ln_1", "ln_2"):
                yield f"{at}{name}.weight", (4096,)
        tower = "transformer.visual."
        yield f"{tower}conv1.weight", (1664, 3, 14, 14)
        yield f"{tower}positional_embedding", (256, 1664)
        yield f"{tower}proj", (4096, 4096)
        for name, width in (("ln_pre", 1664), ("ln_post", 4096)):
            yield from norm(tower + name, width, bias=True)
        for block in range(48):
            at = f"{tower}transformer.resblocks.{block}."
            yield from linear(f"{at}attn.in_proj", 4992, 1664)
            yield from linear(f"{at}attn.out_proj", 1664, 1664)
            yield from linear(f"{at}mlp.c_fc", 8192, 1664)
            yield from linear(f"{at}mlp.c_proj", 1664, 8192)
            for name in ("ln_1", "ln_2"):
                yield from norm(at + name, 1664, bias=True)
        pool = f"{tower}attn_pool."
        yield f"{pool}query", (256, 4096)
        yield f"{pool}pos_embed", (256, 4096)
        yield f"{pool}kv_proj.weight", (4096, 1664)
        yield f"{pool}attn.in_proj_weight", (12288, 4096)
        yield f"{pool}attn.in_proj_bias", (12288,)
        yield from linear(f"{pool}attn.out_proj", 4096, 4096)
        for name in ("ln_q", "ln_kv"):
            yield from norm(pool + name, 4096, bias=True)

    return Original(config, tensors, _ranks)


def _padded(folder: Path, tokens: tuple[str, ...], total: int = 0) -> None:
    """The demo's tokenizer with more tokens, up to a total."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)}) if tokens else None
    tokenizer.add_tokens([f"unused{n}" for n in range(total - len(tokenizer))])
    tokenizer.save_pretrained(folder)


def _ranks(folder: Path) -> None:
    """151,643 made-up ranks: bytes, and pairs and threes of them."""
    parts = (bytes(part) for size in (1, 2, 3) for part in product(range(256), repeat=size))
    lines = (
        base64.b64encode(token) + b" %d\n" % rank
        for rank, token in enumerate(islice(parts, 151643))
    )
    (folder / "qwen.tiktoken").write_bytes(b"".join(lines))
    settings = {"chat_format": "chatml", "eos_token_id": 151643}
    (folder / "generation_config.json").write_text(json.dumps(settings))


ORIGINALS = {
    "internvl2-8b": _internvl2_8b(),
    "cogvlm-17b": _cogvlm(),
    "qwen-vl-7b": _qwen_vl(),
}
