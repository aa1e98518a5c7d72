"""Weights as codes and scales, against the formula written out."""

import numpy as np
import pytest
import torch

from edgeprune.errors import ExportError
from edgeprune.models._quantised import SHRINKS, QuantizedWeight, quantize


def _weight(inputs: int = 64, outputs: int = 6) -> torch.Tensor:
    return torch.randn(inputs, outputs, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("bits", "block"), [(4, 32), (4, 64), (8, 32), (8, 64)])
def test_codes_and_scales_are_those_of_the_formula(bits, block):
    weight, largest = _weight(), 2 ** (bits - 1) - 1
    found = quantize(weight, bits, block)
    for output in range(6):
        for start in range(0, 64, block):
            part = weight[start : start + block, output].numpy()
            scale = np.abs(part).max() / np.float32(largest)
            assert found.scales[start // block, output].item() == pytest.approx(scale)
            codes = found.codes[start : start + block, output].numpy()
            np.testing.assert_array_equal(codes, np.rint(part / scale).astype(np.int8))
    assert found.codes.dtype == torch.int8
    error = (found.dequantised() - weight).abs().view(-1, block, 6).amax(1)
    assert bool((error <= found.scales * 0.5001).all())


def test_scales_are_numbers_of_the_graphs_dtype_and_codes_are_made_for_them():
    weight = _weight()
    found = quantize(weight, 4, 32, torch.float16)
    assert torch.equal(found.scales, found.scales.half().float())
    blocks = weight.view(2, 32, 6) / found.scales[:, None]
    assert torch.equal(found.codes, blocks.round().clamp(-8, 7).to(torch.int8).view(64, 6))


@pytest.mark.parametrize("value", [0.0, 1e-9])
def test_a_block_without_a_scale_is_zeros(value):
    found = quantize(torch.full((32, 2), value), 4, 32, torch.float16)
    assert bool((found.scales > 0).all())
    assert torch.equal(found.dequantised(torch.float16), torch.zeros(32, 2, dtype=torch.float16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("tail", [1, 3])  # 3: few weights are much larger than the others
def test_a_clipped_scale_never_leaves_a_block_a_larger_error(dtype, weighted, tail):
    weight = _weight(256, 20) ** tail
    weight[:128, 0], weight[:128, 1] = 0, 1e-9
    importance = _weight(256, 1)[:, 0].exp() if weighted else torch.ones(256)

    def errors(**options):
        found = quantize(weight, 4, 128, dtype, importance=importance, **options)
        assert torch.equal(found.scales, found.scales.to(dtype).float())
        assert bool((found.scales > 0).all())
        square = (found.dequantised() - weight).square() * importance[:, None]
        return square.view(2, 128, 20).sum(1)

    rounded, clipped = errors(), errors(clip=True)
    assert bool((clipped <= rounded * (1 + 1e-6)).all())
    assert clipped.sum() < 0.95 * rounded.sum()


def test_a_clipped_scale_is_the_best_of_those_tried():
    weight = _weight(64, 3) ** 3
    found = quantize(weight, 4, 64, clip=True)
    for output in range(3):
        part = weight[:, output].numpy()
        left = {}
        for shrink in SHRINKS:
            scale = np.abs(part).max() / np.float32(7) * np.float32(shrink)
            near = np.clip(np.rint(part / scale), -8, 7) * scale
            left[scale] = float(np.square(near - part).sum())
        assert found.scales[0, output].item() == pytest.approx(min(left, key=left.get))


def test_a_weight_at_minus_eight_sevenths_is_held_exactly():
    """Codes reach -8, which rounding to the largest as 7 does not use."""
    weight = torch.arange(-8.0, 8).repeat(2)[:, None]
    assert not torch.equal(quantize(weight, 4, 32).dequantised(), weight)
    torch.testing.assert_close(quantize(weight, 4, 32, clip=True).dequantised(), weight)


def test_zeros_are_taken_off_the_codes():
    codes = torch.tensor([[-8, 7], [3, 0]], dtype=torch.int8)
    zeros = torch.tensor([[-8, 7]], dtype=torch.int8)
    weight = QuantizedWeight(codes, torch.tensor([[0.5, 2.0]]), zeros, 4, 2)
    assert weight.dequantised().tolist() == [[0.0, 0.0], [5.5, -14.0]]


def test_a_form_that_does_not_fit_is_refused_by_its_sizes():
    weight = _weight()
    with pytest.raises(ExportError, match="divide its 64 inputs; got 4 bits in blocks of 48"):
        QuantizedWeight(weight.to(torch.int8), weight, None, 4, 48)
    with pytest.raises(ExportError, match=r"scales .* are \[2, 6\]; got \[64, 6\]"):
        QuantizedWeight(weight.to(torch.int8), weight, None, 4, 32)
