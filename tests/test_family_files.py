"""A family is one file: no code outside of it asks for it by name, and it answers every step."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgeprune import models
from edgeprune.models import Adapter
from tests.test_layers import sources

FAMILIES = {name: models.load(name) for name in models.names()}
TYPES = {*FAMILIES, *(kind for found in FAMILIES.values() for kind in found.model_types)}


def bases(name: str) -> list[type]:
    """The class of a family, and those of its bases that not every family has."""
    return [base for base in FAMILIES[name].__mro__ if base not in Adapter.__mro__]


def own(name: str) -> set[Path]:
    """The file of a family, and that of a base which it shares with its kin."""
    return {Path(inspect.getfile(base)) for base in bases(name)}


OWN = {file for name in FAMILIES for file in own(name)}


def literals(tree: ast.AST) -> Iterator[str]:
    """Texts of a module but docstrings and bare texts, which compute nothing."""
    bare = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in bare:
            yield node.value


def classes() -> set[str]:
    """Names of transformers' classes that family files speak of."""
    found = set()
    for file in OWN:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformers"):
                found |= {alias.name for alias in node.names}
        found |= {text for text in literals(tree) if re.fullmatch(r"\w+Processor", text)}
    return found - {"CLIPImageProcessor"}  # of the tower, which reads frames of every family


def test_no_code_outside_of_a_familys_file_asks_for_it_by_name() -> None:
    """No text in code is a family's name, a model type of it or the name of one of its classes, and
    no import names its file. Prose may: help, messages and comments name families as examples."""
    named = list[str]()
    wanted = TYPES | {f"{kind}_{part}" for kind in TYPES for part in ("text", "vision")} | classes()
    for module, file in sources():
        if file in OWN:
            continue
        tree = ast.parse(file.read_text(encoding="utf-8"))
        named += [f"{module}: {text}" for text in literals(tree) if text in wanted]
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module:
                above, _, last = node.module.rpartition(".")
                parts = [last] if above == "edgeprune.models" else []
                parts += [a.name for a in node.names] if node.module == "edgeprune.models" else []
                named += [f"{module} imports {part}" for part in parts if part in FAMILIES]
    assert named == []


def test_the_test_above_knows_what_to_look_for() -> None:
    assert {"llava", "qwen2_vl", "smolvlm", "idefics3"} <= TYPES
    assert {"LlavaImageProcessor", "GotOcr2ImageProcessor", "Idefics3Config"} <= classes()
    assert {file.name for file in own("qwen2_vl")} == {"_qwen.py", "qwen2_vl.py"}
    assert {file.name for file in own("smolvlm")} == {"smolvlm.py"}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_answers_every_step_and_skips_none(name: str) -> None:
    """A constructor of its own could skip steps."""
    assert not inspect.isabstract(FAMILIES[name])
    assert not any("__init__" in vars(base) for base in bases(name))
