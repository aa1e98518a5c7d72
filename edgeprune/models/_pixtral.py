"""What families with Pixtral's tower share: images of any size, frozen to one, a run a row.

Both sides of the frozen size are multiples of a token's pixels. Behind each row of tokens stands a
token that ends it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from PIL import Image
from torch import Tensor

from edgeprune.errors import ModelError
from edgeprune.manifest import ImageRecord
from edgeprune.models import _adapter
from edgeprune.models._family import at_size
from edgeprune.models._image_record import Reader, count, levels, resample, unsupported
from edgeprune.models._layers import ACTIVATIONS
from edgeprune.models._layout import Layout
from edgeprune.models._media import IMAGE_SLOT, Media
from edgeprune.models._names import LLAMA, PACKED, Stored, TensorNames
from edgeprune.models._qwen_tower import TowerConfig
from edgeprune.models._stored import read_json
from edgeprune.models._towers import patch_grid
from edgeprune.tiling import Size

SIDE = 448
"""Pixels a side, about, where no size is asked for."""
EPS = 1e-5
"""Of every norm of the tower; no config says otherwise."""
MARKS = {"image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"}
"""Behind a row of tokens, and behind the last one, where the processor's settings do not say."""

_TOWER = {
    r"^patch\.": "patch_conv.",
    r"^pre_norm\.": "ln_pre.",
    r"^blocks\.": "transformer.layers.",
    r"\.mlp_norm\.": ".ffn_norm.",
    r"\.query\.": ".attention.q_proj.",
    r"\.key\.": ".attention.k_proj.",
    r"\.value\.": ".attention.v_proj.",
    r"\.output\.": ".attention.o_proj.",
    r"\.mlp\.(gate|up|down)\.": r".feed_forward.\1_proj.",
}


class Adapter(_adapter.Adapter):
    """Base of the families; never built itself."""

    frozen: Size
    encoder: TowerConfig

    @property
    def merge(self) -> int:
        """Patches a side that become one token."""
        return 1

    @property
    def step(self) -> int:
        """Pixels a side of a token."""
        return int(self.config.vision_config.patch_size) * self.merge

    def demands(self) -> dict[str, bool]:
        vision, layer = self.config.vision_config, self.config.vision_feature_layer
        kind = vision.rope_parameters["rope_type"] if vision.model_type == "pixtral" else "axial"
        return {
            f"a {vision.model_type} vision tower": vision.model_type == "pixtral",
            f"activation {vision.hidden_act!r}": vision.hidden_act in ACTIVATIONS,
            f"patch_size {vision.patch_size}": isinstance(vision.patch_size, int),
            f"{vision.num_channels} colours": vision.num_channels == 3,
            f"rope_type {kind!r} in the vision tower": kind == "axial",
            f"vision_feature_layer {layer}": layer in (-1, vision.num_hidden_layers),
        }

    def read_size(self) -> Size:
        side = max(1, round(SIDE / self.step)) * self.step
        return self.asked.size or Size(side, side)

    def read_encoder(self) -> TowerConfig:
        vision = self.config.vision_config
        rows, columns = patch_grid(self.config, self.frozen, self.step)
        return TowerConfig(
            blocks=vision.num_hidden_layers,
            width=vision.hidden_size,
            mlp_width=vision.intermediate_size,
            heads=vision.num_attention_heads,
            patch=vision.patch_size,
            frames=1,
            rows=rows,
            columns=columns,
            activation=vision.hidden_act,
            theta=vision.rope_parameters["rope_theta"],
            gated=True,
            bias=False,
            eps=EPS,
            pre_norm=True,
            post_norm=False,
            mixed=True,
        )

    def read_media(self) -> Media:
        file = self.checkpoint.folder / "processor_config.json"
        settings = read_json(file) if file.is_file() else {}
        behind, last = (str(settings.get(name, mark)) for name, mark in MARKS.items())
        rows = self.encoder.rows // self.merge
        written = behind.join([IMAGE_SLOT] * rows) + last
        return Media.of_images(self.config, self.asked.images, written)

    def read_layout(self) -> Layout:
        shape = self.encoder.rows, self.merge, self.asked.images, self.encoder.columns
        return Layout.plain(*shape).parted(self.between)

    def preprocess(self, image_processor: Any, image: Image.Image) -> Tensor:
        image = at_size(image, self.frozen, self.step, image_processor.resample)
        found = image_processor(image, do_resize=False, return_tensors="pt")["pixel_values"]
        return Tensor(found).float()

    def tensor_names(self) -> TensorNames:
        prefixes = "vision_tower.", "model.vision_tower."
        return TensorNames(tower=_TOWER, tower_prefixes=prefixes, decoder=LLAMA)

    def stored(self, parameter: str) -> Stored:
        """Queries, keys and values, which are one product here, are stored by themselves."""
        if ".qkv." not in parameter:
            return super().stored(parameter)
        return Stored(tuple(self.names(parameter.replace("qkv", part)) for part in PACKED))

    def image_readers(self) -> Mapping[str, Reader]:
        return {"PixtralImageProcessor": partial(rounded_up, frozen=self.frozen, step=self.step)}


def rounded_up(processor: Any, frozen: Size, step: int) -> ImageRecord:
    """Of a processor that makes an image as large as a bound allows, if it is larger, and rounds
    both sides up: resizing to the frozen size. ModelError where it never makes that size."""
    if not processor.do_resize:
        raise unsupported("do_resize", False, "True")
    if processor.do_center_crop:
        raise unsupported("do_center_crop", True, "False")
    edges = {name: value for name, value in dict(processor.size or {}).items() if value is not None}
    names = ("longest_edge",) * 2 if "longest_edge" in edges else ("height", "width")
    most = Size(*(-(-count("size", edges.get(name)) // step) * step for name in names))
    if frozen.height > most.height or frozen.width > most.width:
        raise ModelError(
            f"--image-size {frozen.width}x{frozen.height}: the checkpoint's image processor makes"
            f" {most.width}x{most.height} at most; choose a smaller size"
        )
    (height, width), how = frozen, resample(processor.resample)
    return ImageRecord(height, width, (height, width), how, None, *levels(processor), step=step)
