"""Bundles with several ratios: at each they are the bundle that was frozen for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgeprune import policies
from edgeprune.bundle import Bundle, read_manifest
from edgeprune.cli import main
from edgeprune.dial import on_common_sites, widest
from edgeprune.errors import BundleError, SessionError, SpecError
from edgeprune.runtime import Sampling, Session
from edgeprune.spec import Plan, PruneSpec, Stage
from tests import fake_gpu, families, qwen
from tests.frozen import dialed, frozen

Refused = Callable[..., str]

COUNTS = {2.0: (16, 16, 6), 1.0: (16, 16, 16), 4.0: (8, 5, 2)}
"""Of the tiny model: dense, and before the encoder's end too."""
SHORT = Sampling(max_new_tokens=6)
SCENE = Image.effect_noise((64, 64), 90).convert("RGB")


@pytest.fixture(scope="module")
def dial(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """UTP at three ratios, for JetPack 7."""
    folder = tmp_path_factory.mktemp("dial") / "tiny"
    spec = PruneSpec("utp")
    target = {"model": tiny_checkpoint, "target": "jetpack7", "dtype": "fp16"}
    return dialed(folder, spec, COUNTS, **target)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Said:
    """A dialogue of two turns: tokens, the next position, and the indices that were kept."""

    ids: tuple[tuple[int, ...], ...]
    position: int
    kept: list[list[int]]
    scores: list[float] = field(compare=False)

    def apart(self, other: Said) -> float:
        """The largest difference of log-probabilities."""
        return float(np.abs(np.array(self.scores) - np.array(other.scores)).max())


def answers(session: Session, cr: float | None = None) -> Said:
    first = session.ask(SCENE, "what color is the star ?", SHORT, logprobs=3, cr=cr)
    second = session.follow_up("how many circles are there ?", SHORT, logprobs=3)
    sites = [kept.tolist() for kept in (first.vision_kept, *first.layer_kept)]
    kept = [site for site in sites if site != list(range(len(site)))]  # all are kept in order
    scores = [s.log_probability for s in (*first.scores, *second.scores)]
    return Said((first.ids, second.ids), session.sequence.position, kept, scores)


@pytest.fixture(scope="module")
def alone(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[float, Path]:
    """The bundles that are frozen at two of these ratios."""
    folder = tmp_path_factory.mktemp("frozen")
    target = {"model": tiny_checkpoint, "target": "jetpack7", "dtype": "fp16"}
    return {
        cr: frozen(folder / f"{cr:g}", "utp", cr, counts=COUNTS[cr], **target)  # type: ignore[arg-type]
        for cr in (2.0, 4.0)
    }


@pytest.mark.parametrize("backend", ["ort-cpu", "trt"])
def test_each_ratio_is_the_frozen_bundle(
    dial: Path, alone: dict[float, Path], monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    if backend == "trt":
        for bundle in (dial, *alone.values()):
            fake_gpu.pretend(bundle)
        fake_gpu.install(monkeypatch)
    with Session.open(dial, backend=backend) as session:
        said = {cr: answers(session, cr) for cr in (4.0, 2.0, 1.0, 4.0, None)}
        assert session.manifest.prune.cr == 2, "the first is the default"
    assert said[None] == said[2.0] and said[4.0] not in (said[2.0], said[1.0])
    for cr, bundle in alone.items():
        with Session.open(bundle, backend=backend) as session:
            own = answers(session)
            assert own == said[cr] and own.apart(said[cr]) < 1e-2, "ONNX Runtime rounds otherwise"


def test_a_dialogue_keeps_its_ratio(dial: Path) -> None:
    with Session.open(dial, cr=4) as session:
        session.ask(SCENE, "what color ?", SHORT)
        assert session.manifest.prune.cr == 4 and session.manifest.label == "tiny@4"
        held = session.sequence.cache_bytes()
        image = session.engine.encode_image(SCENE, cr=2)
        with pytest.raises(SessionError, match="at CR 4, the image was encoded at CR 2"):
            session.sequence.read(np.array([[5]]), image=image)
        with pytest.raises(SessionError, match="encoded at CR 2, the question asks for CR 4"):
            session.ask(image, "what color ?", SHORT, cr=4)
        session.ask(SCENE, "what color ?", SHORT, cr=1)
        assert session.sequence.cache_bytes() >= held
        with pytest.raises(SpecError, match="tiny runs at CR 2, 1, 4, not 3"):
            session.ask(SCENE, "what color ?", SHORT, cr=3)
        assert session.manifest.prune.cr == 1, "what is refused changes nothing"


def test_commands_take_and_name_the_ratio(
    dial: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], refused: Refused
) -> None:
    image = tmp_path / "scene.png"
    SCENE.save(image)
    asked = ["--image", str(image), "--prompt", "what color ?"]
    limit = ["--max-new-tokens", "2"]
    assert main(["run", str(dial), *asked, *limit, "--cr", "4", "--json"]) == 0
    record = json.loads(capfd.readouterr().out)
    assert (record["bundle"], record["counts"]) == ("tiny@4", [8, 5, 2])
    assert main(["show", str(dial), *asked, "--cr", "4", "-o", str(tmp_path / "show.svg")]) == 0
    rounds = ["--rounds", "1", "--warmup", "0", "--new-tokens", "1"]
    assert main(["bench", str(dial), "--cr", "1,4", *rounds]) == 0
    table = capfd.readouterr().out
    assert "tiny@1" in table and "tiny@4" in table and "tiny@2" not in table
    told = refused("run", dial, *asked, "--cr", "3")
    assert "runs at CR 2, 1, 4, not 3; choose one of these, or export with --cr 2,1,4,3" in told
    told = refused("run", dial, *asked, "--cr", "nan")
    assert told.endswith("runs at CR 2, 1, 4, not nan; choose one of these\n")


def test_a_manifest_with_contradicting_ratios_is_damaged(dial: Path, tmp_path: Path) -> None:
    file = tmp_path / "manifest.json"
    record = json.loads((dial / "manifest.json").read_text())

    def told() -> str:
        file.write_text(json.dumps(record))
        with pytest.raises(BundleError) as raised:
            read_manifest(tmp_path)
        return str(raised.value)

    record["ratios"][2]["prune"]["stages"][0]["layer"] = 2
    assert "the stages give other token counts" in told()
    record["ratios"] = record["ratios"][1:2]
    assert "the first of the ratios is not the default" in told()
    record["ratios"] = []
    assert "join.onnx lists" in told()


def test_common_sites_change_no_count() -> None:
    plans = [
        Plan(16, 3),
        Plan(16, 3, (Stage("vision", 8, layer=1, renumber=True), Stage("layer", 2, layer=3))),
        Plan(16, 3, (Stage("layer", 6, layer=2),)),
    ]
    common = on_common_sites(plans)
    assert [plan.counts for plan in common] == [(16, 16, 16), (8, 8, 2), (16, 6, 6)]
    assert {tuple((s.site, s.layer) for s in plan.stages) for plan in common} == {
        (("vision", 1), ("layer", 2), ("layer", 3))
    }
    assert widest(common).counts == (16, 16, 16) and widest(common).dialed


DIALED = {"fastv", "pyramiddrop", "utp", "vtw"}
WITH_OPTIONS = {"sparsevlm": "version=2", "fastervlm": "tiles=joint"}


@pytest.mark.parametrize("name", policies.names())
def test_a_method_has_a_dial_or_a_reason(name: str, tmp_path: Path, refused: Refused) -> None:
    why = policies.make(PruneSpec(name)).why_frozen()
    assert bool(why) == (name not in DIALED)
    option = WITH_OPTIONS.get(name)
    if option:
        key, _, value = option.partition("=")
        assert not policies.make(PruneSpec(name, options={key: value})).why_frozen()
    if why:
        arguments = ["--method", name, "--cr", "2,4", "-o", tmp_path / "no"]
        told = refused("export", *arguments)
        assert f"method {name} takes one --cr a bundle: {why}" in told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cr", "2,4,2"], "--cr 2,4,2 names a ratio twice"),
        (["--cr", "2,2.0000001"], "--cr 2,2 names a ratio twice"),
        (["--cr", "2,0.5"], "a number of at least 1; got 0.5"),
        (["--cr", "2,200"], "--cr 200 leaves less than one visual token"),
        (["--cr", "2,4", "--schedule", "s.json"], "--schedule is of one ratio"),
        (["--cr", "2,4", "--method", "fastv", "--set", "counts=20"], "counts= gives one ratio"),
    ],
)
def test_what_several_ratios_exclude(
    arguments: list[str], message: str, tmp_path: Path, refused: Refused
) -> None:
    assert message in refused("export", *arguments, "-o", tmp_path / "no")


MANY: dict[str, tuple[dict[str, str], dict[float, tuple[int, ...]]]] = {
    "fastv": ({"K": "1"}, {2.0: (), 1.0: (), 2.5: ()}),
    "pyramiddrop": ({"stages": "1,2"}, {1.5: (), 1.0: (), 2.0: ()}),
    "sparsevlm": ({"version": "2", "stages": "1,2"}, {1.5: (), 1.0: (), 2.0: ()}),
    "fastervlm": ({"tiles": "joint"}, {2.0: (), 1.0: (), 8.0: ()}),
    "vtw": ({}, {1.5: (), 1.0: (), 3.0: ()}),
    "utp": ({"positions": "keep"}, COUNTS),
}


@pytest.mark.slow
@pytest.mark.parametrize("method", MANY)
@pytest.mark.parametrize("target", ["cpu", "jetpack6"])
def test_every_method_with_a_dial(
    method: str, target: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    options, counts = MANY[method]
    spec = PruneSpec(method, options=options)
    more = {"model": tiny_checkpoint, "target": target}
    path = dialed(tmp_path / "dial", spec, counts, parity=2, **more)  # type: ignore[arg-type]
    manifest = Bundle.open(path).manifest
    assert all(ratio.parity.samples == 2 for ratio in manifest.ratios)
    with Session.open(path) as session:
        for cr, own in counts.items():
            one = frozen(tmp_path / f"{cr}", method, cr, counts=own, options=options, **more)  # type: ignore[arg-type]
            with Session.open(one) as alone:
                found, wanted = answers(session, cr), answers(alone)
                assert found == wanted and found.apart(wanted) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("write", "counts"),
    [
        (
            lambda folder: families.llava_onevision().save(folder),
            {2.0: (21, 10, 5), 1.0: (21,) * 3, 4.0: (15, 8, 2)},
        ),
        (qwen.stacked_checkpoint, {2.0: (196, 98, 49, 49), 4.0: (137, 78, 20, 20)}),
    ],
)
def test_newlines_and_rows_of_middle_blocks_follow(
    write: Callable[[Path], Path], counts: dict[float, tuple[int, ...]], tmp_path: Path
) -> None:
    checkpoint = write(tmp_path / "checkpoint")
    path = dialed(tmp_path / "dial", PruneSpec("utp"), counts, model=checkpoint, parity=2)
    for ratio in Bundle.open(path).manifest.ratios:
        assert (ratio.parity.samples, ratio.parity.ties) == (2, 0)
