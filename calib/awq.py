"""Scales of channels before weights are quantised, as in AWQ (arXiv:2306.00978), without a change
of the graph.

s_k = mean(|x_k|) ** alpha for input channel k of the products that read one tensor. The alpha is
taken that leaves the least squared error of their outputs, were their weights rounded: the sum over
k of mean(x_k^2) times the squared error of row k, so inputs are taken as uncorrelated, and two
numbers a channel are all that is kept of the samples. The scales are folded into the tensor's
source: a norm, or the outputs of another product.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from edgeprune.calib.activations import Moments, collect
from edgeprune.errors import ModelError
from edgeprune.models import Adapter
from edgeprune.models._decoder_config import DecoderConfig
from edgeprune.models._memory import check_memory, layerwise_bytes
from edgeprune.models._processor import Prompt
from edgeprune.models._quantised import quantize
from edgeprune.models._tuning import Fold, Tuning
from edgeprune.models._weight_plan import HEAD, WeightPlan
from edgeprune.models._weight_source import Source
from edgeprune.policies import Policy
from edgeprune.progress import Progress, silent
from edgeprune.spec import Plan

ALPHAS = tuple(step / 10 for step in range(11))
LEAST = 1e-5
"""Of the mean magnitude of a channel's largest: smaller channels have the scale of this."""


@dataclass(frozen=True)
class Group:
    """Products that read one tensor, and what it comes from."""

    products: tuple[str, ...]  # weights of the products
    source: tuple[str, ...]  # its parameters whose outputs are divided: a norm's, or a product's;
    # empty where nothing can be
    shared: tuple[int, int, int] | None = None  # [kv heads, queries a key, head] that inputs are:
    # queries that share a key share a scale

    def averaged(self, channels: Tensor) -> Tensor:
        """Numbers [K] of the inputs, equal where a channel of the source is read several times."""
        if self.shared is None:
            return channels
        heads = channels.view(self.shared)
        return heads.mean(1, keepdim=True).expand_as(heads).reshape(-1)

    def largest(self, channels: Tensor) -> Tensor:
        """As `averaged`, with the largest in place of the mean."""
        if self.shared is None:
            return channels
        heads = channels.view(self.shared)
        return heads.amax(1, keepdim=True).expand_as(heads).reshape(-1)

    def of_source(self, scales: Tensor) -> Tensor:
        """Scales [K] of the inputs as those of the source's outputs."""
        return scales if self.shared is None else scales.view(self.shared)[:, 0].reshape(-1)


def tune(
    adapter: Adapter,
    policy: Policy,
    plan: Plan,
    prompts: Sequence[Prompt],
    report: Progress = silent,
) -> Tuning:
    """Scales for the weights that `adapter.weights` quantises to 4 bits, from samples.

    ModelError where the checkpoint's weights are quantised already, or do not fit in memory.
    """
    assert adapter.weights is not None
    floats = adapter.without_weights()
    if adapter.checkpoint.packed is not None:
        raise ModelError(
            "awq=on needs the floats of a checkpoint, and this one's weights are quantised"
            f" ({adapter.checkpoint.packed}); leave it out"
        )
    check_memory(layerwise_bytes(floats, len(prompts)), "awq=on", "leave it out")
    moments = collect(floats, policy, plan, prompts, report)
    sources = adapter.sources(adapter.empty_modules()[1])
    groups = [
        group for group in groups_of(adapter.decoder_config) if _helps(group, adapter.weights)
    ]
    folds: dict[str, Fold] = defaultdict(Fold)
    for number, group in enumerate(groups, 1):
        scales = _search(group, adapter, sources, moments)
        for name in group.products:
            folds[name] = Fold(scales, folds[name].outputs)
        for name in (name for name in group.source if name in sources):
            folds[name] = Fold(folds[name].inputs, group.of_source(scales))
        report("AWQ scales", number, len(groups))
    importance = dict(_importance(moments, folds, adapter.weights))
    return replace(adapter.weights.tuning, folds=dict(folds), importance=importance)


def groups_of(config: DecoderConfig) -> Iterator[Group]:
    """All of a decoder, in its order."""
    shared = (config.kv_heads, config.heads // config.kv_heads, config.head_size)
    for layer in range(len(config.layers)):
        path, experts = f"layers.{layer}", ("", "image_")[: 1 + config.layers[layer].experts]
        attentions = [f"{path}.{expert}attention" for expert in experts]
        mlps = [f"{path}.{expert}mlp" for expert in experts]
        kind = config.layers[layer]
        if kind.linear is not None:
            names = ("input", "beta", "decay", "gate")
            read = [f"{path}.linear.{name}.weight" for name in names]
            yield Group(tuple(read), (f"{path}.linear_norm.weight",))
            yield Group((f"{path}.linear.output.weight",), ())  # reads no product's output alone
        elif kind.kernel:
            yield Group((f"{path}.convolution.input.weight",), (f"{path}.convolution_norm.weight",))
            yield Group((f"{path}.convolution.output.weight",), ())  # likewise
        else:
            names = ("query", "key", "value", *(("gate",) if kind.output_gate else ()))
            read = [f"{own}.{name}.weight" for own in attentions for name in names]
            yield Group(tuple(read), (f"{path}.attention_norm.weight",))
            value = [f"{own}.value.{leaf}" for own in attentions for leaf in ("weight", "bias")]
            outputs = tuple(f"{own}.output.weight" for own in attentions)
            yield Group(outputs, tuple(value), shared)
        read = [f"{own}.{name}.weight" for own in mlps for name in ("gate", "up")]
        yield Group(tuple(read), (f"{path}.mlp_norm.weight",))
        for own in mlps:
            yield Group((f"{own}.down.weight",), (f"{own}.up.weight", f"{own}.up.bias"))
    yield Group((HEAD,), ("norm.weight",))


def _helps(group: Group, weights: WeightPlan) -> bool:
    """Whether any of its products is quantised to 4 bits, and something takes scales."""
    forms = (weights.forms.get(name) for name in group.products)
    return bool(group.source) and any(form is not None and form.bits == 4 for form in forms)


def _search(
    group: Group, adapter: Adapter, sources: Mapping[str, Source], moments: Mapping[str, Moments]
) -> Tensor:
    """The scales [K] with the least error; all 1 where none is better than that."""
    assert adapter.weights is not None
    channels = group.averaged(moments[group.products[0]].mean_absolute)
    channels = channels.clamp(min=LEAST * float(channels.max()) or 1.0)
    tried = [normalised(channels**alpha) for alpha in ALPHAS]
    errors = torch.zeros(len(tried))
    for name in group.products:
        form, squares = adapter.weights.forms.get(name), moments[name].mean_square[:, None]
        if form is None or form.bits != 4:
            continue
        for _, weight in adapter.reader.floats(sources[name]):
            for number, scales in enumerate(tried):
                block = form.block or len(weight)
                found = quantize(weight * scales[:, None], 4, block, adapter.weights.scales)
                left = found.dequantised() / scales[:, None] - weight
                errors[number] += (left.square() * squares).sum()
    return tried[int(errors.argmin())]


def normalised(scales: Tensor) -> Tensor:
    """Around 1, so that no dtype is left: the largest times the smallest is 1."""
    return scales / (scales.max() * scales.min()).sqrt()


def _importance(
    moments: Mapping[str, Moments], folds: Mapping[str, Fold], weights: WeightPlan
) -> Iterator[tuple[str, Tensor]]:
    """The mean square of each channel as a product reads it after the folds."""
    for name in weights.forms.keys() & moments.keys():  # no product reads the embedding
        fold, squares = folds.get(name, Fold()), moments[name].mean_square
        yield name, squares if fold.inputs is None else squares / fold.inputs.square()
