"""Everything that Myriad raises on bad input: what is wrong, the numbers, the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass


class SimulatorError(Exception):
    """Base of every error that Myriad raises on purpose."""


class ProfileError(SimulatorError):
    """A file or a fact in it cannot be used: unreadable, unknown, wrong unit or missing."""


class NetworkError(SimulatorError):
    """A network, or traffic on it, that cannot be: a link without a rate, a path over links that are not there."""


class DeadlockError(SimulatorError):
    """A step program whose operations wait for each other for ever."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a scenario cannot run, as data.

    Parameters
    ----------
    rule : str
        Short name of the rule that is broken, e.g. ``"experts divide by ep"``.
    numbers : str
        What was found, with the numbers.
    remedy : str
        What would make it legal.
    """

    rule: str
    numbers: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.numbers}; {self.remedy}"


class PlanError(SimulatorError):
    """A scenario that cannot run; `problems` lists every reason."""

    def __init__(self, problems: Iterable[Problem]):
        self.problems = list(problems)
        super().__init__("\n".join(f"{p.rule}: {p}" for p in self.problems))


def nearest(word: str, choices: Iterable[str]) -> str:
    """Return a remedy that names the choices closest to `word`, or all of them when none is close."""
    choices = sorted(choices)
    close = difflib.get_close_matches(word, choices, n=3, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(close) + "?"
    return "choose from " + ", ".join(choices)
