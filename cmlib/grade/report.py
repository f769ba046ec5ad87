"""What a lecturer takes away: tables for nbgrader, Canvas and Moodle, a page a student, a leaderboard, a summary.

Nothing here shows a hidden test: of each part of a question a page says which property it asks for, whether it held, and the kind of failure.
What was tried, what came out and what was expected stay in the stored grade.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from html import escape
from pathlib import Path
from statistics import mean, median

from .judge import Grade, Mark
from .submission import Submission
from .trial import one_line


@dataclass(frozen=True)
class Student:
    """A line of the roster: nbgrader's own columns. ``lms_user_id`` is the number that Canvas has for the student."""

    id: str
    first_name: str = ""
    last_name: str = ""
    email: str = ""
    lms_user_id: str = ""

    @property
    def name(self) -> str:
        return f"{self.first_name} {self.last_name}".strip() or self.id


def read_roster(path: Path) -> dict[str, Student]:
    """The students by id, of a CSV with the columns that ``nbgrader db student import`` reads; only ``id`` has to be there."""
    known = [f.name for f in fields(Student)]
    with path.open(encoding="utf-8-sig", newline="") as file:
        lines = csv.DictReader(file)
        if "id" not in (lines.fieldnames or ()):
            raise ValueError(f"{path}: the first line names no column 'id', only {lines.fieldnames}")
        students = {s.id: s for s in (Student(**{k: (line.get(k) or "").strip() for k in known}) for line in lines) if s.id}
    if bad := [name for name in students if "/" in name]:
        raise ValueError(f"{path}: an id is a file's name, and {bad[0]!r} has a slash")
    return students


@dataclass(frozen=True)
class Row:
    """A student and an exercise. No grade: nothing was handed in, or the grader broke down over it (then ``failure`` says how)."""

    student: Student
    exercise: str
    max: float
    grade: Grade | None = None
    submission: Submission | None = None
    known: bool = True  # stands on the roster, or there is none
    timestamp: str = ""
    penalty: float = 0.0  # for being late, as the gradebook has it
    failure: str = ""
    comments: Mapping[str, str] = field(default_factory=dict)  # what people wrote, by question

    @property
    def raw(self) -> float:
        return self.grade.points if self.grade else 0.0

    @property
    def score(self) -> float:
        return max(0.0, self.raw - self.penalty)

    @property
    def waiting(self) -> list[Mark]:
        """The questions that a person still has to grade."""
        return [m for m in self.grade.marks if m.points is None] if self.grade else []

    @property
    def notes(self) -> list[str]:
        unknown = [] if self.known else ["is not on the roster: left out of canvas.csv, moodle.csv and the gradebook"]
        failed = [f"could not be graded, run again: {self.failure}"] if self.failure else []
        return unknown + failed + (list(self.grade.notes) if self.grade else [])


def _csv(header: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *(map(_no_formula, line) for line in lines)])
    return text.getvalue()


def _no_formula(cell: object) -> object:
    """An apostrophe before what a spreadsheet would run: a submission's folder can be called =1+1."""
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(("=", "+", "-", "@", "\t", "\r")) else cell


def nbgrader_csv(rows: Sequence[Row]) -> str:
    """The columns of ``nbgrader export``; like there, who handed in nothing has zero points."""
    first = ("assignment", "duedate", "timestamp", "student_id", "last_name", "first_name", "email")
    header = [*first, "raw_score", "late_submission_penalty", "score", "max_score"]
    lines = (
        (r.exercise, "", r.timestamp, s.id, s.last_name, s.first_name, s.email, float(r.raw), float(r.penalty), float(r.score), float(r.max))
        for r in rows
        for s in [r.student]
    )
    return _csv(header, lines)


def canvas_csv(rows: Sequence[Row]) -> str:
    """For "Import" in Canvas' gradebook, which finds a student by ID, else by SIS Login ID (our id); for a new title it makes an assignment."""
    exercises, students = _grid(rows)
    header = ["Student", "ID", "SIS Login ID", "Section", *exercises]
    possible = ["    Points Possible", "", "", "", *(_short(m) for m in exercises.values())]
    lines = (
        [f"{s.last_name}, {s.first_name}" if s.last_name else s.name, s.lms_user_id, s.id, "", *(_points(own.get(e)) for e in exercises)]
        for s, own in students.items()
    )
    return _csv(header, [possible, *lines])


def moodle_csv(rows: Sequence[Row]) -> str:
    """For Grades > Import > CSV file: map Username to username (or Email address to email), the others to a grade item or to "Feedback for" it."""
    exercises, students = _grid(rows)
    header = ["Username", "First name", "Last name", "Email address", *(c for e in exercises for c in (e, f"{e} (feedback)"))]
    lines = (
        [s.id, s.first_name, s.last_name, s.email, *(c for e in exercises for c in (_points(own.get(e)), _in_words(own.get(e))))]
        for s, own in students.items()
    )
    return _csv(header, lines)


def _grid(rows: Sequence[Row]) -> tuple[dict[str, float], dict[Student, dict[str, Row]]]:
    """Exercises with their points, and of each student that the course knows the row of each exercise: both systems stop at an unknown one."""
    students: dict[Student, dict[str, Row]] = {r.student: {} for r in rows if r.known}
    for r in rows:
        if r.known:
            students[r.student][r.exercise] = r
    return {r.exercise: r.max for r in rows}, students


def _points(row: Row | None) -> str:
    """Empty, which is "no grade" in both systems, where there is none."""
    return _short(row.score) if row and row.grade else ""


def _in_words(row: Row | None) -> str:
    if not row or not row.grade:
        return ""
    marks = "; ".join(f"{m.key}: {'still to be graded' if m.points is None else _short(m.points)} of {_short(m.max)}" for m in row.grade.marks)
    return f"{row.exercise}: {marks}"


def leaderboard_csv(rows: Sequence[Row]) -> str:
    """The measured figures of the open problems, best (smallest) first; equal figures share a rank."""
    found = [
        (r.exercise, m.key, name, value, r.student.id) for r in rows if r.grade for m in r.grade.marks for name, value in (m.figures or {}).items()
    ]
    lines = [
        (exercise, key, name, 1 + sum(other[:3] == (exercise, key, name) and other[3] < value for other in found), student, f"{value:g}")
        for exercise, key, name, value, student in sorted(found)
    ]
    return _csv(["exercise", "question", "figure", "rank", "student_id", "value"], lines)


def _short(points: float) -> str:
    """Two decimals at most, as Canvas keeps them."""
    return f"{round(points, 2):.2f}".rstrip("0").rstrip(".")


def summary(rows: Sequence[Row]) -> str:
    """What the screen shows at the end: points, the questions and what was lost most there, and whose grade needs a hand."""
    lines = []
    for exercise in dict.fromkeys(r.exercise for r in rows):
        mine = [r for r in rows if r.exercise == exercise]
        graded = [r for r in mine if r.grade]
        lines.append(f"\n{exercise}: {len(graded)} graded, {len(mine) - len(graded)} without a grade")
        if graded:
            scores = [r.score for r in graded]
            lines.append(f"  points of {_short(graded[0].max)}: mean {_short(mean(scores))}, median {_short(median(scores))}")
            lines += [_question(marks) for marks in zip(*(r.grade.marks for r in graded), strict=True)]
    lines += _hands([r for r in rows if r.notes], [r for r in rows if r.waiting])
    return "\n".join(lines)


def _question(marks: Sequence[Mark]) -> str:
    first, given = marks[0], [m.points for m in marks if m.points is not None]
    lost = Counter(p.says for m in marks for p in m.parts if not p.ok).most_common(1)
    what = f"; lost most: {lost[0][0]} ({lost[0][1]})" if lost else ""
    return f"  {first.key:>5}  {f'mean {_short(mean(given))}' if given else 'not yet graded'} of {_short(first.max)}{what}"


def _hands(noted: Sequence[Row], waiting: Sequence[Row]) -> list[str]:
    lines = [f"\n{len(waiting)} submissions have free text to be graded by a person; until then it counts as nothing."] if waiting else []
    lines += [f"\n{len(noted)} need a look:"] if noted else []
    return lines + [f"  {r.exercise} {r.student.id}: {one_line('; '.join(r.notes))}" for r in noted]


STYLE = """
:root { color-scheme: light dark; }
body { font: 1rem/1.5 system-ui, sans-serif; max-width: 46rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; } caption { text-align: left; font-weight: bold; }
th, td { padding: .2rem 1.2rem .2rem 0; text-align: left; border-bottom: 1px solid; } td.points { text-align: right; }
li { margin: .3rem 0; } pre, code { white-space: pre-wrap; overflow-wrap: anywhere; }
h2, h3 { margin-top: 2rem; } @media print { h3, li { break-inside: avoid; } }
"""


def feedback_html(rows: Sequence[Row]) -> str:
    """A student's page: one file, no script, nothing fetched; it reads without colour and by a screen reader. A student's text is escaped."""
    student = rows[0].student
    body = "".join(_exercise(r) for r in rows)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>Feedback for {escape(student.name)}</title><style>{STYLE}</style></head>\n"
        f"<body><main><h1>Feedback for {escape(student.name)}</h1>\n{body}</main></body></html>\n"
    )


def _exercise(row: Row) -> str:
    title = f"<h2>{escape(row.exercise)}: {_short(row.score)} of {_short(row.max)} points</h2>\n"
    if not row.grade:
        return f"{title}<p>{'This could not be graded yet.' if row.failure else 'Nothing was handed in.'}</p>\n"
    late = f"<p>Handed in late: {_short(row.penalty)} points off.</p>" if row.penalty else ""
    notes = "".join(f"<li>{escape(n)}</li>" for n in row.grade.notes)
    lines = "".join(
        f'<tr><th scope="row">{escape(m.key)}</th><td class="points">{_got(m)}</td><td>{_short(m.max)}</td></tr>' for m in row.grade.marks
    )
    head = '<thead><tr><th scope="col">Question</th><th scope="col">Points</th><th scope="col">of</th></tr></thead>'
    return (
        f"{title}{late}{f'<p>About the submission:</p><ul>{notes}</ul>' if notes else ''}"
        f"<table><caption>Points by question</caption>{head}<tbody>{lines}</tbody></table>\n"
        + "".join(_marked(m, row.comments.get(m.key, "")) for m in row.grade.marks)
    )


def _got(mark: Mark) -> str:
    return "not yet graded" if mark.points is None else _short(mark.points)


def _counted(points: float) -> str:
    return f"{_short(points)} point{'' if _short(points) == '1' else 's'}"


def _marked(mark: Mark, comment: str) -> str:
    whole = sum(p.weight for p in mark.parts)
    parts = "".join(
        f"<li><strong>{'Held' if p.ok else 'Lost'}</strong> ({_counted(mark.max * p.weight / whole)}): {escape(p.says)}"
        f"{'' if p.ok else f'<br>{escape(p.reason)}'}</li>\n"
        for p in mark.parts
    )
    figures = "".join(f"<p>Measured: {escape(name)} {value:g}</p>" for name, value in (mark.figures or {}).items())
    said = f"<p>Comment:</p><pre>{escape(comment)}</pre>" if comment else ""
    by_hand = "<p>A person grades this.</p>" if mark.by_hand else ""
    return f"<h3>{escape(mark.key)}: {_got(mark)} of {_short(mark.max)} points</h3>\n{by_hand}{f'<ul>{parts}</ul>' if parts else ''}{figures}{said}\n"


def write(out: Path, rows: Sequence[Row]) -> None:
    """All tables and pages into ``out``."""
    tables = {"nbgrader.csv": nbgrader_csv, "canvas.csv": canvas_csv, "moodle.csv": moodle_csv, "leaderboard.csv": leaderboard_csv}
    for name, table in tables.items():
        (out / name).write_text(table(rows), "utf-8")
    (out / "feedback").mkdir(exist_ok=True)
    for student in dict.fromkeys(r.student for r in rows):
        page = feedback_html([r for r in rows if r.student == student])
        (out / "feedback" / f"{student.id}.html").write_text(page, "utf-8")
