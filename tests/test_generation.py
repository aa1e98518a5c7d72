"""A checkpoint's settings of generation are followed, refused before any work, or told by name."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import Refused
from text_cases import SHAPE
from transformers import GenerationConfig

from edgeprune.bundle import Bundle
from edgeprune.cli import main
from edgeprune.demo import SAMPLES_DIR
from edgeprune.export import generation
from edgeprune.generation import Sampling

TOKENIZER = SimpleNamespace(eos_token_id=2)
TEXT = SimpleNamespace(text_config=SimpleNamespace(eos_token_id=7))
DRAWN = {"do_sample": True}


def read(given: dict[str, Any], config: Any = TEXT) -> generation.Generation:
    return generation.generation({"eos_token_id": 2, **given}, config, TOKENIZER, SHAPE)


FOLLOWED: list[tuple[dict[str, Any], Sampling]] = [
    ({}, Sampling(top_k=50)),
    ({"temperature": 0.7, "do_sample": False, "top_p": 0.9}, Sampling(top_k=50, top_p=0.9)),
    (DRAWN, Sampling(temperature=1.0, top_k=50)),
    ({**DRAWN, "top_p": 0.0}, Sampling(temperature=1.0, top_k=50, top_p=0.0)),
    (
        {**DRAWN, "temperature": 0.2, "top_k": 0, "top_p": 0.9, "max_new_tokens": 9, "min_p": 0.1},
        Sampling(temperature=0.2, top_p=0.9, max_new_tokens=9, min_p=0.1),
    ),
    (
        {"repetition_penalty": 1.05, "no_repeat_ngram_size": 3, "bad_words_ids": [[3], [4, 5]]},
        Sampling(
            top_k=50,
            repetition_penalty=1.05,
            no_repeat_ngram_size=3,
            bad_words_ids=((3,), (4, 5)),
        ),
    ),
    (
        {"suppress_tokens": [1, 4000], "begin_suppress_tokens": [9], "min_length": 700},
        Sampling(top_k=50, suppress_tokens=(1, 4000), begin_suppress_tokens=(9,), min_length=700),
    ),
    ({"min_length": 700, "min_new_tokens": 3}, Sampling(top_k=50, min_new_tokens=3)),
    ({"stop_strings": "END"}, Sampling(top_k=50, stop=("END",))),
    ({"stop_strings": ["END", "\n"]}, Sampling(top_k=50, stop=("END", "\n"))),
    ({"max_length": 20}, Sampling(top_k=50)),  # transformers' own default, written out
    ({"max_length": 4096}, Sampling(top_k=50, max_length=4096)),
]


@pytest.mark.parametrize(("given", "wanted"), FOLLOWED, ids=str)
def test_what_is_followed(given: dict[str, Any], wanted: Sampling) -> None:
    found = read(given)
    assert (found.sampling, found.eos_token_ids, found.notes) == (wanted, (2,), ())


def test_all_defaults_of_transformers_spelled_out_are_nothing_to_tell() -> None:
    given = {**GenerationConfig().to_dict(), **GenerationConfig._get_default_generation_params()}
    assert len(given) > 60 and given.pop("eos_token_id") is None
    assert read(given) == read({})


def test_every_other_setting_of_transformers_is_told() -> None:
    known = generation.HONOURED | generation.IDLE
    names = GenerationConfig().to_dict().keys() - known
    assert len(names) > 15
    for name in {*names, "a_setting_of_tomorrow"}:
        (note,) = read({name: 17}).notes
        assert note == f"generation setting {name} = 17 is left out"
    assert read({"forced_eos_token_id": 0}).notes, "0 is a token, although it equals False"


def test_settings_are_either_followed_or_idle_or_told() -> None:
    assert not generation.HONOURED & generation.IDLE
    assert not generation.NEUTRAL.keys() & (generation.HONOURED | generation.IDLE)


MENDED = [
    ({**DRAWN, "temperature": 0.0}, Sampling(top_k=50), "the likeliest token is taken"),
    ({"top_p": 1.5}, Sampling(top_k=50), "top_p = 1.5 does nothing above 1"),
    ({"max_length": 4}, Sampling(top_k=50), "max_length = 4 leaves no room"),
]


@pytest.mark.parametrize(("given", "wanted", "told"), MENDED, ids=str)
def test_what_is_mended_is_told(given: dict[str, Any], wanted: Sampling, told: str) -> None:
    found = read(given)
    assert found.sampling == wanted
    (note,) = found.notes
    assert told in note


@pytest.mark.parametrize("absent", [{"eos_token_id": []}, {"eos_token_id": None}])
def test_without_end_tokens_others_are_used_and_told(absent: dict[str, Any]) -> None:
    found = read(absent)
    assert found.eos_token_ids == (7,) and "names no eos_token_id; config.json's" in found.notes[0]
    found = read(absent, SimpleNamespace(text_config=SimpleNamespace(eos_token_id=9999)))
    assert found.eos_token_ids == (2,) and "the tokenizer's is used: [2]" in found.notes[0]
    nobody = SimpleNamespace(eos_token_id=None)
    found = generation.generation({}, nobody, nobody, SHAPE)
    assert found.eos_token_ids == () and "runs on to --max-new-tokens" in found.notes[0]


UNUSABLE: dict[str, dict[str, Any]] = {
    "generation_config.json.temperature cannot be NaN": {**DRAWN, "temperature": "NaN"},
    'generation_config.json.temperature cannot be "0.7"': {**DRAWN, "temperature": "0.7"},
    "top_p is from 0 to 1; got -1": {"top_p": -1},
    "eos_token_id is a token id below 66 or a list of them; got '</s>' (the": {
        "eos_token_id": "</s>"
    },
    "below 66 or a list of them; got 66 (the tokenizer's own is 2)": {"eos_token_id": [2, 66]},
    "repetition_penalty is from 1e-09 to 1,073,741,824; got 0": {"repetition_penalty": 0},
    'top_k cannot be "many"': {"top_k": "many"},
    'max_new_tokens cannot be "64"': {"max_new_tokens": "64"},
    "do_sample is true or false; got 'yes'": {"do_sample": "yes"},
    "bad_words_ids has the id 99, the model has 66 tokens": {"bad_words_ids": [[1, 99]]},
    "bad_words_ids is a tuple of 16384 tuples of token ids at most": {"bad_words_ids": [[]]},
    "suppress_tokens cannot be 5": {"suppress_tokens": 5},
    "suppress_tokens is from 0 to 16,777,216; got -1": {"suppress_tokens": [-1]},
}


@pytest.mark.parametrize("message", UNUSABLE)
def test_what_cannot_be_used_is_refused_at_export(
    message: str, copy_checkpoint: Callable[[], Path], tmp_path: Path, refused: Refused
) -> None:
    file = (checkpoint := copy_checkpoint()) / generation.FILE
    given = {"eos_token_id": 2, **UNUSABLE[message]}
    file.write_text(json.dumps(given).replace('"NaN"', "NaN"))
    line = refused("export", "--model", checkpoint, "--method", "none", "-o", tmp_path / "bundle")
    assert message in line and str(checkpoint) in line and "repair it there" in line
    assert not (tmp_path / "bundle").exists()


@pytest.fixture(scope="module")
def settled(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose checkpoint has settings to follow, to mend and to tell."""
    folder = tmp_path_factory.mktemp("settled")
    checkpoint = Path(shutil.copytree(tiny_checkpoint, folder / "checkpoint"))
    given = {"repetition_penalty": 1.3, "eos_token_id": 2, "top_p": 1.5, "num_beams": 4}
    (checkpoint / generation.FILE).write_text(json.dumps(given))
    options = ["--model", str(checkpoint), "--method", "none", "--parity", "0"]
    told = io.StringIO()
    with contextlib.redirect_stderr(told):
        assert main(["export", *options, "-o", str(folder / "bundle")]) == 0
    for note in ("top_p = 1.5 does nothing above 1", "setting num_beams = 4 is left out"):
        assert note in told.getvalue()
    return folder / "bundle"


def test_the_manifest_holds_what_is_followed(settled: Path) -> None:
    text = Bundle.open(settled).manifest.text
    assert text.generation == Sampling(top_k=50, repetition_penalty=1.3)
    assert text.visual_ids == ((text.image_token_id, 16),)


def said(capfd: pytest.CaptureFixture[str], bundle: Path, *options: object) -> list[int]:
    """Ids that `edgeprune run` answers with."""
    image = SAMPLES_DIR / "scene-1.png"
    fixed = ["--image", image, "--prompt", "what color is the star ?", "--json"]
    capfd.readouterr()
    assert main(["run", str(bundle), *map(str, fixed), *map(str, options)]) == 0
    ids: list[int] = json.loads(capfd.readouterr().out)["turns"][0]["ids"]
    return ids


def test_run_follows_the_bundle_and_its_user(
    settled: Path, tiny_bundle: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    longer = "--max-new-tokens", 24
    own = said(capfd, settled, *longer)
    plain = said(capfd, tiny_bundle, *longer)
    assert own != plain
    assert said(capfd, tiny_bundle, *longer, "--repetition-penalty", 1.3) == own
    assert said(capfd, settled, *longer, "--repetition-penalty", 1) == plain
    once = said(capfd, tiny_bundle, *longer, "--no-repeat-ngram-size", 1)
    assert len(set(once)) == len(once)
    drawn = "--temperature", 50, "--seed", 3
    assert said(capfd, tiny_bundle, *longer, *drawn, "--min-p", 1) == plain
    assert said(capfd, tiny_bundle, *longer, *drawn) != plain


def test_an_answer_has_its_least_length(
    tiny_bundle: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    drawn = "--temperature", 9, "--max-new-tokens", 64
    seeds = [n for n in range(9) if len(said(capfd, tiny_bundle, *drawn, "--seed", n)) < 20]
    assert seeds, "no answer ends early"
    for seed in seeds:
        ids = said(capfd, tiny_bundle, *drawn, "--seed", seed, "--min-new-tokens", 20)
        assert len(ids) >= 20


NONSENSE = {
    "repetition penalty is above 0": ["--repetition-penalty", "0"],
    "min-p is a probability from 0 to 1; got 7.0": ["--min-p", "7"],
    "min_new_tokens is a number of tokens from 0; got -1": ["--min-new-tokens", "-1"],
    "no_repeat_ngram_size is a number of tokens from 0": ["--no-repeat-ngram-size", "-2"],
}


@pytest.mark.parametrize("message", NONSENSE)
def test_options_that_cannot_be_used_are_refused(
    message: str, tiny_bundle: Path, refused: Refused
) -> None:
    asked = ["run", tiny_bundle, "--image", SAMPLES_DIR / "scene-1.png", "--prompt", "what ?"]
    assert message in refused(*asked, *NONSENSE[message])
