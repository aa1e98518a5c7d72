"""What --weights says, and in which form products are stored."""

import pytest

from edgeprune.errors import SpecError
from edgeprune.lowering import resolve
from edgeprune.weight_format import FLOAT, Form, WeightFormat


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("float", FLOAT),
        ("int4", WeightFormat("int4", 128, head="int4")),
        ("int8", WeightFormat("int8", 128, head="int8")),
        ("int4:head=off", WeightFormat("int4")),
        ("int4:block=32:vision=on", WeightFormat("int4", 32, head="int4", vision="int4")),
        ("int4:head=int8:vision=int8", WeightFormat("int4", head="int8", vision="int8")),
        ("int4:clip=off", WeightFormat("int4", head="int4", clip=False)),
        ("auto", WeightFormat("auto", head="auto", bits=4.5)),
        ("auto:bits=5:head=int8", WeightFormat("auto", head="int8", bits=5)),
        ("int4:awq=on", WeightFormat("int4", head="int4", awq=True)),
        ("int4:embedding=on", WeightFormat("int4", head="int4", embedding="int8")),
        ("int8:activations=on", WeightFormat("int8", head="int8", activations=True, smooth=True)),
        (
            "int8:activations=on:smooth=off",
            WeightFormat("int8", head="int8", activations=True),
        ),
    ],
)
def test_what_is_written_is_read_back(text, found):
    assert WeightFormat.parse(text) == found
    assert WeightFormat.parse(str(found)) == found
    assert resolve("cpu", weights=text).weights == found


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("int3", "--weights is one of float, int8, int4, fp8, auto; got 'int3'"),
        ("int4:block=48", "block of --weights is one of 32, 64, 128; got '48'"),
        ("int4:block=x", "block of --weights is one of 32, 64, 128; got 'x'"),
        ("int4:head=fp4", "head of --weights is one of float, int8, int4, fp8; got 'fp4'"),
        ("int4:embedding=int4", "embedding of --weights is one of float, int8; got 'int4'"),
        (
            "int4:size=3",
            "embedding, clip, awq, bits, activations, round, smooth; got 'size'",
        ),
        ("int4:bits=5", "bits is an option of --weights auto; got int4:bits=5"),
        ("auto:bits=3", "bits of --weights is a number from 4 to 32; got '3'"),
        ("auto:bits=x", "bits of --weights is a number from 4 to 32; got 'x'"),
        ("auto:vision=on", "vision of --weights is one of float, int8, int4, fp8; got 'auto'"),
        ("int4:head=auto", "head of --weights is one of float, int8, int4, fp8; got 'auto'"),
        ("int4:clip=7", "clip of --weights is on or off; got '7'"),
        ("int4:head", "options of --weights are written KIND:NAME=VALUE; got 'int4:head'"),
        ("int4:head=on:head=off", "given twice"),
        ("float:head=int8", "--weights float takes no options"),
    ],
)
def test_a_wrong_option_is_refused_by_name(text, why):
    with pytest.raises(SpecError, match=why.replace("(", r"\(")):
        WeightFormat.parse(text)


@pytest.mark.parametrize(
    ("inputs", "outputs", "form"),
    [
        (4096, 11008, Form(4, 128)),
        (192, 352, Form(4, 64)),
        (352, 192, Form(4, 32)),
        (4304, 1152, Form(8, None)),  # no block divides the inputs
        (4096, 32003, Form(8, None)),  # two codes share a byte
    ],
)
def test_what_int4_cannot_hold_is_int8(inputs, outputs, form):
    assert WeightFormat.parse("int4").form("kind", inputs, outputs) == form
    assert WeightFormat.parse("int4:block=64").form("kind", 4096, 64) == Form(4, 64)
    assert WeightFormat.parse("int4").form("vision", 4096, 64) is None
