"""TensorRT-RTX compiles bundles for real, without a GPU; what cannot be built is told in a line."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

from edgeprune.bundle import MANIFEST, Bundle, record_files, sha256
from edgeprune.cli import main
from edgeprune.runtime.build import BuildRequest, build
from edgeprune.runtime.onnx_dims import with_sizes
from tests.conftest import Refused
from tests.frozen import frozen

if sys.platform == "linux":  # the dev extra brings it there, so its absence is a fault
    import tensorrt_rtx
else:
    tensorrt_rtx = pytest.importorskip("tensorrt_rtx")

Copy = Callable[[], Path]


@pytest.fixture(scope="module")
def full_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint's dense bundle in fp32."""
    folder = tmp_path_factory.mktemp("full") / "tiny-fp32"
    return frozen(folder, "none", model=tiny_checkpoint, target="rtx", dtype="fp32")


@pytest.fixture
def copy_half(tiny_rtx: Path, tmp_path: Path) -> Copy:
    return lambda: Path(shutil.copytree(tiny_rtx, tmp_path / "half"))


@pytest.fixture(scope="module", params=[pytest.param("none", marks=pytest.mark.slow), "utp"])
def demo_built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's fp16 bundle with its engines, dense and pruned."""
    output = tmp_path_factory.mktemp("built") / "demo"
    if request.param == "utp":
        shutil.copytree(request.getfixturevalue("demo_rtx"), output)
    else:
        frozen(output, "none", target="rtx", dtype="fp16")
    assert main(["build", str(output), "--backend", "trt-rtx"]) == 0
    return output


def engines(bundle: Path) -> Path:
    """The one folder of engines; no draft may stand beside it."""
    (folder,) = (bundle / "engines").iterdir()
    return folder


def record(bundle: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((engines(bundle) / "engine.json").read_text())
    return found


def edit(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a manifest, hashes brought up to date."""
    file = bundle / MANIFEST
    manifest = json.loads(file.read_text())
    change(manifest)
    files = record_files(bundle).items()
    manifest["files"] = {name: {"bytes": f.bytes, "sha256": f.sha256} for name, f in files}
    file.write_text(json.dumps(manifest))


def test_the_demo_becomes_engines_with_a_record_that_is_true(demo_built: Path) -> None:
    found, manifest = record(demo_built), Bundle.open(demo_built).manifest
    assert found["backend"] == "trt-rtx"
    assert found["version"] == tensorrt_rtx.__version__
    assert found["dtype"] == "fp16"
    assert found["capacities"] == [count + 512 for count in manifest.prune.counts]
    names = {"vision.engine", "join.engine", "decoder.engine", "engine.json"}
    assert {file.name for file in engines(demo_built).iterdir()} == names
    for name, engine in found["engines"].items():
        file = engines(demo_built) / f"{name}.engine"
        assert file.stat().st_size == engine["bytes"]
        assert sha256(file) == engine["sha256"]


def test_the_decoder_takes_prefill_and_decode_as_ranges(demo_built: Path) -> None:
    decoder = record(demo_built)["engines"]["decoder"]
    visual = Bundle.open(demo_built).manifest.prune.counts[0]
    assert list(decoder["profiles"]) == ["prefill", "decode"]
    for profile in decoder["profiles"].values():
        assert [profile[kind][0] for kind in ("prefix", "visual", "text")] == [0, 0, 1]
        assert profile["visual"][2] == visual
        assert all(least < most for least, _, most in profile.values())
    assert decoder["profiles"]["decode"]["text"][1] == 1


def test_the_engines_ends_are_the_graphs_ends_with_fixed_caches(demo_built: Path) -> None:
    found, manifest = record(demo_built), Bundle.open(demo_built).manifest
    for name, engine in found["engines"].items():
        graph = onnx.load(demo_built / f"{name}.onnx", load_external_data=False).graph
        assert [t["name"] for t in engine["inputs"]] == [i.name for i in graph.input]
        assert [t["name"] for t in engine["outputs"]] == [o.name for o in graph.output]
    shapes = {t["name"]: (t["shape"], t["dtype"]) for t in found["engines"]["decoder"]["inputs"]}
    kv_heads, size = manifest.decoder.kv_heads, manifest.decoder.head_size
    for layer, capacity in enumerate(found["capacities"]):
        for kind in ("key", "value"):
            cache = shapes[f"past_{kind}.{layer}"]
            assert cache == ([1, kv_heads, capacity, size], "HALF")


def test_both_profiles_share_one_copy_of_the_weights(demo_built: Path) -> None:
    """A row of a weight stands in the engine's bytes once; never, where it was repacked."""
    plan = (engines(demo_built) / "decoder.engine").read_bytes()
    graph = onnx.load(demo_built / "decoder.onnx").graph
    tensors = [onnx.numpy_helper.to_array(t) for t in graph.initializer if len(t.dims) == 2]
    rows = [tensor[len(tensor) // 2].tobytes() for tensor in tensors if len(tensor) > 1]
    copies = [plan.count(row) for row in rows]
    assert set(copies) <= {0, 1}
    assert copies.count(1) > len(copies) / 2


def test_what_is_built_is_not_built_again(
    copy_half: Copy, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = copy_half()
    command = ["build", str(bundle), "--backend", "trt-rtx", "--text-capacity", "64"]
    assert main(command) == 0
    out, err = capsys.readouterr()
    assert Path(out.strip()) == engines(bundle)
    assert "decoder.engine" in err
    Bundle.open(bundle)  # a bundle is none the worse for its engines
    first = (engines(bundle) / "decoder.engine").stat().st_mtime_ns
    assert main(command) == 0
    assert "built before" in capsys.readouterr().err
    assert (engines(bundle) / "decoder.engine").stat().st_mtime_ns == first


def test_an_altered_engine_is_built_again(copy_half: Copy) -> None:
    bundle = copy_half()
    command = ["build", str(bundle), "--backend", "trt-rtx"]
    assert main(command) == 0
    file = engines(bundle) / "vision.engine"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    (
        file.parent.parent / f".{file.parent.name}.draft-abcdefgh"
    ).mkdir()  # of a build that was killed
    assert main(command) == 0
    assert sha256(file) == record(bundle)["engines"]["vision"]["sha256"]


def test_gpu_generations_can_be_named(copy_half: Copy) -> None:
    bundle = copy_half()
    options = ["--compute", "sm89", "--compute", "SM120", "--compute", "SM89"]
    assert main(["build", str(bundle), "--backend", "trt-rtx", *options]) == 0
    assert record(bundle)["compute"] == ["SM89", "SM120"]
    assert "SM89+SM120" in engines(bundle).name


@pytest.mark.filterwarnings("ignore:.*no-ops in TensorRT-RTX:DeprecationWarning")
def test_tensorrt_is_driven_alike_and_keeps_its_timings(
    copy_half: Copy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT has the same Python API, so TensorRT-RTX stands in for it."""
    monkeypatch.setitem(sys.modules, "tensorrt", tensorrt_rtx)
    bundle = copy_half()
    assert main(["build", str(bundle), "--backend", "trt"]) == 0
    timings = bundle / "engines" / "timing.cache"
    assert timings.stat().st_size > 0
    timings.unlink()
    assert record(bundle)["backend"] == "trt"


def test_a_missing_engine_builder_is_named(
    tiny_rtx: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    assert "JetPack" in refused("build", tiny_rtx, "--backend", "trt")
    line = refused("build", tiny_rtx, "--backend", "trt-rtx")
    assert "pip install '.[trt-rtx]'" in line
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "neither" in refused("build", tiny_rtx)


def test_a_builder_that_wants_a_gpu_is_told(
    tiny_rtx: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    def builder(logger: object) -> None:
        raise TypeError("pybind11::init(): factory function returned nullptr")

    trt = SimpleNamespace(**{**vars(tensorrt_rtx), "Builder": builder})
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    line = refused("build", tiny_rtx, "--backend", "trt")
    assert "cannot build here (pybind11::init(): " in line
    assert "build on a machine with a GPU" in line


def test_fp32_is_refused_before_any_work(full_bundle: Path, refused: Refused) -> None:
    line = refused("build", full_bundle, "--backend", "trt-rtx")
    assert "fp32" in line and "--dtype fp16" in line


def test_the_cpu_targets_graphs_are_refused(tiny_bundle: Path, refused: Refused) -> None:
    line = refused("build", tiny_bundle, "--backend", "trt-rtx")
    assert "on a CPU" in line and "--target rtx, jetpack7 or jetpack6" in line


@pytest.mark.parametrize(
    ("option", "value", "wanted"),
    [
        ("--text-capacity", 0, "at least 1"),
        ("--text-capacity", 2, "before the image"),
        ("--text-capacity", 100_000, "positions"),
        ("--compute", "SM10", "SM120"),
    ],
)
def test_options_that_cannot_be_met(
    option: str, value: object, wanted: str, tiny_rtx: Path, refused: Refused
) -> None:
    line = refused("build", tiny_rtx, "--backend", "trt-rtx", option, value)
    assert wanted in line and str(value) in line
    assert not list((tiny_rtx / "engines").glob("*"))


def test_a_node_that_the_parser_refuses_is_named(copy_half: Copy, refused: Refused) -> None:
    bundle = copy_half()
    model = onnx.load(bundle / "decoder.onnx", load_external_data=False)
    node = next(n for n in model.graph.node if n.op_type == "Sigmoid")
    node.op_type = "Softmax"
    node.attribute.append(onnx.helper.make_attribute("axis", 99))
    (bundle / "decoder.onnx").write_bytes(model.SerializeToString())
    edit(bundle, lambda manifest: None)
    line = refused("build", bundle, "--backend", "trt-rtx")
    assert f"node {node.name} (Softmax)" in line
    assert not list((bundle / "engines").glob("*")), "nothing half-made stays"


def test_a_graph_that_cannot_be_compiled(
    full_bundle: Path, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An fp32 graph that is let pass: its attention has no kernel and may not be split."""
    monkeypatch.setattr("edgeprune.runtime.trt.let_fall_back", lambda trt, network: None)
    monkeypatch.setattr("edgeprune.runtime.build._check", lambda manifest, request: None)
    bundle = Path(shutil.copytree(full_bundle, tmp_path / "full"))
    line = refused("build", bundle, "--backend", "trt-rtx")
    assert "cannot build decoder.onnx" in line
    assert not list((bundle / "engines").glob("*"))


def test_an_interrupt_ends_the_build_and_leaves_nothing(copy_half: Copy) -> None:
    bundle, steps = copy_half(), []

    def interrupt(step: str, done: int, total: int) -> None:
        steps.append(step)
        if step == "build decoder" and done == 1:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        build(BuildRequest(bundle, "trt-rtx"), interrupt)
    assert steps[-1] == "build decoder"
    assert not list((bundle / "engines").glob("*"))
    assert main(["build", str(bundle), "--backend", "trt-rtx"]) == 0


@pytest.mark.parametrize("target", ["jetpack6", "jetpack7"])
def test_jetpacks_graphs_are_compiled_too(
    target: str, tiny_utp: Callable[[str], Path], tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(tiny_utp(target), tmp_path / "tiny"))
    assert main(["build", str(bundle), "--backend", "trt-rtx", "--text-capacity", "100"]) == 0
    found, counts = record(bundle), Bundle.open(bundle).manifest.prune.counts
    for label, profile in found["engines"]["decoder"]["profiles"].items():
        past = [profile.get(f"past.{layer}") for layer in range(3)]
        if target == "jetpack7":
            assert past == [None] * 3, "written in place: the size of a cache is fixed"
        else:
            assert [p[0] for p in past] == [int(label == "decode")] * 3
            assert [p[2] for p in past] == [count + 100 for count in counts]


def test_sizes_are_written_as_onnx_would_write_them(tiny_rtx: Path) -> None:
    data = (tiny_rtx / "decoder.onnx").read_bytes()
    written = onnx.ModelProto.FromString(with_sizes(data, {"capacity.1": 300, "text": 7}))
    wanted = onnx.ModelProto.FromString(data)
    for value in (*wanted.graph.input, *wanted.graph.output):
        for size in value.type.tensor_type.shape.dim:
            numbers = {"capacity.1": 300, "text": 7}
            if size.dim_param in numbers:
                size.dim_value = numbers[size.dim_param]
    assert written == wanted
    assert with_sizes(data, {}) == data


def test_sizes_that_occur_nowhere_and_bytes_that_are_no_model(tiny_rtx: Path) -> None:
    data = (tiny_rtx / "decoder.onnx").read_bytes()
    with pytest.raises(ValueError, match=r"capacity\.99"):
        with_sizes(data, {"capacity.99": 4})
    rng = np.random.default_rng(0)
    for end in rng.integers(1, len(data) - 1, 20):
        with pytest.raises(ValueError):
            with_sizes(data[:end], {"capacity.0": 4})
    with pytest.raises(ValueError, match="no protobuf field"):
        with_sizes(b"\x0f" * 8, {})


def test_a_bundle_without_its_weights_keeps_its_engines(
    copy_half: Copy, refused: Refused, capfd: pytest.CaptureFixture[str]
) -> None:
    """They run on a device; nothing else can be made of such a bundle, and each says so."""
    bundle = copy_half()
    weights = bundle / "weights.bin"
    kept = weights.read_bytes()
    weights.unlink()
    assert f"{weights} is missing" in refused("check", bundle), "there are no engines"
    weights.write_bytes(kept)
    usual = ("build", bundle, "--backend", "trt-rtx", "--text-capacity", 64)
    assert main([*map(str, usual), "--drop-weights"]) == 0
    assert "weights.bin is removed" in capfd.readouterr().err
    assert not weights.exists() and not Bundle.open(bundle, verify=True).has_weights
    gone = f"{bundle} has engines and no weights.bin, which"
    assert main([*map(str, usual)]) == 0, "these engines are there"
    assert f"{gone} a build needs" in refused(*usual, "--force")
    question = ("--image", "edgeprune/demo/samples/scene-1.png", "--prompt", "?")
    assert f"{gone} ONNX Runtime needs" in refused("run", bundle, *question)
    capfd.readouterr()
    assert main(["check", str(bundle)]) == 0
    assert "could not be asked: weights.bin was removed once engines" in capfd.readouterr().out
    weights.write_bytes(kept)
    assert Bundle.open(bundle, verify=True).has_weights
