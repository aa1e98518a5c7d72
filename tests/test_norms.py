"""RMS norms, those of queries and keys among them, are one operator where a dialect has one."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import onnx
import pytest
from transformers import Qwen3Config

from edgeprune.making import make as make_bundle
from edgeprune.onnx_file import SKIP_NORM
from edgeprune.recipe import Recipe
from edgeprune.runtime.build import BuildRequest, build
from edgeprune.spec import PruneSpec
from tests import families
from tests.families import TEXT
from tests.frozen import frozen


@pytest.fixture(scope="module")
def normed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose decoder (Qwen3) and encoder (InternViT-6B) norm queries and keys."""
    family = families.internvl(rms_norms=True, config=Qwen3Config(**TEXT, head_dim=32))
    return family.save(tmp_path_factory.mktemp("normed") / "tiny")


def norms(graph: Path) -> Counter[str]:
    """How many nodes norm what, by module: `layers.0/attention/query_norm` and so on."""
    nodes = onnx.load(graph, load_external_data=False).graph.node
    return Counter(
        re.sub(r"\d+", "N", node.name.rpartition("/")[0])
        for node in nodes
        if node.op_type in ("RMSNormalization", SKIP_NORM)
    )


def test_norms_of_queries_and_keys_are_one_operator(normed: Path, tmp_path: Path) -> None:
    """Four norms in every layer of both, and the decoder's last; and the bundle passes parity."""
    made = make_bundle(Recipe(PruneSpec("none"), tmp_path / "b", str(normed), parity=2)).path
    decoder, vision = norms(made / "decoder.onnx"), norms(made / "vision.onnx")
    assert sum(decoder.values()) == 4 * TEXT["num_hidden_layers"] + 1, decoder
    assert sum(vision.values()) == 4 * 2, vision
    plain = onnx.load(made / "decoder.onnx", load_external_data=False).graph.node
    assert not {node.op_type for node in plain} & {"Pow", "ReduceMean"}


def test_tensorrt_rtx_compiles_norms_of_queries_and_keys(normed: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    bundle = frozen(tmp_path / "b", "none", model=normed, target="rtx", dtype="fp16")
    assert build(BuildRequest(bundle, "trt-rtx", 200)).path.is_dir()
