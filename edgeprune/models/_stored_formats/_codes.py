"""Unpacking codes from 32-bit words, and scales that stand for a rectangle of a weight each."""

from __future__ import annotations

import torch
from torch import Tensor


def unpacked(words: Tensor, bits: int) -> Tensor:
    """The codes of each word, the one in the lowest bits first.

    int32 [rows, words] -> uint8 [rows, words, 32 / bits], for 4 or 8 bits.
    """
    rows, count = words.shape
    octets = words.contiguous().view(torch.uint8).view(rows, count, 4)
    if bits == 8:
        return octets
    return torch.stack((octets & 15, octets >> 4), dim=-1).view(rows, count, 8)


def along_rows(words: Tensor, bits: int) -> Tensor:
    """Words that each hold neighbours of one row: [rows, words] -> uint8 [rows, codes]."""
    return unpacked(words, bits).reshape(len(words), -1)


def along_columns(words: Tensor, bits: int) -> Tensor:
    """Words that each hold neighbours of one column: [words, columns] -> uint8 [codes, columns]."""
    return unpacked(words, bits).transpose(1, 2).reshape(-1, words.shape[1])


def signed(codes: Tensor, bits: int) -> Tensor:
    """Codes from 0 up, less the middle: uint8 -> int8 of the same size. Changes its argument."""
    return codes.sub_(1 << (bits - 1)).view(torch.int8)  # bytes wrap around


def scaled(weight: Tensor, scales: Tensor, rows: int, columns: int) -> Tensor:
    """A weight times its scales, each of which stands for `rows` x `columns` of it.

    [N, K] and [N / rows, K / columns], both rounded up -> float32 [N, K].
    """
    result = weight.float()
    outputs, inputs = result.shape
    scales = scales.repeat_interleave(rows, 0)[:outputs]
    whole = inputs // columns
    blocks = result[:, : whole * columns].view(outputs, whole, columns)
    blocks.mul_(scales[:, :whole, None])
    result[:, whole * columns :].mul_(scales[:, whole:])
    return result
