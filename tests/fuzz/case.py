"""What an input is: something altered, and the command that is given it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from random import Random

from tests.fuzz.seeds import Seeds


@dataclass(frozen=True)
class Case:
    """One input. `run` gives the exit code of its command, as `edgeprune.cli.main` does."""

    run: Callable[[], int]
    note: str  # what was altered
    well_formed: (
        bool  # JSON parses and hashes hold, or the format is still known by its first bytes
    )
    refuse: bool = False  # success would be wrong
    forbidden: tuple[Path, ...] = ()  # files that may not be opened


def command(*arguments: object) -> Callable[[], int]:
    """The real command."""
    from edgeprune.cli import main

    return lambda: main([str(argument) for argument in arguments])


def reader(read: Callable[[], object]) -> Callable[[], int]:
    """A reader by itself, whose command would go on for seconds with what it has read."""
    from edgeprune.errors import EdgepruneError
    from edgeprune.terminal import note, plain_streams

    def run() -> int:
        with plain_streams(native=False):
            try:
                read()
            except EdgepruneError as error:
                note(f"edgeprune: {error}")
                return 2
            return 0

    return run


def names() -> list[str]:
    """All kinds of inputs."""
    package = import_module("tests.fuzz.kinds")
    return sorted(m.name for m in iter_modules(package.__path__) if m.name[0] != "_")


def make(kind: str, number: int, seed: int, seeds: Seeds, folder: Path) -> Case:
    """Input `number` of a kind: the same for the same seed, written into an empty folder."""
    rng = Random(f"{seed} {kind} {number}")
    case: Case = import_module(f"tests.fuzz.kinds.{kind}").make(rng, seeds, folder)
    return case


def shares(inputs: int) -> dict[str, int]:
    """How many inputs of each kind, by the weight that each file names."""
    weights = {name: import_module(f"tests.fuzz.kinds.{name}").WEIGHT for name in names()}
    total = sum(weights.values())
    return {name: max(1, inputs * weight // total) for name, weight in weights.items()}


def choose(rng: Random, weighted: Sequence[tuple[int, Callable[[], object]]]) -> object:
    """What one of the callables gives; each is as likely as its weight."""
    weights = [weight for weight, _ in weighted]
    return rng.choices([call for _, call in weighted], weights)[0]()
