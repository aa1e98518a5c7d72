"""The parity check tells a tie from a fault: engines here are stubs that choose by one number."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from edgeprune.errors import ParityError
from edgeprune.export import parity, precision
from edgeprune.export.dialogue import Outcome, play
from edgeprune.models._processor import Prompt
from edgeprune.models._reference import Step
from edgeprune.spec import Plan, Stage

DROPS = Plan(2, 1, (Stage("vision", 1),))
MERGES = Plan(2, 1, (Stage("vision", 0, merged=1),))
NAN = float("nan")


@dataclass
class Engine:
    """Keeps token 1 where the pixels' sum is above `cut`, else token 0: a model and its graphs."""

    cut: float = 0.0
    shift: float = 0.0  # of every logit
    shifted: tuple[int, ...] = (0, 1)  # where one of these is kept
    dtype: torch.dtype = torch.float32
    plan: Plan = DROPS
    visual_shift: float = 0.0
    merges: bool = False  # what is chosen becomes part of token 0, and token 0 is kept
    calls: int = field(default=0)

    @property
    def decoder(self) -> Any:
        return self

    def prefill(self, prompt: Prompt) -> Step:
        self.calls += 1
        chosen = int(prompt.pixels.sum() > self.cut)
        self.vision_kept = torch.tensor([0 if self.merges else chosen])
        self.visual = torch.full((1, 1, 4), float(chosen) + self.visual_shift)
        self.added = self.visual.sum() + (self.shift if chosen in self.shifted else 0.0)
        return self.step(prompt.text_ids)

    def step(self, ids: Tensor) -> Step:
        return Step(torch.arange(5.0) + self.added, ())


def prompt(total: float) -> Prompt:
    pixels = torch.zeros(1, 3, 4, 4)
    pixels[0, 0, 0, 0], pixels[0, 0, 0, 1] = total + 1, -1
    return Prompt(pixels, torch.zeros(1, 2).long(), torch.ones(1, 3).long())


NEAR = prompt(2e-7)  # nearer to the cut than rounding
CLEAR = prompt(9.0)

Check = Callable[..., Any]


@pytest.fixture
def check() -> Check:
    """Compares stubs: check(reference, graphs, prompts)."""

    def run(reference: Engine, graphs: Engine, prompts: Sequence[Prompt]) -> Any:
        return parity.check(graphs, reference, prompts)  # type: ignore[arg-type]

    return run


def test_a_tie_is_a_choice_that_rounding_can_turn(check: Check) -> None:
    """The graph drops the other token; where that is no tie, it is a fault."""
    otherwise = Engine(cut=1.0)
    record = check(Engine(), otherwise, [NEAR, CLEAR, CLEAR])
    assert (record.samples, record.ties) == (3, 1)
    assert record.logits == record.visual == 0.0
    with pytest.raises(ParityError, match="keeps other tokens than the eager reference; nothing"):
        check(Engine(), otherwise, [prompt(2e-2), CLEAR, CLEAR])


@pytest.mark.parametrize("near", [1, 2, 3])
def test_ties_are_a_third_of_the_samples_at_most(check: Check, near: int) -> None:
    prompts = [NEAR] * near + [CLEAR] * 4
    if near <= 2:
        assert check(Engine(), Engine(cut=1.0), prompts).ties == near
        return
    reference = Engine()
    with pytest.raises(ParityError, match="on 3 of 7 samples, and a tie may explain it on a third"):
        check(reference, Engine(cut=1.0), prompts)
    assert reference.calls == len(prompts), "no nudge is tried where no answer would do"


def test_a_tie_explains_no_wrong_logits(check: Check) -> None:
    """The choice turns with rounding, but the graph's logits fit neither choice."""
    with pytest.raises(ParityError, match="keeps other tokens"):
        check(Engine(), Engine(cut=1.0, shift=0.5, shifted=(0,)), [NEAR, CLEAR, CLEAR])


def test_equal_tokens_with_other_numbers_are_a_fault(check: Check) -> None:
    """Where nothing is merged no rounding explains them, however near a choice is."""
    with pytest.raises(ParityError, match=r"logits differ .* by 6\.25e-02"):
        check(Engine(), Engine(shift=0.5), [NEAR, CLEAR, CLEAR])
    graphs = Engine(cut=1.0, merges=True)
    with pytest.raises(ParityError, match="visual tokens differ from the eager reference by"):
        check(Engine(merges=True), graphs, [NEAR, CLEAR, CLEAR])
    assert check(Engine(merges=True, plan=MERGES), graphs, [NEAR, CLEAR, CLEAR]).ties == 1
    graphs = Engine(merges=True, shift=0.5)
    with pytest.raises(ParityError, match="logits differ from the eager reference by"):
        check(Engine(merges=True, plan=MERGES), graphs, [CLEAR, CLEAR, CLEAR])


@pytest.mark.parametrize("value", [NAN, float("inf")])
@pytest.mark.parametrize("where", ["shift", "visual_shift"])
def test_what_is_not_finite_is_a_failure_by_name(check: Check, value: float, where: str) -> None:
    """NaN agrees with nothing, so nothing may be concluded from a disagreement."""
    what = {"shift": "logits of the prefill", "visual_shift": "visual tokens"}[where]
    broken = Engine(**{where: value})  # type: ignore[arg-type]
    for reference, graphs, name in (
        (Engine(), broken, "exported graph"),
        (broken, Engine(), "eager reference"),
        (broken, broken, "eager reference"),
    ):
        with pytest.raises(ParityError, match=f"the {name} in float32 gives {what} that are not"):
            check(reference, graphs, [NEAR, CLEAR, CLEAR])


@pytest.mark.parametrize(
    ("kept", "among"),
    [
        (([0, 2, 3], [0, 1]), True),  # 0 always, then what one or the other kept: 0 and 2
        (([1, 2, 3], [0, 1]), False),  # 0 is kept always
        (([0, 2, 5], [0, 1]), False),  # 5 is never kept
        (([0, 1, 2], [0, 1]), False),  # the first's choice: then it is no choice that differs
        (([0, 2, 1], [0, 2]), True),  # the first's too, but another token stands for merged ones
        (([0, 2, 3], [1, 2]), False),  # of 0, 2 and 3 it drops 0
    ],
)
def test_many_close_choices_are_ties_together(kept: tuple[list[int], ...], among: bool) -> None:
    def outcome(*kept: list[int], logit: float = 0.0) -> Outcome:
        logits = (torch.tensor([1.0, logit]),)
        return Outcome(tuple(map(torch.tensor, kept)), torch.zeros(1, 1, 1), logits)

    others = [
        outcome([0, 1, 2], [0, 1]),
        outcome([0, 1, 3], [0, 2], logit=0.1),
        outcome([0, 2, 4], [0, 1]),
    ]
    assert parity._is_among(outcome(*kept, logit=0.15), others) == among
    assert not parity._is_among(outcome(*kept, logit=0.25), others), "farther than they are"


@dataclass
class Half(Engine):
    """A model of several tokens whose choices and logits are off by noise of a given size."""

    noise: float = 0.0
    seed: int = 0
    plan: Plan = field(default_factory=lambda: Plan(40, 1, (Stage("vision", 10),)))

    def prefill(self, prompt: Prompt) -> Step:
        self.drawn = torch.Generator().manual_seed(self.seed + int(prompt.pixels.sum()))
        scores = torch.arange(40.0) / 40 + self._noise(40)
        self.vision_kept = scores.topk(10).indices.sort().values
        self.visual = torch.zeros(1, 10, 4) + self.visual_shift
        return self.step(prompt.text_ids)

    def step(self, ids: Tensor) -> Step:
        return Step(torch.linspace(-1, 1, 50) + self._noise(50) + self.shift, ())

    def _noise(self, count: int) -> Tensor:
        return self.noise * torch.randn(count, generator=self.drawn)


@pytest.fixture
def measure() -> Check:
    """Measures stubs: measure(eager, graphs)."""

    def run(eager: Half, graphs: Half | None, reference: Half | None = None) -> Any:
        prompts, wanted = [prompt(float(total)) for total in range(8)], reference or Half()
        return precision.measure(graphs, wanted, eager, prompts)  # type: ignore[arg-type]

    return run


def half(noise: float, dtype: torch.dtype = torch.float16, **settings: Any) -> Half:
    return Half(dtype=dtype, noise=noise, **settings)


def test_half_precision_is_measured_beside_float32(measure: Check) -> None:
    eager, graph = measure(half(0.03), half(0.03, seed=100))
    for record in (eager, graph):
        assert 0.8 <= record.overlap["vision"] < 1
        assert record.logits == pytest.approx(0.03 / 0.595, rel=0.1)
        assert 0.8 <= record.tokens <= 1
    eager, graph = measure(half(0.0), half(0.0))
    assert (eager.overlap, eager.logits, eager.tokens) == ({"vision": 1.0}, 0.0, 1.0)
    assert measure(half(0.02, torch.bfloat16), None)[1] is None


def test_a_graph_may_not_be_farther_from_float32_than_the_eager_model(measure: Check) -> None:
    with pytest.raises(ParityError, match=r"keeps \d\d\.\d% of float32's tokens at vision"):
        measure(half(0.02), half(0.2))
    with pytest.raises(
        ParityError, match=r"it has logits 0\.05\d* standard deviations from float32's"
    ):
        measure(half(0.005), half(0.005, shift=0.03))
    with pytest.raises(ParityError, match="it has 0% of float32's next tokens, the eager model 1"):
        graphs = half(0.0)
        graphs.step = lambda ids: Step(  # type: ignore[method-assign]
            torch.linspace(-1, 1, 50).index_fill(0, torch.tensor([48]), 1.001), ()
        )
        measure(half(0.005), graphs)


def test_a_model_that_half_precision_does_not_hold_is_refused(measure: Check) -> None:
    for dtype, name, advice in (
        (torch.float16, "fp16", "export with --dtype bf16 or --dtype fp32"),
        (torch.bfloat16, "bf16", "export with --dtype fp32"),
    ):
        with pytest.raises(ParityError, match=f"{name} does not hold this model: .*: {advice}"):
            measure(half(2.0, dtype), half(2.0))


def test_what_is_not_finite_in_half_precision_says_what_would_help(measure: Check) -> None:
    found = "gives logits of the prefill that are not finite on sample 1; nothing was written"
    for eager, graph, name in (
        (half(0, shift=NAN), half(0, shift=NAN), "the eager model in fp16"),
        (half(0), half(0, shift=NAN), "the exported graph in fp16"),
    ):
        with pytest.raises(
            ParityError, match=f"{name} {found}: export with --dtype bf16 or --dtype fp32"
        ):
            measure(eager, graph)
    with pytest.raises(
        ParityError, match=r"float32 model gives .*: check the checkpoint's weights"
    ):
        measure(half(0), half(0), half(NAN))


def test_a_dialogue_is_a_prefill_two_decode_steps_and_a_second_turn() -> None:
    outcome, token = play(Engine(), CLEAR)  # type: ignore[arg-type]
    assert len(outcome.logits) == 4 and token.tolist() == [[4]]
    assert outcome.survivors() == [{1}]
