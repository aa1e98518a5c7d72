"""A checkpoint of a family: its two modules, and the weights that they are given."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Collection, Iterator
from dataclasses import replace
from functools import cached_property
from typing import Self

import torch
from torch import Tensor, nn

from edgeprune.encoder_methods import EncoderMethod
from edgeprune.errors import ModelError, SpecError
from edgeprune.models._decoder import Decoder
from edgeprune.models._encoder_site import ExitMap, SiteConfig
from edgeprune.models._execution import HOST, Execution
from edgeprune.models._family import Family
from edgeprune.models._layers import Linear, compute_buffers
from edgeprune.models._lora import MERGE
from edgeprune.models._ops import TorchOps
from edgeprune.models._quantised import BITS, QuantizedWeight
from edgeprune.models._tuning import UNTUNED, Tuning
from edgeprune.models._unread import check_unread
from edgeprune.models._vision import Vision
from edgeprune.models._weight_plan import EMBEDDING, WeightPlan, plan_weights
from edgeprune.models._weight_reader import WeightReader
from edgeprune.models._weight_source import Source, find_source
from edgeprune.policies import Policy, make
from edgeprune.spec import Plan, PruneSpec
from edgeprune.weight_format import FLOAT, WeightFormat

PADDED = re.compile(r"encoder\.blocks\.\d+\.(mlp\.)?(up|gate|down)\.")
"""Parameters of the encoder's MLPs."""


class Adapter(Family):
    """Base of all families' adapters: the steps of Family, the two modules and their weights."""

    weights: WeightPlan | None = None
    """Which weights are quantised; None: none. What `load` gives is quantised too."""
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
                if self.reader.is_packed(source) and name != EMBEDDING and first.block % block == 0:
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
        shape = tuple(parameter.shape)[::-1] if transposed else tuple(parameter.shape)
        own = self._own_shape(name, shape)
        source = find_source(self.checkpoint, self.stored(name), shape, own, transposed=transposed)
        change = next(filter(None, source.changes), "")
        if change and name == "embedding.weight" and self.decoder_config.tied:
            raise ModelError(
                f"the adapter changes {change}, which is both embedding and output head of this"
                f" model; {MERGE}, saved with tie_word_embeddings false"
            )
        return source if self.weights is None else source.planned(name, self.weights)

    def _own_shape(self, parameter: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """A parameter's shape without channels that `_padded` has added."""
        if self.stored_mlp is None or not PADDED.match(parameter):
            return shape
        added, own = self.vision_config.encoder.mlp_width, self.stored_mlp
        return tuple(own if size == added else size for size in shape)

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

    @property
    def reader(self) -> WeightReader:
        """What reads the parameters of `sources`."""
        return WeightReader(self.checkpoint, self.weights)

    def load(self, module: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
        """Fill a module built on the meta device with weights; returns it ready to run."""
        module.to_empty(device="cpu").to(dtype)
        compute_buffers(module, dtype)
        parameters = dict(module.named_parameters())
        for name, source in self.sources(module).items():
            parameters[name].data.copy_(self.reader.read(source, dtype))
        return module.eval().requires_grad_(False)


def _numbers(*modules: nn.Module) -> int:
    """How many numbers the parameters have."""
    return sum(one.numel() for module in modules for one in module.parameters())


def _is_linear(module: nn.Module, parameter: str) -> bool:
    owner, _, leaf = parameter.rpartition(".")
    return leaf == "weight" and isinstance(module.get_submodule(owner), Linear)
