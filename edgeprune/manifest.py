"""manifest.json as frozen dataclasses: what the runtime has to know of a bundle."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field, replace
from math import inf
from typing import Annotated, Any

from edgeprune.dial import widest
from edgeprune.errors import SpecError
from edgeprune.generation import Sampling
from edgeprune.graphs import DECODER, DELTA, GRAPHS, JOIN, VISION, GraphRecord, PartRecord
from edgeprune.lowering import DTYPES, TARGETS
from edgeprune.measured import ChoiceRecord, ParityRecord, RangeRecord, TimingRecord, WeightsRecord
from edgeprune.records import (
    Amount,
    Between,
    Bytes,
    Count,
    Few,
    LongestEdge,
    Matches,
    OneOf,
    Ratio,
    Side,
)
from edgeprune.spec import LinearAttention, Plan, Stage
from edgeprune.tiling import Size, Tiling, ViewRule, Views
from edgeprune.weight_format import WeightFormat

SCHEMA = 5
"""Raised where the format changes."""

DATE = re.compile(r"\{now:((?:%-?[A-Za-z]|[^%{}]){1,64})\}")
"""The hole of a prompt's template for the date of the day on which it is written."""

DIALECTS = tuple(dict.fromkeys(target.dialect for target in TARGETS.values()))
CACHES = ("in-place", "grow")
"""In place: present is past, written at lengths. Where caches grow, present is longer than past."""

_Byte = Annotated[int, Between(0, 255)]
Hash = Annotated[str, Matches("[0-9a-f]{64}", "a SHA-256 of 64 hexadecimal digits")]
Seed = Annotated[int, Between(0, (1 << 63) - 1)]
Level = Annotated[float, Between(-1e6, 1e6)]
Scale = Annotated[float, Between(1e-6, 1e6)]
Rgb = tuple[_Byte, _Byte, _Byte]
Filter = Annotated[int, Between(0, 5)]  # Pillow's numbers


@dataclass(frozen=True, slots=True)
class FileRecord:
    """Size in bytes and SHA-256 of one file of a bundle."""

    bytes: Bytes
    sha256: Hash


@dataclass(frozen=True, slots=True)
class PruneRecord:
    """What was asked and what is frozen in: r_1 ... r_L and the certificate of the schedule."""

    method: str
    cr: Ratio
    cr_reached: Ratio
    visual_tokens: Count  # V, before any pruning
    grid: tuple[Count, Count]  # rows, columns of the V tokens
    counts: tuple[Amount, ...]  # r_1 ... r_L
    stages: tuple[Stage, ...]  # where tokens leave, in the order in which they meet them
    reads_text: bool  # whether what stays of an image depends on the text that is read with it
    seed: Seed | None  # of a method that draws, None of others
    options: dict[str, str] = field(default_factory=dict)
    schedule: dict[str, Any] | None = None

    @property
    def encoded(self) -> int:
        """Visual tokens before the decoder: r_1, or more where the text prunes too."""
        return self.plan.encoded

    @property
    def plan(self) -> Plan:
        """The sizes that were frozen in."""
        return Plan(self.visual_tokens, len(self.counts), self.stages)


@dataclass(frozen=True, slots=True)
class DeltaRecord:
    """The encoder for frames of a fixed camera of which few patches changed."""

    patches: Count  # of a tile that go through it, whether so many changed or not
    unit: Few  # patches a side of those that become one visual token, and go through it together
    patch: Side  # pixels a side of one
    heads: Few
    operations: Bytes  # for these patches of a tile, and [CLS]


@dataclass(frozen=True, slots=True)
class EncoderRecord:
    """The vision encoder: what goes through its blocks, and what shortening it does.

    A unit is the patches that become one visual token, or one patch. Operations are of all tiles:
    patch embedding, blocks and the map of an exit.
    """

    method: str  # as --encoder takes it
    blocks: Few
    width: Count
    patches: Count  # of a tile
    tiles: Few  # or images, or frames, that are encoded at once
    extra: Amount  # tokens of a tile that are no patch: [CLS]
    window: Amount  # patches of a window, in most blocks; 0: attention is over a tile
    shown: Few  # images or frames of a prompt
    operations: Bytes
    dense_operations: Bytes  # were nothing to leave
    units: Count  # of a tile
    kept: Count  # units of a tile that go through all blocks
    samples: Amount = 0  # on which loss was measured
    r2: Annotated[float, Between(-1e6, 1)] | None = None  # of an exit's map, on images it never saw
    angle: Annotated[float, Between(0, 4)] | None = None  # mean, in radians, between the decoder's
    # last features with the shortened encoder and with all of it
    delta: DeltaRecord | None = None  # None: frames are encoded as a whole

    @property
    def share(self) -> float:
        """Of the dense encoder's operations."""
        return self.operations / max(1, self.dense_operations)

    @property
    def changed_share(self) -> float:
        """Of this encoder's operations, where few patches of every tile changed."""
        return self.tiles * (self.delta.operations if self.delta else 0) / max(1, self.operations)


@dataclass(frozen=True, slots=True)
class DecoderRecord:
    """What the runtime needs to feed decoder.onnx; sizes are counts."""

    layers: Few
    kv_heads: Few
    head_size: Few
    width: Count
    mlp_width: Count
    attention_heads: Few
    vocabulary: Count
    max_positions: Count
    cache: Annotated[str, OneOf(CACHES)]
    image_positions: Amount  # that an image takes: r_1, V where tokens keep theirs, or by M-RoPE
    deepstack: Amount = 0  # first layers after each of which a row is added to every visual token
    convolutions: tuple[Few, ...] = ()  # layers with a short convolution in place of attention
    kernel: Amount = 0  # tokens that these read; 0 where there are none
    linear: LinearAttention | None = None  # behind these convolutions; None: they stand alone
    output_gate: bool = False  # whether what attention gives is gated

    @property
    def visual_width(self) -> int:
        """Of a visual token between the graphs, the rows that are added to it beside it."""
        return self.width * (1 + self.deepstack)

    @property
    def channels(self) -> int:
        """That the convolutions go over."""
        return self.linear.channels if self.linear else self.width


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """How an image becomes pixels [tiles, 3, height, width]; the checkpoint's own processor."""

    height: Side
    width: Side
    resize: tuple[Side, Side] | Side | None  # (height, width), or the shortest edge, or no resizing
    resample: Filter
    crop: tuple[Side, Side] | None  # (height, width) of the centre crop
    rescale: Scale
    mean: tuple[Level, Level, Level]
    std: tuple[Scale, Scale, Scale]
    pad_to_square: Rgb | None = None  # colour of the padding, before resizing
    tiling: Tiling | None = None  # cut into tiles of height x width, which are pixels [tiles, ...]
    longest_edge: LongestEdge | None = None  # pixels of the longer side, which an image is resized
    # to first: the ratio is kept, the other side rounded down and made even
    step: Side | None = None  # the model takes any multiple of so many pixels, the bundle one size
    images: Few = 1  # in a prompt
    frames: Count | None = None  # of a video, in place of images
    view_rule: ViewRule | None = None  # by which the model's own processor shows an image; None: as
    # the bundle does

    @property
    def views(self) -> Views:
        """What the encoder sees of an image."""
        if self.tiling is not None:
            return self.tiling.views
        return Views(Size(1, 1), Size(self.height, self.width))

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the pixels."""
        tiles, channels = (self.tiling.tiles, self.tiling.channels) if self.tiling else (1, 3)
        return tiles * (self.frames or self.images), channels, self.height, self.width


@dataclass(frozen=True, slots=True)
class TextRecord:
    """How a prompt becomes tokens: the chat template, rendered once with holes.

    `first` holds {image} and {prompt}, `with_system` {system} too; `next` follows an answer and
    holds {prompt}. All may hold the date, {now:FORMAT} with a format of strftime.
    """

    first: str
    next: str
    with_system: str  # empty where the template takes no system message
    add_special_tokens: bool
    image_token_id: Amount
    eos_token_ids: tuple[Amount, ...]
    generation: Sampling = field(default_factory=Sampling)  # the checkpoint's defaults
    around_image: tuple[str, str] = ("", "")  # text before and after the image's tokens
    visual_ids: tuple[tuple[Amount, Count], ...] = ()  # ids that transformers has for the V visual
    # tokens, as runs: id, how often
    user_tokens: tuple[Amount, ...] = ()  # added tokens that a user may type; all others stay text


@dataclass(frozen=True, slots=True)
class RatioRecord:
    """One of several ratios that a bundle's graphs take: its counts, and what was compared."""

    prune: PruneRecord
    image_positions: Amount  # that an image takes
    parity: ParityRecord


@dataclass(frozen=True, slots=True)
class Manifest:
    """The whole of manifest.json."""

    name: str
    model: str
    family: str
    target: Annotated[str, OneOf(tuple(TARGETS))]
    dialect: Annotated[str, OneOf(DIALECTS)]
    dtype: Annotated[str, OneOf(tuple(DTYPES))]
    opset: Few
    prune: PruneRecord
    encoder: EncoderRecord
    decoder: DecoderRecord
    image: ImageRecord
    text: TextRecord
    graphs: dict[str, GraphRecord]  # by the names of `graph_names`
    files: dict[str, FileRecord]
    parity: ParityRecord
    versions: dict[str, str]
    range: RangeRecord | None = None  # None: the dtype is not fp16, or no sample was looked at
    weights: WeightsRecord | None = None  # None: all weights are of the dtype
    timing: TimingRecord | None = None  # None: no time was asked for
    ratios: tuple[RatioRecord, ...] = ()  # where counts are an input, the default first; else none
    choice: ChoiceRecord | None = None  # None: encoder and decoder were not chosen together
    checkpoint_weights: str = ""  # the form of a quantised checkpoint's; empty: floats
    parts: tuple[PartRecord, ...] = ()  # graphs that edgeprune profile times by themselves
    schema: Count = SCHEMA

    @property
    def is_calibrated(self) -> bool:
        """Whether what goes into products is rounded with scales that samples say."""
        if self.weights is None or TARGETS[self.target].integers != "QuantizeLinear":
            return False
        return WeightFormat.parse(self.weights.format).activations

    @property
    def settings(self) -> tuple[RatioRecord, ...]:
        """All ratios at which the bundle runs: one, or those that its graphs take."""
        own = RatioRecord(self.prune, self.decoder.image_positions, self.parity)
        return self.ratios or (own,)

    @property
    def label(self) -> str:
        """The name, with the ratio where there are several: `NAME@8`."""
        return f"{self.name}@{self.prune.cr:g}" if self.ratios else self.name

    @property
    def widest(self) -> Plan:
        """The most tokens at each site, over all ratios."""
        return widest([setting.prune.plan for setting in self.settings])

    def at(self, cr: float | None) -> Manifest:
        """The bundle at one of its ratios, as it was asked for at export; None: the default.

        SpecError where it has no such ratio.
        """
        if cr is None:
            return self
        for setting in self.settings:
            if setting.prune.cr == cr:
                decoder = replace(self.decoder, image_positions=setting.image_positions)
                parity = setting.parity
                return replace(self, prune=setting.prune, decoder=decoder, parity=parity)
        ratios = ", ".join(f"{setting.prune.cr:g}" for setting in self.settings)
        other = f", or export with --cr {ratios.replace(' ', '')},{cr:g}" if 1 <= cr < inf else ""
        raise SpecError(f"{self.name} runs at CR {ratios}, not {cr:g}; choose one of these{other}")

    @property
    def vision(self) -> GraphRecord:
        """Inputs and outputs of vision.onnx."""
        return self.graphs[VISION]

    @property
    def graph_names(self) -> tuple[str, ...]:
        """Files of the graphs that run, in the order in which they do."""
        return GRAPHS if self.encoder.delta is None else (VISION, DELTA, JOIN, DECODER)

    @property
    def join(self) -> GraphRecord:
        """Inputs and outputs of join.onnx."""
        return self.graphs[JOIN]

    @property
    def graph(self) -> GraphRecord:
        """Inputs and outputs of decoder.onnx."""
        return self.graphs[DECODER]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"
