"""The parity check tells a tie from a fault: engines here are stubs that choose by one number."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from edgeprune.errors import ParityError
from edgeprune.export import parity, precision, ties
from edgeprune.export.dialogue import Played
from edgeprune.export.ties import Given
from edgeprune.models._activations import Activations
from edgeprune.models._dialogues import Outcome
from edgeprune.models._execution import HOST
from edgeprune.models._processor import Prompt
from edgeprune.models._stages import DialogueState, ImageState, Stages
from edgeprune.spec import Plan, Stage

NAN = float("nan")


@dataclass
class Settings:
    """Keeps token 1 where the pixels' sum is above `cut`, else token 0: a model or its graphs."""

    cut: float = 0.0
    shift: float = 0.0  # of every logit
    visual_shift: float = 0.0
    merges: bool = False  # what is chosen becomes part of token 0, and token 0 is kept
    merged: bool = False  # and the plan says so


class Stub(Stages[Any]):
    """Two stages: what comes in, and what comes out."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.calls, self.execution = settings, 0, HOST

    def windows(self) -> list[range]:
        return [range(1), range(1, 2)]

    def loaded(self, stages: range) -> AbstractContextManager[None]:
        return nullcontext()

    def merges(self, stage: int) -> bool:
        return self.settings.merged

    def nudged(self, state: Any, change: Callable[[Tensor], Tensor]) -> Any:
        self.calls += 1
        return replace(state, shown=tuple(map(change, state.shown)))

    def entered(self, state: Any, hidden: Tensor) -> Any:
        return replace(state, shown=(hidden, *state.shown[1:]))


class Vision(Stub):
    titles, gives = ("the encoder's input", "the visual tokens"), "visual tokens"

    def through(self, stage: int, state: ImageState) -> ImageState:
        if stage == 0:
            return state
        settings, chosen = self.settings, int(state.shown[0].sum() > self.settings.cut)
        kept = torch.tensor([0 if settings.merges else chosen])
        visual = torch.full((1, 1, 4), float(chosen) + settings.visual_shift)
        return ImageState((visual,), (kept,))


class Decoder(Stub):
    titles, gives = ("the decoder's input", "the output head"), "logits"

    def begin(self, prompt: Prompt, visual: Tensor, indices: Tensor) -> DialogueState:
        return DialogueState((), (visual,) * 4, (indices,))

    def through(self, stage: int, state: DialogueState) -> DialogueState:
        if stage == 0:
            return state
        logits = tuple(torch.arange(5.0) + v.sum() + self.settings.shift for v in state.shown)
        return replace(state, shown=logits)


class Model:
    def __init__(self, settings: Settings) -> None:
        self.vision, self.decoder = Vision(settings), Decoder(settings)
        self.activations, self.stages = Activations(), 4


class Graph:
    """A model's stages as windows of a graph."""

    def __init__(self, stages: Stub) -> None:
        self.stages = stages

    @contextmanager
    def opened(self, number: int) -> Iterator[Callable[[Played], Played]]:
        def run(played: Played) -> Played:
            before: Any = ImageState(played.inputs[0])
            if isinstance(self.stages, Decoder):
                before = DialogueState((), played.inputs[0], ())
            after = self.stages.advance(number, before)
            return Played((after.shown,), (), before.shown, (after.shown,), (after.chosen,))

        yield run


class Graphs:
    def __init__(self, settings: Settings) -> None:
        model = Model(settings)
        self.vision, self.decoder = Graph(model.vision), Graph(model.decoder)

    def encode_image(self, prompt: Prompt) -> Played:
        return Played(((prompt.pixels,),))

    def talk(self, prompt: Prompt, visual: Tensor, indices: Tensor) -> Played:
        return Played(((visual,) * 4,))


def prompt(total: float) -> Prompt:
    pixels = torch.zeros(1, 3, 4, 4)
    pixels[0, 0, 0, 0], pixels[0, 0, 0, 1] = total + 1, -1
    return Prompt(pixels, torch.zeros(1, 2).long(), torch.ones(1, 3).long())


NEAR = prompt(2e-7)  # nearer to the cut than rounding
CLEAR = prompt(9.0)


def check(reference: Settings | Model, graphs: Settings, prompts: Sequence[Prompt]) -> Any:
    model = reference if isinstance(reference, Model) else Model(reference)
    return parity.check(Graphs(graphs), model, prompts)  # type: ignore[arg-type]


def test_a_tie_is_a_choice_that_rounding_can_turn() -> None:
    """The graph drops the other token; where that is no tie, it is a fault."""
    otherwise = Settings(cut=1.0)
    record = check(Settings(), otherwise, [NEAR, CLEAR, CLEAR])
    assert (record.samples, record.ties) == (3, 1)
    assert record.logits == record.visual == 0.0
    fault = "keeps other tokens than the eager reference in the visual tokens; nothing"
    with pytest.raises(ParityError, match=fault):
        check(Settings(), otherwise, [prompt(2e-2), CLEAR, CLEAR])


@pytest.mark.parametrize("near", [1, 2, 3])
def test_ties_are_a_third_of_the_samples_at_most(near: int) -> None:
    prompts = [NEAR] * near + [CLEAR] * 4
    if near <= 2:
        assert check(Settings(), Settings(cut=1.0), prompts).ties == near
        return
    model = Model(Settings())
    with pytest.raises(ParityError, match="on 3 of 7 samples, and a tie may explain it on a third"):
        check(model, Settings(cut=1.0), prompts)
    assert model.vision.calls <= 2 * ties.NUDGES, "no nudge is tried where no answer would do"


def test_a_tie_explains_no_wrong_logits() -> None:
    """The choice turns with rounding; what the decoder makes of it is compared all the same."""
    with pytest.raises(ParityError, match=r"logits differ .* begins in the output head"):
        check(Settings(), Settings(cut=1.0, shift=0.5), [NEAR, CLEAR, CLEAR])


def test_equal_tokens_with_other_numbers_are_a_fault() -> None:
    """Where nothing is merged no rounding explains them, however near a choice is."""
    with pytest.raises(ParityError, match=r"logits differ .* by 1\.25e-01"):
        check(Settings(), Settings(shift=0.5), [prompt(-9.0), CLEAR, CLEAR])
    graphs = Settings(cut=1.0, merges=True)
    with pytest.raises(ParityError, match="visual tokens differ from the eager reference by"):
        check(Settings(merges=True), graphs, [NEAR, CLEAR, CLEAR])
    assert check(Settings(merges=True, merged=True), graphs, [NEAR, CLEAR, CLEAR]).ties == 1
    graphs = Settings(merges=True, visual_shift=0.5)
    with pytest.raises(ParityError, match="visual tokens differ from the eager reference by"):
        check(Settings(merges=True, merged=True), graphs, [CLEAR, CLEAR, CLEAR])


@pytest.mark.parametrize("value", [NAN, float("inf")])
@pytest.mark.parametrize("where", ["shift", "visual_shift"])
def test_what_is_not_finite_is_a_failure_by_name(value: float, where: str) -> None:
    """NaN agrees with nothing, so nothing may be concluded from a disagreement."""
    what = {"shift": "logits of the prefill", "visual_shift": "visual tokens"}[where]
    broken = Settings(**{where: value})  # type: ignore[arg-type]
    for reference, graphs, name in (
        (Settings(), broken, "exported graph"),
        (broken, Settings(), "eager reference"),
        (broken, broken, "eager reference"),
    ):
        with pytest.raises(ParityError, match=f"the {name} in float32 gives {what} that are not"):
            check(reference, graphs, [NEAR, CLEAR, CLEAR])


@pytest.mark.parametrize(
    ("kept", "among"),
    [
        ([0, 2, 3], True),  # 0 always, then what one or the other kept: 2 and 3
        ([1, 2, 3], False),  # 0 is kept always
        ([0, 2, 5], False),  # 5 is never kept
        ([0, 1, 2], False),  # the first's choice: then it is no choice that differs
    ],
)
def test_many_close_choices_are_ties_together(kept: list[int], *, among: bool) -> None:
    others = [Given((), (torch.tensor(o),)) for o in ([0, 1, 2], [0, 1, 3], [0, 2, 4])]
    assert ties._is_among(Given((), (torch.tensor(kept),)), others) == among


PLAN = Plan(40, 1, (Stage("vision", 10),))


def outcomes(noise: float, seed: int = 0, shift: float = 0.0) -> list[Outcome]:
    """Of eight samples, several tokens each; choices and logits are off by noise of a size."""
    found = list[Outcome]()
    for number in range(8):
        drawn = torch.Generator().manual_seed(seed + number)
        scores = torch.arange(40.0) / 40 + noise * torch.randn(40, generator=drawn)
        kept = scores.topk(10).indices.sort().values
        off = [noise * torch.randn(50, generator=drawn) + shift for _ in range(4)]
        logits = tuple(torch.linspace(-1, 1, 50) + one for one in off)
        found.append(Outcome((kept,), torch.zeros(1, 10, 4), logits))
    return found


def measure(
    half: list[Outcome],
    graph: list[Outcome] | None,
    exact: list[Outcome] | None = None,
    dtype: torch.dtype = torch.float16,
) -> Any:
    return precision.measure(PLAN, dtype, exact or outcomes(0), half, graph)


def test_half_precision_is_measured_beside_float32() -> None:
    eager, graph = measure(outcomes(0.03), outcomes(0.03, seed=100))
    for record in (eager, graph):
        assert 0.8 <= record.overlap["vision"] < 1
        assert record.logits == pytest.approx(0.03 / 0.595, rel=0.1)
        assert 0.8 <= record.tokens <= 1
    eager, graph = measure(outcomes(0.0), outcomes(0.0))
    assert (eager.overlap, eager.logits, eager.tokens) == ({"vision": 1.0}, 0.0, 1.0)
    assert measure(outcomes(0.02), None, dtype=torch.bfloat16)[1] is None


def test_a_graph_may_not_be_farther_from_float32_than_the_eager_model() -> None:
    with pytest.raises(ParityError, match=r"keeps \d\d\.\d% of float32's tokens at vision"):
        measure(outcomes(0.02), outcomes(0.2))
    with pytest.raises(
        ParityError, match=r"it has logits 0\.05\d* standard deviations from float32's"
    ):
        measure(outcomes(0.005), outcomes(0.005, shift=0.03))
    other = torch.linspace(-1, 1, 50).index_fill(0, torch.tensor([48]), 1.001)
    graph = [replace(one, logits=(other,) * 4) for one in outcomes(0.0)]
    with pytest.raises(ParityError, match="it has 0% of float32's next tokens, the eager model 1"):
        measure(outcomes(0.005), graph)


def test_a_model_that_half_precision_does_not_hold_is_refused() -> None:
    for dtype, name, advice in (
        (torch.float16, "fp16", "export with --dtype bf16 or --dtype fp32"),
        (torch.bfloat16, "bf16", "export with --dtype fp32"),
    ):
        with pytest.raises(ParityError, match=f"{name} does not hold this model: .*: {advice}"):
            measure(outcomes(2.0), outcomes(2.0), dtype=dtype)


def test_what_is_not_finite_in_half_precision_says_what_would_help() -> None:
    found = "gives logits of the prefill that are not finite on sample 1; nothing was written"
    broken = outcomes(0, shift=NAN)
    for eager, graph, name in (
        (broken, broken, "the eager model in fp16"),
        (outcomes(0), broken, "the exported graph in fp16"),
    ):
        with pytest.raises(
            ParityError, match=f"{name} {found}: export with --dtype bf16 or --dtype fp32"
        ):
            measure(eager, graph)
    with pytest.raises(
        ParityError, match=r"float32 model gives .*: check the checkpoint's weights"
    ):
        measure(outcomes(0), outcomes(0), broken)


def test_survivors_are_indices_in_the_image() -> None:
    kept = tuple(map(torch.tensor, ([1, 4, 7, 9], [0, 2, 3], [2])))
    assert Outcome(kept, torch.zeros(1), ()).survivors() == [{1, 4, 7, 9}, {1, 7, 9}, {9}]
