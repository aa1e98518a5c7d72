"""The products whose kind `--weights auto` chooses, and the bits that each choice takes.

A budget of bits a weight is of all weights that are quantised or may be, scales included: what the
manifest's `bits` says of the bundle.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edgeprune.calib.awq import groups_of
from edgeprune.errors import SpecError
from edgeprune.models import Adapter
from edgeprune.models._weight_plan import EMBEDDING, HEAD
from edgeprune.weight_format import AUTO


@dataclass(frozen=True)
class OpenProducts:
    """Groups of products that a kind is chosen for, and what they and all others take."""

    groups: Sequence[Sequence[str]]  # products that read one tensor, in the decoder's order
    bits: Sequence[Mapping[str, float]]  # of each group, by kind
    rest: float  # bits of what is quantised, and has no choice
    numbers: int  # weights that are quantised, or may be

    @classmethod
    def of(cls, four: Adapter, eight: Adapter, element: int, *, fused: bool) -> OpenProducts:
        """Of two adapters that have the open products in 4 and in 8 bits.

        Scales have `element` bytes; `fused` says that products are MatMulNBits.
        """
        assert four.weights is not None and eight.weights is not None
        fine, coarse, sizes = eight.weights.forms, four.weights.forms, four.weights.sizes
        is_open = {name for name, form in coarse.items() if form != fine.get(name)}
        found = (
            [n for n in group.products if n in is_open] for group in groups_of(four.decoder_config)
        )
        groups = [names for names in found if names]
        assert is_open == {name for names in groups for name in names}
        taken = {
            "int4": _bits(four, element, fused=fused),
            "int8": _bits(eight, element, fused=fused),
        }
        bits = list[dict[str, float]]()
        for names in groups:
            bits.append({kind: sum(map(each.__getitem__, names)) for kind, each in taken.items()})
            if HEAD not in names:  # of floats it may be the embedding's tensor, which is not scaled
                bits[-1]["float"] = 8.0 * element * sum(math.prod(sizes[name]) for name in names)
        rest = sum(each for name, each in taken["int4"].items() if name not in is_open)
        return cls(groups, bits, rest, sum(map(math.prod, sizes.values())))

    @property
    def least(self) -> float:
        """The fewest bits a weight that a choice takes."""
        return (self.rest + sum(min(one.values()) for one in self.bits)) / self.numbers

    def budget(self, wanted: float) -> float:
        """What is left for the groups of so many bits a weight; SpecError where that is too few."""
        if wanted < self.least:
            enough = math.ceil(100 * self.least) / 100
            raise SpecError(
                f"--weights {AUTO}:bits={wanted:g} cannot be met: {self.least:.3f} bits a weight"
                " are the fewest here, with scales and with what int4 cannot hold; give"
                f" bits={enough:g} or more"
            )
        return wanted * self.numbers - self.rest


def _bits(adapter: Adapter, element: int, *, fused: bool) -> dict[str, float]:
    """Of each quantised weight: its codes, its scales, and what stands for zero points."""
    plan, found = adapter.weights, dict[str, float]()
    assert plan is not None
    for name, form in plan.forms.items():
        size = form.fused_bytes if fused and name != EMBEDDING else form.bytes
        found[name] = 8.0 * size(*plan.sizes[name], element)
    for name, bits, block in adapter.shifted(plan):
        inputs, outputs = plan.sizes[name]
        blocks = inputs // block
        held = bits * (blocks + blocks % 2 * (bits == 4)) if fused else 8 * element * blocks
        found[name] += outputs * held
    return found
