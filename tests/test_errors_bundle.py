"""Bundles that are damaged, and engines that are asked for wrongly."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Refused

from edgeprune.bundle import NEEDED
from edgeprune.cli import main
from edgeprune.demo import SAMPLES_DIR

QUESTION = ["--image", SAMPLES_DIR / "scene-1.png", "--prompt", "what color is the star ?"]


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _alter(file: Path) -> None:
    """Another bit somewhere in the middle, the size as it was."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("name", NEEDED)
@pytest.mark.parametrize(
    ("damage", "says"),
    [(Path.unlink, "is missing"), (_cut, "bytes, the manifest says"), (_alter, "was altered")],
    ids=["missing", "truncated", "altered"],
)
def test_a_file_that_is_not_the_exported_one(
    name: str,
    damage: Callable[[Path], object],
    says: str,
    copy_bundle: Callable[[], Path],
    refused: Refused,
) -> None:
    damage((bundle := copy_bundle()) / name)
    line = refused("run", bundle, *QUESTION)
    assert f"{bundle / name} " in line and says in line and "again" in line


def _edit(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads((bundle / "manifest.json").read_text())
    change(data)
    (bundle / "manifest.json").write_text(json.dumps(data))


def _name_file(name: str) -> Callable[[dict[str, Any]], object]:
    return lambda data: data["files"].update({name: {"bytes": 0, "sha256": ""}})


MANIFESTS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "newer": (
        lambda d: d.update(schema=99),
        "has schema 99, this edgeprune reads schema 2; update",
    ),
    "older": (lambda d: d.update(schema=0), "this edgeprune reads schema 2; export again"),
    "no schema": (lambda d: d.pop("schema"), "names no schema; export the bundle again"),
    "no part": (lambda d: d.pop("decoder"), "'decoder'"),
    "no field": (lambda d: d["image"].pop("mean"), "'mean'"),
    "unknown field": (lambda d: d["prune"].update(colour="red"), "'colour'"),
    "wrong type": (
        lambda d: d["decoder"].update(layers="3"),
        'manifest.decoder.layers cannot be "3"',
    ),
    "wrong list": (lambda d: d["prune"].update(grid=[4]), "manifest.prune.grid cannot be [4]"),
    "wrong part": (lambda d: d.update(text=[]), "manifest.text cannot be []"),
    "contradiction": (lambda d: d["prune"].update(counts=[16]), "1 token counts for 3 layers"),
    "other sizes": (lambda d: d["prune"].update(counts=[9] * 3), "the stages give other"),
    "wrong stage": (
        lambda d: d["prune"]["stages"].append({"site": "moon", "keep": 1}),
        'site cannot be "moon"',
    ),
    "no graph": (lambda d: d["files"].pop("decoder.onnx"), "files lacks decoder.onnx"),
    "wrong defaults": (
        lambda d: d["text"]["generation"].update(temperature=-1),
        "no usable generation defaults",
    ),
    "unknown defaults": (
        lambda d: d["text"]["generation"].update(beams=4),
        "no usable generation defaults",
    ),
    "wrong template": (lambda d: d["text"].update(first="USER:"), "do not fit"),
    "wrong sizes": (
        lambda d: d["decoder"].update(kv_heads=3),
        "ONNX Runtime failed in decoder.onnx",
    ),
    "parent": (_name_file("../passwd"), "names '../passwd', a path that leaves the bundle"),
    "absolute": (_name_file("/etc/passwd"), "names '/etc/passwd', a path that leaves"),
    "windows": (_name_file("..\\passwd"), "a path that leaves the bundle"),
    "nul": (_name_file("a\0b"), "a path that leaves the bundle"),
}


@pytest.mark.parametrize(("change", "says"), MANIFESTS.values(), ids=MANIFESTS.keys())
def test_a_manifest_that_is_not_the_exported_one(
    change: Callable[[dict[str, Any]], object],
    says: str,
    copy_bundle: Callable[[], Path],
    refused: Refused,
) -> None:
    _edit(bundle := copy_bundle(), change)
    line = refused("run", bundle, *QUESTION)
    assert says in line, line


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\xff", "[" * 100_000], ids=range(6))
def test_a_manifest_that_is_no_json_object(
    text: str, copy_bundle: Callable[[], Path], refused: Refused
) -> None:
    (bundle := copy_bundle()).joinpath("manifest.json").write_bytes(text.encode("latin-1"))
    line = refused("run", bundle, *QUESTION)
    assert f"{bundle / 'manifest.json'} is damaged (" in line and "export the bundle again" in line


def test_a_link_that_leaves_the_bundle(
    copy_bundle: Callable[[], Path], tmp_path: Path, refused: Refused
) -> None:
    bundle = copy_bundle()
    (bundle / "weights.bin").rename(tmp_path / "weights.bin")
    (bundle / "weights.bin").symlink_to(tmp_path / "weights.bin")
    assert "is a link that leaves the bundle" in refused("run", bundle, *QUESTION)


def test_what_is_no_bundle_at_all(tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file", tmp_path / "nosuch"):
        for command in (["run", path, *QUESTION], ["bench", path]):
            assert f"{path} is no bundle: it has no manifest.json" in refused(*command)


def test_a_bundle_that_the_engine_does_not_run(
    copy_bundle: Callable[[], Path], refused: Refused
) -> None:
    _edit(bundle := copy_bundle(), lambda data: data.update(dtype="bf16"))
    assert "export it again with --dtype fp16" in refused("run", bundle, *QUESTION)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--backend", "tpu"], "no backend 'tpu'; choose: ort-cpu, ort-cuda"),
        (["--threads", "0"], "--threads is at least 1; got 0"),
        (["--threads", "-2"], "--threads is at least 1; got -2"),
        (["--threads", "two"], "argument --threads: invalid int value: 'two'"),
    ],
)
def test_engine_options(options: list[str], says: str, tiny_bundle: Path, refused: Refused) -> None:
    assert says in refused("run", tiny_bundle, *QUESTION, *options)
    assert says in refused("bench", tiny_bundle, *options)


def test_cuda_where_there_is_none(tiny_bundle: Path, refused: Refused) -> None:
    ort = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" in ort.get_available_providers():
        pytest.skip("this ONNX Runtime has CUDA")
    line = refused("run", tiny_bundle, *QUESTION, "--backend", "ort-cuda")
    assert "no CUDAExecutionProvider" in line and "pip install '.[gpu]'" in line


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--laps", "0"], "--laps is at least 1"),
        (["--warmup", "-1"], "--warmup is at least 0"),
        (["--new-tokens", "0"], "--new-tokens is at least 1"),
        (["--text-tokens", "3"], "--text-tokens is at least 6"),
        (["--text-tokens", "5000"], "lower --text-tokens or --new-tokens"),
        (["--figure", "speed.pdf"], "must end in one of .png, "),
        (["--json", "."], "the result goes to a file, . is a folder; name a file in it"),
    ],
)
def test_bench_options(options: list[str], says: str, tiny_bundle: Path, refused: Refused) -> None:
    assert says in refused("bench", tiny_bundle, *options)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_result_that_finds_no_room(
    tiny_bundle: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "laps.json").symlink_to("/dev/full")
    laps = ["--laps", "1", "--warmup", "0", "--new-tokens", "1"]
    capfd.readouterr()
    assert main(["bench", str(tiny_bundle), *laps, "--json", str(tmp_path / "laps.json")]) == 2
    assert "cannot be written (No space left on device)" in capfd.readouterr().err.splitlines()[-1]


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(copy_bundle: Callable[[], Path], refused: Refused) -> None:
    (bundle := copy_bundle()).joinpath("weights.bin").chmod(0)
    assert "weights.bin cannot be read (Permission denied)" in refused("run", bundle, *QUESTION)


def test_a_bundle_is_moved_and_copied_freely(
    copy_bundle: Callable[[], Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    moved = tmp_path / "elsewhere" / "bundle"
    shutil.move(copy_bundle(), moved)
    assert main(["run", str(moved), *map(str, QUESTION), "--max-new-tokens", "1"]) == 0
