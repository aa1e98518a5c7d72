"""The modules of a checkpoint and their weights: where they are stored, and how they are read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from edgeprune.errors import ModelError
from edgeprune.models._decoder import Decoder
from edgeprune.models._family import Family
from edgeprune.models._format import check_stored, why_missing
from edgeprune.models._layers import Linear, set_tables
from edgeprune.models._lora import MERGE
from edgeprune.models._ops import TorchOps
from edgeprune.models._rounding import rounded
from edgeprune.models._unread import told
from edgeprune.models._vision import Vision
from edgeprune.policies import Policy, make
from edgeprune.spec import Plan, PruneSpec


@dataclass(frozen=True, slots=True)
class Source:
    """Where a parameter comes from: a tensor's name, and whether it is stored the other way."""

    name: str
    shape: tuple[int, ...]  # as stored, but for axes of length 1
    transposed: bool
    rows: tuple[int, ...] = ()  # only these
    change: str = ""  # the adapter's name of the tensor, where a LoRA adapter changes it


class Adapter(Family):
    """Base of all families' adapters: the steps of Family, the two modules and their weights."""

    def vision(self, policy: Policy, plan: Plan, ops: TorchOps | None = None) -> nn.Module:
        """Module: pixels -> (visual tokens [1, r_1, width], kept positions [r_1])."""
        return Vision(self.vision_config, policy, plan, ops)

    def decoder(self, policy: Policy, plan: Plan, ops: TorchOps | None = None) -> Decoder:
        config = replace(self.decoder_config, tile_of=self.vision_config.layout.group_of)
        return Decoder(config, policy, plan, ops)

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
        changed = {source.change for source in sources}
        return (*self.notes(), *told(self.checkpoint, read, changed, self.is_spare))

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
