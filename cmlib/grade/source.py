"""The source notebook of an exercise: its questions, their points and their hidden checks. It is trusted, and never enters a box."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Question:
    """A graded cell. ``key`` is "2.3" where nbgrader's id of the cell is "q2.3"; ``hidden`` is the text of its hidden checks, empty where a person grades."""

    key: str
    cell: str
    points: float
    hidden: str = ""
    released: str = ""  # what the learner found in the cell

    @property
    def by_hand(self) -> bool:
        return not self.hidden


@dataclass(frozen=True)
class Exercise:
    """``exercises/source/<name>/<name>.ipynb``, its graded cells in their order."""

    name: str
    path: Path
    questions: tuple[Question, ...]
    digest: str  # of the file

    @property
    def points(self) -> float:
        return sum(q.points for q in self.questions)


def read(path: Path) -> Exercise:
    """The exercise of a source notebook. ``ValueError`` where the notebook could not be graded by (a question without points or checks, a key twice)."""
    raise NotImplementedError
