"""ONNX Runtime's own operators in decoders for a CPU stand for several of ONNX's."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from edgeprune.export.dialects import dialect_of
from edgeprune.export.trace import HIDDEN, decoder_graph
from edgeprune.export.writing import modules_of
from edgeprune.lowering import resolve
from edgeprune.models import open_model
from edgeprune.policies import make
from edgeprune.spec import Plan, PruneSpec
from tests import families, gemma, qwen

OWN = "GroupQueryAttention", "SkipSimplifiedLayerNormalization"


def traced(folder: Path, target: str = "cpu", dtype: str = "fp32") -> tuple[Counter[str], set[str]]:
    """Operators of a dense decoder's graph, and the names of its values."""
    adapter, lowering = open_model(str(folder)), resolve(target, dtype)
    plan, policy = Plan(adapter.shape.visual_tokens, adapter.shape.layers), make(PruneSpec("none"))
    dialect, kind = dialect_of(lowering), getattr(torch, lowering.dtype.torch)
    _, decoder = modules_of(plan, adapter, policy, dialect, kind, ())
    graph = decoder_graph(decoder, kind, dialect).model.graph
    values = {str(value.name) for node in graph for value in node.outputs}
    return Counter(node.op_type for node in graph), values


def test_a_layer_has_one_node_for_its_cache_and_attention(tmp_path: Path) -> None:
    """And no transposition; sums that the graph may be cut at are left."""
    found, values = traced(families.llava().save(tmp_path / "tiny"))
    assert [found[name] for name in OWN] == [3, 3]
    assert not found.keys() & {"Attention", "TensorScatter", "Transpose", "Reshape"}
    assert found["RMSNormalization"] == 3 + 1
    assert values >= {f"{HIDDEN}{layer}" for layer in range(4)}


@pytest.mark.slow
def test_norms_of_queries_and_keys_see_their_heads(tmp_path: Path) -> None:
    found, _ = traced(qwen.stacked_checkpoint(tmp_path / "tiny", layers=3))
    assert found["GroupQueryAttention"] == 3 and not found["Attention"]
    # To heads for the norms of queries and keys, and back; two are of rotary tables.
    assert found["Transpose"] == 3 * 4 + 2


@pytest.mark.slow
def test_masks_and_heads_that_it_has_not_keep_attention(tmp_path: Path) -> None:
    """Tokens of an image see each other in Gemma."""
    found, _ = traced(gemma.gemma3().save(tmp_path / "gemma"))
    assert not found["GroupQueryAttention"] and found["Attention"] == 3
    odd = families.llava(hidden_size=24, num_attention_heads=2, num_key_value_heads=2)
    found, _ = traced(odd.save(tmp_path / "odd"))  # heads of 12
    assert not found["GroupQueryAttention"] and found["Attention"] == 3


@pytest.mark.parametrize(
    ("target", "dtype"), [("cpu", "fp16"), pytest.param("rtx", "fp16", marks=pytest.mark.slow)]
)
def test_no_other_graph_has_them(target: str, dtype: str, tmp_path: Path) -> None:
    found, _ = traced(families.llava().save(tmp_path / "tiny"), target, dtype)
    assert not found.keys() & {*OWN} and found["Attention"] == found["TensorScatter"] / 2 == 3
