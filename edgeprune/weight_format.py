"""What `--weights` asks for: how the weights of products are stored.

Written as a kind with options: `int4:block=64:head=float:vision=int8:awq=on`.
With `auto:bits=4.5` each product of the decoder has the kind that a measurement gives it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from edgeprune.errors import SpecError

BITS = {"float": 0, "int8": 8, "int4": 4, "fp8": 8}
"""Kinds of weights; float: as the graph's dtype, fp8: float8 with 4 bits of exponent (e4m3)."""
ROUNDING = ("int8", "fp8")
"""Kinds to which what goes into a product may be rounded too."""

AUTO = "auto"
"""A kind that is chosen product by product: calib/sensitivity.py."""

BITS_A_WEIGHT = 4.5
"""Of AUTO, unless others are asked for."""

GPTQ = "gptq"
ROUNDINGS = ("nearest", GPTQ)
"""How codes of int4 are found where scales are known."""

BLOCKS = (128, 64, 32)
"""How many inputs may share a scale of int4: sizes that every engine takes."""


ROWS = ("float", "int8")
"""Kinds of a table whose rows are read one by one."""

LARGEST_ROW = 107
"""Code of such a table: four of -107 to 107 fit in 31 bits, which some engines read in place of
bytes."""

PARTS = ("kind", "head", "vision", "embedding")
"""Of a model: the decoder's layers, then what may be of another kind."""


@dataclass(frozen=True, slots=True)
class Form:
    """How one product's weight [K, N] is stored."""

    bits: int
    block: int | None  # inputs that share a scale; None: all K, one scale an output
    activations: bool = False  # whether the product's inputs are rounded to the same numbers
    float8: bool = False  # whether codes are floats of 8 bits
    largest: int | None = None  # code; None: what the bits hold

    def __str__(self) -> str:
        return "fp8" if self.float8 else f"int{self.bits}"

    def bytes(self, inputs: int, outputs: int, scale: int) -> int:
        """Of a weight whose scales have `scale` bytes each."""
        return outputs * (inputs * self.bits // 8 + scale * (inputs // (self.block or inputs)))

    def fused_block(self, inputs: int) -> int:
        """The block of ONNX Runtime's MatMulNBits: where an output has one scale, each block
        repeats it."""
        return self.block or next((size for size in BLOCKS if inputs % size == 0), BLOCKS[-1])

    def fused_bytes(self, inputs: int, outputs: int, scale: int) -> int:
        """As `bytes`, of a MatMulNBits, whose last block is padded."""
        block = self.fused_block(inputs)
        return outputs * -(-inputs // block) * (block * self.bits // 8 + scale)


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """Kinds of weights by part of the model. SpecError where a kind is not known."""

    kind: str = "float"  # of the decoder's layers
    block: int = BLOCKS[0]  # of int4, at most: smaller where it does not divide the inputs
    head: str = "float"  # the product that gives logits
    vision: str = "float"  # products of encoder and projector
    embedding: str = "float"  # the table of tokens, whose rows may be int8
    clip: bool = True  # whether scales of int4 are searched for: models/_quantised.py
    awq: bool = False  # whether samples say which channels count: calib/awq.py
    bits: float = 0.0  # a weight on average, scales included, where the kind is AUTO
    activations: bool = False  # whether inputs of the products of layers are rounded too
    round: str = "nearest"  # or gptq: codes make up for each other's errors, calib/gptq.py
    smooth: bool = False  # whether channels are scaled before that: calib/smoothing.py

    def __post_init__(self) -> None:
        for part in PARTS:
            known = ROWS if part == "embedding" else tuple(BITS)
            if part == "kind" or (part == "head" and self.kind == AUTO):
                known = (*known, AUTO)
            if (value := getattr(self, part)) not in known:
                name = "--weights" if part == "kind" else f"{part} of --weights"
                raise SpecError(f"{name} is one of {', '.join(known)}; got {value!r}")
        if self.activations and self.kind not in ROUNDING:
            kinds = " and ".join(ROUNDING)
            raise SpecError(f"activations=on is an option of --weights {kinds}; got {self.kind}")
        if self.smooth and not (self.activations and self.kind == "int8"):
            raise SpecError("smooth=on of --weights is for int8 with activations=on; leave it out")
        if self.round not in ROUNDINGS:
            kinds = " or ".join(ROUNDINGS)
            raise SpecError(f"round of --weights is {kinds}; got {self.round!r}")
        if self.round == GPTQ and self.kind not in ("int4", AUTO):
            raise SpecError(f"round=gptq is an option of --weights int4 and auto; got {self.kind}")
        if self.awq and self.activations:
            raise SpecError(
                "awq=on of --weights is for activations of floats; leave one of them out"
            )

    @classmethod
    def parse(cls, text: str) -> WeightFormat:
        """What a command line says; `on` is the kind of the layers, `off` is float."""
        kind, *settings = text.strip().split(":")
        pairs = [setting.partition("=")[::2] for setting in settings]
        known = [field.name for field in fields(cls)][1:]
        if any(not (name and value) for name, value in pairs):
            raise SpecError(f"options of --weights are written KIND:NAME=VALUE; got {text!r}")
        if kind == "float" and pairs:
            raise SpecError(f"--weights float takes no options; got {text!r}")
        if strange := [name for name, _ in pairs if name not in known]:
            raise SpecError(f"--weights has the options {', '.join(known)}; got {strange[0]!r}")
        if len(dict(pairs)) != len(pairs):
            raise SpecError(f"an option of --weights is given twice: {text!r}")
        given = dict(pairs)
        block = given.pop("block", str(BLOCKS[0]))
        if block not in map(str, BLOCKS):
            sizes = ", ".join(map(str, sorted(BLOCKS)))
            raise SpecError(f"block of --weights is one of {sizes}; got {block!r}")
        clip = _switch("clip", given.pop("clip", "on"))
        awq = _switch("awq", given.pop("awq", "off"))
        usual = "on" if kind == "fp8" else "off"
        activations = _switch("activations", given.pop("activations", usual))
        usual = "on" if kind == "int8" and activations else "off"
        smooth = _switch("smooth", given.pop("smooth", usual))
        bits = _bits(given.pop("bits", None), kind)
        rounding = given.pop("round", ROUNDINGS[0])
        kinds = {"on": kind, "off": "float"}
        if given.get("embedding") == "on":
            given["embedding"] = "int8"
        parts = {"head": kind} | {name: kinds.get(value, value) for name, value in given.items()}
        return cls(
            kind,
            int(block),
            clip=clip,
            awq=awq,
            bits=bits,
            activations=activations,
            round=rounding,
            smooth=smooth,
            **parts,
        )

    def __str__(self) -> str:
        """As `parse` reads it, with every option."""
        if self.is_float:
            return "float"
        parts = (f"{part}={getattr(self, part)}" for part in PARTS[1:])
        mixed = [f"bits={self.bits:g}"] if self.kind == AUTO else []
        names = ("clip", "awq", "activations", "smooth")
        switches = {name: getattr(self, name) for name in names}
        told = (f"{name}={'on' if on else 'off'}" for name, on in switches.items())
        rounding = [f"round={self.round}"] if self.round == GPTQ else []
        return ":".join([self.kind, *mixed, f"block={self.block}", *parts, *rounding, *told])

    @property
    def is_float(self) -> bool:
        """Whether nothing is quantised."""
        return {getattr(self, part) for part in PARTS} == {"float"}

    @property
    def float8(self) -> bool:
        """Whether any part has floats of 8 bits."""
        return "fp8" in {getattr(self, part) for part in PARTS}

    @property
    def measured(self) -> bool:
        """Whether calibration samples decide anything."""
        return self.awq or self.smooth or self.round == GPTQ or self.kind == AUTO

    @property
    def algorithm(self) -> str:
        """How codes are chosen, in words."""
        if not {"int4", AUTO} & {self.kind, self.head, self.vision}:
            return "rounding, smoothed" if self.smooth else "rounding"
        words = ["AWQ"] if self.awq else []
        words += ["GPTQ"] if self.round == GPTQ else [] if self.awq else ["rounding"]
        words += ["clipped"] if self.clip else []
        return ", ".join([*words, *(["mixed by measured loss"] if self.kind == AUTO else [])])

    def settled(self, kind: str) -> WeightFormat:
        """The same with one kind in place of AUTO."""
        head = kind if self.head == AUTO else self.head
        return replace(self, kind=kind if self.kind == AUTO else self.kind, head=head, bits=0.0)

    def within(self, block: int) -> WeightFormat:
        """The same with blocks that divide one of another size, where there are such."""
        fitting = [size for size in BLOCKS if size <= self.block and block % size == 0]
        return replace(self, block=fitting[0]) if fitting else self

    def padded(self, width: int) -> int:
        """Channels between two products of the vision part, with zeros behind `width` of them where
        int4 has no block that divides these: as many as take the fewest bits."""
        if self.vision != "int4" or any(width % size == 0 for size in BLOCKS if size <= self.block):
            return width
        sizes = {-(-width // size) * size: size for size in BLOCKS if size <= self.block}
        return min(sizes, key=lambda channels: channels * (4 + 16 / sizes[channels]))

    def form(self, part: str, inputs: int, outputs: int, chosen: str = "") -> Form | None:
        """How a weight of one of PARTS is stored; None: as floats.

        What int4 cannot hold is int8: where no block divides the inputs, and an odd number of
        outputs, since two codes share a byte. Where the kind is AUTO it is the `chosen` one, int8
        as long as none is.
        """
        kind = getattr(self, part)
        if part == "embedding" and kind == "int8":
            return Form(8, None, largest=LARGEST_ROW)
        bits = BITS[(chosen or "int8") if kind == AUTO else kind]
        if bits == 4:
            sizes = [size for size in BLOCKS if size <= self.block and inputs % size == 0]
            return Form(4, sizes[0]) if sizes and outputs % 2 == 0 else Form(8, None)
        rounded = self.activations and kind == self.kind and part in ("kind", "vision")
        return Form(bits, None, rounded, kind == "fp8") if bits else None


def _bits(given: str | None, kind: str) -> float:
    """Bits a weight of AUTO; 0 for other kinds, which have no such option."""
    if kind != AUTO:
        if given is not None:
            raise SpecError(f"bits is an option of --weights auto; got {kind}:bits={given}")
        return 0.0
    try:
        bits = float(given or BITS_A_WEIGHT)
    except ValueError:
        bits = 0.0
    if not 4 <= bits <= 32:
        raise SpecError(f"bits of --weights is a number from 4 to 32; got {given!r}")
    return bits


def _switch(name: str, value: str) -> bool:
    if value not in ("on", "off"):
        raise SpecError(f"{name} of --weights is on or off; got {value!r}")
    return value == "on"


FLOAT = WeightFormat()
