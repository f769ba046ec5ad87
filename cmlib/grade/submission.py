"""Submissions, found and read with suspicion: every byte may be hostile, and nothing here runs or imports any of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Submission:
    """What one student handed in. ``path`` is None where there is no notebook; ``student`` is the folder's (or flat file's) name, which is trusted."""

    student: str
    exercise: str
    path: Path | None
    timestamp: str | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Notebook:
    """A notebook as read: ``content`` as nbformat has it (plain dicts), None where the file cannot be read as one, and then a note says why."""

    content: dict[str, Any] | None
    notes: tuple[str, ...]
    digest: str

    @property
    def code(self) -> tuple[str, ...]:
        """The texts of the code cells, in order."""
        raise NotImplementedError

    def text(self, cell: str) -> str | None:
        """The text of the cell with this nbgrader id (the longest one, where it was copied); None where it was deleted."""
        raise NotImplementedError


def find(folder: Path, exercise: str) -> list[Submission]:
    """One submission a student, sorted by student.

    Layouts: nbgrader's ``<student>/<exercise>/<notebook>.ipynb``, ``<student>/<notebook>.ipynb``, or flat ``<student>.ipynb``. Links are not followed.
    """
    raise NotImplementedError


def read(submission: Submission) -> Notebook:
    """The notebook of a submission. It never raises for what the file holds."""
    raise NotImplementedError
