"""What the libraries pack is read as the weights that they compute with.

`tests/vectors/make_quantised.py` made the file, with the libraries' own packers and unpackers.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from edgeprune.models._quantised import QuantizedWeight
from edgeprune.models._stored import TensorFiles
from edgeprune.models._stored_formats import format_of, load, names
from edgeprune.models._stored_formats._format import Parts

FILE = Path(__file__).parent / "vectors" / "quantised.safetensors"
with safe_open(FILE, framework="pt") as opened:
    SCHEMES = {name: json.loads(scheme) for name, scheme in sorted(opened.metadata().items())}
    STORED = list(opened.keys())


@pytest.mark.parametrize("case", SCHEMES)
def test_a_packed_weight_is_the_one_that_its_library_computes_with(case: str) -> None:
    """To the last digit of the library's dtype; products are rounded there in another order."""
    form = format_of(FILE, {"quantization_config": SCHEMES[case]})
    assert form is not None
    stored = TensorFiles({name: FILE for name in STORED if name.startswith(f"{case}.")})
    leaves = {name.removeprefix(f"{case}.") for name in stored.files}
    parts = Parts(case, frozenset(leaves - {"floats"}), stored)
    assert form.shape(parts) == (32, 64)
    found = form.read(parts)
    if isinstance(found, QuantizedWeight):
        found = found.dequantised(torch.float32).T
    wanted = stored.read(f"{case}.floats")
    assert wanted.std() > 0.1
    digit = 2 * torch.finfo(wanted.dtype).eps
    torch.testing.assert_close(found.to(wanted.dtype), wanted, rtol=digit, atol=0)


def test_every_format_has_a_row_in_the_documentation() -> None:
    page = Path(__file__).parents[1] / "docs" / "checkpoints.md"
    rows = re.findall(r"^\| `([\w-]+)` \|", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(rows) == sorted(load(name).method for name in names())


def test_every_format_has_a_vector() -> None:
    methods = {scheme["quant_method"].replace("-", "_") for scheme in SCHEMES.values()}
    assert methods == set(names())
