"""Cases of a matrix: a few are tested always, the others with `-m slow`."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def essence(cases: Iterable[Any], names: Collection[str]) -> list[Any]:
    """All cases; those are slow that have none of the names, which must all be there."""
    every = [(case, str(getattr(case, "family", case))) for case in cases]
    known = {name for _, name in every}
    assert known.issuperset(names), "a case that is tested always has another name"
    return [
        pytest.param(case, marks=() if name in names else pytest.mark.slow, id=str(case))
        for case, name in every
    ]
