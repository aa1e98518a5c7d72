"""The modules of a checkpoint and their weights: where they are stored, and how they are read."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Self

import torch
from torch import Tensor, nn

from edgeprune.encoder_methods import EncoderMethod
from edgeprune.errors import ModelError, SpecError
from edgeprune.models._decoder import Decoder
from edgeprune.models._encoder_site import ExitMap, SiteConfig
from edgeprune.models._execution import HOST, Execution
from edgeprune.models._family import Family
from edgeprune.models._format import check_stored, why_missing
from edgeprune.models._layers import Linear, compute_buffers
from edgeprune.models._lora import MERGE
from edgeprune.models._names import Stored
from edgeprune.models._ops import TorchOps
from edgeprune.models._quantised import (
    BITS,
    QuantizedWeight,
    Strip,
    fitted,
    quantize,
    quantize_float8,
    strips,
)
from edgeprune.models._rounding import rounded
from edgeprune.models._tuning import UNTUNED, Fold, Tuning
from edgeprune.models._unread import check_unread
from edgeprune.models._vision import Vision
from edgeprune.models._weight_plan import EMBEDDING, WeightPlan, plan_weights
from edgeprune.policies import Policy, make
from edgeprune.spec import Plan, PruneSpec
from edgeprune.weight_format import FLOAT, Form, WeightFormat


@dataclass(frozen=True, slots=True)
class Source:
    """Where a parameter comes from in one checkpoint."""

    names: tuple[str, ...]  # the tensors, one below the other
    changes: tuple[str, ...]  # of each, the LoRA adapter's name of it; "" where there is no change
    shape: tuple[int, ...]  # of them together, but for axes of length 1
    transposed: bool  # whether the module wants it the other way
    stored: Stored
    form: Form | None = None  # in which bundles hold it, where it is quantised
    fold: Fold | None = None  # what it is scaled by before that
    importance: Tensor | None = None  # float32 [inputs], how much the error of each counts
    peak: float | None = None  # the largest input of its product, where samples say so
    codes: QuantizedWeight | None = None  # where samples chose them
    stored_shape: tuple[int, ...] = ()  # where it differs from `shape`: what is behind it is 0


class Adapter(Family):
    """Base of all families' adapters: the steps of Family, the two modules and their weights."""

    weights: WeightPlan | None = None
    """Which weights are quantised; None: none. What `read` and `load` give is quantised too."""
    execution: Execution = HOST
    """Where the eager engines that hold a few layers compute."""

    stored_mlp: int | None = None
    """Channels inside of the encoder's MLPs as the checkpoint has them, where modules have more."""

    def with_weights(
        self,
        wanted: WeightFormat,
        scales: torch.dtype,
        tuning: Tuning = UNTUNED,
        *,
        zero_points: bool = False,
        largest: int | None = None,
    ) -> Self:
        """The same checkpoint with weights in a format, whose scales a graph stores in a dtype.

        `tuning` is what samples say of them.
        Codes that the checkpoint has keep their zero points where `zero_points` says so, elsewhere
        offsets stand for these. Codes of products whose inputs are rounded are `largest` at most.
        """
        if wanted.is_float:
            return self
        wanted = self._as_stored(wanted)
        changed = self._padded(wanted)
        changed.weights = plan_weights(
            *(wanted, *changed.empty_modules(), scales, tuning),
            zero_points=zero_points,
            largest=largest,
        )
        return changed

    def _padded(self, wanted: WeightFormat) -> Self:
        """The same model with channels of zeros in the encoder's MLPs, where blocks of int4 want
        them: a product's outputs of 0, activated, are the next one's inputs of 0."""
        changed, encoder = copy.copy(self), self.vision_config.encoder
        own = self.stored_mlp or encoder.mlp_width
        if (channels := wanted.padded(own)) != encoder.mlp_width:
            wider = replace(encoder, mlp_width=channels)
            changed.vision_config = replace(self.vision_config, encoder=wider)
            changed.stored_mlp = own
        return changed

    def is_chosen(self, parameter: str) -> bool:
        """Whether the kind of a product was chosen by what it loses."""
        return self.weights is not None and parameter in self.weights.tuning.kinds

    def without_weights(self) -> Self:
        """The same checkpoint with its own weights."""
        changed = copy.copy(self)
        changed.weights = None
        return changed

    def in_floats(self) -> Self:
        """The same checkpoint in floats, scaled as samples say."""
        if self.weights is None:
            return self
        changed = copy.copy(self)
        changed.weights = replace(self.weights, forms={})
        return changed

    def with_execution(self, execution: Execution) -> Self:
        """The same checkpoint, whose layers run on a device."""
        changed = copy.copy(self)
        changed.execution = execution
        return changed

    def with_encoder(self, site: SiteConfig | None) -> Self:
        """The same checkpoint with patches that leave the encoder at a site; None: with none."""
        changed = copy.copy(self)
        changed.vision_config = replace(self.vision_config, site=site)
        return changed

    def encoder_site(self, method: EncoderMethod) -> SiteConfig:
        """The sizes that a method has in this model; SpecError where it has no place there."""
        encoder, layout = self.vision_config.encoder, self.vision_config.layout
        method = method.settled(encoder.blocks, encoder.cls)
        if not method.rejoins and (why := layout.why_whole):
            raise SpecError(
                f"--encoder {method} lets patches go for good, which this model and input do not"
                f" allow: {why}; or choose exit, by which all come back"
            )
        apart = layout.pool != "join" and method.rejoins  # averaged or resized, later
        units = encoder.units(1 if apart else layout.merge)
        site = SiteConfig(method, units)
        if site.masked and sum(windows for windows, _ in units.runs) == 1:
            raise SpecError(
                f"--encoder {method}: windows=joint is for an encoder that attends within several"
                " windows, which this one does not; leave it out"
            )
        if site.kept_units == units.count:
            raise SpecError(
                f"--encoder {method} keeps all of {units.count} patches or groups of patches;"
                " choose a smaller keep"
            )
        return site

    @property
    def encoder_topk(self) -> int:
        """Most patches, groups of them or tokens that the encoder's site puts in order at once."""
        config = self.vision_config
        if config.site is None:
            return 0
        among_fixed = config.after_encoder if config.layout.fixed else 0
        return max(config.site.units.count, among_fixed)

    def unfitted(self, site: SiteConfig) -> SiteConfig:
        """A site whose exit gives what left as it was, for each state that is read."""
        if not site.method.rejoins:
            return site
        encoder = self.vision_config.encoder
        states = encoder.states_after(site.at)
        same = torch.eye(encoder.width).repeat(1, states)
        return replace(site, exit_map=ExitMap(same, torch.zeros(same.shape[1])))

    def _as_stored(self, wanted: WeightFormat) -> WeightFormat:
        """The format with blocks that a quantised checkpoint has: its codes can be kept then."""
        first = self._first_packed
        return wanted if first is None or first.is_float8 else wanted.within(first.block)

    @cached_property
    def _first_packed(self) -> QuantizedWeight | None:
        """One of the checkpoint's weights in codes, which all are taken to be like."""
        packed = self.checkpoint.packed
        return next(iter(packed.weights.values())).quantized() if packed else None

    def weight_bytes(
        self,
        wanted: WeightFormat,
        element: int,
        kept: Collection[int] = BITS,
        *,
        zero_points: bool = False,
    ) -> int:
        """Bytes of all weights in a format, floats and scales of `element` bytes each; codes of
        products of other bits than `kept` count as floats. Where the checkpoint's codes have zero
        points, `zero_points` says that graphs take them, not offsets."""
        wanted = self._as_stored(wanted)
        modules, own = (self._padded(one).empty_modules() for one in (wanted, FLOAT))
        plan = plan_weights(wanted, *modules, torch.float32)
        changed = sum(
            form.bytes(*plan.sizes[name], element) - math.prod(plan.sizes[name]) * element
            for name, form in plan.forms.items()
            if form.bits in kept or name == EMBEDDING
        )
        changed += sum(
            math.prod(plan.sizes[name]) // block * (bits if zero_points else 8 * element) // 8
            for name, bits, block in self.shifted(plan)
            if bits in kept
        )
        if plan.head_apart and self.decoder_config.tied:
            changed += self.shape.vocabulary * self.shape.width * element
        added = _numbers(*modules) - _numbers(*own)
        return (self.checkpoint.num_parameters() + added) * element + changed

    def shifted(self, plan: WeightPlan) -> Iterator[tuple[str, int, int]]:
        """The parameters that keep codes with zero points, with their bits and blocks."""
        first = self._first_packed
        if first is None or first.zeros is None:
            return
        for module in self.empty_modules():
            for name, source in self.sources(module).items():
                form = plan.forms.get(name)
                if form is None or form.bits != first.bits or form.activations:
                    continue
                block = form.block or plan.sizes[name][0]
                if self.is_packed(source) and name != EMBEDDING and first.block % block == 0:
                    yield name, form.bits, block

    def vision(self, policy: Policy, plan: Plan, ops: TorchOps | None = None) -> Vision:
        """Module: pixels -> (visual tokens [1, r_1, width], kept positions [r_1])."""
        return Vision(self.vision_config, policy, plan, ops)

    def decoder(self, policy: Policy, plan: Plan, ops: TorchOps | None = None) -> Decoder:
        config = replace(
            self.decoder_config,
            tile_of=self._tile_of(plan),
            head_apart=self.weights is not None and self.weights.head_apart,
        )
        return Decoder(config, policy, plan, ops)

    def _tile_of(self, plan: Plan) -> tuple[int, ...]:
        """The tile of each visual token that the vision graph gives, where the encoder is the last
        that left some out; SpecError where a stage needs it and it depends on the image."""
        layout, site = self.vision_config.layout, self.vision_config.site
        if layout.tiles == 1 or not self.vision_config.after_encoder or site is None:
            return layout.group_of
        if layout.by_tile:
            return layout.left_groups(site.kept_units)
        if plan.with_text() is not None:
            raise SpecError(
                f"--encoder {site.method} leaves open which tile a visual token is of, since rows"
                " of this model's tiles are read in turns, and the method chooses by text before"
                " the first layer; choose exit, or a method that does not, such as fastv"
            )
        return ()

    def empty_modules(self) -> tuple[nn.Module, Decoder]:
        """Both modules without their weights, nothing pruned."""
        policy, plan = make(PruneSpec("none")), Plan(self.shape.visual_tokens, self.shape.layers)
        with torch.device("meta"):
            return self.vision(policy, plan), self.decoder(policy, plan)

    def sources(self, module: nn.Module) -> dict[str, Source]:
        """For each parameter of a module of ours, its tensors in the checkpoint."""
        return {
            name: self._source(name, parameter, _is_linear(module, name))
            for name, parameter in module.named_parameters()
        }

    def _source(self, name: str, parameter: Tensor, transposed: bool) -> Source:
        stored, checkpoint = self.stored(name), self.checkpoint
        names = tuple(map(self._found, stored.parts))
        for tensor in names:
            leaves = checkpoint.leaves[tensor.rpartition(".")[0]]
            check_stored(checkpoint.files[tensor], tensor, checkpoint.dtype(tensor), leaves)
        shape = _together([checkpoint.shape(tensor) for tensor in names], len(stored.rows))
        wanted = tuple(parameter.shape)[::-1] if transposed else tuple(parameter.shape)
        own = self._own_shape(name, wanted)
        if shape is None or not _alike(shape, own):
            shapes = " and ".join(f"{tensor} is {[*checkpoint.shape(tensor)]}" for tensor in names)
            raise ModelError(
                f"{checkpoint.files[names[0]].name}: {shapes},"
                f" config.json says {list(own)}; the two are not of one checkpoint"
            )
        changes = tuple(self._change(name, part) for part in stored.parts)
        source = Source(names, changes, wanted, transposed, stored)
        if own != wanted:
            source = replace(source, stored_shape=own)
        if self.weights is None:
            return source
        form, tuning = self.weights.forms.get(name), self.weights.tuning
        fold, importance = tuning.folds.get(name), tuning.importance.get(name)
        peak = tuning.peaks.get(name)
        codes = tuning.codes.get(name)
        said = {"fold": fold, "importance": importance, "peak": peak, "codes": codes}
        return replace(source, form=form, **said)  # type: ignore[arg-type]

    def _own_shape(self, parameter: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """A parameter's shape without channels that `_padded` has added."""
        if self.stored_mlp is None or not PADDED.match(parameter):
            return shape
        added, own = self.vision_config.encoder.mlp_width, self.stored_mlp
        return tuple(own if size == added else size for size in shape)

    def _found(self, names: tuple[str, ...]) -> str:
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

    def _change(self, parameter: str, names: tuple[str, ...]) -> str:
        """The adapter's name of a tensor that it changes, else empty."""
        change = self.checkpoint.lora.changed_name(names) if self.checkpoint.lora else ""
        if change and parameter == "embedding.weight" and self.decoder_config.tied:
            raise ModelError(
                f"the adapter changes {change}, which is both embedding and output head of this"
                f" model; {MERGE}, saved with tie_word_embeddings false"
            )
        return change

    @cached_property
    def all_notes(self) -> tuple[str, ...]:
        """What was done with a folder's weights, for people; ModelError where they mean something
        else than what would be exported."""
        modules = self.empty_modules()
        sources = [source for module in modules for source in self.sources(module).values()]
        read = {name for source in sources for part in source.stored.parts for name in part}
        changed = {change for source in sources for change in source.changes}
        for name in (name for source in sources for name in source.names):
            self.checkpoint.check(name)
        stored = (str(self.checkpoint.packed),) if self.checkpoint.packed else ()
        return (
            *self.notes(),
            *stored,
            *check_unread(self.checkpoint, read, changed, self.is_spare),
        )

    def read(self, source: Source, dtype: torch.dtype) -> Tensor:
        """One parameter, laid out and rounded as a module of ours wants it, where it is quantised
        as its codes say; ModelError where the checkpoint holds a number that is not finite or that
        does not fit the dtype."""
        if source.form is None:
            return self._read(source, dtype)
        found = ((strip.outputs, strip.weight) for strip in self.strips(source))
        return _laid_out(source, dtype, found)

    def terms(self, source: Source, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """What `read` gives but for the offsets of blocks, and these [K / block, N]; None where
        the parameter has none."""
        if source.form is None:
            return self._read(source, dtype), None
        offsets = list[Tensor]()

        def codes() -> Iterator[tuple[slice, QuantizedWeight]]:
            for strip in self.strips(source):
                if strip.weight.offsets is not None:
                    offsets.append(strip.weight.offsets)
                yield strip.outputs, replace(strip.weight, offsets=None)

        whole = _laid_out(source, dtype, codes())
        return whole, torch.cat(offsets, 1).to(dtype) if offsets else None

    def rows(self, source: Source, dtype: torch.dtype) -> Iterator[Tensor]:
        """What `read` gives; of a large one that is stored as it is, an embedding, some rows at a
        time."""
        plain = source.form is None and not source.transposed and self._is_whole(source)
        if not plain or len(source.shape) != 2 or source.fold is not None:
            yield self.read(source, dtype)
            return
        outputs, inputs = source.shape
        for part in strips(inputs, outputs):
            yield self._read(source, dtype, part)

    def _is_whole(self, source: Source) -> bool:
        """Whether one stored tensor is the parameter, in floats, so that its rows may be read."""
        changed = any(source.changes) or source.stored.rows or source.stored_shape
        if len(source.names) > 1 or changed:
            return False
        return self.checkpoint.shape(source.names[0]) == source.shape and not self.is_packed(source)

    def strips(self, source: Source) -> Iterator[Strip]:
        """A quantised weight, some outputs at a time, so that large ones need little memory."""
        assert source.form is not None and self.weights is not None
        outputs, inputs = source.shape
        form, scales = source.form, self.weights.scales
        stored = self.quantized(source)
        if stored is not None and stored.is_float8 and not form.float8:
            stored = None  # its floats are rounded as any others
        largest = self.weights.largest if form.activations else form.largest
        anew = partial(
            quantize,
            bits=form.bits,
            block=form.block or inputs,
            dtype=scales,
            clip=self.weights.clip and form.bits == 4,
            importance=None if stored else source.importance,
            largest=largest,
        )
        if form.float8:
            anew = partial(quantize_float8, dtype=scales)
        if stored is not None:
            own = self._kept(source, stored, largest)
            for part in strips(inputs, outputs):
                exact = stored.part(part).dequantised()
                weight = own.part(part) if own else anew(exact)
                yield Strip.of(part, weight, exact, own=own is not None)
            return
        for part, exact in self.floats(source):
            yield Strip.of(part, source.codes.part(part) if source.codes else anew(exact), exact)

    def _kept(
        self, source: Source, stored: QuantizedWeight, largest: int | None
    ) -> QuantizedWeight | None:
        """The checkpoint's codes as a graph takes them; None where it does not."""
        form, plan = source.form, self.weights
        assert form is not None and plan is not None
        if form.float8 != stored.is_float8:
            return None
        largest = None if stored.is_float8 else largest
        asked = form.bits, form.block or len(stored.codes), plan.scales
        found = fitted(stored, *asked, largest=largest)
        if found is None or found.zeros is None:
            return found
        if form.activations or not source.transposed:  # nodes of codes, and tables, have no such
            return None
        return found if plan.zero_points else found.with_offsets(plan.scales)

    def floats(self, source: Source) -> Iterator[tuple[slice, Tensor]]:
        """A product's weight in float32 before it is quantised, some outputs at a time: [K, n]."""
        outputs, inputs = source.shape
        whole = None if self._is_whole(source) else self._columns(source)
        for part in strips(inputs, outputs):
            yield part, self._columns(source, part) if whole is None else whole[:, part]

    def _columns(self, source: Source, rows: slice | None = None) -> Tensor:
        """A weight in float32 with an output in each column, of an embedding a row of it."""
        weight = self._read(source, torch.float32, rows)
        return weight if source.transposed else weight.t().contiguous()

    def is_packed(self, source: Source) -> bool:
        """Whether the checkpoint stores a parameter in a quantised form."""
        packed = self.checkpoint.packed
        return packed is not None and any(name in packed.weights for name in source.names)

    def _read(self, source: Source, dtype: torch.dtype, rows: slice | None = None) -> Tensor:
        """One parameter as the checkpoint has it, but for its fold; of its only tensor some
        `rows`."""
        if source.fold is None:
            return self._unfolded(source, dtype, rows)
        folded = source.fold.applied(self._unfolded(source, torch.float32, rows), rows)
        return rounded(folded, dtype, f"{source.names[0]}, scaled by awq=on,")

    def _unfolded(self, source: Source, dtype: torch.dtype, rows: slice | None) -> Tensor:
        """One parameter as the checkpoint has it."""
        tensors = zip(source.names, source.changes, strict=True)
        parts = (self._part(name, change, source.stored, dtype, rows) for name, change in tensors)
        whole = next(parts)
        if len(source.names) > 1:  # a vector may have axes of length 1 before it
            whole = torch.cat([part.reshape(-1, *source.shape[1:]) for part in (whole, *parts)])
        shape = source.stored_shape or source.shape
        whole = whole.reshape(-1, *shape[1:]) if rows else whole.reshape(shape)
        if source.stored_shape:
            whole = _with_zeros(whole, source.shape)
        return whole.t().contiguous() if source.transposed else whole.contiguous()

    def quantized(self, source: Source) -> QuantizedWeight | None:
        """One parameter in the codes that the checkpoint stores, [K, N]: K inputs, N outputs.

        None where it stores floats, or where what it stores is not the whole of the parameter:
        `read` gives the floats then.
        """
        stored, changed = source.stored, any(source.changes) or source.fold is not None
        changed = changed or bool(source.stored_shape)
        if changed or stored.rows or (stored.factor, stored.offset) != (1, 0):
            return None
        return self.checkpoint.quantized(source.names[0]) if len(source.names) == 1 else None

    def _part(
        self,
        name: str,
        change: str,
        stored: Stored,
        dtype: torch.dtype,
        rows: slice | None = None,
    ) -> Tensor:
        """One stored tensor, or some rows of it, as a parameter has it, in a dtype."""
        tensor = self.checkpoint.read(name)
        if change and self.checkpoint.lora is not None:
            tensor = self.checkpoint.lora.merged(change, tensor)
        if stored.rows:
            tensor = tensor[list(stored.rows)]
        if rows is not None:
            tensor = tensor[rows]
        if (stored.factor, stored.offset) != (1, 0):
            tensor = tensor.float() * stored.factor + stored.offset
        return rounded(tensor, dtype, f"{self.checkpoint.files[name].name}: {name}")

    def load(self, module: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
        """Fill a module built on the meta device with weights; returns it ready to run."""
        module.to_empty(device="cpu").to(dtype)
        compute_buffers(module, dtype)
        parameters = dict(module.named_parameters())
        for name, source in self.sources(module).items():
            parameters[name].data.copy_(self.read(source, dtype))
        return module.eval().requires_grad_(False)


def _laid_out(
    source: Source, dtype: torch.dtype, parts: Iterable[tuple[slice, QuantizedWeight]]
) -> Tensor:
    """A quantised parameter as a module wants it, from some of its outputs after others."""
    whole = torch.empty(source.shape[::-1], dtype=dtype)
    for outputs, weight in parts:
        whole[:, outputs] = weight.dequantised(dtype)
    return whole if source.transposed else whole.t().contiguous()


PADDED = re.compile(r"encoder\.blocks\.\d+\.(mlp\.)?(up|gate|down)\.")
"""Parameters of the encoder's MLPs."""


def _with_zeros(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A tensor at the beginning of a larger one."""
    whole = tensor.new_zeros(shape)
    whole[tuple(map(slice, tensor.shape))] = tensor
    return whole


def _numbers(*modules: nn.Module) -> int:
    """How many numbers the parameters have."""
    return sum(one.numel() for module in modules for one in module.parameters())


def _is_linear(module: nn.Module, parameter: str) -> bool:
    owner, _, leaf = parameter.rpartition(".")
    return leaf == "weight" and isinstance(module.get_submodule(owner), Linear)


def _together(shapes: list[tuple[int, ...]], rows: int) -> tuple[int, ...] | None:
    """The shape of tensors one below the other, or of some rows of one; None where they differ."""
    first = shapes[0]
    if not first:
        return first
    rest = first[1:]
    if any(shape[len(shape) - len(rest) :] != rest for shape in shapes):
        return None
    each = (math.prod(shape[: len(shape) - len(rest)]) for shape in shapes)
    return (rows or sum(each), *rest)


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
