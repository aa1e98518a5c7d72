"""Models whose encoder is shortened, exported without the command: every tower that there is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.schedules import planned
from benchmarks.shapes import write
from edgeprune import encoder_methods
from edgeprune.bundle import Bundle
from edgeprune.export.exporter import ExportRequest, export
from edgeprune.models import Adapter, open_model
from edgeprune.models._encoder_site import ExitMap, SiteConfig
from edgeprune.models._processor import Processor, random_prompt
from edgeprune.policies import make
from edgeprune.spec import PruneSpec
from edgeprune.tiling import Size
from tests import cogvlm, families, gemma, glm, lfm2, pixtral, qwen, smolvlm
from tests.tiny import TINY

DENSE = PruneSpec("none")

Towers = dict[str, Callable[[Path], Adapter]]


def _saved(family: families.Family, folder: Path, **asked: Any) -> Adapter:
    family.save(folder)
    return open_model(str(folder), **asked)


def _cogvlm(folder: Path) -> Adapter:
    cog = cogvlm.checkpoint(folder)
    return open_model(str(cog.folder), tokenizer=cog.tokenizer)


TOWERS: Towers = {
    "llava": lambda folder: open_model(str(write(replace(TINY, vision_layers=3), folder))),
    "qwen2_vl": lambda f: open_model(str(qwen.plain_checkpoint(f)), size=Size(56, 84), frames=4),
    "qwen2_5_vl": lambda f: open_model(str(qwen.windowed_checkpoint(f)), size=Size(168, 84)),
    "qwen3_vl": lambda f: open_model(str(qwen.stacked_checkpoint(f)), size=Size(256, 256)),
    "llava_next": lambda f: _saved(families.llava_next(), f, size=Size(84, 84), images=2),
    "llava_next_padded": lambda f: _saved(families.llava_next(), f, size=Size(60, 100), images=2),
    "granite_vision": lambda f: _saved(families.granite_vision(), f, size=Size(84, 84)),
    "llava_next_video": lambda f: _saved(families.llava_next_video(), f, frames=4),
    "llava_onevision": lambda f: _saved(families.llava_onevision(), f),
    "llava_onevision_video": lambda f: _saved(families.llava_onevision(), f, frames=4),
    "video_llava": lambda f: _saved(families.video_llava(), f, frames=4),
    "internvl": lambda f: _saved(families.internvl(), f, size=Size(70, 150)),
    "smolvlm": lambda f: _saved(smolvlm.smolvlm(), f),
    "smolvlm_tiles": lambda f: _saved(smolvlm.smolvlm_tiles(), f, size=Size(84, 84)),
    "gemma3": lambda f: _saved(gemma.gemma3(), f, images=2),
    "paligemma": lambda f: _saved(gemma.paligemma(), f),
    "lfm2_vl": lambda f: _saved(lfm2.lfm2_vl(), f),
    "ministral3": lambda f: _saved(pixtral.ministral3(), f, size=Size(112, 140)),
    "glm46v": lambda folder: open_model(str(glm.checkpoint(folder)), size=Size(84, 168)),
    "pixtral": lambda f: _saved(pixtral.pixtral(), f, size=Size(84, 84)),
    "cogvlm": _cogvlm,
}
"""Every tower and layout of tokens, by the family that has it."""
STAYS = {"llava_next_padded": "padding", "llava_onevision_video": "resized"}
"""Those that drop no patch for good, and why."""


def site_of(adapter: Adapter, text: str, seed: int = 0) -> SiteConfig:
    """A method's sizes, an exit's map made up."""
    method = encoder_methods.make(text)
    assert method is not None
    site = adapter.encoder_site(method)
    if not method.rejoins:
        return site
    plain = adapter.unfitted(site).exit_map
    assert plain is not None
    noise = torch.randn(plain.weight.shape, generator=torch.Generator().manual_seed(seed))
    return replace(site, exit_map=ExitMap(plain.weight + 0.1 * noise, plain.bias + 0.1))


def bundle(
    adapter: Adapter,
    text: str,
    folder: Path,
    spec: PruneSpec = DENSE,
    *,
    target: str = "cpu",
    samples: int = 2,
) -> Bundle:
    """Exported with a shortened encoder, and where `spec` prunes nothing at the ratio that this
    has; compared with the eager reference on the way."""
    adapter, policy = adapter.with_encoder(site_of(adapter, text)), make(spec)
    if spec.method == DENSE.method:
        spec = replace(spec, cr=adapter.shape.least_ratio)
    plan = planned(policy, adapter.shape, spec.cr)
    why = "" if samples else "left out by a test"
    request = ExportRequest("tiny", spec, plan, folder / "b", target, no_parity=why)
    vocabulary = adapter.shape.vocabulary
    prompts = [random_prompt(adapter.pixels, vocabulary, seed) for seed in range(samples)]
    return Bundle.open(export(request, adapter, policy, Processor(adapter), prompts).path)
