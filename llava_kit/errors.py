"""Errors that a user can act on.  Each says what was wrong, where, and what would be right.

A command collects every mistake it can find before it stops, so an error carries a list of problems and prints as
one line per problem: ``error[CODE] where: what; hint``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import ClassVar

EXIT_UNEXPECTED = 1
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143


@dataclass(frozen=True)
class Problem:
    """One mistake: where it stands (file, key path, sample id or package), what it is, and what would be right."""

    where: str
    what: str
    hint: str = ""

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        return f"{text}; {self.hint}" if self.hint else text


class KitError(Exception):
    """Base of all errors that are the user's to mend; ``code`` is the exit status of the command line."""

    code: ClassVar[int] = EXIT_UNEXPECTED

    def __init__(self, problems: Problem | Sequence[Problem]) -> None:
        self.problems: tuple[Problem, ...] = (problems,) if isinstance(problems, Problem) else tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))

    def __reduce__(self) -> tuple[type[KitError], tuple[tuple[Problem, ...]]]:
        return type(self), (self.problems,)  # errors cross process borders (data loader workers)

    @classmethod
    def at(cls, where: str, what: str, hint: str = "") -> KitError:
        """An error with a single problem."""
        return cls(Problem(where, what, hint))


class RecipeError(KitError):
    """A recipe or a command line that cannot be carried out (exit 2)."""

    code = 2


class DataError(KitError):
    """Data beyond what the recipe tolerates (exit 3)."""

    code = 3


class MissingDataError(DataError):
    """Data that is not there (yet): a preparation may make it."""


class SampleError(DataError):
    """One sample that cannot be used; the trainer sets it aside, counts it and names it."""


class ModelError(KitError):
    """A model, checkpoint, plugin or parity check that failed (exit 4)."""

    code = 4


class PluginError(ModelError):
    """A plugin that is broken, missing or in conflict with another (exit 4)."""


class DivergedError(KitError):
    """Training produced a loss or gradient that is not finite (exit 5)."""

    code = 5


class ResourceError(KitError):
    """Out of disk, memory or workers, or a resource somebody else holds (exit 6)."""

    code = 6


def nearest(name: str, known: Sequence[str]) -> str:
    """``"did you mean 'x'?"`` for the nearest of ``known``, else the list of what there is."""
    matches = get_close_matches(name, known, n=1)
    if matches:
        return f"did you mean '{matches[0]}'?"
    return f"there is {', '.join(sorted(known))}" if known else "there is none"
