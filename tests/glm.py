"""A tiny random checkpoint of GLM-4.1V or GLM-4.6V, in the layout that transformers saves."""

from __future__ import annotations

from pathlib import Path

from transformers import (
    AutoTokenizer,
    Glm4vConfig,
    Glm4vForConditionalGeneration,
    Glm46VConfig,
    Glm46VForConditionalGeneration,
)
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
from transformers.models.glm46v.image_processing_pil_glm46v import Glm46VImageProcessorPil

from edgeprune.demo import MODEL_DIR
from tests.families import IMAGES, TEXT, settled, uneven_norms

TOKENS = (
    *("<|image|>", "<|video|>", "<|begin_of_image|>", "<|end_of_image|>"),
    *("<|begin_of_video|>", "<|end_of_video|>"),
)
SHAPE = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2}
KINDS = {
    "glm4v": (Glm4vConfig, Glm4vForConditionalGeneration, Glm4vImageProcessorPil),
    "glm46v": (Glm46VConfig, Glm46VForConditionalGeneration, Glm46VImageProcessorPil),
}
# images (width, height) that the processor makes these sizes of
IMAGE_SIZES = {"112x112": (110, 118), "84x168": (90, 160), "196x140": (190, 150)}


def checkpoint(folder: Path, layers: int = 3, kind: str = "glm46v", positions: int = 512) -> Path:
    """Half of a head of 16 turns; the tower's grid has 6 x 6 positions."""
    config_class, model_class, processor = KINDS[kind]
    text = {
        **TEXT,
        "num_hidden_layers": layers,
        "max_position_embeddings": positions,
        "hidden_size": 64,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 500000.0,
            "partial_rotary_factor": 0.5,
            "mrope_section": [2, 1, 1],
        },
    }
    vision = {
        "depth": 3,
        "hidden_size": 32,
        "num_heads": 2,
        "image_size": 84,
        "out_hidden_size": 64,
        "intermediate_size": 80,
    }
    ids = dict(zip(("image", "video", "image_start", "image_end"), range(66, 70), strict=True))
    model = model_class(
        config_class(
            text_config={**text, "model_type": "glm4v_text"},
            vision_config={**vision, "model_type": "glm4v_vision"},
            **{f"{name}_token_id": number for name, number in ids.items()},
            video_start_token_id=70,
            video_end_token_id=71,
            tie_word_embeddings=False,
        )
    )
    uneven_norms(settled(model)).save_pretrained(folder)
    processor(**SHAPE).save_pretrained(folder)
    names = {f"mark_{number}": token for number, token in enumerate(TOKENS)}
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR, extra_special_tokens=names)
    image = IMAGES.replace("<image>{{ '\\n' }}", "<|begin_of_image|><|image|><|end_of_image|>")
    template = (MODEL_DIR / "chat_template.jinja").read_text()
    tokenizer.chat_template = template.replace(IMAGES, image + image.replace("image", "video"))
    tokenizer.save_pretrained(folder)
    return folder
