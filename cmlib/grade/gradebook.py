"""Safe grades in nbgrader's own gradebook, so that formgrader shows them, people grade free text there, and ``nbgrader generate_feedback`` works.

nbgrader's autograde finds points by running a submission; here the points are known already. What formgrader and the feedback page read beside the
database is ``autograded/<student>/<exercise>/<exercise>.ipynb``: the submission's own cells, every graded cell among them once and as released (its
hidden tests never enter it), without outputs and without HTML that could act in a lecturer's browser.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import nbformat
from nbconvert.preprocessors.sanitize import SanitizeHTML
from nbformat import NotebookNode
from nbgrader import preprocessors as steps
from nbgrader.api import Grade as Entry
from nbgrader.api import Gradebook, SubmittedNotebook
from nbgrader.utils import parse_utc
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from .judge import Mark
from .report import Row
from .submission import Submission, read, secret

# generate_assignment's steps: up to the database, and from there to the student version
RELEASE = (steps.LockCells, steps.ClearSolutions, steps.ClearOutput, steps.ComputeChecksums, steps.SaveCells)
HIDE = (steps.ClearHiddenTests, steps.ClearMarkScheme, steps.ComputeChecksums)
MAKE = {"code": nbformat.v4.new_code_cell, "markdown": nbformat.v4.new_markdown_cell}


def course_folder(url: str) -> Path:
    """Where the course lies: beside an SQLite file, else in the current folder."""
    place = make_url(url)
    return Path(place.database).parent if place.get_backend_name() == "sqlite" and place.database else Path()


@contextmanager
def opened(url: str) -> Iterator[Gradebook]:
    """The gradebook, made where there is none. For that nbgrader calls the program alembic, which may lie beside the interpreter alone."""
    beside = str(Path(sys.executable).parent)
    if not shutil.which("alembic"):
        os.environ["PATH"] = os.pathsep.join((os.environ.get("PATH", ""), beside))
    try:
        book = Gradebook(url)
    except SQLAlchemyError as error:
        raise ValueError(f"no gradebook at {url!r}: {error}") from error
    with book:
        yield book


def register(url: str, exercise: str, source: Path) -> NotebookNode:
    """Make the exercise known to the gradebook, as ``nbgrader generate_assignment`` does; returns its student version."""
    with opened(url) as book:
        book.update_or_create_assignment(exercise)
    notebook, resources = nbformat.read(source, as_version=4), {"nbgrader": {"assignment": exercise, "notebook": exercise, "db_url": url}}
    for step in RELEASE + HIDE:
        notebook, resources = step().preprocess(notebook, resources)
    return notebook


def enter(url: str, rows: Iterable[Row], released: NotebookNode) -> Iterator[Row]:
    """Enter each grade and write its autograded copy; yields the rows as the gradebook has them then: a person's points come first."""
    answers = answer_cells(released)
    with opened(url) as book:
        for row in rows:
            if not row.grade or not row.known:
                yield row
                continue
            changed = write_copy(course_folder(url), row.submission, released)
            notebook = _entry(book, row)
            _enter_points(notebook, row.grade.marks, changed)
            _enter_reasons(notebook, row.grade.marks, answers)
            book.db.commit()
            book.db.expire_all()  # scores are sums that the database makes
            yield _read(notebook, row, answers)


def _entry(book: Gradebook, row: Row) -> SubmittedNotebook:
    names = {k: v for k, v in vars(row.student).items() if k != "id" and v}
    book.update_or_create_student(row.student.id, **names)
    return book.update_or_create_submission(row.exercise, row.student.id, timestamp=_time(row.submission)).notebooks[0]


def _time(submission: Submission) -> datetime | None:
    try:
        return parse_utc(submission.timestamp)
    except (ValueError, OverflowError):  # the file lay in the student's hands
        return None


def _enter_points(notebook: SubmittedNotebook, marks: Sequence[Mark], changed: bool) -> None:
    """A person's points stay; where the submission is another one than they saw, the grade is marked for a new look."""
    grades = {g.name: g for g in notebook.grades}
    for mark in marks:
        grade = grades[mark.cell]
        if changed or grade.auto_score != mark.points:
            grade.auto_score = mark.points
            grade.needs_manual_grade = mark.points is None or grade.manual_score is not None


def _enter_reasons(notebook: SubmittedNotebook, marks: Sequence[Mark], answers: dict[str, str]) -> None:
    """What was lost and why, as a comment on the answer; indented by four, so that nbgrader's Markdown shows it letter by letter."""
    comments = {c.name: c for c in notebook.comments}
    for mark in marks:
        lost = [f"    {p.says}: {' '.join(p.reason.split())}" for p in mark.parts if not p.ok]
        comments[answers[mark.cell]].auto_comment = "\n".join(["Not all of it held:", "", *lost]) if lost else None


def _read(notebook: SubmittedNotebook, row: Row, answers: dict[str, str]) -> Row:
    grades, said = {g.name: g for g in notebook.grades}, {c.name: c.manual_comment for c in notebook.comments if c.manual_comment}
    marks = tuple(replace(m, points=_points(grades[m.cell])) for m in row.grade.marks)
    return replace(
        row,
        grade=replace(row.grade, marks=marks),
        timestamp=str(notebook.assignment.timestamp or ""),
        penalty=notebook.late_submission_penalty or 0.0,
        comments={m.key: said[answers[m.cell]] for m in marks if answers[m.cell] in said},
    )


def _points(grade: Entry) -> float | None:
    return None if grade.auto_score is None and grade.manual_score is None else grade.score


def answer_cells(released: NotebookNode) -> dict[str, str]:
    """For each graded cell the cell with the answer: itself, or the last solution cell above it."""
    found, last = {}, ""
    for cell in released.cells:
        info = cell.metadata.get("nbgrader", {})
        last = info["grade_id"] if info.get("solution") else last
        if info.get("grade"):
            found[info["grade_id"]] = last
    return found


def write_copy(course: Path, submission: Submission, released: NotebookNode) -> bool:
    """The autograded copy, written aside and renamed; whether it differs from the one that was there."""
    folder = course / "autograded" / submission.student / submission.exercise
    folder.mkdir(parents=True, exist_ok=True)
    place, text = folder / f"{submission.exercise}.ipynb", nbformat.writes(autograded(read(submission).cells, released))
    changed = not place.exists() or place.read_text("utf-8") != text
    beside = {"timestamp.txt": str(_time(submission) or ""), "submission_secret.txt": secret(submission)}  # nbgrader's feedback asks for them
    for name, content in {place.name: text, **beside}.items():
        if content:
            aside = folder / f".{name}.part"
            aside.write_text(content, "utf-8")
            os.replace(aside, folder / name)
    return changed


def autograded(cells: Iterable[tuple[str, str, str]], released: NotebookNode) -> NotebookNode:
    """The submission's cells (kind, nbgrader's id, text) in their order, nbgrader's own as released but for the answers.

    Where an id comes twice, the longest text has it, and the others are cells of the student's own; what is missing comes back at the end.
    """
    waiting = {c.metadata.nbgrader.grade_id: c for c in released.cells if "nbgrader" in c.metadata}
    cells, mine = list(cells), []
    longest = {name: text for _, name, text in sorted(cells, key=lambda c: len(c[2]))}
    for kind, name, text in cells:
        own = waiting.pop(name) if name in waiting and text == longest[name] else None
        if own is None:
            mine.append(MAKE.get(kind, nbformat.v4.new_raw_cell)(text))
        else:
            mine.append(NotebookNode({**own, "source": text}) if own.metadata.nbgrader.solution else own)
    mine += waiting.values()
    for i, cell in enumerate(mine):
        cell.id = f"cell-{i}"
    return SanitizeHTML().preprocess(nbformat.v4.new_notebook(metadata=released.metadata, cells=mine), {})[0]
