"""Checkpoints in the layouts of authors' own code, with their small files."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from edgeprune.protobuf import block, integer
from tests.families import Family

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
CONTROL, BYTE, UNKNOWN, NORMAL = 3, 6, 2, 1


def sentencepiece(
    file: Path, pieces: Sequence[str], unused: int = 0, *, squeeze: bool = False
) -> None:
    """A BPE vocabulary as SentencePiece writes it: three control tokens, bytes, then `pieces`, the
    best first, and `unused` ones that no text has."""
    parts = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL)]
    parts += [(text, 0.0, BYTE) for text in BYTES]
    parts += [(text, -float(rank), NORMAL) for rank, text in enumerate(pieces)]
    parts += [(f"[UNUSED_TOKEN_{n}]", -1e9, NORMAL) for n in range(unused)]
    message = b"".join(
        block(1, block(1, text.encode()) + b"\x15" + struct.pack("<f", score) + integer(3, kind))
        for text, score, kind in parts
    )
    message += block(2, integer(3, 2) + integer(35, 1))
    message += block(3, block(1, b"identity") + integer(3, 1) + integer(4, int(squeeze)))
    file.write_bytes(message)


PIECES = ["\u2581w", "ha", "\u2581wha", "\u2581what", "at", "\u2581c", "ol", "or", "\u2581col"]
PIECES += ["\u2581color", *"\u2581whatcolor is?\n"]
PIECES = list(dict.fromkeys(PIECES))
SPECIALS = ["<|im_end|>", "<|im_start|>", "<img>", "</img>", "<IMG_CONTEXT>"]
"""The first two lie on pieces of the vocabulary."""


def internlm_tokenizer(folder: Path) -> int:
    """The tokenizer of an InternVL with InternLM2; how many tokens it has."""
    first = 3 + 256 + len(PIECES)
    sentencepiece(folder / "tokenizer.model", PIECES, unused=2)
    added = {
        str(number): {"content": token, "special": True}
        for number, token in enumerate(SPECIALS, start=first)
    }
    settings = {
        "tokenizer_class": "InternLM2Tokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]},
        "added_tokens_decoder": added,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return first + len(SPECIALS)


_TOWER = {
    r"cls_token": "class_embedding",
    r"patch_embeddings\.projection": "patch_embedding",
    r"position_embeddings": "position_embedding",
    r"encoder\.layer\.": "encoder.layers.",
    r"attention\.projection_layer": "attn.proj",
    r"attention\.([qk])_norm": r"attn.\1_norm",
    r"lambda_": "ls",
    r"layernorm_before": "norm1",
    r"layernorm_after": "norm2",
}
_PROJECTOR = {"layer_norm": "0", "linear_1": "1", "linear_2": "3"}
_INTERNLM2 = {
    "embed_tokens": "tok_embeddings",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}


def internvl_chat(family: Family, folder: Path, template: str, **config: Any) -> Path:
    """The model of an `internvl` family as the authors store it; a LLaMA decoder as InternLM2."""
    folder.mkdir(parents=True, exist_ok=True)
    model, kind = family.model, family.model.config.text_config.model_type
    internlm2 = kind == "llama"
    tensors = dict[str, Tensor]()
    for name, tensor in model.state_dict().items():
        tensors[_theirs(name, internlm2=internlm2)] = tensor.clone()
    _pack(tensors, r"(.*\.)attention\.q_proj(.*)", "attention.{}_proj", "attn.qkv", torch.cat)
    if internlm2:
        heads = model.config.text_config.num_key_value_heads
        _pack(
            tensors,
            r"(language_model.*\.)self_attn\.q_proj(.*)",
            "self_attn.{}_proj",
            "attention.wqkv",
            lambda parts: torch.cat([p.unflatten(0, (heads, -1)) for p in parts], 1).flatten(0, 1),
        )
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors")
    given = _config(model.config, template, internlm2=internlm2)
    (folder / "config.json").write_text(json.dumps(given | config))
    return folder


def _theirs(name: str, *, internlm2: bool) -> str:
    name = name.removeprefix("model.")
    if name.startswith("lm_head"):
        return name.replace("lm_head", "language_model." + ("output" if internlm2 else "lm_head"))
    owner, _, rest = name.partition(".")
    table = {
        "vision_tower": _TOWER,
        "multi_modal_projector": _PROJECTOR,
        "language_model": _INTERNLM2 if internlm2 else {},
    }[owner]
    for ours, theirs in table.items():
        rest = re.sub(ours, theirs, rest)
    prefixes = {"vision_tower": "vision_model.", "multi_modal_projector": "mlp1."}
    return prefixes.get(owner, "language_model.model.") + rest


def _pack(
    tensors: dict[str, Tensor],
    query: str,
    old: str,
    new: str,
    join: Callable[[list[Tensor]], Tensor],
) -> None:
    """Put the tensors of queries, keys and values into one."""
    for name in [name for name in tensors if re.fullmatch(query, name)]:
        parts = [tensors.pop(name.replace(old.format("q"), old.format(part))) for part in "qkv"]
        tensors[name.replace(old.format("q"), new)] = join(parts)


def _config(config: Any, template: str, *, internlm2: bool) -> dict[str, Any]:
    vision, text = config.vision_config, config.text_config.to_dict()
    if internlm2:
        rope = {"rope_theta": text.pop("rope_parameters")["rope_theta"]}
        scaling = {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "bias": False}
        text |= {"model_type": "internlm2", **rope, **scaling}
    return {
        "model_type": "internvl_chat",
        "architectures": ["InternVLChatModel"],
        "auto_map": {"AutoConfig": "configuration_internvl_chat.InternVLChatConfig"},
        "downsample_ratio": config.downsample_ratio,
        "dynamic_image_size": True,
        "force_image_size": vision.image_size[0],
        "max_dynamic_patch": 12,
        "ps_version": "v2",
        "select_layer": -1,
        "template": template,
        "use_thumbnail": True,
        "llm_config": text,
        "vision_config": {
            "model_type": "intern_vit_6b",
            "hidden_act": vision.hidden_act,
            "hidden_size": vision.hidden_size,
            "image_size": vision.image_size[0],
            "intermediate_size": vision.intermediate_size,
            "layer_norm_eps": vision.layer_norm_eps,
            "norm_type": vision.norm_type,
            "num_attention_heads": vision.num_attention_heads,
            "num_hidden_layers": vision.num_hidden_layers,
            "patch_size": vision.patch_size[0],
            "qk_normalization": vision.use_qk_norm,
            "qkv_bias": vision.attention_bias,
        },
    }
