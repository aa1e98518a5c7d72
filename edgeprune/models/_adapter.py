"""What a model family answers: its sizes, its two modules, and where their weights are stored."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn

from edgeprune.errors import ModelError
from edgeprune.models._chat import Chat
from edgeprune.models._checkpoint import Checkpoint
from edgeprune.models._decoder import Decoder, DecoderConfig
from edgeprune.models._format import check_stored, why_missing
from edgeprune.models._layers import Linear, set_tables
from edgeprune.models._lora import MERGE
from edgeprune.models._media import Asked, Media
from edgeprune.models._names import CLIP, stored_names
from edgeprune.models._ops import TorchOps
from edgeprune.models._rounding import rounded
from edgeprune.models._unread import is_spare, told
from edgeprune.models._vision import Vision, VisionConfig
from edgeprune.policies import Policy, make
from edgeprune.spec import ModelShape, Plan, PruneSpec
from edgeprune.tiling import Size, Tiling, fitted


@dataclass(frozen=True, slots=True)
class Source:
    """Where a parameter comes from: a tensor's name, and whether it is stored the other way."""

    name: str
    shape: tuple[int, ...]  # as stored, but for axes of length 1
    transposed: bool
    rows: tuple[int, ...] = ()  # only these
    change: str = ""  # the adapter's name of the tensor, where a LoRA adapter changes it


class Adapter:
    """Base of all families; never built itself."""

    tower: ClassVar[Mapping[str, str]] = CLIP
    """How the checkpoint names the parameters of the vision tower."""

    stem: str = "vision_tower"
    """How it names the tower itself."""

    media: Media
    tiling: Tiling | None = None  # the tiles that a picture is cut into, where it is
    frozen: Size | None = None  # the size of pictures, where the processor leaves it open
    vision_config: VisionConfig
    decoder_config: DecoderConfig

    def __init__(self, checkpoint: Checkpoint, config: Any, asked: Asked) -> None:
        self.checkpoint = checkpoint
        self.config = config  # transformers', of the family
        self.asked = asked
        self.media = Media.pictures(config, asked.pictures)

    @property
    def shape(self) -> ModelShape:
        decoder, layout = self.decoder_config, self.vision_config.layout
        encoder = self.vision_config.encoder
        return ModelShape(
            family=self.config.model_type,
            visual_tokens=layout.visual_tokens,
            grid=layout.grid,
            layers=decoder.layers,
            width=decoder.width,
            mlp_width=decoder.mlp_width,
            attention_heads=decoder.heads,
            kv_heads=decoder.kv_heads,
            head_size=decoder.head_size,
            vocabulary=decoder.vocabulary,
            max_positions=decoder.max_positions,
            has_cls=encoder.cls,
            separators=len(layout.fixed),
            mrope=decoder.mrope is not None,
            blocks=encoder.merging_blocks if layout.is_plain else 0,
        )

    @property
    def image_token_id(self) -> int:
        return self.media.token

    @property
    def shown(self) -> int:
        """Pictures or frames of a prompt."""
        return self.asked.frames or self.asked.pictures

    def between(self) -> list[list[int]]:
        """Ids of the text between the runs of visual tokens of a prompt; none where there is one
        run alone."""
        if self.media.runs == 1:
            return []
        chat = Chat(self.checkpoint.folder, self.config.model_type)
        return chat.split(self.media, "?")[1]

    @property
    def pixels(self) -> tuple[int, ...]:
        """Shape of what the vision graph takes: [tiles, 3, height, width]."""
        return self.vision_config.layout.tiles, 3, *self.vision_config.encoder.size

    def picture_processor(self, own: Callable[[], Any]) -> Any:
        """What treats each picture or frame: the checkpoint's own image processor, which `own`
        reads, unless it does otherwise with one picture alone."""
        return own()

    def look(self, image_processor: Any, image: Image.Image) -> Tensor:
        """A picture through the checkpoint's own image processor: float32, of shape `pixels`."""
        if self.tiling is not None:
            image = on_canvas(image, Size(self.tiling.height, self.tiling.width))
        found: Tensor = image_processor(image, return_tensors="pt")["pixel_values"]
        return found.float().flatten(0, -4)

    def vision(self, policy: Policy, plan: Plan, ops: TorchOps | None = None) -> nn.Module:
        """Module: pixels -> (visual tokens [1, r_1, width], kept positions [r_1])."""
        return Vision(self.vision_config, policy, plan, ops)

    def decoder(self, policy: Policy, plan: Plan, ops: TorchOps | None = None) -> Decoder:
        config = replace(self.decoder_config, tile_of=self.vision_config.layout.group_of)
        return Decoder(config, policy, plan, ops)

    def names(self, parameter: str) -> tuple[str, ...]:
        """Names under which checkpoints of this family store a parameter, likeliest first."""
        return stored_names(parameter, self.tower, self.stem)

    def sources(self, module: nn.Module) -> dict[str, Source]:
        """For each parameter of a module of ours, its tensor in the checkpoint."""
        found = {}
        for name, parameter in module.named_parameters():
            source = self._source(name, parameter, _is_linear(module, name))
            found[name] = source
        return found

    def _source(self, name: str, parameter: Tensor, transposed: bool) -> Source:
        names, checkpoint = self._names(name), self.checkpoint
        stored = self._stored(names)
        check_stored(
            checkpoint.files[stored],
            stored,
            checkpoint.dtype(stored),
            checkpoint.leaves[stored.rpartition(".")[0]],
        )
        shape, rows = checkpoint.shape(stored), self._rows(name)
        if rows:
            shape = len(rows), *shape[1:]
        wanted = tuple(parameter.shape)[::-1] if transposed else tuple(parameter.shape)
        if not _alike(shape, wanted):
            raise ModelError(
                f"{checkpoint.files[stored].name}: {stored} is {list(shape)},"
                f" config.json says {list(wanted)}; the two are not of one checkpoint"
            )
        return Source(stored, wanted, transposed, rows, self._change(name, names))

    def _stored(self, names: tuple[str, ...]) -> str:
        """Under which of its names a tensor is stored; where under several, they must be equal."""
        files, folder = self.checkpoint.files, self.checkpoint.folder
        found = [name for name in names if name in files]
        if not found:
            raise ModelError(f"{folder} has no tensor {names[0]}; {why_missing(names, files)}")
        for other in found[1:]:
            if not torch.equal(self.checkpoint.read(found[0]), self.checkpoint.read(other)):
                raise ModelError(
                    f"{folder} stores one weight twice, as {found[0]} and as {other}, and the two"
                    " differ; remove the one that is not meant"
                )
        return found[0]

    def _names(self, parameter: str) -> tuple[str, ...]:
        """Names under which a parameter may be stored: of a tied embedding, those of the head
        too."""
        names = self.names(parameter)
        embedding = parameter in ("embedding.weight", "fixed.text")
        return (
            names + self.names("head.weight") if embedding and self.decoder_config.tied else names
        )

    def _change(self, parameter: str, names: tuple[str, ...]) -> str:
        """The adapter's name of a tensor that it changes, else empty."""
        change = self.checkpoint.lora.spelling(names) if self.checkpoint.lora else ""
        if change and parameter == "embedding.weight" and self.decoder_config.tied:
            raise ModelError(
                f"the adapter changes {change}, which is both embedding and output head of this"
                f" model; {MERGE}, saved with tie_word_embeddings false"
            )
        return change

    @cached_property
    def remarks(self) -> tuple[str, ...]:
        """What was done with a folder's weights, for people; ModelError where they mean something
        else than what would be exported."""
        policy, plan = make(PruneSpec("none")), Plan(self.shape.visual_tokens, self.shape.layers)
        with torch.device("meta"):
            modules = self.vision(policy, plan), self.decoder(policy, plan)
        sources = [source for module in modules for source in self.sources(module).values()]
        parameters = (name for module in modules for name, _ in module.named_parameters())
        read = {stored for parameter in parameters for stored in self._names(parameter)}
        return told(self.checkpoint, read, {s.change for s in sources}, self.is_spare)

    def is_spare(self, name: str) -> bool:
        """Whether checkpoints of the family store a tensor that no graph of a bundle needs."""
        return is_spare(name, self.vision_config.encoder.blocks)

    def _rows(self, parameter: str) -> tuple[int, ...]:
        """Which rows of a stored tensor a parameter is; none where it is the whole."""
        return self.vision_config.layout.text if parameter == "fixed.text" else ()

    def read(self, source: Source, dtype: torch.dtype) -> Tensor:
        """One parameter, laid out and rounded as a module of ours wants it; ModelError where the
        checkpoint holds a number that is not finite or that does not fit the dtype."""
        tensor = self.checkpoint.read(source.name)
        if source.change and self.checkpoint.lora is not None:
            tensor = self.checkpoint.lora.merged(source.change, tensor)
        if source.rows:
            tensor = tensor[list(source.rows)]
        where = f"{self.checkpoint.files[source.name].name}: {source.name}"
        tensor = rounded(tensor, dtype, where).reshape(source.shape)
        return tensor.t().contiguous() if source.transposed else tensor.contiguous()

    def load(self, module: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
        """Fill a module built on the meta device with weights; returns it ready to run."""
        module.to_empty(device="cpu").to(dtype)
        set_tables(module, dtype)
        parameters = dict(module.named_parameters())
        for name, source in self.sources(module).items():
            parameters[name].data.copy_(self.read(source, dtype))
        return module.eval().requires_grad_(False)


def _is_linear(module: nn.Module, parameter: str) -> bool:
    owner, _, leaf = parameter.rpartition(".")
    return leaf == "weight" and isinstance(module.get_submodule(owner), Linear)


def on_canvas(image: Image.Image, size: Size) -> Image.Image:
    """A picture fitted into another size, its aspect ratio kept, the rest black."""
    height, width = fitted(Size(image.height, image.width), size)
    canvas = Image.new("RGB", (size.width, size.height))
    at = (size.width - width) // 2, (size.height - height) // 2
    canvas.paste(image.resize((width, height), Image.Resampling.BICUBIC), at)
    return canvas


def _alike(stored: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether shapes hold the same elements in the same order, as far as they can tell: axes of
    length 1 aside, and a kernel over frames taken for one over as many more channels."""
    if len(stored) == 5:
        stored = stored[0], stored[1] * stored[2], *stored[3:]
    bare = ([size for size in shape if size != 1] for shape in (stored, wanted))
    return next(bare) == next(bare)


def parameters(module: nn.Module) -> Iterator[str]:
    """Names of a module's parameters, in the order in which they are stored."""
    return (name for name, _ in module.named_parameters())
