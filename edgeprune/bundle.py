"""The bundle: the folder that `export` writes and `run`, `build` and `bench` read.

    manifest.json     everything below, as JSON; paths are relative and stay inside the folder
    vision.onnx       the encoder, for one tile
    vision_delta.onnx the same for some of its patches, where the bundle was exported with --delta
    join.onnx         what it gave for all tiles -> visual tokens
    decoder.onnx      prefill, decode and later turns in one graph
    weights.bin       the tensors of all graphs
    tokenizer.json    and the checkpoint's other text files

A bundle is written in a hidden folder beside its place and renamed, so it is whole or absent.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from edgeprune import contract, graph_contract, onnx_file
from edgeprune.dial import widest
from edgeprune.errors import BundleError, SpecError
from edgeprune.files import obstacle, real, replaced
from edgeprune.generation import Sampling
from edgeprune.graphs import DECODER, DELTA, GRAPHS, JOIN, VISION, GraphRecord
from edgeprune.lowering import DTYPES, TARGETS
from edgeprune.records import (
    Amount,
    Between,
    Bytes,
    Count,
    Few,
    LongestEdge,
    Magnitude,
    Matches,
    OneOf,
    Ratio,
    Side,
    build,
    is_utf8,
    parse,
)
from edgeprune.spec import LinearAttention, Plan, Stage
from edgeprune.tiling import Tiling
from edgeprune.timing import Milliseconds
from edgeprune.weight_format import WeightFormat

SCHEMA = 5
ENGINES, ENGINE_RECORD = "engines", "engine.json"
MANIFEST = "manifest.json"
QUICK = 256 << 20
"""Files up to so many bytes are hashed whenever a bundle is opened."""
MANIFEST_BYTES = 16 << 20
"""A longer manifest is not read: hundreds of layers take some 100 kB."""
NEEDED = ("weights.bin", "tokenizer.json")
"""Files of a bundle beside its graphs."""

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
Loss = Annotated[float, Between(0, 1e3)]  # radians
Share = Annotated[float, Between(0, 1)]
Difference = Annotated[float, Between(0, 1e6)]
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

    patches: Count  # of a frame that go through it, whether so many changed or not
    patch: Side  # pixels a side of one
    heads: Few
    operations: Bytes  # for these patches and [CLS]


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


@dataclass(frozen=True, slots=True)
class TimingRecord:
    """Time to first token as asked for, and as a profile predicts it, in milliseconds."""

    asked: Milliseconds
    predicted: Milliseconds
    before: Milliseconds  # reading the image file, and preprocessing
    vision: Milliseconds
    prefill: Milliseconds
    text_tokens: Count
    backend: str
    machine: dict[str, str]


@dataclass(frozen=True, slots=True)
class ChoiceRecord:
    """Encoder and counts that were chosen together, and why."""

    unit: str  # of the budget: ms, or billion operations
    budget: Milliseconds
    spent: Milliseconds  # predicted
    loss: Loss  # predicted: the encoder's and the schedule's
    weighed: dict[str, Loss]  # encoders and the least loss with each, before it was calibrated


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

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the pixels."""
        tiles = self.tiling.tiles if self.tiling else 1
        return tiles * (self.frames or self.images), 3, self.height, self.width


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
class DistanceRecord:
    """How far a model in half precision is from the same model in float32, over all samples."""

    overlap: dict[str, Share]  # by pruning site: of the tokens float32 keeps, those it keeps too
    logits: Difference  # median root mean square difference, in standard deviations of float32's
    tokens: Share  # of the next tokens, those that are equal


@dataclass(frozen=True, slots=True)
class ParityRecord:
    """What was compared before the bundle was written.

    Graphs and eager reference, both computing in float32 with the bundle's rounded weights: `ties`
    of the samples keep other tokens, and the reference does too where it is rounded otherwise; the
    others keep the same, their visual tokens and logits differ by at most `visual` and `logits`, as
    a share of the largest value. In half precision also the distances to the
    float32 model: of the `eager` model that rounds after each operator, and of the `graph` in ONNX
    Runtime's CPU provider, which keeps float32 between many fp16 nodes and has no kernels for bf16.
    """

    samples: Amount
    why: str = ""  # no sample was compared
    ties: Amount = 0
    visual: Difference = 0.0
    logits: Difference = 0.0
    tolerance: Difference = 0.0
    eager: DistanceRecord | None = None  # None in fp32
    graph: DistanceRecord | None = None  # None in fp32 and bf16
    delta: Difference | None = None  # at most, of what vision_delta.onnx gives; None: there is none


@dataclass(frozen=True, slots=True)
class RatioRecord:
    """One of several ratios that a bundle's graphs take: its counts, and what was compared."""

    prune: PruneRecord
    image_positions: Amount  # that an image takes
    parity: ParityRecord


@dataclass(frozen=True, slots=True)
class WeightsRecord:
    """How weights of products are quantised, and what that changes of the model.

    `distance` is that of the model with these weights, computed in float32, to the same model with
    the checkpoint's own. `running` is that of the graph with activations rounded, as ONNX Runtime's
    CPU provider runs it; None where no activation is. `rounded` is that of the eager model whose
    activations are rounded as `activations=on` of --weights has it; None without that.
    """

    format: str  # as --weights takes it, with every option
    algorithm: str  # that chose the codes, where they are not the checkpoint's own
    tensors: dict[str, Amount]  # products by kind: float, int8, int4, fp8
    packed: Amount  # products whose weights the checkpoint stores in a quantised form
    own: Amount  # of these, those whose codes are the checkpoint's own
    numbers: Bytes  # weights that are quantised
    bits: Annotated[float, Between(0, 64)]  # of each of these, scales included
    error: Share  # of all of these: norm of what was changed, as a share of their norm
    zero_points: Amount = 0  # products whose codes have zero points, or offsets for them
    kinds: dict[str, str] = field(default_factory=dict)  # of products that --weights auto chose for
    distance: DistanceRecord | None = None  # None: no sample was compared
    running: DistanceRecord | None = None
    rounded: DistanceRecord | None = None


@dataclass(frozen=True, slots=True)
class RangeRecord:
    """How near what a bundle holds in float16 comes to the largest float16 number, 65,504.

    Magnitudes are those of the float32 model over all samples; the model rounded to float16 after
    each operator was finite on them too.
    """

    samples: Amount
    limit: Magnitude
    peak: Magnitude  # the largest
    where: str  # it is, such as `decoder layers.1 gate * up`
    sample: Count  # that has it, from 1
    margin: Magnitude  # limit / peak
    float32: tuple[str, ...] = ()  # parts that compute in float32, `decoder.layers.1.mlp.product`


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
        raise SpecError(
            f"{self.name} runs at CR {ratios}, not {cr:g}; choose one of these, or export with"
            f" --cr {ratios.replace(' ', '')},{cr:g}"
        )

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


@dataclass(frozen=True, slots=True)
class Bundle:
    """An opened bundle: its folder and its manifest."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: Path | str, *, verify: bool | None = None) -> Bundle:
        """Read a bundle; check every file's size, and its hash, and that the graphs are its own.

        Hashing 14 GB at every start would cost a device ten seconds, so `verify` None hashes files
        up to QUICK bytes only; True hashes all, False none. Where there are engines the weights may
        be missing: `has_weights`.
        """
        path = Path(path)
        manifest = read_manifest(path)
        for name, record in manifest.files.items():
            if name == graph_contract.WEIGHTS and _is_dropped(path):
                continue
            try:
                hashed = record.bytes <= QUICK if verify is None else verify
                _check_file(path, name, record, hashed=hashed)
            except OSError as error:
                raise BundleError(
                    f"{path / name} cannot be read ({error.strerror}); copy the bundle again"
                ) from error
        for name in manifest.graph_names:
            try:
                graph_contract.check_graph(manifest, name, onnx_file.read(path / name))
            except (OSError, ValueError) as error:
                raise BundleError(
                    f"{path / name} is not the graph of {MANIFEST} ({error}); export it again"
                ) from error
        return cls(path, manifest)

    def file(self, name: str) -> Path:
        return self.path / name

    @property
    def has_weights(self) -> bool:
        """Whether the graphs can be loaded; engines hold weights of their own."""
        return not _is_dropped(self.path)

    def drop_weights(self) -> None:
        """Remove the weights of a bundle that has engines."""
        self.file(graph_contract.WEIGHTS).unlink(missing_ok=True)

    def require_weights(self, work: str) -> None:
        """BundleError where `work` needs weights that were removed once engines were built."""
        if not self.has_weights:
            raise BundleError(
                f"{self.path} has engines and no {graph_contract.WEIGHTS}, which {work} needs; copy"
                " that file back or export the bundle again"
            )


def _is_dropped(folder: Path) -> bool:
    """Whether the weights were removed after engines were built."""
    there = os.path.lexists(folder / graph_contract.WEIGHTS)
    return not there and any((folder / ENGINES).glob(f"*/{ENGINE_RECORD}"))


def read_manifest(path: Path) -> Manifest:
    """The manifest of a bundle's folder, checked by itself; BundleError where it is damaged."""
    file = path / MANIFEST
    if not is_utf8(str(path)):
        raise BundleError(f"the name of {path} is not UTF-8, which engines want; rename the folder")
    if not file.is_file():
        raise BundleError(
            f"{path} is no bundle: it has no {MANIFEST}. Write one with: edgeprune export"
        )
    try:
        data = parse(_read(file))
        schema = data["schema"]
    except KeyError as error:
        raise BundleError(f"{file} names no schema; export the bundle again") from error
    except (OSError, ValueError, TypeError) as error:
        raise BundleError(f"{file} is damaged ({error}); export the bundle again") from error
    if schema != SCHEMA:
        newer = isinstance(schema, int) and schema > SCHEMA
        raise BundleError(
            f"{file} has schema {str(schema)[:20]}, this edgeprune reads schema {SCHEMA}; "
            + ("update edgeprune" if newer else "export again")
        )
    try:
        manifest: Manifest = build(Manifest, data, "manifest")
        if absent := [
            name for name in (*manifest.graph_names, *NEEDED) if name not in manifest.files
        ]:
            raise ValueError(f"files lacks {', '.join(absent)}")
        contract.check_sizes(manifest)
        graph_contract.check_signature(manifest)
    except (TypeError, ValueError, SpecError) as error:
        raise BundleError(f"{file} is damaged ({error}); export the bundle again") from error
    return manifest


def _read(file: Path) -> str:
    """The text of a manifest; ValueError where it is longer than any."""
    if (size := file.stat().st_size) > MANIFEST_BYTES:
        raise ValueError(f"it has {size:,} bytes, at most {MANIFEST_BYTES:,} are read")
    return file.read_text(encoding="utf-8")


def _check_file(folder: Path, name: str, record: FileRecord, *, hashed: bool) -> None:
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\\" in name or "\0" in name:
        raise BundleError(f"{folder / MANIFEST} names {name!r}, a path that leaves the bundle")
    file = folder / name
    if not real(file).is_relative_to(real(folder)):
        raise BundleError(f"{file} is a link that leaves the bundle; copy the file in its place")
    if not file.is_file():
        raise BundleError(f"{file} is missing; copy the whole bundle or export it again")
    size = file.stat().st_size
    if size != record.bytes:
        raise BundleError(
            f"{file} has {size:,} bytes, the manifest says {record.bytes:,}; copy or export again"
        )
    if hashed and sha256(file) != record.sha256:
        raise BundleError(f"{file} was altered: its hash is not the manifest's; export it again")


def sha256(file: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with file.open("rb") as stream:
        digest = hashlib.sha256()
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def record_files(folder: Path) -> dict[str, FileRecord]:
    """Size and hash of every file in a folder that is about to become a bundle."""
    files = sorted(f for f in folder.rglob("*") if f.is_file() and f.name != MANIFEST)
    return {
        f.relative_to(folder).as_posix(): FileRecord(f.stat().st_size, sha256(f)) for f in files
    }


def check_target(target: Path) -> None:
    """BundleError, before any work, unless a bundle may be written at `target`."""
    if target.name in ("", ".."):  # a draft beside it would lie within it
        raise BundleError(
            f"a bundle is a new folder, {target} has no name of its own; choose another --output,"
            f" such as {target / 'bundle'}"
        )
    if why := obstacle(target):
        raise BundleError(f"{target} cannot be written: {why}; choose another --output")
    if os.path.lexists(target) and not target.is_dir():
        kind = "a link that leads nowhere" if target.is_symlink() else "a file"
        raise BundleError(f"{target} is {kind}, a bundle is a folder; choose another --output")
    if target.is_dir() and any(target.iterdir()) and not _is_bundle(target):
        raise BundleError(f"{target} exists and is no bundle; choose another --output")


def _is_bundle(folder: Path) -> bool:
    """Whether a folder may be replaced: many programs have a manifest.json, few these as well."""
    return all((folder / name).is_file() for name in (MANIFEST, VISION, DECODER))


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A new folder that becomes the bundle `target` when the block ends well, or vanishes."""
    check_target(target)
    with replaced(target) as draft:
        yield draft
        check_target(target)  # again: minutes have passed
