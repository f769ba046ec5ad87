"""A small exercise and submissions to it, for the tests of the grader."""

import json
import os
import re
from pathlib import Path
from textwrap import dedent

import pytest

from cmlib.grade.box import MB, Limits, missing
from cmlib.grade.source import Exercise, read
from cmlib.grade.submission import Submission

SLOW = max(1, os.getloadavg()[0] / (os.cpu_count() or 1))  # where others work too, everything takes longer
QUICK = Limits(cell=SLOW, call=0.5 * SLOW, total=20 * SLOW, memory=384 * MB, disk=16 * MB)
needs_a_box = pytest.mark.skipif(bool(missing()), reason=missing())


def notebook(*cells: str | dict, language: str = "python") -> dict:
    """A notebook of code cells (texts) and others (dicts)."""
    made = [
        c if isinstance(c, dict) else {"cell_type": "code", "metadata": {}, "source": dedent(c), "outputs": [], "execution_count": None}
        for c in cells
    ]
    return {"cells": made, "metadata": {"kernelspec": {"language": language}}, "nbformat": 4, "nbformat_minor": 5}


def answered(cell: str, text: str) -> dict:
    return {"cell_type": "markdown", "metadata": {"nbgrader": {"grade_id": cell, "grade": True, "solution": True, "points": 2}}, "source": text}


def test_cell(key: str, hidden: str, points: float) -> dict:
    text = (
        f'check("{key}")\n### BEGIN HIDDEN TESTS\nt = trial("{key}", globals())\n{dedent(hidden).strip()}\nt.score({points})\n### END HIDDEN TESTS\n'
    )
    nbgrader = {"grade_id": f"q{key}", "grade": True, "solution": False, "locked": True, "points": points}
    return {"cell_type": "code", "metadata": {"nbgrader": nbgrader}, "source": text.splitlines(keepends=True)}


test_cell.__test__ = False


def exercise(folder: Path, hidden: dict[str, str], *others: dict, points: float = 2) -> Exercise:
    """The exercise of these hidden checks, written to a source notebook and read from it."""
    path = folder / "source" / "small.ipynb"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(notebook(*(test_cell(key, text, points) for key, text in hidden.items()), *others)))
    return read(path)


def submit(folder: Path, *cells: str | dict, student: str = "ada") -> Submission:
    path = folder / "submitted" / student / "small.ipynb"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(notebook(*cells)))
    return Submission(student, "small", path)


def named(mapping: dict) -> list:
    """Cases for ``parametrize`` that are called by their keys; a tuple is several arguments."""
    return [pytest.param(*(value if isinstance(value, tuple) else [value]), id=re.sub(r"\W+", "-", key)) for key, value in mapping.items()]
