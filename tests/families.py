"""Tiny random checkpoints of the LLaVA families and InternVL, as transformers saves them,
and what those of other families are made with."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoTokenizer,
    CLIPVisionConfig,
    GenerationConfig,
    GraniteConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
    VideoLlavaImageProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)

from edgeprune.demo import MODEL_DIR
from edgeprune.tiling import Size

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 72,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
IMAGES = (
    "{%- for item in message['content'] if item['type'] == 'image' %}"
    "<image>{{ '\\n' }}{% endfor -%}"
)
VIDEOS = IMAGES.replace("image", "video")
QUESTION = "what color is the star ?"
SETTINGS = {  # of generation, as a checkpoint may ship them; Qwen2.5-VL's penalty is among them
    "repetition_penalty": 1.05,
    "no_repeat_ngram_size": 6,
    "min_new_tokens": 40,
    "bad_words_ids": [[13], [14, 15]],
    "suppress_tokens": [9, 10],
    "begin_suppress_tokens": [11, 12],
    "eos_token_id": 2,
}


def with_settings(checkpoint: Path) -> GenerationConfig:
    """A checkpoint's own settings of generation, now SETTINGS."""
    (checkpoint / "generation_config.json").write_text(json.dumps(SETTINGS))
    return GenerationConfig.from_pretrained(checkpoint)


@dataclass(frozen=True)
class Family:
    """One family's tiny model, and image sizes whose tiles differ."""

    name: str
    model: Any
    image_processor: Any
    image_token: str
    tokens: dict[str, str] = field(default_factory=dict)  # special ones known by name
    sizes: tuple[Size, ...] = (Size(84, 84),)
    tiled: bool = True  # whether a bundle is frozen for one of these sizes

    def look(self, images: Any) -> Any:
        """What transformers' own image processor makes of images."""
        options = {}
        if self.name == "video_llava":  # deprecates an old name of its result
            options["return_legacy_image_output"] = False
        if self.name == "internvl":  # as its processor asks, whatever the settings say
            options["crop_to_patches"] = True
        if self.name in ("smolvlm", "idefics3"):
            options["do_image_splitting"] = self.tiled
        return self.image_processor(images, return_tensors="pt", **options)

    def kinds(self, ids: Any, later: int) -> dict[str, Any]:
        """What says to transformers' model which ids, int64 [1, S], see each other; the last
        `later` of them are of a second turn."""
        if self.name == "gemma3":
            return {"token_type_ids": (ids == self.model.config.image_token_id).int()}
        if self.name == "paligemma":
            first = ids.shape[1] - later
            return {"token_type_ids": (torch.arange(ids.shape[1]) >= first).int()[None]}
        return {}

    def frozen(self, size: Size) -> Size | None:
        """The size to freeze a bundle for images of `size` for."""
        return size if self.tiled else None

    def save(self, folder: Path) -> Path:
        """The checkpoint, with the demo's tokenizer and template."""
        self.model.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR, extra_special_tokens=self.tokens)
        template = (MODEL_DIR / "chat_template.jinja").read_text()
        tokenizer.chat_template = template.replace(IMAGES, IMAGES + VIDEOS).replace(
            "<image>", self.image_token
        )
        if self.name == "paligemma":  # as published
            tokenizer.chat_template = None
        tokenizer.save_pretrained(folder)
        config = self.model.config
        placeholder = getattr(config, "boi_token_id", config.image_token_id)
        assert tokenizer.convert_tokens_to_ids(self.image_token) == placeholder
        return folder


def settled(model: Any) -> Any:
    """Weights that make every token count, and an end token that greedy decoding never takes."""
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "norm" not in name and "lambda" not in name:
            spread = 0.3 if weight.dim() < 2 else weight.shape[-1] ** -0.5
            torch.nn.init.normal_(weight, std=spread)
    with torch.no_grad():
        model.get_output_embeddings().weight[2] = 0
    return model.eval()


def uneven_norms(model: Any) -> Any:
    """A model whose norms have weights that are not all alike, so that none stands for another."""
    for name, weight in model.named_parameters():
        if "norm" in name or ".ln_" in name:
            torch.nn.init.normal_(weight, mean=1.0, std=0.3)
    return model


def internvl(side: int = 56, rms_norms: bool = False, **text: Any) -> Family:
    """Tiles of 56 pixels, 4 tokens each; the decoder is Qwen2. `rms_norms`: as in InternViT-6B."""
    norms = {"norm_type": "rms_norm", "use_qk_norm": True} if rms_norms else {}
    vision = InternVLVisionConfig(
        **norms,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=side,
        attention_bias=True,
    )
    config = InternVLConfig(
        vision_config=vision,
        text_config=text.pop("config", None) or Qwen2Config(**{**TEXT, **text}),
        image_token_id=68,
        image_seq_length=(side // 28) ** 2,
        tie_word_embeddings=False,
    )
    names = ("start_image_token", "end_image_token", "context_image_token", "video_token")
    return Family(
        "internvl",
        settled(InternVLForConditionalGeneration(config)),
        GotOcr2ImageProcessorPil(size={"height": side, "width": side}, crop_to_patches=False),
        "<IMG_CONTEXT>",
        dict(zip(names, ("<img>", "</img>", "<IMG_CONTEXT>", "<video>"), strict=True)),
        (Size(56, 56), Size(70, 150), Size(181, 60)),
    )


TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 42,
    "patch_size": 14,
}
GRIDS = [[42, 42], [42, 84], [84, 42], [84, 84], [126, 42], [42, 126]]
SMALL_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 48,
    "patch_size": 6,
}
SHAPES = Size(84, 84), Size(60, 100), Size(110, 41)


def llava(**text: Any) -> Family:
    """Images of 42 pixels, 9 tokens each, cut out of the middle."""
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**TOWER, projection_dim=32),
        text_config=LlamaConfig(**{**TEXT, **text}),
        image_token_id=4,
    )
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 42}, crop_size={"height": 42, "width": 42}
    )
    model = settled(LlavaForConditionalGeneration(config))
    return Family("llava", model, processor, "<image>", {}, SHAPES, tiled=False)


def llava_next(**text: Any) -> Family:
    """Tiles of 42 pixels, 9 tokens each; the decoder is LLaMA."""
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**TOWER, projection_dim=32),
        text_config=text.pop("config", None) or LlamaConfig(**{**TEXT, **text}),
        image_token_index=4,
        image_grid_pinpoints=GRIDS,
    )
    processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": 42},
        crop_size={"height": 42, "width": 42},
        image_grid_pinpoints=GRIDS,
    )
    model = settled(LlavaNextForConditionalGeneration(config))
    return Family("llava_next", model, processor, "<image>", {}, SHAPES)


def granite_vision(**text: Any) -> Family:
    """Granite Vision 3.x: LLaVA-NeXT with a SigLIP tower, three of whose hidden states are joined,
    one before the first block, and a decoder of kind granite."""
    factors = {"embedding_multiplier": 12, "residual_multiplier": 0.22, "logits_scaling": 8}
    config = LlavaNextConfig(
        vision_config=SiglipVisionConfig(**TOWER, vision_use_head=False),
        text_config=GraniteConfig(**{**TEXT, **factors, "attention_multiplier": 0.2, **text}),
        image_token_index=4,
        image_grid_pinpoints=GRIDS,
        vision_feature_layer=[-4, -2, -1],
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
    )
    processor = LlavaNextImageProcessorPil(
        size={"height": 42, "width": 42},
        crop_size={"height": 42, "width": 42},
        image_grid_pinpoints=GRIDS,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    model = settled(LlavaNextForConditionalGeneration(config))
    return Family("granite_vision", model, processor, "<image>", {}, SHAPES)


def llava_onevision(**text: Any) -> Family:
    """Tiles of 42 pixels, 9 tokens each; the encoder has no [CLS], the decoder is Qwen2."""
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**TOWER, vision_use_head=False),
        text_config=Qwen2Config(**{**TEXT, "tie_word_embeddings": True, **text}),
        image_token_index=4,
        video_token_index=66,
        image_grid_pinpoints=GRIDS,
    )
    processor = LlavaOnevisionImageProcessorPil(
        size={"height": 42, "width": 42}, image_grid_pinpoints=GRIDS
    )
    model = settled(LlavaOnevisionForConditionalGeneration(config))
    tokens = {"video_token": "<video>"}
    return Family("llava_onevision", model, processor, "<image>", tokens, SHAPES)


def llava_next_video(**text: Any) -> Family:
    """Videos of 56-pixel frames, 4 tokens each; images as llava_next."""
    tower = {**TOWER, "image_size": 56}
    grids = [[h * 56 // 42, w * 56 // 42] for h, w in GRIDS]
    config = LlavaNextVideoConfig(
        vision_config=CLIPVisionConfig(**tower, projection_dim=32),
        text_config=LlamaConfig(**{**TEXT, **text}),
        image_token_index=4,
        video_token_index=66,
        image_grid_pinpoints=grids,
    )
    processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": 56},
        crop_size={"height": 56, "width": 56},
        image_grid_pinpoints=grids,
    )
    model = settled(LlavaNextVideoForConditionalGeneration(config))
    tokens = {"video_token": "<video>"}
    return Family("llava_next_video", model, processor, "<image>", tokens, SHAPES)


def video_llava(**text: Any) -> Family:
    """Videos of 42-pixel frames, 9 patches and [CLS] each; images of as many patches."""
    config = VideoLlavaConfig(
        vision_config=CLIPVisionConfig(**TOWER, projection_dim=32),
        text_config=LlamaConfig(**{**TEXT, **text}),
        image_token_index=4,
        video_token_index=66,
    )
    processor = VideoLlavaImageProcessor(
        size={"shortest_edge": 42}, crop_size={"height": 42, "width": 42}
    )
    model = settled(VideoLlavaForConditionalGeneration(config))
    tokens = {"video_token": "<video>"}
    return Family("video_llava", model, processor, "<image>", tokens, SHAPES, tiled=False)
