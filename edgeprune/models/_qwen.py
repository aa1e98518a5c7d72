"""What the Qwen-VL families share: images of any size, frozen to one; M-RoPE; 2 x 2 merger.

The input size is the bundle's: both sides are multiples of patch times merge (28 or 32 pixels), and
each such square is one visual token. A video has one for each square of each pair of frames.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

from PIL import Image
from torch import Tensor

from edgeprune.errors import SpecError
from edgeprune.models import _adapter
from edgeprune.models._decoder_config import DecoderConfig
from edgeprune.models._family import at_size
from edgeprune.models._image_record import Reader, rounded_size
from edgeprune.models._layers import ACTIVATIONS
from edgeprune.models._layout import Layout
from edgeprune.models._media import Media, Takes
from edgeprune.models._mrope import Grid, MRope, in_runs
from edgeprune.models._names import TensorNames
from edgeprune.models._qwen_tower import TowerConfig
from edgeprune.models._towers import patch_grid
from edgeprune.models._video import video
from edgeprune.models._vision import ProjectorConfig, ProjectorLike
from edgeprune.tiling import Size

DEFAULT = Size(448, 448)


_TOWER = {
    r"^patch\.": "patch_embed.proj.",
    r"^post_norm\.": "merger.ln_q.",
    r"\.attention_norm\.": ".norm1.",
    r"\.mlp_norm\.": ".norm2.",
    r"\.qkv\.": ".attn.qkv.",
    r"\.output\.": ".attn.proj.",
}
_PLAIN_MLP = {r"\.mlp\.up\.": ".mlp.fc1.", r"\.mlp\.down\.": ".mlp.fc2."}
_GATED_MLP = {r"\.mlp\.(gate|up|down)\.": r".mlp.\1_proj."}
_PROJECTOR = {r"^first\.": "merger.mlp.0.", r"^second\.": "merger.mlp.2."}


class Adapter(_adapter.Adapter):
    """Base of the families; never built itself."""

    takes: ClassVar[Takes] = Takes(frames=True, sized_frames=True)
    decoder_kind: ClassVar[str | None] = "qwen2"
    sections: ClassVar[tuple[int, ...]] = (16, 24, 24)
    """Pairs of a head that turn by time, by row and by column, where the config does not say."""
    layer_types: ClassVar[frozenset[str]] = frozenset({"full_attention"})
    """Of the decoder's layers, where the config names any."""
    gated: ClassVar[bool]
    frozen: Size
    encoder: TowerConfig

    def demands(self) -> dict[str, bool]:
        return _demands(self.config, self._sections, self._turned, self.layer_types)

    @property
    def _head(self) -> int:
        """Numbers of a head."""
        text = self.config.text_config
        size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return int(size)

    @property
    def _turned(self) -> int:
        """Of these, as many as rotary embedding turns."""
        rope = self.config.text_config.rope_parameters
        return int(self._head * rope.get("partial_rotary_factor", 1.0))

    @property
    def _merge(self) -> int:
        """Patches a side that become one token."""
        return int(self.config.vision_config.spatial_merge_size)

    @property
    def _sections(self) -> tuple[int, ...]:
        """Pairs of a head that turn by time, by row and by column."""
        rope = self.config.text_config.rope_parameters
        return tuple(rope.get("mrope_section", self.sections))

    def axes(self) -> tuple[int, ...]:
        """What each pair of a head turns by: 0 time, 1 row, 2 column."""
        return in_runs(self._sections)

    def with_still(self, axes: tuple[int, ...]) -> tuple[int, ...]:
        """Axes of the pairs that turn, and behind them one for each pair that does not."""
        return (*axes, *(0,) * (self._head // 2 - len(axes)))

    @property
    def _step(self) -> int:
        """Pixels a side of a token."""
        return int(self.config.vision_config.patch_size) * self._merge

    def read_size(self) -> Size:
        return self.asked.size or DEFAULT

    def read_encoder(self) -> TowerConfig:
        rows, columns = patch_grid(self.config, self.frozen, self._step)
        encoder = self.tower_config(self.config.vision_config, rows, columns)
        return replace(encoder, still=self.asked.frames is None)

    def read_media(self) -> Media:
        return super().read_media() if self.asked.frames is None else video(self.config)

    def read_layout(self) -> Layout:
        encoder = self.encoder
        run = Layout.plain(encoder.rows, self._merge, self._spans(), encoder.columns)
        return run.chained(self.between)

    def read_projector(self) -> ProjectorLike:
        inputs = self._merge**2 * self.encoder.width
        return ProjectorConfig(inputs, self.config.text_config.hidden_size, "gelu", hidden=inputs)

    def read_decoder(self) -> DecoderConfig:
        return replace(super().read_decoder(), mrope=self.read_mrope())

    def read_mrope(self) -> MRope:
        """The positions of what a prompt shows."""
        rows, columns = (n // self._merge for n in (self.encoder.rows, self.encoder.columns))
        grid = Grid(rows, columns, self.times(self._spans()))
        others = tuple(part for text in self.between for part in (len(text), grid))
        return MRope.of(self.axes(), grid, *others)

    def _spans(self) -> int:
        """Groups of frames that are one in time, of a run of visual tokens; 1 of an image."""
        if self.asked.frames is None:
            return 1
        spans, rest = divmod(self.shown, self.encoder.frames)
        if rest:
            raise SpecError(
                f"--frames of a {self.config.model_type} is a multiple of {self.encoder.frames};"
                f" got {self.asked.frames}"
            )
        return spans // self.media.runs

    def times(self, spans: int) -> tuple[int, ...]:
        """The position in time of each span of frames of a run."""
        return tuple(range(spans))

    @property
    def pixels(self) -> tuple[int, ...]:
        return self.shown, 3, *self.vision_config.encoder.size

    def tower_config(self, vision: Any, rows: int, columns: int) -> TowerConfig:
        """The vision tower for an image of rows x columns patches."""
        raise NotImplementedError

    def preprocess(self, image_processor: Any, image: Image.Image) -> Tensor:
        image = at_size(image, self.frozen, self._step, image_processor.resample)
        found = image_processor(image, do_resize=False, return_tensors="pt")["pixel_values"]
        return self._raster(found.float())

    def _raster(self, patches: Tensor) -> Tensor:
        """Patches in the order of merging, each of equal frames: [n, ...] -> [1, 3, H, W]."""
        encoder, merge = self.encoder, self._merge
        rows, columns = (length // self._step for length in encoder.size)
        split = patches.view(rows, columns, merge, merge, 3, -1, encoder.patch, encoder.patch)
        still = split[:, :, :, :, :, 0]  # [rows, columns, merge, merge, 3, patch, patch]
        return still.permute(4, 0, 2, 5, 1, 3, 6).reshape(1, 3, *encoder.size)

    def tensor_names(self) -> TensorNames:
        prefixes = "visual.", "model.visual."
        return TensorNames(
            tower=_TOWER | (_GATED_MLP if self.gated else _PLAIN_MLP),
            tower_prefixes=prefixes,
            projector=_PROJECTOR,
            projector_prefixes=prefixes,
            decoder_prefixes=("model.", "model.language_model."),
            head=("lm_head.weight",),
        )

    def image_readers(self) -> Mapping[str, Reader]:
        return {"Qwen2VLImageProcessor": partial(rounded_size, frozen=self.frozen)}


def tower(vision: Any, rows: int, columns: int, width: int, mlp_width: int) -> TowerConfig:
    """What the configs of all these towers name alike; the rest is a family's own."""
    return TowerConfig(
        blocks=vision.depth,
        width=width,
        mlp_width=mlp_width,
        heads=vision.num_heads,
        patch=vision.patch_size,
        frames=vision.temporal_patch_size,
        rows=rows,
        columns=columns,
        activation=vision.hidden_act,
        theta=vision.rope_parameters["rope_theta"],
    )


def _demands(
    config: Any, sections: tuple[int, ...], turned: int, layer_types: frozenset[str]
) -> dict[str, bool]:
    vision, text = config.vision_config, config.text_config
    kind = vision.rope_parameters["rope_type"]
    layers = set(getattr(text, "layer_types", ()))
    return {
        f"activation {vision.hidden_act!r}": vision.hidden_act in ACTIVATIONS,
        f"patch_size {vision.patch_size}": isinstance(vision.patch_size, int),
        f"temporal_patch_size {vision.temporal_patch_size}": vision.temporal_patch_size == 2,
        f"{vision.in_channels} colours": vision.in_channels == 3,
        f"rope_type {kind!r} in the vision tower": kind == "axial",
        f"mrope_section {list(sections)}": 2 * sum(sections) == turned,
        "sliding windows in the decoder": layers <= layer_types,
    }
