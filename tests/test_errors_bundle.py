"""Bundles that are damaged, and engines that are asked for wrongly."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import pytest
from conftest import Refused

from edgeprune.bundle import NEEDED, Bundle
from edgeprune.cli import main
from edgeprune.demo import SAMPLES_DIR
from edgeprune.errors import BundleError
from edgeprune.export import dialects
from edgeprune.graphs import GRAPHS
from edgeprune.lowering import DTYPES, TARGETS, resolve
from edgeprune.manifest import CACHES, DIALECTS, SCHEMA, Manifest
from edgeprune.models._rounding import TORCH
from edgeprune.records import DEPTH, Between
from tests.hostile import edit_graph

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
    return lambda data: data["files"].update({name: {"bytes": 0, "sha256": "0" * 64}})


MANIFESTS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "newer": (
        lambda d: d.update(schema=99),
        f"has schema 99, this edgeprune reads schema {SCHEMA}; update",
    ),
    "older": (lambda d: d.update(schema=0), f"this edgeprune reads schema {SCHEMA}; export again"),
    "no schema": (lambda d: d.pop("schema"), "names no schema; export the bundle again"),
    "no part": (lambda d: d.pop("decoder"), "'decoder'"),
    "no field": (lambda d: d["image"].pop("mean"), "'mean'"),
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
        'site is one of encoder, block, vision, input, layer; got "moon"',
    ),
    "no graph": (lambda d: d["files"].pop("decoder.onnx"), "files lacks decoder.onnx"),
    "deep": (lambda d: d.update(parity=_nested(DEPTH)), "it nests more than 64 levels deep"),
    "infinite": (lambda d: d["prune"].update(cr=float("inf")), "Infinity is no number of JSON"),
    "other grid": (lambda d: d["prune"].update(grid=[3, 5]), "a grid of 3 x 5 has not 16 tokens"),
    "other ratio": (lambda d: d["prune"].update(cr_reached=2), "a ratio of 1, not 2"),
    "heads": (lambda d: d["decoder"].update(attention_heads=5), "5 heads cannot share 2 keys"),
    "rows": (lambda d: d["decoder"].update(deepstack=99), "DeepStack rows for 99 of "),
    "a row": (lambda d: d["decoder"].update(deepstack=1), "lists visual as "),
    "end token": (lambda d: d["text"].update(eos_token_ids=[66]), "end token 66 is not among 66"),
    "other pixels": (lambda d: d["image"].update(height=28), "give 56 x 56 pixels, not 28 x 56"),
    "huge resize": (
        lambda d: d["image"].update(resize=30_000),
        "resize makes 30000 pixels of which 56 are used",
    ),
    "huge images": (
        lambda d: d["image"].update(height=30_000, width=30_000, crop=[30_000] * 2),
        "images of 2,700,000,000 numbers, at most 268,435,456 are taken",
    ),
    "step": (lambda d: d["image"].update(step=9), "56 x 56 pixels are not multiples of 9"),
    "video": (lambda d: d["image"].update(frames=2, images=2), "2 images of a video"),
    "fraction": (lambda d: d["text"]["generation"].update(top_k=2.5), "top_k cannot be 2.5"),
    "losses": (
        lambda d: d["prune"].update(schedule={"loss": ["low"]}),
        'manifest.prune.schedule.loss cannot be "low"',
    ),
    "wrong defaults": (
        lambda d: d["text"]["generation"].update(temperature=-1),
        "generation.temperature is from 0 to 1,073,741,824; got -1",
    ),
    "other image": (
        lambda d: d["text"].update(visual_ids=[[4, 17]]),
        "visual_ids has 17 ids for 16 visual tokens",
    ),
    "no image": (
        lambda d: d["text"].update(visual_ids=[[4, 17], [5, -1]]),
        "from 1 to 16,777,216; got -1",
    ),
    "wrong template": (lambda d: d["text"].update(first="USER:"), "do not fit"),
    "wrong sizes": (
        lambda d: d["decoder"].update(kv_heads=4),
        "past_key.0 as fp32 [1, 2, capacity.0, 16], its sizes say fp32 [1, 4, capacity.0, 16]",
    ),
    "parent": (_name_file("../passwd"), "names '../passwd', a path that leaves the bundle"),
    "absolute": (_name_file("/etc/passwd"), "names '/etc/passwd', a path that leaves"),
    "windows": (_name_file("..\\passwd"), "a path that leaves the bundle"),
    "nul": (_name_file("a\0b"), r'manifest.files cannot be "a\u0000b"'),
    "no text": (lambda d: d.update(name="\ud800"), r'manifest.name cannot be "\ud800"'),
}


def _nested(levels: int) -> dict[str, Any]:
    return {"deeper": _nested(levels - 1)} if levels else {}


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
    def halve(model: Any) -> None:
        for value in (*model.graph.input, *model.graph.output):
            kind = value.type.tensor_type
            kind.elem_type = 16 if kind.elem_type == 1 else kind.elem_type  # bfloat16, float32

    bundle = copy_bundle()
    for name in GRAPHS:
        edit_graph(bundle, name, halve)
    manifest = bundle / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"fp32"', '"bf16"'))
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
        (["--rounds", "0"], "--rounds is at least 1"),
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
    (tmp_path / "rounds.json").symlink_to("/dev/full")
    rounds = ["--rounds", "1", "--warmup", "0", "--new-tokens", "1"]
    capfd.readouterr()
    assert main(["bench", str(tiny_bundle), *rounds, "--json", str(tmp_path / "rounds.json")]) == 2
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


def _numbers(kind: Any, rules: tuple[object, ...] = ()) -> Iterator[tuple[Any, bool]]:
    """Every number that a type holds, and whether it has a range."""
    if is_dataclass(kind):
        for inner in get_type_hints(kind, include_extras=True).values():
            yield from _numbers(inner)
    elif get_origin(kind) is Annotated:
        yield from _numbers(get_args(kind)[0], get_args(kind)[1:])
    elif kind in (int, float):
        yield kind, any(isinstance(rule, Between) for rule in rules)
    else:
        for inner in get_args(kind):
            yield from _numbers(inner)


def test_every_number_of_a_manifest_has_a_range() -> None:
    found = list(_numbers(Manifest))
    assert len(found) > 40 and all(ranged for _, ranged in found)


def _paths(value: Any, kind: type, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where values of a type stand in a JSON value, of each list the first."""
    if type(value) is kind:
        yield at
    inner: Any = value.items() if isinstance(value, dict) else ()
    for key, one in inner if not isinstance(value, list) else list(enumerate(value))[:1]:
        yield from _paths(one, kind, (*at, key))


@pytest.mark.parametrize("wrong", [-1, 1 << 62, 2.5, "3", None, [], True], ids=str)
def test_a_number_that_no_export_writes(
    wrong: object, copy_bundle: Callable[[], Path], tmp_path: Path
) -> None:
    """Whatever number it stands in place of: one line, or an answer where it means nothing."""
    manifest = (bundle := copy_bundle()) / "manifest.json"
    text = manifest.read_text()
    free = ("schedule", "parity")  # told to people, used for nothing
    paths = [at for at in _paths(json.loads(text), int) if not {*at} & {*free}]
    assert len(paths) > 25
    for at in paths:
        data = inner = json.loads(text)
        for key in at[:-1]:
            inner = inner[key]
        inner[at[-1]] = wrong
        manifest.write_text(json.dumps(data))
        optional = wrong is None and at[-1] in ("resize", "crop", "max_new_tokens")
        if not optional and not (wrong == 2.5 and at[-1] in ("cr", "cr_reached")):
            with pytest.raises(BundleError, match=r"manifest\.json (is damaged|has schema)"):
                Bundle.open(bundle, verify=False)


def test_what_a_newer_version_adds_is_ignored(
    copy_bundle: Callable[[], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    def change(data: dict[str, Any]) -> None:
        for record in (data, *(data[name] for name in ("prune", "decoder", "image", "text"))):
            record["color_of_the_robot"] = ["red"]

    _edit(bundle := copy_bundle(), change)
    assert main(["run", str(bundle), *map(str, QUESTION), "--max-new-tokens", "1"]) == 0


def test_the_names_of_a_manifest_are_those_of_the_exporter() -> None:
    made = [dialects.dialect_of(resolve(name)) for name in TARGETS]
    assert {dialect.name for dialect in made} == {*DIALECTS} == {*dialects.DIALECTS}
    assert {dialect.cache for dialect in made} == {*CACHES}
    assert {*TORCH} == {*DTYPES}
