"""What a session is asked, what it answers, and how long it took."""

from __future__ import annotations

from dataclasses import dataclass, field

from edgeprune.generation import Sampling
from edgeprune.runtime.backend import EncodedImage, Ids
from edgeprune.runtime.formats import Grammar


@dataclass
class Timings:
    """Milliseconds of one answer; `decode` has one entry per token after the first."""

    preprocess: float = 0.0
    vision: float = 0.0
    prefill: float = 0.0
    decode: list[float] = field(default_factory=list)
    score: float = 0.0  # of given choices

    @property
    def first_token(self) -> float:
        """Time to first token: preprocessing, vision and prefill."""
        return self.preprocess + self.vision + self.prefill


@dataclass(frozen=True, slots=True)
class TokenScore:
    """A token that was said, or might have been: its text, and its log-probability among all."""

    id: int
    text: str
    log_probability: float
    likeliest: tuple[TokenScore, ...] = ()  # in its place, the likeliest first


@dataclass(frozen=True)
class Answer:
    """What was said, and how: ids, why it ended (`stop`, `length`), times, kept visual tokens."""

    text: str
    ids: tuple[int, ...]
    finish: str
    timings: Timings
    vision_kept: Ids  # indices of the encoder's survivors among the V tokens; V: [CLS]
    layer_kept: tuple[Ids, ...]  # at each site of the decoder likewise, of the ones alive there
    prompt_tokens: int
    warnings: tuple[str, ...] = ()  # of the image, such as that its shape is not the bundle's
    scores: tuple[TokenScore, ...] = ()  # of each token but the end, where they were asked for


@dataclass(frozen=True)
class Choice:
    """The likeliest of given answers. Probabilities sum to 1 over the choices; log-probabilities
    are of each choice, end of turn included, among all that the model could say."""

    text: str
    probabilities: dict[str, float]
    log_probabilities: dict[str, float]
    ids: tuple[int, ...]  # of the text, without the end of the turn
    timings: Timings  # `decode` is empty: scoring is told as `score`
    prompt_tokens: int
    warnings: tuple[str, ...] = ()


@dataclass
class Turn:
    """A question that is being answered."""

    prefix_ids: Ids
    text_ids: Ids
    image: EncodedImage | None
    prompt_tokens: int
    sampling: Sampling
    room: int  # tokens that may be said
    timings: Timings
    grammar: Grammar | None = None  # the form that the answer has
    top: int | None = None  # how many of the likeliest tokens to tell; None: no scores at all
    scores: list[TokenScore] = field(default_factory=list)
    said: list[int] = field(default_factory=list)
