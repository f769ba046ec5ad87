"""One submission, judged: its code runs in a box, the checks run here, and only plain values pass between them."""

from __future__ import annotations

from dataclasses import dataclass

from .box import Limits
from .source import Exercise
from .submission import Submission
from .trial import Part


@dataclass(frozen=True)
class Mark:
    """The points of one question; None while a person has yet to give them, and then ``text`` is the answer that they will read."""

    key: str
    cell: str
    points: float | None
    max: float
    parts: tuple[Part, ...] = ()
    figures: dict[str, float] | None = None
    text: str = ""

    @property
    def by_hand(self) -> bool:
        return self.points is None


@dataclass(frozen=True)
class Grade:
    """A submission's marks, with notes for the report; plain JSON both ways."""

    student: str
    exercise: str
    marks: tuple[Mark, ...]
    notes: tuple[str, ...]
    digest: str
    seconds: float

    @property
    def points(self) -> float:
        """The points known so far."""
        return sum(m.points or 0 for m in self.marks)

    @property
    def max(self) -> float:
        return sum(m.max for m in self.marks)

    def to_json(self) -> str:
        raise NotImplementedError

    @classmethod
    def from_json(cls, text: str) -> Grade:
        raise NotImplementedError


def judge(submission: Submission, exercise: Exercise, *, seed: int | None = None, limits: Limits = Limits(), boxed: bool = True) -> Grade:  # noqa: B008
    """The grade of a submission. It raises ``GraderError`` where the grading itself is broken, and never for what a submission does.

    ``seed=None``: fresh inputs each time. ``boxed=False``: without the box; whoever says so trusts every line of the submission.
    """
    raise NotImplementedError


def digest(submission: Submission, exercise: Exercise) -> str:
    """Of all that a grade is made of: the submission's bytes, the source notebook, the kit. Cheap: nothing is run."""
    raise NotImplementedError
