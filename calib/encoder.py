"""What a method of the encoder does to a model: its map where it has one, and what is lost by it.

Both are measured on calibration samples, kept in the cache, and made only once.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from edgeprune.calib.calibrate import CalibrationRequest, encoder_key, samples_of, write_cached
from edgeprune.calib.encoder_loss import angle, features
from edgeprune.calib.exit_map import fit
from edgeprune.errors import SpecError
from edgeprune.models import Adapter
from edgeprune.models._encoder_site import ExitMap, SiteConfig, SiteLoss
from edgeprune.models._memory import check_memory, layerwise_bytes
from edgeprune.models._processor import Processor, Prompt
from edgeprune.progress import Progress, silent

MOST = 32
"""Samples at most on which the loss is measured: each is a prefill of the whole decoder."""


def measure_site(
    request: CalibrationRequest,
    adapter: Adapter,
    processor: Processor,
    site: SiteConfig,
    report: Progress = silent,
) -> SiteConfig:
    """The site with its map and its loss; SpecError where more is lost than its limit allows."""
    stored = request.folder / f"{encoder_key(request, adapter, site.method)}-encoder.npz"
    found = _load(stored, site)
    if found is None:
        check_memory(layerwise_bytes(adapter, request.samples), "calibration", "use fewer samples")
        found = _measured(request, adapter, processor, site, report)
        _save(stored, found)
    assert found.loss is not None
    if not found.loss.angle <= site.method.limit:
        raise SpecError(
            f"--encoder {site.method} turns the model's output by {found.loss.angle:.3f} radians on"
            f" {found.loss.samples} samples, at most {site.method.limit:g} is taken; choose a later"
            " block, keep more, or raise limit="
        )
    return found


def _measured(
    request: CalibrationRequest,
    adapter: Adapter,
    processor: Processor,
    site: SiteConfig,
    report: Progress,
) -> SiteConfig:
    prompts: list[Prompt] = [one.prompt for one in samples_of(request, adapter, processor)]
    r2 = None
    if site.method.rejoins:
        exit_map, r2 = fit(adapter, site, prompts, _step(report, "fit the exit's map"))
        site = replace(site, exit_map=exit_map)
    few = list(islice(prompts, MOST))
    dense = features(adapter.with_encoder(None), few, _step(report, "features, dense encoder"))
    ours = features(adapter.with_encoder(site), few, _step(report, "features, short encoder"))
    return replace(site, loss=SiteLoss(len(few), r2, angle(ours, dense)))


def _step(report: Progress, title: str) -> Callable[[int, int], None]:
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
