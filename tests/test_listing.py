"""`edgeprune methods` and `edgeprune models` tell what the files say of themselves."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from conftest import Refused

from edgeprune import encoder_methods, models, policies
from edgeprune.cli import main, parser
from edgeprune.policies import Policy

ROOT = Path(__file__).resolve().parents[1]
CONTROLS = {"none", "random", "uniform"}


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(list(arguments)) == 0
    return capsys.readouterr().out


def test_the_list_has_a_line_for_every_method(capsys: pytest.CaptureFixture[str]) -> None:
    listed, shorter = printed(capsys, "methods").split("\n\n")
    head, *lines = listed.splitlines()
    assert head.split() == ["method", "prunes", "at", "needs", "what", "stays"]
    assert [line.split()[0] for line in lines] == policies.names()
    for name, line in zip(policies.names(), lines, strict=True):
        policy = policies.load(name)
        assert line.endswith(policy.summary)
        assert all(word in line for word in (*policy.sites, *policy.needs))
    assert [line.split()[0] for line in shorter.splitlines()[1:]] == encoder_methods.names()


@pytest.mark.parametrize("name", encoder_methods.names())
def test_a_method_of_the_encoder_tells_its_options(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    method, text = encoder_methods.load(name), printed(capsys, "methods", name)
    for field in fields(method):
        assert f" {field.name}={field.default}  " in text
    assert f"| `{name}` | {method.summary} |" in (ROOT / "docs/encoder.md").read_text()


@pytest.mark.parametrize("name", policies.names())
def test_a_method_tells_its_paper_options_and_deviations(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    policy, text = policies.load(name), printed(capsys, "methods", name)
    assert bool(policy.paper) != (name in CONTROLS)
    assert policy.paper in text
    assert (sys.modules[policy.__module__].__doc__ or "!").strip() in text
    for option in fields(policy) if policy.sites else ():
        assert f"--set {option.name}=" in text
    assert ("Of every method:\n- Counts are fixed" in text) == (name != "none")


def test_options_are_told_with_default_and_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "methods", "fastv")
    assert "options    --set K=2  layers that see every visual token" in text.splitlines()


@pytest.mark.parametrize("name", policies.names())
def test_what_calibrates_says_so(name: str) -> None:
    policy = policies.load(name)
    assert ("calibration" in policy.needs) == (policy.entry_tokens is not Policy.entry_tokens)


def test_every_family_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, "models").splitlines()
    others = ["-"] * (len(models.elsewhere()) + len(models.nearby()))
    assert [line.split()[0] for line in lines] == [*models.names(), "demo", *others]


def test_a_models_sizes_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, "models", "--model", "demo").splitlines()
    assert lines[0].split() == ["family", "llava"]
    assert lines[-1].split() == ["visual", "tokens", "144"]


def test_each_method_is_told_with_its_tokens_or_why_not(
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, *lines = printed(capsys, "methods", "--model", "demo", "--cr", "20").splitlines()
    rows = {line.split()[0]: line.split(maxsplit=2)[1:] for line in lines}
    assert list(rows) == policies.names()
    assert rows["fastervlm"] == ["yes", "7 x 12"]
    assert rows["fastv"][0] == "no" and "--cr is at most" in rows["fastv"][1]


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("models --frames 8", "--frames asks about a model; name it: edgeprune models --model M"),
        ("models --num-images 2 --revision v1", "--revision, --num-images asks about a model"),
        ("methods --image-size 56x56", "--image-size asks about a model; name it: edgeprune meth"),
        ("methods fastv --cr 4", "--cr asks about a model; name it: edgeprune methods --model M"),
        ("methods fastv --model demo", "give a NAME or --model"),
        ("check --frames 0", "--frames asks about a model; name it: edgeprune check --memory"),
        ("check bundle --image-size 56x56", "--image-size asks about a model"),
        ("models --model demo --revision v1", "--revision is one of a hub id's"),
    ],
)
def test_options_that_would_do_nothing_are_refused(
    command: str, says: str, refused: Refused
) -> None:
    assert says in refused(*command.split())


def test_no_such_method(refused: Refused) -> None:
    assert "there is no method 'nosuch'; choose one of: " in refused("methods", "nosuch")


def test_help_tells_every_default() -> None:
    (commands,) = (a for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
    helps = {
        f"{name} {option.option_strings[0]}": (option.default, option.help or "")
        for name, command in commands.choices.items()
        for option in command._actions
        if option.option_strings
    }
    for option, (default, told) in helps.items():
        if isinstance(default, (int, float, str)) and default not in (False, argparse.SUPPRESS):
            word = default if isinstance(default, str) else f"{default:g}"
            assert word in told and "default" in told, option
    for command in ("export", "calibrate"):
        assert "default 4; 1 for none" in helps[f"{command} --cr"][1]
    assert "default 8" in helps["export --parity"][1]
