"""Checkpoints' tokenizers and chat templates, small, and what transformers makes of them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from PIL import Image
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import (
    AutoConfig,
    AutoProcessor,
    LlamaTokenizer,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from edgeprune.export import prompts
from edgeprune.export.generation import generation, read_generation
from edgeprune.manifest import TextRecord
from edgeprune.runtime.text import Prompter
from edgeprune.spec import ModelShape

DEMO = Path(__file__).parents[1] / "edgeprune" / "demo" / "model"
SHAPE = ModelShape(
    family="llava",
    visual_tokens=4,
    grid=(2, 2),
    layers=2,
    width=8,
    mlp_width=8,
    attention_heads=1,
    kv_heads=1,
    head_size=8,
    vocabulary=1000,
    max_positions=512,
    has_cls=True,
)
SHOWN = Image.new("RGB", (28, 28))
CORPUS = [
    "USER: ASSISTANT: what color is the star in this image? It is red, below the green heart.",
    "how many blue circles are there? There are 3 of them; isn't it? user assistant system",
    "Where is the white square left of the yellow digit 7 ? You are a helpful assistant.",
] * 3

MARKS = ["<ref>", "</ref>", "<|box_start|>"]
"""Special tokens that are none of media nor of chats: a user may type them."""

LLAVA = (  # the template of llava-hf/llava-1.5-7b-hf
    "{% for message in messages %}{% if message['role'] != 'system' %}"
    "{{ message['role'].upper() + ': '}}{% endif %}{# Render all images first #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}{# Render all text next #}"
    "{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' '}}{% endfor %}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
MISTRAL = (  # as llava-v1.6-mistral, with the control tokens in the template
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "[INST] {% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %} [/INST]{% else %}"
    " {{ message['content'][0]['text'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
CHATML = (  # as Qwen2-VL, with its own system text
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DATED = CHATML.replace(
    "You are a helpful assistant.", "Today is {{ strftime_now('%d %B %Y') }}."
).replace("<|im_start|>system\n", "<|im_start|>system\n{%- set now = strftime_now('%Y') %}", 1)
STRINGS = (  # contents are strings only
    "{% for m in messages %}{{ '### ' + m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}### assistant:{% endif %}"
)


def trained(pre_tokenizer: Any, **options: Any) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a small BPE."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    trainer = trainers.BpeTrainer(vocab_size=500, show_progress=False, **options)
    tokenizer.train_from_iterator(CORPUS, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


@cache
def llama_pieces() -> tuple[dict[str, int], list[tuple[str, str]]]:
    start = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary, merges = trained(pre_tokenizers.Metaspace())
    names = [*start, *sorted(vocabulary, key=vocabulary.__getitem__)]
    return {name: number for number, name in enumerate(names)}, merges


def wrapped(tokenizer: Tokenizer, **names: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def llama(*, legacy: bool, scheme: str = "always") -> PreTrainedTokenizerFast:
    """LLaMA's tokenizer: `legacy` marks the start in the normalizer, else Metaspace does."""
    vocabulary, merges = llama_pieces()
    model = models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    if legacy:
        marks = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        tokenizer.normalizer = normalizers.Sequence(marks)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", scheme, split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>", "<image>", "<pad>", *MARKS])
    tokenizer.add_tokens(["<point>"])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return wrapped(tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def transformers_llama() -> LlamaTokenizer:
    vocabulary, merges = llama_pieces()
    tokenizer = LlamaTokenizer(vocab=vocabulary, merges=merges)
    names = "<image>", *MARKS
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    tokenizer.add_tokens(["<point>"])
    return tokenizer


QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(*, regex: str | None = None) -> PreTrainedTokenizerFast:
    """GPT-2's tokenizer or, with its expression, Qwen's; no bos."""
    parts: Any = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex is None)
    if regex:
        split = pre_tokenizers.Split(Regex(regex), "isolated")
        parts = pre_tokenizers.Sequence([split, parts])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    vocabulary, merges = trained(parts, initial_alphabet=alphabet)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = parts, decoders.ByteLevel()
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|image_pad|>", "<image>"]
    tokenizer.add_special_tokens([*names, "<|vision_start|>", "<|vision_end|>"])
    tokenizer.add_special_tokens(MARKS)
    tokenizer.add_tokens(["<tool_call>", "<point>", "  "])
    return wrapped(tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def unigram() -> PreTrainedTokenizerFast:
    """A sentencepiece tokenizer that has unknown characters."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    names = ["<unk>", "</s>", "<image>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=120, unk_token="<unk>", special_tokens=names, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return wrapped(tokenizer, unk_token="<unk>", eos_token="</s>")


@dataclass(frozen=True)
class Case:
    """A checkpoint's text side, and our own reading of it."""

    processor: Any
    record: TextRecord
    prompter: Prompter
    file: Path

    def reference(self, turns: list[tuple[str, str]], system: str | None = None) -> list[int]:
        """transformers' ids of a conversation whose first turn shows the image."""
        parts: list[list[dict[str, Any]]] = [[{"type": "text", "text": text}] for _, text in turns]
        parts[0].insert(0, {"type": "image", "image": SHOWN})
        messages = [{"role": role, "content": p} for (role, _), p in zip(turns, parts, strict=True)]
        if system is not None:
            messages.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
        ids = self.processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True
        )
        return self.once(ids[0])

    def rendered(self, text: str) -> list[int]:
        """transformers' ids of a string with the image token in it."""
        special = self.record.add_special_tokens
        out = self.processor(text=text, images=SHOWN, add_special_tokens=special)
        return self.once(out["input_ids"][0])

    def once(self, ids: list[int]) -> list[int]:
        """Ids with the run of image tokens shortened to one."""
        image = self.record.image_token_id
        return [i for at, i in enumerate(ids) if i != image or ids[at - 1] != image]

    def first(self, prompt: str, system: str | None = None) -> list[int]:
        before, after = self.prompter.first_turn(prompt, system)
        assert before.dtype == after.dtype == "int64"
        assert before.ndim == after.ndim == 2 and len(before) == len(after) == 1
        return [*before[0].tolist(), self.record.image_token_id, *after[0].tolist()]


def built(tokenizer: Any, template: str | None, image: str = "<image>") -> Any:
    shown = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor = LlavaProcessor(shown, tokenizer, 14, "full", template, image)
    config = SimpleNamespace(image_token_id=processor.image_token_id, model_type="llava")
    return processor, config, generation({}, config, tokenizer, SHAPE)


def demo() -> Any:
    processor, config = AutoProcessor.from_pretrained(DEMO), AutoConfig.from_pretrained(DEMO)
    return processor, config, read_generation(DEMO, config, processor.tokenizer, SHAPE)


SOURCES: dict[str, Callable[[], Any]] = {
    "demo": demo,
    "llama": lambda: built(transformers_llama(), LLAVA),
    "llama, first": lambda: built(llama(legacy=False, scheme="first"), LLAVA),
    "llama, always": lambda: built(llama(legacy=False), LLAVA),
    "llama, legacy": lambda: built(llama(legacy=True), LLAVA),
    "mistral": lambda: built(llama(legacy=True), MISTRAL),
    "mistral, first": lambda: built(llama(legacy=False, scheme="first"), MISTRAL),
    "gpt-2": lambda: built(byte_level(), LLAVA),
    "qwen": lambda: built(byte_level(regex=QWEN), CHATML, "<|image_pad|>"),
    "dated": lambda: built(byte_level(regex=QWEN), DATED, "<|image_pad|>"),
    "unigram": lambda: built(unigram(), LLAVA),
}


@cache
def case(name: str) -> Case:
    """One of SOURCES, read once; its tokenizer goes through a file, as in a bundle."""
    processor, config, generation = SOURCES[name]()
    record = prompts.read_text(processor, config, generation, SHAPE.vocabulary).record
    file = Path(tempfile.mkdtemp(prefix="edgeprune-tests-")) / "tokenizer.json"
    prompts.save_tokenizer(processor, file)
    return Case(processor, record, Prompter(file, record), file)
