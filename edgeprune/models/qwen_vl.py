"""Qwen-VL and Qwen-VL-Chat, the first: ViT-bigG, 256 learned queries, Qwen-7B."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from edgeprune.errors import ModelError
from edgeprune.models import _adapter
from edgeprune.models._chat import Chat
from edgeprune.models._image_record import Reader
from edgeprune.models._layers import LayerNorm
from edgeprune.models._layout import Layout
from edgeprune.models._media import IMAGE_SLOT, Media
from edgeprune.models._names import PACKED, Stored, TensorNames, packed_rows
from edgeprune.models._nearby import Nearby
from edgeprune.models._ops import TorchOps, cast
from edgeprune.models._own_config import OwnConfig, translated
from edgeprune.models._qwen_tiktoken import CONTROL, END, IMAGE, IMAGE_END, PATCH, TURN, TURN_END
from edgeprune.models._resampled import ResampledConfig
from edgeprune.models._square import CLIP, square_processor
from edgeprune.models._stored import read_json
from edgeprune.models._towers import one_size
from edgeprune.models._video import FRAME_READERS

QUERIES = 256
SYSTEM = "You are a helpful assistant."

_TOWER = {
    r"^patch\.": "conv1.",
    r"^position$": "positional_embedding",
    r"^pre_norm\.": "ln_pre.",
    r"^blocks\.": "transformer.resblocks.",
    r"^resampler\.queries$": "attn_pool.query",
    r"^resampler\.position$": "attn_pool.pos_embed",
    r"^resampler\.project\.": "attn_pool.kv_proj.",
    r"^resampler\.query_norm\.": "attn_pool.ln_q.",
    r"^resampler\.key_norm\.": "attn_pool.ln_kv.",
    r"^resampler\.(query|key|value)\.": "attn_pool.attn.in_proj_",
    r"^resampler\.output\.": "attn_pool.attn.out_proj.",
    r"\.(query|key|value)\.": ".attn.in_proj.",
    r"\.output\.": ".attn.out_proj.",
    r"\.attention_norm\.": ".ln_1.",
    r"\.mlp_norm\.": ".ln_2.",
    r"\.up\.": ".mlp.c_fc.",
    r"\.down\.": ".mlp.c_proj.",
}
_PROJECTOR = {r"^norm\.": "ln_post."}
_DECODER = {
    r"^embedding\.": "wte.",
    r"^layers\.": "h.",
    r"^norm\.": "ln_f.",
    r"\.attention\.(query|key|value)\.": ".attn.c_attn.",
    r"\.attention\.output\.": ".attn.c_proj.",
    r"\.attention_norm\.": ".ln_1.",
    r"\.mlp_norm\.": ".ln_2.",
    r"\.mlp\.gate\.": ".mlp.w2.",
    r"\.mlp\.up\.": ".mlp.w1.",
    r"\.mlp\.down\.": ".mlp.c_proj.",
}


class Adapter(_adapter.Adapter):
    """An image is 256 tokens, whatever its size: those of the resampler's queries.

    Beyond `seq_length` positions the authors' code turns queries and keys otherwise (dynamic NTK)
    and scales queries (logn); a bundle ends there.
    """

    nearby: ClassVar[tuple[Nearby, ...]] = (
        Nearby(
            "BLIP-2 and InstructBLIP",
            ("blip-2", "instructblip"),
            tower="EVA's",
            projector="a Q-Former",
            decoder="OPT, T5 or LLaMA",
        ),
    )
    model_types: ClassVar[tuple[str, ...]] = ("qwen",)
    decoder_kind: ClassVar[str | None] = "qwen2"
    encoder: ResampledConfig

    def config_class(self) -> Any:
        return OwnConfig

    def read_config(self) -> Any:
        return translated(self.checkpoint, _translated)

    def demands(self) -> dict[str, bool]:
        given, vision = self.checkpoint.config, self.config.vision_config
        first = vision["image_start_id"] - CONTROL.index(IMAGE)
        head = given["hidden_size"] // given["num_attention_heads"]
        return {
            f"image_start_id {vision['image_start_id']}": 0 < first <= given["vocab_size"],
            f"{vision.get('n_queries', QUERIES)} queries": vision.get("n_queries", QUERIES)
            == QUERIES,
            f"output_dim {vision['output_dim']} for a decoder of {given['hidden_size']}": (
                vision["output_dim"] == given["hidden_size"] != vision["width"]
            ),
            f"images of {vision['image_size']} pixels with patches of {vision['patch_size']}": (
                vision["image_size"] % vision["patch_size"] == 0
            ),
            "biases in the decoder": given.get("no_bias", True),
            f"kv_channels {given['kv_channels']}": given["kv_channels"] == head,
            f"rotary_pct {given.get('rotary_pct', 1)}": given.get("rotary_pct", 1) == 1,
        }

    @property
    def _answers_turns(self) -> bool:
        """Whether it is a chat model, as its settings of generation say."""
        file = self.checkpoint.folder / "generation_config.json"
        return file.is_file() and read_json(file).get("chat_format") == "chatml"

    def read_chat(self) -> Chat:
        chat = Chat(self.checkpoint.text_folder, _jinja(chat=self._answers_turns))
        if chat.tokenizer.convert_tokens_to_ids(IMAGE) != (start := _start(self.config)):
            raise ModelError(
                f"the tokenizer in {self.checkpoint.text_folder} has {IMAGE} not at {start}, where"
                " config.json has it: it is another's"
            )
        return chat

    def read_ends(self) -> tuple[int, ...]:
        ends = (TURN_END, TURN, END) if self._answers_turns else (END,)
        return tuple(map(self._id_of, ends))

    def _id_of(self, token: str) -> int:
        return _start(self.config) - CONTROL.index(IMAGE) + CONTROL.index(token)

    def read_encoder(self) -> ResampledConfig:
        vision = self.config.vision_config
        return ResampledConfig(
            blocks=vision["layers"],
            width=vision["width"],
            mlp_width=int(vision["width"] * vision["mlp_ratio"]),
            heads=vision["heads"],
            image=vision["image_size"],
            patch=vision["patch_size"],
            eps=1e-6,
            activation="gelu",
            cls=False,
            pre_norm=True,
            resampled=vision["output_dim"],
            resampled_heads=vision["output_dim"] // 128,
        )

    def read_media(self) -> Media:
        return Media.of_images(self.config, self.asked.images, IMAGE + IMAGE_SLOT + IMAGE_END)

    def read_layout(self) -> Layout:
        one_size(self.asked.size, self.encoder.image)
        layout = replace(Layout.plain(self.encoder.queries), grid=(1, QUERIES))
        return layout.chained(self.between)

    def read_projector(self) -> Projection:
        return Projection(self.encoder.resampled)

    def tensor_names(self) -> TensorNames:
        return TensorNames(
            tower=_TOWER,
            tower_prefixes=("transformer.visual.",),
            projector=_PROJECTOR,
            projector_prefixes=("transformer.visual.",),
            decoder=_DECODER,
            decoder_prefixes=("transformer.",),
            head=("lm_head.weight",),
        )

    def stored(self, parameter: str) -> Stored:
        found, path = super().stored(parameter), parameter.split(".")
        if len(path) < 2 or path[-2] not in PACKED:
            return found
        if path[0] == "layers":
            rows: Sequence[int] = packed_rows(path[-2], self.decoder_config.width)
        elif path[1] == "resampler":
            rows = packed_rows(path[-2], self.encoder.resampled)
        else:
            rows = self._by_head(path[-2])
        return replace(found, rows=rows)

    def _by_head(self, name: str) -> tuple[int, ...]:
        """Rows of the tower's in_proj: for each head its queries, keys and values."""
        size, first = self.encoder.width // self.encoder.heads, PACKED.index(name)
        starts = ((3 * head + first) * size for head in range(self.encoder.heads))
        return tuple(row for start in starts for row in range(start, start + size))

    def image_readers(self) -> Mapping[str, Reader]:
        return FRAME_READERS

    def image_processor(self, own: Callable[[], Any]) -> Any:
        """The checkpoint has none; the authors' code resizes an image to the tower's square."""
        return square_processor(self.encoder.image, CLIP)


@dataclass(frozen=True, slots=True)
class Projection:
    """A norm and a matrix, which is stored as inputs by outputs."""

    output: int

    def build(self, ops: TorchOps) -> nn.Module:
        return _Projection(self.output, ops)


class _Projection(nn.Module):
    def __init__(self, width: int, ops: TorchOps) -> None:
        super().__init__()
        self.ops = ops
        self.norm = LayerNorm(width, 1e-6, ops)
        self.proj = nn.Parameter(torch.empty(width, width))

    def forward(self, features: Tensor) -> Tensor:
        return self.ops.linear(cast(self.norm(features), self.proj.dtype), self.proj)


def _start(config: OwnConfig) -> int:
    """Id of the token before an image."""
    return int(config.vision_config["image_start_id"])


def _translated(given: dict[str, Any]) -> OwnConfig:
    from transformers import Qwen2Config

    if "visual" not in given:
        raise KeyError("visual")
    vision = dict(given["visual"])
    names = "image_size", "patch_size", "width", "layers", "heads", "mlp_ratio", "output_dim"
    missing = [name for name in (*names, "image_start_id") if name not in vision]
    if missing:
        raise KeyError(f"visual.{missing[0]}")
    text = Qwen2Config(
        hidden_size=given["hidden_size"],
        intermediate_size=given["intermediate_size"] // 2,
        num_hidden_layers=given["num_hidden_layers"],
        num_attention_heads=given["num_attention_heads"],
        num_key_value_heads=given["num_attention_heads"],
        vocab_size=given["vocab_size"],
        max_position_embeddings=min(given["seq_length"], given["max_position_embeddings"]),
        rms_norm_eps=given["layer_norm_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": given["rotary_emb_base"]},
        tie_word_embeddings=False,
    )
    token = vision["image_start_id"] + CONTROL.index(PATCH) - CONTROL.index(IMAGE)
    return OwnConfig("qwen_vl", text, vision, token)


def _jinja(*, chat: bool) -> str:
    """A chat template that writes what the authors' code does for a list of images and a text."""
    said = (
        "{%- if message['content'] is string -%}{{ message['content'] }}"
        "{%- else -%}{%- for part in message['content'] -%}"
        "{%- if part['type'] == 'text' -%}{{ part['text'] }}"
        f"{{%- else -%}}{{{{ 'Picture ' ~ loop.index ~ ': {PATCH}\\n' }}}}{{%- endif -%}}"
        "{%- endfor -%}{%- endif -%}"
    )
    if not chat:
        later = "{%- if not loop.last -%}{{ '\\n' }}{%- endif -%}"
        return f"{{%- for message in messages -%}}{said}{later}{{%- endfor -%}}"
    return (
        "{%- if messages[0]['role'] != 'system' -%}"
        f"{{{{ '{TURN}system\\n{SYSTEM}{TURN_END}\\n' }}}}{{%- endif -%}}"
        "{%- for message in messages -%}"
        f"{{{{ '{TURN}' ~ message['role'] ~ '\\n' }}}}{said}{{{{ '{TURN_END}\\n' }}}}"
        "{%- endfor -%}"
        f"{{%- if add_generation_prompt -%}}{{{{ '{TURN}assistant\\n' }}}}{{%- endif -%}}"
    )
