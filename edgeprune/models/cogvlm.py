"""CogVLM-chat and CogVLM2: EVA2-CLIP-E, a gated projector, a decoder with experts for images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

from edgeprune.errors import ModelError
from edgeprune.models import _adapter
from edgeprune.models._chat import Chat
from edgeprune.models._decoder_config import DecoderConfig
from edgeprune.models._encoder import EncoderConfig
from edgeprune.models._glu import Glu
from edgeprune.models._image_record import Reader
from edgeprune.models._layers import ACTIVATIONS
from edgeprune.models._layout import Layout
from edgeprune.models._media import IMAGE_SLOT, Media, Takes
from edgeprune.models._names import PACKED, Stored, TensorNames, packed_rows
from edgeprune.models._own_config import OwnConfig, translated
from edgeprune.models._square import CLIP, square_processor
from edgeprune.models._towers import one_size
from edgeprune.models._video import FRAME_READERS

BEGIN, END = "<|image_begin|>", "<|image_end|>"
"""What stands around an image: vectors of the vision tower, here two more rows of the embedding."""

RESERVED = 128002
"""A reserved token of Llama 3's vocabulary, which CogVLM2 has for visual tokens."""

QUESTIONS = {"chat": ("Question: ", " Answer:"), "vqa": ("Question: ", " Short answer:")}
"""By `template_version` of config.json: what stands around a question; else nothing."""

_TOWER = {
    r"^cls$": "patch_embedding.cls_embedding",
    r"^patch\.": "patch_embedding.proj.",
    r"^position$": "patch_embedding.position_embedding.weight",
    r"^blocks\.": "transformer.layers.",
    r"\.(query|key|value)\.": ".attention.query_key_value.",
    r"\.output\.": ".attention.dense.",
    r"\.attention_norm\.": ".input_layernorm.",
    r"\.mlp_norm\.": ".post_attention_layernorm.",
    r"\.up\.": ".mlp.fc1.",
    r"\.down\.": ".mlp.fc2.",
}
_PROJECTOR = {
    r"^merge\.": "conv.",
    r"^first\.": "linear_proj.linear_proj.",
    r"^norm\.": "linear_proj.norm1.",
    r"^gate\.": "linear_proj.gate_proj.",
    r"^up\.": "linear_proj.dense_h_to_4h.",
    r"^down\.": "linear_proj.dense_4h_to_h.",
}
_DECODER = {
    r"^embedding\.": "embed_tokens.",
    r"\.image_attention\.(query|key|value)\.": ".self_attn.vision_expert_query_key_value.",
    r"\.attention\.(query|key|value)\.": ".self_attn.language_expert_query_key_value.",
    r"\.image_attention\.output\.": ".self_attn.vision_expert_dense.",
    r"\.attention\.output\.": ".self_attn.language_expert_dense.",
    r"\.image_mlp\.(gate|up|down)\.": r".mlp.vision_mlp.\1_proj.",
    r"\.mlp\.(gate|up|down)\.": r".mlp.language_mlp.\1_proj.",
    r"\.attention_norm\.": ".input_layernorm.",
    r"\.mlp_norm\.": ".post_attention_layernorm.",
}


class Adapter(_adapter.Adapter):
    """The V visual tokens are the patches; all have one position. The marks around them are text,
    of which the first goes through the image's weights as patches do.

    CogVLM2 is known by the convolution behind its tower.
    """

    architectures: ClassVar[tuple[str, ...]] = ("CogVLMForCausalLM",)
    takes: ClassVar[Takes] = Takes(several=False)
    decoder_kind: ClassVar[str | None] = "llama"
    encoder: EncoderConfig

    def config_class(self) -> Any:
        return OwnConfig

    def read_config(self) -> Any:
        return translated(self.checkpoint, self._translated)

    def _translated(self, given: dict[str, Any]) -> OwnConfig:
        from transformers import LlamaConfig

        heads = given["num_attention_heads"]
        text = LlamaConfig(
            hidden_size=given["hidden_size"],
            intermediate_size=given["intermediate_size"],
            num_hidden_layers=given["num_hidden_layers"],
            num_attention_heads=heads,
            num_key_value_heads=given.get("num_multi_query_heads", heads),
            vocab_size=given["vocab_size"],
            hidden_act=given["hidden_act"],
            max_position_embeddings=given["max_position_embeddings"],
            rms_norm_eps=given["rms_norm_eps"],
            rope_parameters={"rope_type": "default", "rope_theta": 5e5 if self._second else 1e4},
            eos_token_id=given["eos_token_id"],
            tie_word_embeddings=False,
        )
        placeholder = RESERVED if self._second else int(given["pad_token_id"])
        return OwnConfig("cogvlm", text, dict(given["vision_config"]), placeholder)

    @property
    def _second(self) -> bool:
        """Whether it is a CogVLM2."""
        return "model.vision.conv.weight" in self.checkpoint.files

    def demands(self) -> dict[str, bool]:
        vision = self.config.vision_config
        try:
            sides = vision["image_size"], vision["patch_size"], vision["num_positions"]
            activation, channels = vision["hidden_act"], vision.get("in_channels", 3)
        except KeyError as error:
            raise ModelError(f"vision_config of config.json has no {error}") from error
        image, patch, positions = sides
        return {
            f"activation {activation!r}": activation in ACTIVATIONS,
            f"{channels} colours": channels == 3,
            f"{positions} positions for {image} pixels with patches of {patch}": image % patch == 0
            and (image // patch) ** 2 + 1 == positions,
        }

    def read_chat(self) -> Chat:
        """With the two marks behind the vocabulary."""
        from tokenizers import AddedToken

        given, folder = self.checkpoint.config, self.checkpoint.text_folder
        chat = Chat(folder)
        placeholder = chat.tokenizer.convert_ids_to_tokens(self.config.image_token_id)
        around = QUESTIONS.get(given.get("template_version", "base"), ("", ""))
        chat.tokenizer.chat_template = _jinja(str(placeholder), *around)
        marks = [AddedToken(mark, normalized=False, special=True) for mark in (BEGIN, END)]
        rows, own = given["vocab_size"], len(chat.tokenizer)
        chat.tokenizer.add_tokens(marks)
        if chat.tokenizer.convert_tokens_to_ids(BEGIN) != rows:
            raise ModelError(
                f"the tokenizer in {folder} has {own} tokens, the model {rows}: it is another's"
            )
        return chat

    def read_encoder(self) -> EncoderConfig:
        vision = self.config.vision_config
        return EncoderConfig(
            blocks=vision["num_hidden_layers"],
            width=vision["hidden_size"],
            mlp_width=vision["intermediate_size"],
            heads=vision["num_heads"],
            image=vision["image_size"],
            patch=vision["patch_size"],
            eps=vision["layer_norm_eps"],
            activation=vision["hidden_act"],
            patch_bias=True,
            branch_norms=True,
        )

    def read_media(self) -> Media:
        return Media.of_images(self.config, self.asked.images, BEGIN + IMAGE_SLOT + END)

    def read_layout(self) -> Layout:
        one_size(self.asked.size, self.encoder.image)
        return Layout.plain(self.encoder.side, 2 if self._second else 1)

    def read_projector(self) -> Glu:
        text = self.config.text_config
        width = self.encoder.width
        merged = width if self._second else 0
        return Glu(width, text.intermediate_size, text.hidden_size, merged)

    def read_decoder(self) -> DecoderConfig:
        decoder = super().read_decoder()
        layer = replace(decoder.layers[0], experts=True, expert_qkv_bias=self._second)
        layers = (layer,) * len(decoder.layers)
        return replace(decoder, layers=layers, one_position=True, marks=2)

    def tensor_names(self) -> TensorNames:
        return TensorNames(
            tower=_TOWER,
            tower_prefixes=("model.vision.",),
            projector=_PROJECTOR,
            projector_prefixes=("model.vision.",),
            decoder=_DECODER,
            decoder_prefixes=("model.",),
            head=("lm_head.weight",),
        )

    def stored(self, parameter: str) -> Stored:
        found, path = super().stored(parameter), parameter.split(".")
        if parameter == "embedding.weight":
            marks = ("model.vision.boi",), ("model.vision.eoi",)
            return replace(found, parts=(*found.parts, *marks))
        if len(path) < 2 or path[-2] not in PACKED:
            return found
        if path[0] == "encoder":
            return replace(found, rows=packed_rows(path[-2], self.encoder.width))
        decoder = self.decoder_config
        queries, others = (n * decoder.head_size for n in (decoder.heads, decoder.kv_heads))
        return replace(found, rows=packed_rows(path[-2], queries, others))

    def image_readers(self) -> Mapping[str, Reader]:
        return FRAME_READERS

    def image_processor(self, own: Callable[[], Any]) -> Any:
        """The checkpoint has none; the authors' code resizes an image to the tower's square."""
        return square_processor(self.encoder.image, CLIP)


def _jinja(placeholder: str, before: str, after: str) -> str:
    """A chat template that writes what the authors' `_history_to_prompt` does."""
    text = (
        "{%- macro said(content) -%}"
        "{%- if content is string -%}{{ content }}"
        "{%- else -%}{%- for part in content if part['type'] == 'text' -%}{{ part['text'] }}"
        "{%- endfor -%}{%- endif -%}{%- endmacro -%}"
    )
    image = (
        "{%- if message['content'] is not string -%}"
        "{%- for part in message['content'] if part['type'] == 'image' -%}"
        f"{{{{ {placeholder!r} }}}}{{%- endfor -%}}{{%- endif -%}}"
    )
    return (
        f"{text}{{%- for message in messages -%}}"
        "{%- if message['role'] == 'user' -%}"
        f"{image}{{{{ {before!r} ~ said(message['content']) ~ {after!r} }}}}"
        "{%- elif message['role'] == 'assistant' -%}"
        "{{ ' ' ~ said(message['content']) ~ '\\n' }}"
        "{%- endif -%}{%- endfor -%}"
    )
