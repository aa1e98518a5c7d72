"""`edgeprune show`: what survives where, what is dimmed, and the image that shows it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from conftest import Refused
from numpy.typing import NDArray
from PIL import Image

from edgeprune.bundle import Bundle
from edgeprune.cli import main
from edgeprune.drawing import png, svg
from edgeprune.drawing.canvas import ACCENT, LOSS, Pen, Sheet
from edgeprune.drawing.image_files import save
from edgeprune.drawing.schedule_chart import chart
from edgeprune.drawing.show import MERGED, Caption, dim
from edgeprune.drawing.show_figure import figure, representative
from edgeprune.errors import BundleError, SpecError
from edgeprune.images import read_image
from edgeprune.manifest import Manifest, PruneRecord
from edgeprune.runtime import Answer, Session, Timings
from edgeprune.runtime.survivors import Site, seen, survivors
from edgeprune.spec import Stage
from tests.hostile import edit_graph, set_size

SCENES = sorted((Path(__file__).parents[1] / "edgeprune/demo/samples").glob("*.png"))
QUESTION = "what color is the star ?"


def answered(vision: list[int], *layers: list[int]) -> Answer:
    """An answer with nothing but its kept positions."""
    kept = tuple(np.array(k, np.int64) for k in layers)
    return Answer("red", (1,), "stop", Timings(), np.array(vision, np.int64), kept, 9)


def manifest_with(bundle: Path, **prune: object) -> Manifest:
    """A manifest of 2 x 3 visual tokens, and whatever else of `prune` is asked."""
    manifest = Bundle.open(bundle, verify=False).manifest
    changes = {"visual_tokens": 6, "grid": (2, 3), **prune}
    return replace(manifest, prune=replace(manifest.prune, **changes))  # type: ignore[arg-type]


def test_positions_among_the_alive_become_places_on_the_grid(tiny_bundle: Path) -> None:
    counts = ((1, 4), (2, 3), (3, 2), (9, 0))
    stages = tuple(Stage("layer" if at > 1 else "vision", n, layer=at) for at, n in counts)
    manifest = manifest_with(tiny_bundle, stages=stages)
    sites = survivors(answered([0, 2, 3, 5], [1, 2, 3], [0, 2], []), manifest)
    assert sites == [
        Site("vision", 1, {(0, 0), (0, 2), (1, 0), (1, 2)}),
        Site("layer 2", 2, {(0, 2), (1, 0), (1, 2)}),
        Site("layer 3", 3, {(0, 2), (1, 2)}),
        Site("layer 9", 9, set()),
    ]
    assert [site.caption for site in sites[2:]] == ["layer 3: 2", "layer 9: 0"]


def test_merged_tokens_have_their_centres_places_and_cls_has_none(tiny_bundle: Path) -> None:
    stages = (Stage("vision", 3, 2), Stage("layer", 2, 1, layer=2), Stage("layer", 1, layer=3))
    manifest = manifest_with(tiny_bundle, stages=stages)
    sites = survivors(answered([6, 0, 5, 2, 3], [0, 3, 1], [1]), manifest)
    assert sites == [
        Site("vision", 1, {(0, 0), (1, 2)}, {(0, 2), (1, 0)}, 1),
        Site("layer 2", 2, set(), {(0, 0), (0, 2)}, 1),
        Site("layer 3", 3, set(), {(0, 2)}),
    ]
    captions = ["vision: 2 + 2 merged + [CLS]", "layer 2: 2 merged + [CLS]", "layer 3: 1 merged"]
    assert [site.caption for site in sites] == captions


def test_without_pruning_there_are_no_sites(tiny_bundle: Path) -> None:
    assert survivors(answered(list(range(6))), manifest_with(tiny_bundle)) == []


def test_positions_that_do_not_fit_the_grid_are_refused(tiny_bundle: Path) -> None:
    manifest = manifest_with(tiny_bundle, stages=(Stage("layer", 1, layer=2),))
    for answer in (answered([0, 7], [0]), answered([0, 1], [2]), answered([0, 1])):
        with pytest.raises(BundleError, match="do not fit its grid of 2 x 3"):
            survivors(answer, manifest)
    with pytest.raises(BundleError, match="do not fit its grid of 2 x 2"):
        survivors(answered([0]), manifest_with(tiny_bundle, grid=(2, 2)))


def test_kept_patches_are_untouched_and_pruned_ones_grey_dark_and_ruled() -> None:
    rng = np.random.default_rng(0)
    levels = rng.integers(0, 256, (8, 15, 3), np.uint8)  # patches of 4 x 5 on a grid of 2 x 3
    before = levels.copy()
    shown = dim(levels, Site("", 1, {(0, 1), (1, 2)}), (2, 3))
    assert (levels == before).all(), "the image itself must not change"
    for row, column in np.ndindex(2, 3):
        window = np.s_[4 * row : 4 * row + 4, 5 * column : 5 * column + 5]
        patch, was = shown[window].astype(int), levels[window]
        if (row, column) in {(0, 1), (1, 2)}:
            assert (patch == was).all()
            continue
        grey = 36 + 0.33 * (was @ np.array([0.299, 0.587, 0.114]))
        assert (patch == patch[..., :1]).all(), "no colour is left"
        assert np.abs(patch[1:, 1:, 0] - grey[1:, 1:]).max() <= 1
        assert np.abs(patch[0, :, 0] - grey[0] - 14).max() <= 1
        assert np.abs(patch[1:, 0, 0] - grey[1:, 0] - 14).max() <= 1


def test_the_centre_of_a_merged_token_is_outlined() -> None:
    levels = np.full((12, 18, 3), 200, np.uint8)  # patches of 6 x 6 on a grid of 2 x 3
    shown = dim(levels, Site("", 1, set(), {(1, 1)}), (2, 3))
    patch = shown[6:, 6:12].astype(int)
    assert (patch[2:4, 2:4] == 200).all()
    patch[2:4, 2:4] = MERGED
    assert (patch == MERGED).all()
    assert shown[:6].max() < 150, "elsewhere it is dark"


def test_the_image_is_shown_as_the_model_sees_it(demo_dense: Path) -> None:
    record = Bundle.open(demo_dense, verify=False).manifest.image
    half = Image.fromarray(
        np.arange(168 * 168 * 3, dtype=np.uint32).astype(np.uint8).reshape(168, 168, 3)
    )
    assert (seen(half, record) == np.asarray(half)).all(), "nothing to resize: not a level changes"
    assert seen(read_image(SCENES[0]).image.resize((400, 250)), record).shape == (168, 168, 3)


def test_of_many_sites_the_first_the_last_and_some_between_are_drawn() -> None:
    sites = [Site(f"layer {i}", i, {(0, i)}) for i in range(31)]
    assert [site.title for site in representative(sites)] == [
        f"layer {i}" for i in (0, 5, 10, 15, 20, 25, 30)
    ]
    assert representative(sites[:7]) == sites[:7]
    assert representative([]) == []


def test_long_lines_are_wrapped_cut_and_never_too_wide() -> None:
    pen = Pen()
    text = "a few short words, then averyveryverylongone" + "x" * 80 + " and more " * 9
    lines = pen.wrap(text, 20, 200, 99)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert all(pen.length(line, 20) <= 200 for line in lines)
    assert pen.wrap(text, 20, 200, 3)[:2] == lines[:2]
    assert len(cut := pen.wrap(text, 20, 200, 3)) == 3
    assert cut[2].endswith("...") and pen.length(cut[2], 20) <= 200
    assert pen.wrap("x", 20, 1, 1) == ["x"], "a letter is not cut"


@pytest.mark.parametrize("layers", [1, 12, 32, 80])
@pytest.mark.parametrize("sites", [0, 1, 2, 6, 40])
def test_any_number_of_sites_and_layers_fits(sites: int, layers: int, tiny_bundle: Path) -> None:
    prune = manifest_with(tiny_bundle, counts=(6,) * (layers // 2) + (2,) * -(-layers // 2)).prune
    drawn = [Site(f"layer {i + 1}", i + 1, {(0, 0)}, {(0, 1)}) for i in range(sites)]
    levels = np.full((40, 60, 3), 200, np.uint8)
    sheet = figure(levels, drawn, prune, "why ? " * 99, [Caption("utp", "x" * 999)])
    image = png.render(sheet)
    assert image.width == 1200
    border = np.asarray(image).copy()
    border[40:-40, 40:-40] = 255
    assert (border == 255).all(), "nothing is drawn on the margin"
    larger = png.render(sheet, 2)
    assert larger.width == 2400
    assert abs(larger.height - 2 * image.height) <= 4


def dots(prune: PruneRecord) -> NDArray[np.uint8]:
    """The chart of a schedule, 340 x 260 pixels."""
    return np.asarray(png.render(chart(prune, 340, 260, Pen())))


def test_behind_the_bars_stands_what_each_layer_would_lose(tiny_bundle: Path) -> None:
    prune = manifest_with(tiny_bundle, counts=(6, 3, 0)).prune
    plain = dots(prune)
    assert not (plain == LOSS).all(axis=2).any()
    shown = dots(replace(prune, schedule={"loss": [0.0, 0.8, 0.4]}))
    plot = shown[150:]  # below the legend
    loss, kept = ((plot == colour).all(axis=2).sum(axis=0) for colour in (LOSS, ACCENT))
    whole = loss[:230].max()  # beside the bar of layer 2
    assert whole > 40
    assert loss[230:].max() == pytest.approx(whole / 2, abs=1), "0.4 is half as high as 0.8"
    assert kept.max() == pytest.approx(whole / 2, abs=1), "3 of 6 tokens are half as high as all"
    assert not kept[230:].any(), "no token, no bar"
    for other in ({"loss": [0.5]}, {"loss": [0.0] * 3}, {"loss": []}, {}):
        assert (dots(replace(prune, schedule=other)) == plain).all()


def test_counts_and_angles_have_an_axis_each(tiny_bundle: Path) -> None:
    prune = manifest_with(tiny_bundle, counts=(6, 3, 0)).prune
    plain = svg.render(chart(prune, 340, 260, Pen()))
    assert re.findall(r">([\d.]+)</text>", plain)[:3] == ["0", "3", "6"]
    both = svg.render(chart(replace(prune, schedule={"loss": [0, 0.8, 0.4]}), 340, 260, Pen()))
    assert re.findall(r">([\d.]+)</text>", both)[:6] == ["0", "0", "3", "0.4", "6", "0.8"]


def test_a_figure_as_svg_is_xml_and_holds_what_the_png_holds(
    demo_utp: Path, tmp_path: Path
) -> None:
    file = tmp_path / "out.svg"
    asked = ["--image", str(SCENES[0]), "--prompt", "is <this> a \x1b[31mstar & more ?"]
    assert main(["show", str(demo_utp), *asked, "-o", str(file)]) == 0
    tree = ElementTree.parse(file)
    words = [element.text for element in tree.iter("{http://www.w3.org/2000/svg}text")]
    assert "is <this> a [31mstar & more ?" in words
    images = list(tree.iter("{http://www.w3.org/2000/svg}image"))
    sites = Bundle.open(demo_utp, verify=False).manifest.graph.kept
    assert len(images) == 1 + min(len(sites), 7)


def test_the_image_of_a_pruned_answer(
    demo_utp: Path, demo_dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "new" / "out.png"
    question = ["--image", SCENES[0], "--prompt", QUESTION]
    arguments = ["show", demo_utp, "--dense", demo_dense, *question, "-o", file]
    assert main([str(argument) for argument in arguments]) == 0
    assert capsys.readouterr().out == f"{file}\n"
    assert [f.name for f in file.parent.iterdir()] == ["out.png"], "no draft is left"
    with Image.open(file) as image:
        assert image.format == "PNG"
        assert image.width == 1200
        assert 500 < image.height < 1000
    assert file.stat().st_size < 400_000


@pytest.mark.parametrize("scene", SCENES, ids=[scene.stem for scene in SCENES])
def test_survivors_of_a_real_answer_are_nested_and_as_many_as_scheduled(
    scene: Path, demo_utp: Path
) -> None:
    session = Session.open(demo_utp, verify=False, threads=1)
    answer, prune = session.ask(scene, QUESTION), session.manifest.prune
    sites = survivors(answer, session.manifest)
    assert len(sites) == len(session.manifest.graph.kept) > 0
    alive = {(row, column) for row, column in np.ndindex(prune.grid)}
    for site in sites:
        assert site.kept < alive, site.title
        layer = int(site.title.removeprefix("layer "))
        assert len(site.kept) == prune.counts[layer - 1], site.title
        alive = site.kept


def test_in_the_image_kept_patches_have_the_image_s_colours(demo_utp: Path) -> None:
    manifest = Bundle.open(demo_utp, verify=False).manifest
    levels = np.full((168, 168, 3), (200, 40, 40), np.uint8)
    sites = [Site("layer 3", 3, {(0, 0), (5, 7)})]
    sheet = figure(levels, sites, manifest.prune, "?", [Caption("utp", "red")])
    image = np.asarray(png.render(sheet))
    red = (image == (200, 40, 40)).all(axis=2)
    assert red.any(axis=0)[40:340].all(), "the input stands at the left, 300 wide"
    assert red[:, 356:656].sum() == 2 * 25 * 25, "of the next panel two patches of 25 x 25 are red"


@pytest.mark.parametrize("name", ["out.jpg", "OUT.WEBP", "out.jpeg"])
def test_a_dense_bundle_and_other_formats(name: str, demo_dense: Path, tmp_path: Path) -> None:
    arguments = ["--image", SCENES[0], "--prompt", QUESTION, "-o", tmp_path / name, "--scale", 2]
    assert main(["show", str(demo_dense), *map(str, arguments)]) == 0
    with Image.open(tmp_path / name) as image:
        assert image.format == {".jpg": "JPEG", ".jpeg": "JPEG"}.get(Path(name).suffix, "WEBP")
        assert image.width == 2400


def test_requests_that_cannot_be_met(demo_dense: Path, tmp_path: Path, refused: Refused) -> None:
    plain = tmp_path / "plain.txt"
    plain.write_text("no folder, no font")
    good = {"--image": SCENES[0], "--prompt": QUESTION, "-o": tmp_path / "out.png"}
    wrong = [
        ({"-o": "out.gif"}, "must end in one of .png, .jpg, .jpeg, .webp, .svg; got 'out.gif'"),
        ({"-o": tmp_path / "out"}, "must end in one of .png"),
        ({"-o": plain / "out.png"}, "cannot be written"),
        ({"--image": "nosuch.png"}, "there is no image at nosuch.png"),
        ({"--font": plain}, "plain.txt cannot be used"),
        ({"--font": "nosuch.ttf"}, "nosuch.ttf cannot be used"),
        ({"--dense": tmp_path}, "is no bundle"),
        ({"--scale": 9}, "argument --scale: invalid choice"),
    ]
    for changed, says in wrong:
        options = [part for pair in {**good, **changed}.items() for part in pair]
        assert says in refused("show", demo_dense, *options)
        assert [f.name for f in tmp_path.iterdir()] == ["plain.txt"], "nothing half-written"


@pytest.mark.parametrize(
    ("takes", "says"), [({"images": 2}, "takes 2 images"), ({"frames": 4}, "takes a video")]
)
def test_a_bundle_that_takes_no_single_raster(
    takes: dict[str, int],
    says: str,
    demo_dense: Path,
    copy_bundle: Callable[[], Path],
    tmp_path: Path,
    refused: Refused,
) -> None:
    file = copy_bundle() / "manifest.json"
    tiles = next(iter(takes.values()))
    edit_graph(file.parent, "vision.onnx", set_size("input", "pixels", 0, tiles))
    manifest = json.loads(file.read_text())
    manifest["image"] |= takes
    manifest["graphs"]["vision.onnx"]["inputs"][0]["dims"][0] = tiles
    file.write_text(json.dumps(manifest))
    asked = ["--image", SCENES[0], "--prompt", QUESTION, "-o", tmp_path / "out.png"]
    for bundles in ([file.parent], [demo_dense, "--dense", file.parent]):
        line = refused("show", *bundles, *asked)
        assert "show draws one image" in line and says in line


def test_tokens_that_are_no_rectangle_are_not_drawn(
    demo_dense: Path, copy_bundle: Callable[[], Path], tmp_path: Path, refused: Refused
) -> None:
    file = copy_bundle() / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["prune"]["grid"] = [1, manifest["prune"]["visual_tokens"]]
    file.write_text(json.dumps(manifest))
    asked = ["--image", SCENES[0], "--prompt", QUESTION, "-o", tmp_path / "out.png"]
    assert "are no rectangle of them" in refused("show", file.parent, *asked)


def test_a_image_that_cannot_be_written_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "out.png"
    save(Sheet(4, 4, Pen()), file)
    before = file.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(SpecError, match=r"out\.png cannot be written \(No space left on device\)"):
        save(Sheet(8, 8, Pen()), file)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]
