"""What Qwen2-VL and Qwen2.5-VL share: pictures of any size, frozen to one; M-RoPE; 2 x 2 merger.

The input size is the bundle's: both sides are multiples of patch times merge (28 pixels), and each
such square is one visual token. A video has one for each square of each pair of frames.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from PIL import Image
from torch import Tensor

from edgeprune.errors import SpecError
from edgeprune.models import _adapter
from edgeprune.models._adapter import on_canvas
from edgeprune.models._checkpoint import Checkpoint
from edgeprune.models._encoder import ACTIVATIONS
from edgeprune.models._layout import Layout
from edgeprune.models._media import Asked
from edgeprune.models._mrope import Grid, MRope
from edgeprune.models._names import LLAMA, translate
from edgeprune.models._qwen_tower import TowerConfig
from edgeprune.models._text import decoder_config
from edgeprune.models._towers import is_tied, read_config, refuse
from edgeprune.models._video import video
from edgeprune.models._vision import ProjectorConfig, VisionConfig
from edgeprune.tiling import Size, rounds_to

DEFAULT = Size(448, 448)


_TOWER = {
    r"^encoder\.patch\.": "patch_embed.proj.",
    r"^encoder\.post_norm\.": "merger.ln_q.",
    r"^encoder\.blocks\.": "blocks.",
    r"\.attention_norm\.": ".norm1.",
    r"\.mlp_norm\.": ".norm2.",
    r"\.qkv\.": ".attn.qkv.",
    r"\.output\.": ".attn.proj.",
    r"^projector\.first\.": "merger.mlp.0.",
    r"^projector\.second\.": "merger.mlp.2.",
}
_PLAIN_MLP = {r"\.mlp\.up\.": ".mlp.fc1.", r"\.mlp\.down\.": ".mlp.fc2."}
_GATED_MLP = {r"\.mlp\.(gate|up|down)\.": r".mlp.\1_proj."}


class Adapter(_adapter.Adapter):
    """Base of the two families; never built itself."""

    gated: ClassVar[bool]

    def __init__(self, checkpoint: Checkpoint, kind: Any, asked: Asked) -> None:
        config = read_config(checkpoint, kind)
        super().__init__(checkpoint, config, asked)
        _refuse(config)
        asked.allow(config.model_type, pictures=True, frames=True, sized=True)
        merge = config.vision_config.spatial_merge_size
        self.frozen, self.step = asked.size or DEFAULT, config.vision_config.patch_size * merge
        grid = _grid(config, self.frozen, self.step)
        encoder = replace(
            self.tower_config(config.vision_config, *grid), still=asked.frames is None
        )
        inputs, output = merge**2 * encoder.width, config.text_config.hidden_size
        projector = ProjectorConfig(inputs, output, "gelu", hidden=inputs)
        layout, mrope = self._shown(encoder, merge)
        self.vision_config = VisionConfig(encoder, projector, layout)
        text = decoder_config(config.text_config, is_tied(checkpoint, config))
        self.decoder_config = replace(text, mrope=mrope)

    def _shown(self, encoder: TowerConfig, merge: int) -> tuple[Layout, MRope]:
        """The visual tokens of a prompt, and where they stand."""
        rope = self.config.text_config.rope_parameters
        sections = tuple(rope.get("mrope_section", (16, 24, 24)))
        grid = Grid(encoder.rows // merge, encoder.columns // merge)
        if self.asked.frames is None:
            between = self.between()
            layout = Layout.plain(encoder.rows, merge, across=encoder.columns).chained(between)
            others = (part for text in between for part in (len(text), grid))
            return layout, MRope.of(sections, grid, *others)
        spans, rest = divmod(self.asked.frames, encoder.frames)
        if rest:
            raise SpecError(
                f"--frames of a {self.config.model_type} is a multiple of {encoder.frames}; got"
                f" {self.asked.frames}"
            )
        self.media = video(self.config)
        layout = Layout.plain(encoder.rows, merge, spans, encoder.columns)
        return layout, MRope.of(sections, grid._replace(times=self.times(spans)))

    def times(self, spans: int) -> tuple[int, ...]:
        """The position in time of each span of frames of a video."""
        return tuple(range(spans))

    @property
    def pixels(self) -> tuple[int, ...]:
        return self.shown, 3, *self.vision_config.encoder.size

    def tower_config(self, vision: Any, rows: int, columns: int) -> TowerConfig:
        """The vision tower for a picture of rows x columns patches."""
        raise NotImplementedError

    def look(self, image_processor: Any, image: Image.Image) -> Tensor:
        assert self.frozen is not None
        height, width = self.frozen
        if rounds_to(Size(image.height, image.width), self.frozen, self.step):
            image = image.resize((width, height), image_processor.resample)
        else:
            image = on_canvas(image, self.frozen)
        found = image_processor(image, do_resize=False, return_tensors="pt")["pixel_values"]
        return self._raster(found.float())

    def _raster(self, patches: Tensor) -> Tensor:
        """Patches in the order of merging, each of equal frames: [n, ...] -> [1, 3, H, W]."""
        encoder, merge = self.vision_config.encoder, self.vision_config.layout.merge
        rows, columns = (length // self.step for length in encoder.size)
        split = patches.view(rows, columns, merge, merge, 3, -1, encoder.patch, encoder.patch)
        still = split[:, :, :, :, :, 0]  # [rows, columns, merge, merge, 3, patch, patch]
        return still.permute(4, 0, 2, 5, 1, 3, 6).reshape(1, 3, *encoder.size)

    def names(self, parameter: str) -> tuple[str, ...]:
        owner = parameter.partition(".")[0]
        if owner == "head":
            return ("lm_head.weight",)
        if owner in ("encoder", "projector"):
            table = _TOWER | (_GATED_MLP if self.gated else _PLAIN_MLP)
            stem = translate(parameter, table)
            return f"visual.{stem}", f"model.visual.{stem}"
        embedding = parameter == "fixed.text"  # text between pictures
        stem = translate("embedding.weight" if embedding else parameter, LLAMA)
        return f"model.{stem}", f"model.language_model.{stem}"


def _grid(config: Any, size: Size, step: int) -> tuple[int, int]:
    """Rows and columns of patches of a picture of a frozen size."""
    if size.width % step or size.height % step:
        width, height = (max(1, round(side / step)) * step for side in (size.width, size.height))
        raise SpecError(
            f"--image-size {size.width}x{size.height}: sides of a {config.model_type} are multiples"
            f" of {step}; the nearest such size is {width}x{height}"
        )
    patch = config.vision_config.patch_size
    return size.height // patch, size.width // patch


def _refuse(config: Any) -> None:
    """Name what a config asks for and this adapter does not do."""
    vision, text = config.vision_config, config.text_config
    kind = vision.rope_parameters["rope_type"]
    head_size = text.hidden_size // text.num_attention_heads
    sections = text.rope_parameters.get("mrope_section", (16, 24, 24))
    refuse(
        config,
        {
            f"activation {vision.hidden_act!r}": vision.hidden_act in ACTIVATIONS,
            f"patch_size {vision.patch_size}": isinstance(vision.patch_size, int),
            f"temporal_patch_size {vision.temporal_patch_size}": vision.temporal_patch_size == 2,
            f"{vision.in_channels} colours": vision.in_channels == 3,
            f"rope_type {kind!r} in the vision tower": kind == "axial",
            f"mrope_section {list(sections)}": 2 * sum(sections) == head_size,
            "sliding windows in the decoder": set(text.layer_types) == {"full_attention"},
        },
    )
