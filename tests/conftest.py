"""What several test files share: a tiny LLaVA checkpoint, its bundle, and how commands refuse."""

from __future__ import annotations

import fcntl
import gc
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import numpy as np
import pytest
from PIL import Image

from benchmarks.shapes import write
from edgeprune.cli import main
from tests.engine_setups import SETUPS, Setup
from tests.tiny import TINY

if TYPE_CHECKING:
    from tests.fake_gpu import FakeGpu
SETTINGS = ("EDGEPRUNE_DEBUG", "HF_HUB_OFFLINE", "HF_ENDPOINT")

gc.set_threshold(50_000)
"""Tracers make many objects that stay: looking for cycles so often as Python does by default takes
a sixth of an export."""

Refused = Callable[..., str]

hypothesis.settings.register_profile("fixed", deadline=None, derandomize=True)
hypothesis.settings.register_profile("random", deadline=None)  # --hypothesis-profile random
hypothesis.settings.load_profile("fixed")


@pytest.fixture(scope="session", autouse=True)
def _own_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or writes the user's caches, nor obeys the user's settings."""
    with pytest.MonkeyPatch.context() as patch:
        for name in SETTINGS:
            patch.delenv(name, raising=False)
        patch.setenv("EDGEPRUNE_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("HF_HUB_CACHE", str(tmp_path_factory.mktemp("hub")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _torchlib_is_read_once() -> Iterator[None]:
    """For each graph torch parses the source of all its translations to ONNX, which stay the same:
    a third of a second."""
    from torch.onnx._internal.exporter._registration import onnxscript_apis

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnxscript_apis, "get_torchlib_ops", cache(onnxscript_apis.get_torchlib_ops))
        yield


def _once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A bundle that is made once in a run, whichever process needs it first; the others wait."""
    folder = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    output, lock = folder / "shared" / name, folder / f"{name.replace('/', '-')}.lock"
    lock.touch()
    with lock.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        if not output.exists():  # a bundle is whole or absent
            output.parent.mkdir(parents=True, exist_ok=True)
            make(output)
    return output


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA of random weights with the demo's tokenizer: 3 layers, 16 visual tokens."""
    return write(TINY, tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture
def instruct(tmp_path: Path) -> Path:
    """Five LLaVA-Instruct records with images beside them; the path of the JSON file."""
    return instruct_records(tmp_path)


def instruct_records(folder: Path) -> Path:
    """Write them into a folder."""
    records = []
    for number in range(5):
        noise = np.random.default_rng(number).integers(0, 255, (70, 90, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.png")
        turns = [
            {"from": "human", "value": "<image>\nwhat color is the star ?"},
            {"from": "gpt", "value": "red"},
        ]
        records.append({"id": f"s{number}", "image": f"{number}.png", "conversations": turns})
    file = folder / "samples.json"
    file.write_text(json.dumps(records))
    return file


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dense bundle of the tiny checkpoint; a test that changes it takes a copy."""
    options = ["--model", str(tiny_checkpoint), "--method", "none", "--parity", "1"]

    def make(output: Path) -> None:
        assert main(["export", *options, "-o", str(output)]) == 0

    return _once(tmp_path_factory, "cpu/tiny", make)


@pytest.fixture(scope="session")
def deep_tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint with three blocks in its tower, of which two are run."""

    def make(output: Path) -> None:
        write(replace(TINY, vision_layers=3), output)

    return _once(tmp_path_factory, "deep/tiny", make)


@pytest.fixture(scope="session")
def profilable(deep_tower: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its dense bundle, to be timed."""
    options = ["--model", str(deep_tower), "--method", "none", "--profilable", "--parity", "1"]

    def make(output: Path) -> None:
        assert main(["export", *options, "-o", str(output)]) == 0

    return _once(tmp_path_factory, "profilable/tiny", make)


@pytest.fixture(scope="session")
def tiny_utp(
    tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """The tiny checkpoint with UTP in fp16 for a target; a test that changes it takes a copy."""
    from tests.frozen import frozen

    def bundle(target: str) -> Path:
        def make(output: Path) -> None:
            frozen(output, "utp", 2, model=tiny_checkpoint, target=target, dtype="fp16")

        return _once(tmp_path_factory, f"utp-{target}/tiny", make)

    return bundle


@pytest.fixture(scope="session")
def tiny_jetpack7(tiny_utp: Callable[[str], Path]) -> Path:
    """As above, for JetPack 7."""
    return tiny_utp("jetpack7")


@pytest.fixture(scope="session")
def tiny_jetpack6(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint, dense, in fp16 for JetPack 6: its caches grow at every call."""
    from tests.frozen import frozen

    def make(output: Path) -> None:
        frozen(output, "none", model=tiny_checkpoint, target="jetpack6", dtype="fp16")

    return _once(tmp_path_factory, "jetpack6/tiny", make)


@pytest.fixture
def copy_bundle(tiny_bundle: Path, tmp_path: Path) -> Callable[[], Path]:
    """Makes a copy of the tiny bundle that a test may damage."""
    return lambda: Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


@pytest.fixture
def copy_checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Callable[[], Path]:
    """Makes a copy of the tiny checkpoint that a test may damage."""
    return lambda: Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str]) -> Refused:
    """Runs a command that must be refused: exit code 2 and one line, which is returned."""

    def run(*arguments: object) -> str:
        capfd.readouterr()
        try:
            code: object = main([str(argument) for argument in arguments])
        except SystemExit as exit:  # argparse's way out
            code = exit.code
        out, err = capfd.readouterr()
        assert (code, out) == (2, ""), err
        assert err.startswith("edgeprune: ") and err.count("\n") == 1, err
        assert err.endswith("\n")
        return err

    return run


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[FakeGpu]:
    """Stand-ins for CUDA take the place of GPUs; those that engines have opened."""
    from tests.fake_gpu import install

    return install(monkeypatch)


@pytest.fixture
def no_collector() -> Iterator[None]:
    """What is freed within the test is freed for want of references."""
    gc.disable()
    yield
    gc.enable()


@pytest.fixture(scope="session")
def demo_dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model's dense bundle; a test that changes it takes a copy."""

    def make(output: Path) -> None:
        assert main(["export", "--method", "none", "-o", str(output)]) == 0

    return _once(tmp_path_factory, "demo-none", make)


@pytest.fixture(scope="session")
def demo_utp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model's bundle with UTP at CR 4, calibrated on its 100 scenes; as above."""

    def make(output: Path) -> None:
        assert main(["export", "--method", "utp", "--cr", "4", "-o", str(output)]) == 0

    return _once(tmp_path_factory, "demo-utp-cr4", make)


@pytest.fixture(scope="session")
def demo_fastv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model with FastV at CR 2, which reads the question; without parity; as above."""
    from tests.frozen import frozen

    return _once(tmp_path_factory, "demo-fastv", lambda output: frozen(output, "fastv", 2))


@pytest.fixture(scope="session")
def demo_rtx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model with UTP in fp16 for RTX GPUs, its counts made up; no engines; as above."""
    from tests.frozen import frozen

    def make(output: Path) -> None:
        frozen(output, "utp", 4, target="rtx", dtype="fp16")

    return _once(tmp_path_factory, "demo-rtx", make)


@pytest.fixture(scope="session")
def engine_bundles(
    tiny_jetpack7: Path, tiny_jetpack6: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Caches that are written in place under UTP, caches that grow without pruning."""
    from tests.fake_gpu import pretend

    found = dict[str, Path]()
    for name, shared in (("in-place", tiny_jetpack7), ("grow", tiny_jetpack6)):
        found[name] = Path(shutil.copytree(shared, tmp_path_factory.mktemp(name) / "tiny"))
    for bundle, backend in zip(found.values(), ("trt", "trt-rtx"), strict=True):
        pretend(bundle, backend)
    return found


@pytest.fixture(params=SETUPS, ids=["-".join(one) for one in SETUPS])
def engine_setup(
    request: pytest.FixtureRequest, engine_bundles: dict[str, Path], gpus: list[FakeGpu]
) -> Setup:
    kind, backend = request.param
    return Setup(engine_bundles[kind], backend)


@pytest.fixture
def dense_setup(engine_bundles: dict[str, Path]) -> Setup:
    return Setup(engine_bundles["grow"], "ort-cpu")


@pytest.fixture
def pruned_setup(engine_bundles: dict[str, Path]) -> Setup:
    return Setup(engine_bundles["in-place"], "ort-cpu")


@pytest.fixture(scope="session")
def tiny_rtx(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint, dense, in fp16 for RTX GPUs; no engines."""
    from tests.frozen import frozen

    def make(output: Path) -> None:
        frozen(output, "none", model=tiny_checkpoint, target="rtx", dtype="fp16")

    return _once(tmp_path_factory, "rtx/tiny", make)


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """Three questions of a user's own, the last with two right answers and a kind."""
    for name, colour in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (60, 60), colour).save(tmp_path / name)
    records: list[dict[str, object]] = [
        {"image": "a.png", "question": "what color ?", "answer": "red"},
        {"image": "b.png", "question": "what color ?", "answer": " blue "},
        {"image": "b.png", "question": "how many ?", "answer": ["0", 1], "kind": "count"},
    ]
    file = tmp_path / "own.jsonl"
    file.write_text("\n\n".join(map(json.dumps, records)))
    return file


@pytest.fixture(scope="session")
def camera_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint with a tower of which three blocks of two heads are run."""
    shape = replace(TINY, vision_layers=4, vision_width=128)
    return write(shape, tmp_path_factory.mktemp("camera") / "tiny")


@pytest.fixture(scope="session")
def camera_bundle(camera_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For a fixed camera, 4 of 16 patches of a frame; a test that changes it takes a copy."""
    from tests.cameras import made

    return made(tmp_path_factory.mktemp("camera") / "bundle", camera_checkpoint)
