"""Qwen3-VL, and Cosmos-Reason2 on it: a learned position grid in the tower, DeepStack, M-RoPE whose
axes take turns."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, ClassVar

from edgeprune.models import _qwen
from edgeprune.models._media import IMAGE_SLOT, Media
from edgeprune.models._mrope import interleaved
from edgeprune.models._names import TensorNames
from edgeprune.models._nearby import Nearby
from edgeprune.models._qwen_tower import EPS, TowerConfig
from edgeprune.models._video import sampling_rate, timed_at
from edgeprune.models._vision import ProjectorConfig

_TOWER = {
    r"^patch\.": "patch_embed.proj.",
    r"^position\.": "pos_embed.",
    r"^post_norm\.": "merger.norm.",
    r"\.attention_norm\.": ".norm1.",
    r"\.mlp_norm\.": ".norm2.",
    r"\.qkv\.": ".attn.qkv.",
    r"\.output\.": ".attn.proj.",
    r"\.mlp\.up\.": ".mlp.linear_fc1.",
    r"\.mlp\.down\.": ".mlp.linear_fc2.",
}
_MERGER = {r"first\.": "linear_fc1.", r"second\.": "linear_fc2."}


class Adapter(_qwen.Adapter):
    """Features of three middle blocks of the tower go through mergers of their own. They are added
    to the visual tokens after the decoder's first three layers (DeepStack, arXiv 2406.04334).

    transformers lets axes take turns whatever `mrope_interleaved` says.

    Each pair of a video's frames stands like an image of its own behind its time, in seconds.
    """

    nearby: ClassVar[tuple[Nearby, ...]] = (
        Nearby(
            "Qwen3-VL with experts",
            ("qwen3_vl_moe",),
            decoder="a mixture of experts in place of the MLP",
        ),
        Nearby(
            "Cosmos3-Edge",
            ("cosmos3_edge",),
            tower="a position grid that follows SigLIP2",
            decoder="an MLP without gate, of a squared relu",
        ),
    )
    decoder_kind: ClassVar[str | None] = "qwen3"
    sections: ClassVar[tuple[int, ...]] = (24, 20, 20)

    def config_class(self) -> Any:
        from transformers import Qwen3VLConfig

        return Qwen3VLConfig

    def demands(self) -> dict[str, bool]:
        vision, text = self.config.vision_config, self.config.text_config
        grid, read = vision.num_position_embeddings, list(self._middle)
        inside = all(0 <= block < vision.depth for block in read)
        return {
            **super().demands(),
            f"a grid of {grid} positions": math.isqrt(grid) ** 2 == grid,
            f"deepstack_visual_indexes {read} of {vision.depth} blocks": inside
            and read == sorted(set(read)),
            f"{len(read)} DeepStack layers of {text.num_hidden_layers}": len(read)
            <= text.num_hidden_layers,
            f"out_hidden_size {vision.out_hidden_size} for a decoder of {text.hidden_size}": (
                vision.out_hidden_size == text.hidden_size
            ),
        }

    @property
    def _middle(self) -> tuple[int, ...]:
        """Blocks of the tower whose features go to the decoder too."""
        return tuple(self.config.vision_config.deepstack_visual_indexes)

    def axes(self) -> tuple[int, ...]:
        return interleaved(self._sections)

    def read_media(self) -> Media:
        media = super().read_media()
        if self.asked.frames is None:
            return media
        start, end = self.config.vision_start_token_id, self.config.vision_end_token_id
        before, after = (self.chat.tokenizer.convert_ids_to_tokens(i) for i in (start, end))
        middle = (0.5 + 2 * pair for pair in range(self.shown // 2))  # in frames
        times = (f"<{frame / self._fps:.1f} seconds>" for frame in middle)
        return replace(media, template="".join(f"{t}{before}{IMAGE_SLOT}{after}" for t in times))

    @property
    def _fps(self) -> float:
        """Frames a second that a video is taken to be sampled at."""
        return sampling_rate(self.checkpoint, default=2)

    def notes(self) -> tuple[str, ...]:
        return () if self.asked.frames is None else (timed_at(self._fps),)

    def tower_config(self, vision: Any, rows: int, columns: int) -> TowerConfig:
        return replace(
            _qwen.tower(vision, rows, columns, vision.hidden_size, vision.intermediate_size),
            patch_bias=True,
            position_side=math.isqrt(vision.num_position_embeddings),
            middle=self._middle,
        )

    def read_deepstack(self) -> tuple[ProjectorConfig, ...]:
        inputs, output = self._merge**2 * self.encoder.width, self.config.text_config.hidden_size
        merger = ProjectorConfig(inputs, output, "gelu", norm=True, hidden=inputs, eps=EPS)
        return (merger,) * len(self.encoder.middle)

    def tensor_names(self) -> TensorNames:
        prefixes = "model.visual.", "visual."
        return TensorNames(
            tower=_TOWER,
            tower_prefixes=prefixes,
            projector={r"^": "merger.", **_MERGER},
            projector_prefixes=prefixes,
            deepstack={r"^": "deepstack_merger_list.", **_MERGER},
            decoder_prefixes=("model.language_model.", "model."),
            head=("lm_head.weight",),
        )
