"""Logits that are not finite end an answer at any token, with one line, on every backend."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from edgeprune.bundle import MANIFEST, Bundle, sha256
from edgeprune.cli import main
from edgeprune.demo import SAMPLES_DIR
from edgeprune.errors import BackendError
from edgeprune.export.passes import add_token
from edgeprune.manifest import FileRecord
from edgeprune.runtime import Session
from edgeprune.runtime.backend import Output, likeliest
from tests.fake_gpu import install, pretend
from tests.frozen import frozen

SCENE = SAMPLES_DIR / "scene-1.png"
QUESTION = "what color is the star ?"
GOOD = [0.5, 3.0, -2.0, 3.0, 1.0]
BAD = [
    [0.5, np.nan, -2.0, 3.0],
    [0.5, 1.0, -2.0, np.nan],
    [0.5, np.inf, -2.0, 3.0],
    [0.5, 3.0, -np.inf, 1.0],
    [np.nan] * 4,
    [-np.inf] * 4,
]


@pytest.mark.parametrize("kind", [np.float32, np.float16])
def test_the_graph_names_no_token_where_logits_are_not_finite(kind: type) -> None:
    dtype = ir.DataType.from_numpy(np.dtype(kind))
    logits = ir.val("logits", dtype, [1, 1, "vocabulary"])
    given = ir.val("given", dtype, [1, 1, "vocabulary"])
    same = ir.node("Identity", [given], outputs=[logits])
    graph = ir.Graph([given], [logits], nodes=[same], opset_imports={"": 18}, name="head")
    add_token(graph)
    model = ir.to_proto(ir.Model(graph, ir_version=10))
    onnx.checker.check_model(model)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])

    def token(row: list[float]) -> int:
        feeds = {"given": np.array([[row]], kind)}
        return int(session.run(["token"], feeds)[0][0, 0])

    assert token(GOOD) == 1
    assert token([60000.0] * 64) == 0, "the sum of large logits is finite"
    assert [token(row) for row in BAD] == [-1] * len(BAD)


def test_an_output_has_no_token_where_logits_are_not_finite() -> None:
    assert Output(likeliest(np.array(GOOD, np.float16))).token == 1
    for row in (row for row in BAD if not np.isfinite(max(row, key=lambda x: (x != x, x)))):
        with pytest.raises(BackendError, match="not finite"):
            _ = Output(likeliest(np.array(row, np.float16))).token


def poisoned(bundle: Path, copy: Path, token: int) -> Path:
    """A copy of a bundle in which a token's embedding is infinite; hashes are mended."""
    shutil.copytree(bundle, copy)
    manifest = Bundle.open(bundle).manifest
    graph = onnx.load(copy / "decoder.onnx", load_external_data=False).graph
    (table,) = (t for t in graph.initializer if t.name == "embedding.weight")
    at = {entry.key: entry.value for entry in table.external_data}
    element = np.float16 if manifest.dtype == "fp16" else np.float32
    weights = np.memmap(copy / "weights.bin", np.uint8, "r+")
    start, size = int(at["offset"]), int(at["length"])
    rows = weights[start : start + size].view(element).reshape(*table.dims)
    rows[token] = np.inf
    weights.flush()
    file = copy / "weights.bin"
    data = json.loads((copy / MANIFEST).read_text())
    data["files"][file.name] = asdict(FileRecord(file.stat().st_size, sha256(file)))
    (copy / MANIFEST).write_text(json.dumps(data))
    return copy


@pytest.fixture(
    scope="module", params=["cpu", "jetpack7", pytest.param("jetpack6", marks=pytest.mark.slow)]
)
def answering(
    request: pytest.FixtureRequest, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, tuple[int, ...]]:
    """A bundle, and what it answers."""
    if request.param == "jetpack6":
        folder = tmp_path_factory.mktemp("finite") / "b"
        options = {"model": tiny_checkpoint, "target": "jetpack6", "dtype": "fp16"}
        bundle = frozen(folder, "none", **options)  # type: ignore[arg-type]
    else:
        names = {"cpu": "tiny_bundle", "jetpack7": "tiny_jetpack7"}
        bundle = request.getfixturevalue(names[request.param])
    with Session.open(bundle) as session:
        return bundle, session.ask(SCENE, QUESTION).ids


def test_an_answer_ends_at_the_first_logits_that_are_not_finite(
    answering: tuple[Path, tuple[int, ...]],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bundle, ids = answering
    token = ids[3]  # read back at the fifth step at the latest
    bad = poisoned(bundle, tmp_path / "bad", token)
    expected = ids[: ids.index(token) + 1]
    assert_ends(bad, "ort-cpu", capfd)
    with Session.open(bad) as session:
        assert _until_refused(session) == expected
    if Bundle.open(bad).manifest.dialect in ("jetpack7", "jetpack6"):
        pretend(bad)
        install(monkeypatch)
        assert_ends(bad, "trt", capfd)
        with Session.open(bad, backend="trt") as session:
            assert _until_refused(session) == expected


def assert_ends(bundle: Path, backend: str, capfd: pytest.CaptureFixture[str]) -> None:
    """`run` exits with 2 and one line of its own, whatever was said before."""
    capfd.readouterr()
    options = ["--backend", backend, "--image", str(SCENE), "--prompt", QUESTION]
    assert main(["run", str(bundle), *options]) == 2
    out, err = capfd.readouterr()
    assert err.startswith("edgeprune: ") and "not finite" in err and err.count("\n") == 1
    assert out == "" or out.endswith("\n")


def _until_refused(session: Session) -> tuple[int, ...]:
    """The ids that were fed back before the answer ended in an error."""
    backend = session.engine.backend
    fed, run = list[int](), backend.run

    def watched(inputs, caches):  # type: ignore[no-untyped-def]
        if inputs.image is None:
            fed.extend(inputs.text_ids[0].tolist())
        return run(inputs, caches)

    backend.run = watched  # type: ignore[method-assign]
    with pytest.raises(BackendError, match="not finite"):
        session.ask(SCENE, QUESTION)
    return tuple(fed)
