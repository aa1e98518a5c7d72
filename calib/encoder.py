"""What a method of the encoder does to a model: its map where it has one, and what is lost by it.

Both are measured on calibration samples, kept in the cache, and made only once.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from edgeprune.calib.calibrate import CalibrationRequest, encoder_key, samples_of, write_cached
from edgeprune.calib.encoder_loss import angle, features
from edgeprune.calib.exit_map import fit
from edgeprune.encoder_methods import make
from edgeprune.errors import SpecError
from edgeprune.models import Adapter
from edgeprune.models._encoder_site import ExitMap, SiteConfig, SiteLoss
from edgeprune.models._layers import compute_buffers
from edgeprune.models._memory import check_memory, layerwise_bytes
from edgeprune.models._processor import Processor, Prompt
from edgeprune.policies import Policy
from edgeprune.progress import Progress, silent
from edgeprune.spec import ModelShape, Plan

Step = Callable[[int, int], None]
MOST = 32
"""Samples at most on which the loss is measured: each is a prefill of the whole decoder."""


def placed(text: str, adapter: Adapter) -> Adapter:
    """The model with what --encoder asks for, whose map is not fitted; SpecError where that has no
    place in it."""
    method = make(text)
    return adapter if method is None else adapter.with_encoder(adapter.encoder_site(method))


def check_method(adapter: Adapter, policy: Policy, cr: float) -> None:
    """SpecError, before anything slow, where the decoder's method cannot go with the model's
    encoder."""
    shape = adapter.shape
    first = policy.entry_tokens(shape, cr)
    plan = policy.plan(shape, cr, None if first is None else _Level((first,) * shape.layers))
    _run_empty(adapter, policy, plan)


def chooses(adapter: Adapter, policy: Policy) -> bool:
    """Whether a method can choose before layer 1 among what the model's encoder gives: it may look
    at attention that there is none of where patches leave early."""
    shape = adapter.shape
    fewest = shape.separators + 1
    if fewest >= shape.encoded:
        return False
    try:
        _run_empty(adapter, policy, level_plan(shape, policy, fewest))
    except SpecError:
        return False
    return True


def level_plan(shape: ModelShape, policy: Policy, count: int) -> Plan:
    """So many tokens enter every layer."""
    return policy.plan(shape, shape.visual_tokens / count, _Level((count,) * shape.layers))


def _run_empty(adapter: Adapter, policy: Policy, plan: Plan) -> None:
    """Without weights and numbers."""
    site = adapter.vision_config.site
    with torch.device("meta"):
        adapter = adapter.with_encoder(adapter.unfitted(site) if site else None)
        adapter.decoder(policy, plan)
        vision = adapter.vision(policy, plan)
        compute_buffers(vision, torch.float32)
        vision.eval()(torch.empty(adapter.pixels))


@dataclass(frozen=True)
class _Level:
    """Counts that no calibration gave."""

    counts: tuple[int, ...]


@dataclass(frozen=True)
class SiteMeasurement:
    """Measures sites of one encoder, each by itself, under a decoder whose policy says where tokens
    stand. What the dense model says of the samples is measured once."""

    request: CalibrationRequest
    adapter: Adapter
    processor: Processor
    policy: Policy
    report: Progress = silent

    def of(self, site: SiteConfig) -> SiteConfig:
        """The site with its map and its loss."""
        key = encoder_key(self.request, self.adapter.with_encoder(site), self.policy)
        stored = self.request.folder / f"{key}-encoder.npz"
        if (kept := _load(stored, site)) is not None:
            return kept
        dense, step = self._dense, _step(self.report, f"encoder {site.method}")
        r2 = None
        if site.method.rejoins:
            exit_map, r2 = fit(self.adapter, site, self._prompts, step)
            site = replace(site, exit_map=exit_map)
        shorter, prompts = self.adapter.with_encoder(site), self._prompts[:MOST]
        angles = angle(features(shorter, prompts, step, self.policy), dense)
        site = replace(site, loss=SiteLoss(len(dense), r2, angles))
        _save(stored, site)
        return site

    @cached_property
    def _prompts(self) -> list[Prompt]:
        need = layerwise_bytes(self.adapter, self.request.samples)
        check_memory(need, "calibration", "use fewer samples")
        return [one.prompt for one in samples_of(self.request, self.adapter, self.processor)]

    @cached_property
    def _dense(self) -> Tensor:
        """Features of the first samples."""
        step = _step(self.report, "features, dense encoder")
        return features(self.adapter.with_encoder(None), self._prompts[:MOST], step)


def check_limit(site: SiteConfig) -> None:
    """SpecError where a site that was measured loses more than its method's limit."""
    if site.loss is not None and not site.within_limit:
        raise SpecError(
            f"--encoder {site.method} turns the model's output by {site.loss.angle:.3f} radians on"
            f" {site.loss.samples} samples, at most {site.method.limit:g} is taken; choose a later"
            " block, keep more, or raise limit="
        )


def _step(report: Progress, title: str) -> Step:
    return lambda done, total: report(title, done, total)


def _load(file: Path, site: SiteConfig) -> SiteConfig | None:
    """What was measured before; None where nothing was, or where the file is damaged."""
    if not file.is_file():
        return None
    with (
        suppress(Exception),
        file.open("rb") as stream,
        np.load(stream, allow_pickle=False) as data,
    ):
        samples, r2, turned = data["loss"].tolist()
        loss = SiteLoss(int(samples), None if math.isnan(r2) else r2, turned)
        if not site.method.rejoins:
            return replace(site, loss=loss)
        weight, bias = (torch.from_numpy(data[name]) for name in ("weight", "bias"))
        return replace(site, exit_map=ExitMap(weight, bias), loss=loss)
    return None


def _save(file: Path, site: SiteConfig) -> None:
    assert site.loss is not None
    loss, found, buffer = site.loss, site.exit_map, io.BytesIO()
    told = np.array([loss.samples, math.nan if loss.r2 is None else loss.r2, loss.angle])
    if found is None:
        np.savez_compressed(buffer, loss=told)
    else:
        weight, bias = found.weight.numpy(), found.bias.numpy()
        np.savez_compressed(buffer, loss=told, weight=weight, bias=bias)
    write_cached(file, buffer.getvalue())
