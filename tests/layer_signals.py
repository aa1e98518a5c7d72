"""Signals of a decoder layer from random vectors."""

from __future__ import annotations

import numpy as np
import torch

from edgeprune.policies._signals import (
    Anchors,
    AttentionStates,
    InputSignals,
    LayerSignals,
    Segments,
)


def rotate(x: np.ndarray, tables: tuple[np.ndarray, np.ndarray], position: int) -> np.ndarray:
    cos, sin = (table[position] for table in tables)
    low, high = np.split(x, 2, axis=-1)
    return np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)


def rotated(x: np.ndarray, tables: tuple[np.ndarray, np.ndarray], positions) -> np.ndarray:
    return np.stack([rotate(x[:, i], tables, p) for i, p in enumerate(positions)], axis=1)


def layer_signals(prefix: int, visual: int, text: int, heads: int, kv_heads: int, seed: int):
    """Signals of random vectors with true rotary embedding, and the unrotated parts."""
    rng = np.random.default_rng(seed)
    size, start, total = 8, 3, prefix + visual + text
    angles = np.arange(64)[:, None] * (100.0 ** -(np.arange(size // 2) / (size // 2)))
    query = rng.standard_normal((heads, total, size))
    key = rng.standard_normal((kv_heads, total, size))
    positions = np.arange(start, start + total)
    tables = np.cos(angles), np.sin(angles)
    signals = LayerSignals(
        segments=Segments(prefix, visual, text),
        hidden=torch.zeros(1, total, 4),
        attention=AttentionStates(
            torch.tensor(query)[None],
            torch.tensor(key)[None],
            torch.tensor(rotated(query, tables, positions))[None],
            torch.tensor(rotated(key, tables, positions))[None],
        ),
        cos=torch.tensor(tables[0]),
        sin=torch.tensor(tables[1]),
        rows=torch.tensor(positions),
        anchors=Anchors(
            torch.tensor([start + prefix]),
            torch.tensor([(2 * (start + prefix) + visual) // 2]),
            torch.tensor([start + prefix + visual - 1]),
        ),
        visual_tokens=visual,
        inputs=InputSignals(torch.zeros(1, visual, 4), visual, torch.zeros(1, text, 4)),
    )
    return signals, query, key, positions, tables
