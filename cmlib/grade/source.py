"""The source notebook of an exercise: its questions, their points and their hidden checks. It is trusted, and never enters a box."""

from __future__ import annotations

import hashlib
import json
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_HIDDEN = re.compile(r"^[ \t]*### BEGIN HIDDEN TESTS.*?\n(.*?)^[ \t]*### END HIDDEN TESTS", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Question:
    """A graded cell. ``key`` is "2.3" where nbgrader's id (no dots) is "q2-3"; ``hidden`` is its hidden checks' text, empty where a person grades."""

    key: str
    cell: str
    points: float
    hidden: str = ""
    released: str = ""  # what the learner finds in the cell

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
    """The exercise of a source notebook. ``ValueError`` where nothing could be graded by it: no questions, a key twice, no points."""
    data = path.read_bytes()
    cells = [(cell, cell["metadata"].get("nbgrader", {})) for cell in json.loads(data)["cells"]]
    questions = tuple(_question(cell, nbgrader) for cell, nbgrader in cells if nbgrader.get("grade"))
    keys = [q.key for q in questions]
    if not keys or len(set(keys)) < len(keys):
        raise ValueError(f"{path}: " + (f"questions with one key: {sorted(k for k in set(keys) if keys.count(k) > 1)}" if keys else "no questions"))
    return Exercise(path.stem, path, questions, hashlib.sha256(data).hexdigest())


def _question(cell: dict[str, Any], nbgrader: dict[str, Any]) -> Question:
    name, text = nbgrader["grade_id"], "".join(cell["source"])
    hidden = "" if nbgrader.get("solution") or nbgrader.get("task") else textwrap.dedent("\n".join(_HIDDEN.findall(text)))
    if not nbgrader.get("solution") and not nbgrader.get("task") and not hidden.strip():
        raise ValueError(f"{name}: a test cell without hidden tests")
    if not nbgrader.get("points", 0) > 0:
        raise ValueError(f"{name}: no points")
    compile(hidden, name, "exec")
    return Question(name.removeprefix("q").replace("-", "."), name, nbgrader["points"], hidden, _released(text))


def _released(text: str) -> str:
    """The cell without solutions and hidden tests, as nbgrader releases it up to its placeholder."""
    return re.sub(r"^[ \t]*### BEGIN (SOLUTION|HIDDEN TESTS).*?### END \1[^\n]*\n?", "", text, flags=re.DOTALL | re.MULTILINE)
