"""What an export measured, predicted and chose, as records of manifest.json."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from edgeprune.records import Amount, Between, Bytes, Count, Magnitude
from edgeprune.timing import Milliseconds

Loss = Annotated[float, Between(0, 1e3)]  # radians
Share = Annotated[float, Between(0, 1)]
Difference = Annotated[float, Between(0, 1e6)]


@dataclass(frozen=True, slots=True)
class TimingRecord:
    """Time to first token as asked for, and as a profile predicts it, in milliseconds."""

    asked: Milliseconds
    predicted: Milliseconds
    before: Milliseconds  # reading the image file, and preprocessing
    vision: Milliseconds
    prefill: Milliseconds
    text_tokens: Count
    backend: str
    machine: dict[str, str]


@dataclass(frozen=True, slots=True)
class ChoiceRecord:
    """Encoder and counts that were chosen together, and why."""

    unit: str  # of the budget: ms, or billion operations
    budget: Milliseconds
    spent: Milliseconds  # predicted
    loss: Loss  # predicted: the encoder's and the schedule's
    losses: dict[str, Loss]  # the least loss with each encoder that was measured, before it was
    # calibrated


@dataclass(frozen=True, slots=True)
class DistanceRecord:
    """How far a model in half precision is from the same model in float32, over all samples."""

    overlap: dict[str, Share]  # by pruning site: of the tokens float32 keeps, those it keeps too
    logits: Difference  # median root mean square difference, in standard deviations of float32's
    tokens: Share  # of the next tokens, those that are equal


@dataclass(frozen=True, slots=True)
class ParityRecord:
    """What was compared before the bundle was written.

    Graphs and eager reference, both computing in float32 with the bundle's rounded weights: `ties`
    of the samples keep other tokens, and the reference does too where it is rounded otherwise; the
    others keep the same, their visual tokens and logits differ by at most `visual` and `logits`, as
    a share of the largest value. In half precision also the distances to the
    float32 model: of the `eager` model that rounds after each operator, and of the `graph` in ONNX
    Runtime's CPU provider, which keeps float32 between many fp16 nodes and has no kernels for bf16.
    """

    samples: Amount
    why: str = ""  # no sample was compared
    ties: Amount = 0
    visual: Difference = 0.0
    logits: Difference = 0.0
    tolerance: Difference = 0.0
    eager: DistanceRecord | None = None  # None in fp32
    graph: DistanceRecord | None = None  # None in fp32 and bf16
    delta: Difference | None = None  # at most, of what vision_delta.onnx gives; None: there is none


@dataclass(frozen=True, slots=True)
class WeightsRecord:
    """How weights of products are quantised, and what that changes of the model.

    `distance` is that of the model with these weights, computed in float32, to the same model with
    the checkpoint's own. `running` is that of the graph with activations rounded, as ONNX Runtime's
    CPU provider runs it; None where no activation is. `rounded` is that of the eager model whose
    activations are rounded as `activations=on` of --weights has it; None without that.
    """

    format: str  # as --weights takes it, with every option
    algorithm: str  # that chose the codes, where they are not the checkpoint's own
    tensors: dict[str, Amount]  # products by kind: float, int8, int4, fp8
    packed: Amount  # products whose weights the checkpoint stores in a quantised form
    own: Amount  # of these, those whose codes are the checkpoint's own
    numbers: Bytes  # weights that are quantised, or that --weights auto has left as floats
    bits: Annotated[float, Between(0, 64)]  # of each of these on average, scales included
    error: Share  # of the quantised: norm of what was changed, as a share of their norm
    zero_points: Amount = 0  # products whose codes have zero points, or offsets for them
    kinds: dict[str, str] = field(default_factory=dict)  # of products that --weights auto chose for
    distance: DistanceRecord | None = None  # None: no sample was compared
    running: DistanceRecord | None = None
    rounded: DistanceRecord | None = None


@dataclass(frozen=True, slots=True)
class RangeRecord:
    """How near what a bundle holds in float16 comes to the largest float16 number, 65,504.

    Magnitudes are those of the float32 model over all samples; the model rounded to float16 after
    each operator was finite on them too.
    """

    samples: Amount
    limit: Magnitude
    peak: Magnitude  # the largest
    where: str  # it is, such as `decoder layers.1 gate * up`
    sample: Count  # that has it, from 1
    margin: Magnitude  # limit / peak
    float32: tuple[str, ...] = ()  # parts that compute in float32, `decoder.layers.1.mlp.product`
