"""How far a site in the encoder turns the model's output: the angle that schedules count in too.

The mean over samples of the angle between the decoder's output feature (of the last prompt token,
after the final norm) with the site and without, the decoder dense both times. Angles obey the
triangle inequality, so this and a schedule's loss on the shortened encoder bound the whole's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from edgeprune.models import Adapter
from edgeprune.models._decoder import Flow
from edgeprune.models._layerwise import Layerwise
from edgeprune.models._processor import Prompt
from edgeprune.policies import Policy, make
from edgeprune.spec import Plan, PruneSpec


@torch.no_grad()
def features(
    adapter: Adapter,
    prompts: Iterable[Prompt],
    report: Callable[[int, int], None] = lambda done, total: None,
    policy: Policy | None = None,
    plan: Plan | None = None,
) -> Tensor:
    """The output feature of each prompt: float32 [samples, width]. Nothing is pruned behind the
    encoder, or what the `plan` of a policy says. Where the encoder drops tokens, `policy` says
    where the others stand."""
    policy = policy or make(PruneSpec("none"))
    engine = Layerwise(adapter, policy, plan or policy.unpruned(adapter.shape), report)

    def step(index: int, flow: Flow) -> Flow:
        return engine.advance(index, flow).flow

    flows = engine.keep(started.flow for started in engine.start(prompts))
    last = [flow.hidden[:, -1] for flow in engine.layers(flows, step).drain()]
    run, norm = engine.execution.run, engine.decoder.norm
    return torch.cat([run(norm, one).float() for one in engine.normed(last)])


def angle(found: Tensor, dense: Tensor) -> float:
    """Mean angle between the rows of two sets of features, in radians."""
    cosine = torch.cosine_similarity(found.double(), dense.double())
    return float(cosine.clamp(-1, 1).acos().mean())
