"""`yes>0.8`: an answer to choose from, and the probability above or below which it is an alarm."""

from __future__ import annotations

import operator
import re
from dataclasses import dataclass

from edgeprune.errors import SpecError

COMPARE = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}


@dataclass(frozen=True, slots=True)
class Alarm:
    """A condition on the probability of one choice."""

    choice: str
    sign: str  # of COMPARE
    probability: float

    @classmethod
    def parse(cls, text: str, choices: tuple[str, ...]) -> Alarm:
        """From what a user writes; SpecError where it is no condition on one of the choices."""
        found = re.fullmatch(r"(.+?)\s*(>=|<=|>|<)\s*([\d.]+)", text.strip())
        try:
            alarm = cls(found[1], found[2], float(found[3])) if found else None
        except ValueError:
            alarm = None
        if alarm is None or not 0 <= alarm.probability <= 1:
            raise SpecError(f"--alarm is CHOICE>PROBABILITY, such as 'yes>0.8'; got {text!r}")
        if alarm.choice not in choices:
            raise SpecError(
                f"--alarm asks for {alarm.choice!r}, which is none of --choices"
                f" ({', '.join(choices)})"
            )
        return alarm

    def rings(self, probabilities: dict[str, float]) -> bool:
        """Whether the condition holds."""
        return bool(COMPARE[self.sign](probabilities[self.choice], self.probability))
