"""The map of an early exit: ridge regression from the state before a block to what the dense
encoder says of the same patches in the end, in closed form.

The dense encoder runs on calibration images, block by block, and nothing else does. The patches are
those that would leave under the method's choice. Sums are float64; inputs are scaled to unit
variance before the ridge, since a few channels of deep encoders are a hundred times the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from edgeprune.errors import SpecError
from edgeprune.models import Adapter
from edgeprune.models._encoder_site import EncoderSite, ExitMap, SiteConfig
from edgeprune.models._layerwise import Layerwise
from edgeprune.models._ops import TorchOps
from edgeprune.models._processor import Prompt
from edgeprune.models._vision_tower import Encoding
from edgeprune.policies import make
from edgeprune.spec import Plan, PruneSpec

RIDGE = 1e-3
"""Added to the variance of each scaled input, which is 1."""
HELD_OUT = 5
"""Every so many images one judges the map of the others."""


@dataclass(frozen=True)
class _Sample:
    """One image between two blocks."""

    encoding: Encoding
    left: Tensor | None = None  # [tiles, n, width], states of the patches that leave
    rows: Tensor | None = None  # int64 [tiles, n], where they are in the sequence


@dataclass
class _Sums:
    """Of inputs x and targets y over all patches: what a regression needs to know."""

    count: int
    x: Tensor  # [width]
    y: Tensor  # [outputs]
    xx: Tensor  # [width, width]
    xy: Tensor  # [width, outputs]
    yy: float

    @classmethod
    def none(cls, width: int, outputs: int) -> _Sums:
        def zeros(*size: int) -> Tensor:
            return torch.zeros(size, dtype=torch.float64)

        sums = zeros(width), zeros(outputs), zeros(width, width), zeros(width, outputs)
        return cls(0, *sums, 0.0)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Patches [n, width] and [n, outputs]."""
        x, y = x.double(), y.double()
        self.count += len(x)
        self.x += x.sum(0)
        self.y += y.sum(0)
        self.xx += x.T @ x
        self.xy += x.T @ y
        self.yy += float(y.square().sum())

    def __add__(self, other: _Sums) -> _Sums:
        parts = (self.x + other.x, self.y + other.y, self.xx + other.xx, self.xy + other.xy)
        return _Sums(self.count + other.count, *parts, self.yy + other.yy)

    def solve(self) -> ExitMap:
        """The ridge regression."""
        mean_x, mean_y = self.x / self.count, self.y / self.count
        cross = self.xy / self.count - mean_x[:, None] * mean_y
        covariance = self.xx / self.count - mean_x[:, None] * mean_x
        scale = covariance.diagonal().clamp(min=1e-12).sqrt()
        scaled = covariance / (scale[:, None] * scale) + RIDGE * torch.eye(len(scale))
        weight = torch.linalg.solve(scaled, cross / scale[:, None]) / scale[:, None]
        return ExitMap(weight.float(), (mean_y - mean_x @ weight).float())

    def r2(self, found: ExitMap) -> float:
        """The share of the targets' variance that a map explains."""
        weight, bias = found.weight.double(), found.bias.double()
        left = self.yy - 2 * float((weight * self.xy).sum() + bias @ self.y)
        left += float((weight * (self.xx @ weight)).sum() + 2 * (self.x @ weight) @ bias)
        left += self.count * float(bias @ bias)
        whole = self.yy - float(self.y @ self.y) / self.count
        return 1 - left / whole if whole > 0 else 0.0


@torch.no_grad()
def fit(
    adapter: Adapter,
    site: SiteConfig,
    prompts: Iterable[Prompt],
    report: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[ExitMap, float]:
    """The map for a site, and its R^2 on the images that a map of the others never saw.

    `report` is told how often an image went through a block, and how often it will.
    """
    plan = Plan(adapter.shape.visual_tokens, adapter.shape.layers)
    dense = adapter.with_encoder(None)
    blocks = dense.vision_config.encoder.blocks
    engine = Layerwise(
        dense,
        make(PruneSpec("none")),
        plan,
        lambda done, total: report(done, total * blocks // (blocks + plan.layers)),
    )
    tower, leaves = engine.vision.encoder, EncoderSite(site, TorchOps())
    tower.looked_at = (site.at - 1,)

    run = engine.execution.run

    def begun(prompt: Prompt) -> _Sample:
        encoding = tower.enter(prompt.pixels)
        return _Sample(replace(encoding, contrast=tower.contrast(prompt.pixels, leaves)))

    def step(number: int, sample: _Sample) -> _Sample:
        if number == site.at:
            split = tower.split(sample.encoding, leaves).split
            assert split is not None
            sample = replace(sample, left=split.removed_states, rows=leaves.rows(split.removed))
        return replace(sample, encoding=tower.run_block(number, sample.encoding, None))

    def states(encoding: Encoding) -> tuple[Tensor, ...]:
        return tuple(tower.states(encoding, site.at))

    width = dense.vision_config.encoder.width
    outputs = width * dense.vision_config.encoder.states_after(site.at)
    used, held_out = _Sums.none(width, outputs), _Sums.none(width, outputs)
    with engine.around_blocks():
        samples = engine.blocks(engine.keep(run(begun, prompt) for prompt in prompts), step)
        for number, sample in enumerate(samples.drain()):
            assert sample.left is not None and sample.rows is not None
            whole = torch.cat(run(states, sample.encoding), -1)
            rows = sample.rows[..., None].expand(-1, -1, outputs)
            sums = held_out if number % HELD_OUT == HELD_OUT - 1 else used
            sums.add(sample.left.flatten(0, 1), whole.gather(1, rows).flatten(0, 1))
    if not held_out.count:
        raise SpecError(
            f"encoder {site.method} fits a map on calibration images, {HELD_OUT} at least; give"
            " more with --samples and --samples-file"
        )
    return (used + held_out).solve(), held_out.r2(used.solve())
