"""Architecture, tokenizer and processor of the demo model, and how it is saved.

    python benchmarks/demo/build.py [FOLDER]

writes the untrained model.  The model is a LLaVA-1.5 in small: a CLIP vision tower with [CLS]
whose penultimate layer gives 12x12 patch features, a two-layer projector and a LLaMA decoder.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from edgeprune.demo import MODEL_DIR
from edgeprune.demo.scenes import COLORS, PATCH, PLURALS, SHAPES, SIZE

SPECIALS = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
PAD, BOS, EOS, UNK, IMAGE = range(len(SPECIALS))
WORDS = (
    *SPECIALS, "user:", "assistant:", "?", ".", ",", *COLORS, *SHAPES, *PLURALS.values(),
    *"0123456789", "yes", "no", "what", "color", "shape", "digit", "is", "are", "there", "a", "an",
    "the", "object", "objects", "how", "many", "left", "right", "of", "above", "below", "on", "in",
    "this", "picture", "image",
)  # fmt: skip

# LLaVA-1.5's wording.  The tokenizer splits at white space, so line breaks and spaces count alike.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] == 'assistant' %}ASSISTANT: {% else %}USER: {% endif -%}
{%- if message['content'] is string -%}
{{ message['content'] }}
{%- else -%}
{%- for item in message['content'] if item['type'] == 'image' %}<image>{{ '\\n' }}{% endfor -%}
{%- for item in message['content'] if item['type'] == 'text' -%}
{{ item['text'] }}
{%- endfor -%}
{%- endif -%}
{%- if message['role'] == 'assistant' %} </s>{% else %}{{ ' ' }}{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}ASSISTANT:{% endif -%}
"""


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A lower-casing tokenizer with one token per word and per punctuation mark."""
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"[?.,]"), "isolated")]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        model_max_length=1024,
    )


def make_processor() -> LlavaProcessor:
    """The processor: 168x168 images, 144 image tokens, LLaVA-1.5's chat wording."""
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.25, 0.25, 0.25],
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=make_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        image_token="<image>",
        num_additional_image_tokens=1,
    )


def make_config() -> LlavaConfig:
    """5.4 million parameters, most of them in a decoder of 12 layers."""
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=384,
        projection_dim=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=PATCH,
    )
    text = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=192,
        intermediate_size=352,
        num_hidden_layers=12,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=1024,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        tie_word_embeddings=False,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=(SIZE // PATCH) ** 2,
        tie_word_embeddings=False,
    )


def make_model(seed: int = 0) -> LlavaForConditionalGeneration:
    """The model with fresh float32 weights.

    Blocks start as the identity, and the decoder's keys equal its queries, so that a word attends
    from the start to the visual tokens that carry it.
    """
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(make_config()).float()
    for name, p in model.named_parameters():
        if p.ndim == 2 and ("layers." in name or "projector" in name):
            torch.nn.init.normal_(p, std=p.shape[1] ** -0.5)
            if name.split(".")[-2] in ("o_proj", "down_proj", "out_proj", "fc2"):
                torch.nn.init.zeros_(p)
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            layer.self_attn.k_proj.weight.copy_(layer.self_attn.q_proj.weight)
    return model


def save(model: LlavaForConditionalGeneration, folder: Path) -> None:
    """Write model (rounded to float16) and processor; files appear in `folder` at once."""
    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    half = LlavaForConditionalGeneration(model.config)
    half.load_state_dict(model.state_dict())
    half.half()
    half.generation_config = GenerationConfig(
        bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, max_new_tokens=8, do_sample=False
    )
    half.save_pretrained(fresh)
    make_processor().save_pretrained(fresh)
    folder.mkdir(exist_ok=True, parents=True)
    for file in fresh.iterdir():
        file.replace(folder / file.name)
    fresh.rmdir()
    (folder / "model.safetensors").chmod(0o644)


if __name__ == "__main__":
    save(make_model(), Path(sys.argv[1]) if len(sys.argv) > 1 else MODEL_DIR)
