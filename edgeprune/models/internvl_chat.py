"""InternVL2 to 3.5 in the authors' own layout: InternViT, 2 x 2 patches a token, tiles."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from PIL import Image
from torch import Tensor

from edgeprune.errors import ModelError, brief
from edgeprune.models import internvl
from edgeprune.models._chat import Chat
from edgeprune.models._names import LLAMA, PACKED, Stored, TensorNames, packed_rows
from edgeprune.models._square import IMAGENET, square_processor
from edgeprune.models._towers import refuse
from edgeprune.tiling import Tiling

CONTEXT = "<IMG_CONTEXT>"
"""The visual token."""

_SENSETIME = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，"  # noqa: RUF001
    "英文名叫InternVL, 是一个有用无害的人工智能助手。"
)
_TSINGHUA = (
    "你是书生·万象，英文名是InternVL，"  # noqa: RUF001
    "是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
)
END = "<|im_end|>"
TEMPLATES = {
    "Hermes-2": (_SENSETIME, END),
    "internlm2-chat": (_SENSETIME, END),
    "internvl2_5": (_TSINGHUA, END + "\n"),
}
"""By `template` of config.json: the system message, which the authors have in code, and what ends
a turn."""

_TOWER = {
    r"^cls$": "embeddings.class_embedding",
    r"^patch\.": "embeddings.patch_embedding.",
    r"^position$": "embeddings.position_embedding",
    r"^blocks\.": "encoder.layers.",
    r"\.(query|key|value)\.": ".attn.qkv.",
    r"\.query_norm\.": ".attn.q_norm.",
    r"\.key_norm\.": ".attn.k_norm.",
    r"\.output\.": ".attn.proj.",
    r"\.attention_gain\.weight$": ".ls1",
    r"\.mlp_gain\.weight$": ".ls2",
    r"\.attention_norm\.": ".norm1.",
    r"\.mlp_norm\.": ".norm2.",
    r"\.up\.": ".mlp.fc1.",
    r"\.down\.": ".mlp.fc2.",
}
_PROJECTOR = {r"^norm\.": "0.", r"^first\.": "1.", r"^second\.": "3."}
_INTERNLM2 = {
    r"^embedding\.": "tok_embeddings.",
    r"\.attention\.(query|key|value)\.": ".attention.wqkv.",
    r"\.attention\.output\.": ".attention.wo.",
    r"\.mlp\.gate\.": ".feed_forward.w1.",
    r"\.mlp\.up\.": ".feed_forward.w3.",
    r"\.mlp\.down\.": ".feed_forward.w2.",
    r"\.mlp_norm\.": ".ffn_norm.",
}


class Adapter(internvl.Adapter):
    """The same model as `internvl` in other words: its config is translated, tensors have other
    names, and projections of queries, keys and values are stored as one tensor.

    InternLM2 is LLaMA but for that. Image processor and chat template are those of the authors'
    code, whatever else the folder holds.
    """

    def read_config(self) -> Any:
        given = self.checkpoint.config
        try:
            _refuse(given)
            config = _translated(given)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            file = self.checkpoint.folder / "config.json"
            raise ModelError(f"{file} is damaged: {brief(error)}") from error
        config.image_token_id = self._id_of(CONTEXT)
        return config

    def read_chat(self) -> Chat:
        template = _jinja(*TEMPLATES[self.checkpoint.config["template"]], self.asked.images)
        return Chat(self.checkpoint.text_folder, template)

    def read_ends(self) -> tuple[int, ...]:
        return (self._id_of(END),)

    def _id_of(self, token: str) -> int:
        number = self.chat.tokenizer.convert_tokens_to_ids(token)
        if number is None or number == self.chat.tokenizer.unk_token_id:
            raise ModelError(f"the tokenizer of {self.checkpoint.folder} has no token {token}")
        return int(number)

    @property
    def video_token_id(self) -> int:
        return int(self.config.image_token_id)

    def grid_limits(self) -> tuple[int, int]:
        given = self.checkpoint.config
        if not given.get("dynamic_image_size", False):
            return 1, 1
        return given.get("min_dynamic_patch", 1), given.get("max_dynamic_patch", 6)

    def read_tiling(self) -> Tiling | None:
        tiling = super().read_tiling()
        if tiling is None or self.checkpoint.config.get("use_thumbnail", False):
            return tiling
        return replace(tiling, overview="none")

    def preprocess(self, image_processor: Any, image: Image.Image) -> Tensor:
        pixels = super().preprocess(image_processor, image)
        return pixels[: self.tiling.tiles] if self.tiling else pixels  # the thumbnail is the last

    def image_processor(self, own: Callable[[], Any]) -> Any:
        from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import (
            GotOcr2ImageProcessorPil,
        )

        side, (least, most) = self.encoder.image, self.grid_limits()
        if self.tiling is None:
            return square_processor(side, IMAGENET)
        size = {"height": side, "width": side}
        grid = {"crop_to_patches": True, "min_patches": least, "max_patches": most}
        return GotOcr2ImageProcessorPil(size=size, resample=3, **grid, **IMAGENET)

    def tensor_names(self) -> TensorNames:
        own = self._is_internlm2
        return TensorNames(
            tower=_TOWER,
            tower_prefixes=("vision_model.",),
            projector=_PROJECTOR,
            projector_prefixes=("mlp1.",),
            decoder=_INTERNLM2 if own else LLAMA,
            decoder_prefixes=("language_model.model.",),
            head=("language_model.output.weight" if own else "language_model.lm_head.weight",),
        )

    @property
    def _is_internlm2(self) -> bool:
        return bool(self.checkpoint.config["llm_config"]["model_type"] == "internlm2")

    def stored(self, parameter: str) -> Stored:
        found, path = super().stored(parameter), parameter.split(".")
        if len(path) < 2 or path[-2] not in PACKED:
            return found
        if path[0] == "encoder":
            return replace(found, rows=packed_rows(path[-2], self.encoder.width))
        if self._is_internlm2:
            return replace(found, rows=self._wqkv(path[-2]))
        return found

    def _wqkv(self, name: str) -> Sequence[int]:
        """Rows of InternLM2's wqkv: for each head of keys its query heads, itself and its values,
        each of `size` rows."""
        decoder = self.decoder_config
        size, group = decoder.head_size, decoder.heads // decoder.kv_heads
        first, count = {"query": (0, group), "key": (group, 1), "value": (group + 1, 1)}[name]
        starts = [(k * (group + 2) + first) * size for k in range(decoder.kv_heads)]
        return tuple(row for start in starts for row in range(start, start + count * size))


def _jinja(system: str, end: str, images: int) -> str:
    """A chat template that writes what the authors' conversation class does."""
    number = "" if images == 1 else "{{ 'Image-' ~ loop.index ~ ': ' }}"
    said = (
        "{%- for part in message['content'] -%}"
        "{%- if part['type'] == 'text' -%}{{ part['text'] }}"
        "{%- else -%}" + number + "{{ '<IMG_CONTEXT>\\n' }}"
        "{%- endif -%}{%- endfor -%}"
    )
    return (
        "{%- if messages[0]['role'] != 'system' -%}"
        f"{{{{ {'<|im_start|>system' + chr(10) + system + end!r} }}}}"
        "{%- endif -%}"
        "{%- for message in messages -%}"
        "{{ '<|im_start|>' ~ message['role'] ~ '\\n' }}"
        "{%- if message['content'] is string -%}{{ message['content'] }}"
        "{%- else -%}" + said + "{%- endif -%}"
        f"{{{{ {end!r} }}}}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
    )


def _refuse(given: Mapping[str, Any]) -> None:
    """ModelError that names what a config.json asks and no step does."""
    vision, template = given["vision_config"], given.get("template")
    size = given.get("force_image_size") or vision["image_size"]
    kind = given["llm_config"].get("model_type")
    refuse(
        SimpleNamespace(**given),
        {
            f"template {template!r} (known: {', '.join(TEMPLATES)})": template in TEMPLATES,
            f"ps_version {given.get('ps_version', 'v1')!r}": given.get("ps_version") == "v2",
            f"select_layer {given.get('select_layer', -1)}": given.get("select_layer", -1) == -1,
            "pad2square": not given.get("pad2square", False),
            f"force_image_size {size} of {vision['image_size']}": size == vision["image_size"],
            f"a {kind} decoder": kind in ("internlm2", "llama", "qwen2", "qwen3"),
        },
    )


def _translated(given: Mapping[str, Any]) -> Any:
    """config.json as transformers' InternVLConfig."""
    from transformers import InternVLConfig, InternVLVisionConfig

    vision, text = given["vision_config"], _text_config(dict(given["llm_config"]))
    tower = InternVLVisionConfig(
        hidden_size=vision["hidden_size"],
        intermediate_size=vision["intermediate_size"],
        num_hidden_layers=vision["num_hidden_layers"],
        num_attention_heads=vision["num_attention_heads"],
        image_size=vision["image_size"],
        patch_size=vision["patch_size"],
        num_channels=vision.get("num_channels", 3),
        hidden_act=vision.get("hidden_act", "gelu"),
        layer_norm_eps=vision.get("layer_norm_eps", 1e-6),
        norm_type=vision.get("norm_type", "rms_norm"),
        attention_bias=vision.get("qkv_bias", False),
        use_qk_norm=vision.get("qk_normalization", True),
        use_mean_pooling=True,  # so that no norm follows the blocks
    )
    config = InternVLConfig(
        vision_config=tower,
        text_config=text,
        downsample_ratio=given.get("downsample_ratio", 0.5),
        tie_word_embeddings=bool(text.tie_word_embeddings),
    )
    config.model_type = given["model_type"]
    return config


def _text_config(llm: dict[str, Any]) -> Any:
    from transformers import LlamaConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind, code = llm.pop("model_type"), ("auto_map", "architectures", "attn_implementation")
    llm = {name: value for name, value in llm.items() if name not in code}
    if kind != "internlm2":
        return CONFIG_MAPPING[kind](**llm)
    bias, scaling = llm.pop("bias", False), llm.pop("rope_scaling", None)
    rope = {"rope_theta": llm.pop("rope_theta", 10000), "rope_type": "default"}
    if scaling:
        rope |= {"rope_type": scaling["type"], "factor": scaling["factor"]}
    return LlamaConfig(**{**llm, "rope_parameters": rope, "attention_bias": bias})
