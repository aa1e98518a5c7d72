"""The TensorRT backend on a GPU of numpy arrays: answers, copies, graphs, and what is refused."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeprune.demo.questions import held_out
from edgeprune.errors import CapacityError
from edgeprune.runtime import Sampling, Session
from tests import fake_gpu
from tests.conftest import Refused
from tests.endless import endless
from tests.fake_gpu import TEXT, VERSION, FakeGpu, pretend
from tests.tiny import ASK_SCENE


@pytest.fixture(scope="module")
def demo(demo_rtx: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo with UTP for GPUs, and engines that were never built."""
    bundle = Path(shutil.copytree(demo_rtx, tmp_path_factory.mktemp("rtx") / "demo"))
    pretend(bundle)
    return bundle


@pytest.fixture(scope="module", params=["rtx", "jetpack6", "jetpack7"])
def tiny(
    request: pytest.FixtureRequest,
    tiny_utp: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """UTP on the tiny checkpoint in every dialect that GPUs run, with engines never built."""
    folder = tmp_path_factory.mktemp("trt") / "tiny"
    bundle = Path(shutil.copytree(tiny_utp(request.param), folder))
    pretend(bundle)
    return bundle


def dialogue(session: Session, tokens: int = 24) -> list[tuple[int, ...]]:
    """Two turns about two images each, and none ends early."""
    endless(session)
    sampling, said = Sampling(max_new_tokens=tokens), []
    for image, question in held_out(2):
        said.append(session.ask(image, question.text, sampling).ids)
        said.append(session.follow_up("how many circles are there ?", sampling).ids)
    return said


def test_the_demo_answers_as_on_onnx_runtime(demo: Path, gpus: list[FakeGpu]) -> None:
    ours, theirs = Session.open(demo, backend="trt"), Session.open(demo)
    for image, question in held_out(12):
        answer, wanted = ours.ask(image, question.text), theirs.ask(image, question.text)
        assert answer.ids == wanted.ids
        assert answer.vision_kept.tolist() == wanted.vision_kept.tolist()
        kept, also = answer.layer_kept, wanted.layer_kept
        assert [k.tolist() for k in kept] == [k.tolist() for k in also]
        assert ours.follow_up(question.text).ids == theirs.follow_up(question.text).ids


def test_every_dialect_answers_as_on_onnx_runtime(tiny: Path, gpus: list[FakeGpu]) -> None:
    ours = dialogue(Session.open(tiny, backend="trt"))
    assert ours == dialogue(Session.open(tiny))
    assert len(set(ours)) > 1


def test_sampling_draws_as_on_onnx_runtime(tiny: Path, gpus: list[FakeGpu]) -> None:
    image, question = next(held_out(1))
    sampling = Sampling(temperature=1.0, seed=3, max_new_tokens=12)
    drawn = [
        Session.open(tiny, backend=name).ask(image, question.text, sampling).ids
        for name in ("trt", "ort-cpu")
    ]
    assert drawn[0] == drawn[1]


def test_a_step_copies_one_small_piece_in_and_eight_bytes_out(
    tiny: Path, gpus: list[FakeGpu]
) -> None:
    session = Session.open(tiny, backend="trt")
    (device,) = gpus
    image, question = next(held_out(1))
    endless(session)
    moved = []
    for tokens in (8, 20):
        before = device.uploaded, device.downloaded, device.replays
        session.engine.forget_tiles()  # an image that is known needs no upload
        session.ask(image, question.text, Sampling(max_new_tokens=tokens))
        after = device.uploaded, device.downloaded, device.replays
        moved.append([b - a for a, b in zip(before, after, strict=True)])
    uploaded, downloaded, replays = (b - a for a, b in zip(*moved, strict=True))
    assert uploaded == 12 * (512 + 8 * 3)
    assert downloaded == 12 * 8
    if session.manifest.decoder.cache == "grow":
        assert replays == moved[0][2] == 0, "its shapes change, so each step is queued anew"
    else:
        assert replays == 12 + 1, "all steps but the very first are replays"


def test_visual_tokens_and_caches_stay_on_the_gpu(tiny: Path, gpus: list[FakeGpu]) -> None:
    session = Session.open(tiny, backend="trt")
    (device,) = gpus
    image, question = next(held_out(1))
    assert len(device.blocks) == 2, "what calls share, and the dialogue's caches"
    session.ask(image, question.text, Sampling(max_new_tokens=1))
    prune = session.manifest.prune
    kept = sum(
        8 * prune.counts[site.layer - 1] for site in session.manifest.graph.kept if site.layer
    )
    assert device.downloaded == 8 * prune.encoded + 8 + kept, "logits stay there"
    session.follow_up("how many circles are there ?", Sampling(max_new_tokens=4))
    for image, question in held_out(3):
        session.ask(image, question.text, Sampling(max_new_tokens=1))
    tiles, images = 3, 2
    assert len(device.blocks) == 2 + tiles + images, "one image is read, the next is encoded"


def test_an_answer_ends_where_the_caches_are_full(tiny: Path, gpus: list[FakeGpu]) -> None:
    session = Session.open(tiny, backend="trt")
    endless(session)
    image, question = next(held_out(1))
    answer = session.ask(image, question.text)
    assert (answer.finish, answer.prompt_tokens + len(answer.ids)) == ("length", TEXT)
    with pytest.raises(CapacityError, match=f"caches hold {TEXT}; shorten the prompt, or build"):
        session.follow_up("how many circles are there ?")
    with pytest.raises(CapacityError, match=rf"left of --text-capacity {TEXT}; ask for fewer"):
        session.ask(image, question.text, Sampling(max_new_tokens=TEXT))
    with pytest.raises(CapacityError, match=f"caches hold {TEXT}; shorten the prompt"):
        session.ask(image, "star " * TEXT)
    with pytest.raises(CapacityError, match="cache of layer 1 holds"):
        session.sequence.read(np.zeros((1, TEXT + 16), np.int64))


def test_warming_up_leaves_no_trace(tiny: Path, gpus: list[FakeGpu]) -> None:
    cold, warm = (Session.open(tiny, backend="trt") for _ in range(2))
    warm.warm_up()
    assert dialogue(cold, 6) == dialogue(warm, 6)


def _flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[3] ^= 1
    file.write_bytes(data)


def _record(folder: Path, **changes: object) -> None:
    file = folder / "engine.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def _lacking(folder: Path, name: str) -> None:
    file = folder / "engine.json"
    record = json.loads(file.read_text())
    del record[name]
    file.write_text(json.dumps(record))


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped byte": (lambda f: _flip(f / "decoder.engine"), "was altered since it was built"),
    "cut": (lambda f: (f / "vision.engine").write_bytes(b""), "was altered since it was built"),
    "gone": (lambda f: (f / "vision.engine").unlink(), "was altered since it was built"),
    "other version": (
        lambda f: _record(f, version="10.3.0"),
        f"was built with TensorRT 10.3.0, this is {VERSION}",
    ),
    "other GPU": (lambda f: _record(f, gpu="sm_110"), "was built for sm_110, this GPU is sm_87"),
    "other GPUs": (
        lambda f: _record(f, compute=["SM89", "SM120"]),
        "was built for SM89, SM120, this GPU is sm_87",
    ),
    "other graphs": (lambda f: _record(f, graphs={}), "was built from other graphs"),
    "other dtype": (lambda f: _record(f, dtype="bf16"), "was built from other graphs"),
    "no record": (lambda f: (f / "engine.json").unlink(), "has no engines for TensorRT"),
    "damaged record": (lambda f: (f / "engine.json").write_text("{"), "has no engines for"),
    "no capacities": (lambda f: _lacking(f, "capacities"), "has no engines for TensorRT"),
    "other layers": (lambda f: _record(f, capacities=[1]), "was built from other graphs"),
    "no number": (lambda f: _record(f, text_capacity="many"), "has no engines for TensorRT"),
    "endless text": (lambda f: _record(f, text_capacity=1 << 62), "has no engines for TensorRT"),
    "no text": (lambda f: _record(f, text_capacity=0), "has no engines for TensorRT"),
    "another engine": (lambda f: _record(f, engines={"../../x": {}}), "has no engines for"),
    "no engines": (lambda f: _record(f, engines=[]), "has no engines for TensorRT"),
    "deep": (lambda f: (f / "engine.json").write_text("[" * 100_000), "has no engines for"),
    "other backend": (lambda f: _record(f, backend="trt-rtx"), "has no engines for TensorRT"),
}


@pytest.mark.parametrize(("change", "says"), REFUSED.values(), ids=REFUSED.keys())
def test_an_engine_that_may_not_run_here(
    change: Callable[[Path], object],
    says: str,
    copy_rtx: Callable[[], Path],
    gpus: list[FakeGpu],
    refused: Refused,
) -> None:
    bundle = copy_rtx()
    change(pretend(bundle))
    line = refused("run", bundle, *ASK_SCENE, "--backend", "trt")
    assert says in line
    assert f"edgeprune build {bundle} --backend trt" in line
    assert not gpus[0].blocks, "nothing was loaded"


@pytest.fixture
def copy_rtx(tiny_rtx: Path, tmp_path: Path) -> Callable[[], Path]:
    return lambda: Path(shutil.copytree(tiny_rtx, tmp_path / "rtx"))


def test_an_engine_for_this_gpu_among_others_is_found(
    copy_rtx: Callable[[], Path], gpus: list[FakeGpu]
) -> None:
    bundle = copy_rtx()
    other = pretend(bundle)
    other.rename(other.with_name("trt-a"))
    _record(other.with_name("trt-a"), gpu="sm_110")
    _record(pretend(bundle), compute=["SM75", "SM87"])
    image, question = next(held_out(1))
    assert Session.open(bundle, backend="trt").ask(image, question.text).ids


def test_of_several_engines_those_that_hold_most_are_run(
    copy_rtx: Callable[[], Path], gpus: list[FakeGpu]
) -> None:
    """The folders' names end in a hash, so their order says nothing."""
    bundle = copy_rtx()
    for name, capacity in (("trt-a", TEXT - 10), ("trt-b", TEXT), ("trt-c", TEXT - 20)):
        folder = pretend(bundle)
        _record(folder, text_capacity=capacity)
        folder.rename(folder.with_name(name))
    assert Session.open(bundle, backend="trt").engine.backend.text_capacity == TEXT


def test_closing_frees_the_gpu(
    copy_rtx: Callable[[], Path], gpus: list[FakeGpu], no_collector: None
) -> None:
    bundle = copy_rtx()
    pretend(bundle)
    image, question = next(held_out(1))
    with Session.open(bundle, backend="trt") as session:
        session.ask(image, question.text, Sampling(max_new_tokens=4))
        backend: Any = session.engine.backend
        engine = weakref.ref(backend._decode)
        assert gpus[0].blocks
    assert engine() is None
    assert not gpus[0].blocks
    session.close()  # again, and nothing happens


def test_a_image_that_stands_too_late_in_the_prompt(
    copy_rtx: Callable[[], Path], gpus: list[FakeGpu], refused: Refused
) -> None:
    """A larger --text-capacity would change nothing."""
    bundle = copy_rtx()
    pretend(bundle)
    late = [*ASK_SCENE[:3], "star " * 80 + "<image> what color ?"]
    line = refused("run", bundle, *late, "--backend", "trt")
    assert "read 64 prefix tokens at once" in line
    assert "put <image> earlier in it" in line and "--text-capacity" not in line


def test_too_little_memory_is_told_before_anything_is_loaded(
    copy_rtx: Callable[[], Path], monkeypatch: pytest.MonkeyPatch, refused: Refused
) -> None:
    bundle = copy_rtx()
    pretend(bundle)
    used = fake_gpu.install(monkeypatch, memory=10_000)
    line = refused("run", bundle, *ASK_SCENE, "--backend", "trt")
    assert "GB of GPU memory, 0.00 GB are free; end other programs" in line
    assert not used[0].blocks


def test_threads_are_the_cpus(
    copy_rtx: Callable[[], Path], gpus: list[FakeGpu], refused: Refused
) -> None:
    bundle = copy_rtx()
    line = refused("run", bundle, *ASK_SCENE, "--backend", "trt", "--threads", "2")
    assert "--threads is for ort-cpu" in line
