"""Half precision ends at 65,504: what does not fit is found, and refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from edgeprune.errors import ModelError
from edgeprune.models._rounding import rounded
from tests.conftest import Refused

Edit = Callable[[dict[str, torch.Tensor]], None]


def edited(checkpoint: Path, edit: Edit) -> Path:
    """A checkpoint of one file whose tensors were changed in place."""
    (file,) = checkpoint.glob("*.safetensors")
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, {"format": "pt"})
    return checkpoint


@pytest.mark.parametrize(
    ("value", "dtype", "says"),
    [
        (1e5, torch.float16, "holds 1e+05, fp16 ends at 65,504; export with --dtype bf16 or"),
        (-65520.0, torch.float16, "holds 6.552e+04, fp16 ends at 65,504"),
        (3.4e38, torch.bfloat16, "bf16 ends at 3.38953e+38; export with --dtype fp32"),
        (float("nan"), torch.float32, "holds 2 of 6 numbers that are infinite or not a number"),
        (float("-inf"), torch.float16, "holds 2 of 6 numbers that are infinite or not a number"),
    ],
)
def test_a_number_that_does_not_fit_is_refused(value: float, dtype: torch.dtype, says: str) -> None:
    tensor = torch.tensor([[0.0, value, 1.0], [1e-9, 2.0, value]])
    with pytest.raises(ModelError) as caught:
        rounded(tensor, dtype, "model.safetensors: some.weight")
    assert str(caught.value).startswith("model.safetensors: some.weight holds")
    assert says in str(caught.value)


def test_numbers_that_fit_are_rounded() -> None:
    tensor = torch.tensor([65504.0, -65504.0, 65519.0, 1e-9, 1 / 3])
    assert torch.equal(rounded(tensor, torch.float16, ""), tensor.half())
    assert torch.equal(rounded(tensor.bfloat16(), torch.float32, ""), tensor.bfloat16().float())
    assert rounded(torch.empty(0, 3), torch.float16, "").shape == (0, 3)


def test_an_export_names_the_tensor_that_does_not_fit(
    copy_checkpoint: Callable[[], Path], tmp_path: Path, refused: Refused
) -> None:
    name = "language_model.model.layers.1.mlp.up_proj.weight"

    def large(tensors: dict[str, torch.Tensor]) -> None:
        for key in tensors:
            tensors[key] = tensors[key].bfloat16()
        tensors[name][3, 4] = 1e5

    model = edited(copy_checkpoint(), large)
    options = ["--model", model, "--method", "none", "--parity", 0, "-o", tmp_path / "bundle"]
    line = refused("export", *options, "--target", "cuda")
    assert f".safetensors: {name} holds 9.984e+04, fp16 ends at 65,504" in line
    assert not (tmp_path / "bundle").exists()
