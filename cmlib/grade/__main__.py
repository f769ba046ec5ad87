"""``python -m cmlib.grade SUBMISSIONS --out grades/``: grade a class."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

from ..house.process import ROOT
from . import box, many, source
from .judge import Grade, digest, judge
from .report import Row, Student, read_roster, summary, write
from .submission import Submission, find

SOURCES = ROOT / "exercises" / "source"


def main(argv: list[str] | None = None) -> int:
    options = _options().parse_args(argv)
    try:
        return grade(options)
    except (ValueError, OSError) as error:
        print(f"cmlib.grade: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ncmlib.grade: stopped; the same command goes on from here", file=sys.stderr)
        return 130


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cmlib.grade", description="Grade a class: each submission runs in a box of its own, the checks outside."
    )
    add = parser.add_argument
    add("submissions", type=Path, help="nbgrader's submitted/, or a folder of <student>/<notebook>.ipynb or of <student>.ipynb")
    add("--out", type=Path, default=Path("grades"), help="where grades, tables and feedback go (default: grades/)")
    add("--source", type=Path, default=SOURCES, help="where the source notebooks are, <exercise>/<exercise>.ipynb (default: the kit's)")
    add("--exercise", action="append", help="chapter01, ...; may be given again (default: those that SUBMISSIONS has by name)")
    add("--jobs", type=int, default=2, help="boxes at the same time (default: 2)")
    add(
        "--scheduler",
        metavar="ADDRESS",
        help="a Dask cluster, e.g. tcp://host:8786, whose workers see SUBMISSIONS at the same path",
    )
    add("--roster", type=Path, help="students.csv with the columns id,first_name,last_name,email,lms_user_id; only id has to be there")
    add("--gradebook", metavar="URL", help="nbgrader's gradebook, e.g. sqlite:///gradebook.db: grades are entered, people's points read")
    add("--seconds", type=float, help="the longest that one cell, or one call of an answer, may take")
    add("--seed", type=int, help="the hidden checks' inputs, from 15 digits or more that nobody can guess (default: fresh ones for each submission)")
    add("--dangerously-without-a-box", action="store_true", help="run the submissions as yourself: whoever wrote one can then do what you can")
    return parser


def grade(options: argparse.Namespace) -> int:
    """The whole run; 0 where every submission has a grade, else 1."""
    if not options.dangerously_without_a_box and (lacking := box.missing()):
        raise ValueError(lacking)
    roster = read_roster(options.roster) if options.roster else None
    options.out.mkdir(parents=True, exist_ok=True)
    rows = [row for name in _exercises(options) for row in _one(name, options, roster)]
    write(options.out, rows)
    print(summary(rows))
    print(f"\nTables and pages are in {options.out}/")
    return int(any(r.failure for r in rows))


def _exercises(options: argparse.Namespace) -> list[str]:
    names = sorted(p.name for p in options.source.iterdir() if p.is_dir())
    if not options.submissions.is_dir():
        raise ValueError(f"{options.submissions} is no folder")
    if unknown := set(options.exercise or ()) - set(names):
        raise ValueError(f"no exercise {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    chosen = options.exercise or [n for n in names if any(options.submissions.glob(f"*/{n}")) or any(options.submissions.glob(f"*/{n}.ipynb"))]
    if not chosen:
        raise ValueError(f"{options.submissions} does not say which exercise this is: give --exercise, one of {', '.join(names)}")
    return chosen


def _one(name: str, options: argparse.Namespace, roster: dict[str, Student] | None) -> list[Row]:
    """All rows of an exercise: what was handed in, in the order of students, then who handed in nothing."""
    exercise = source.read(options.source / name / f"{name}.ipynb")
    submissions = find(options.submissions, name)
    if options.gradebook:
        from .gradebook import enter, register  # nbgrader takes a second to import

        released = register(options.gradebook, name, exercise.path)  # before all the work, so that a wrong address is told at once
    results = dict(_results(exercise, submissions, options))
    rows = [_row(exercise, s, results[s.student], roster) for s in submissions]
    if options.gradebook:
        rows = list(enter(options.gradebook, rows, released))
    return rows + [Row(s, name, exercise.points) for s in (roster or {}).values() if s.id not in results]


def _row(exercise: source.Exercise, submission: Submission, result: Grade | many.Failure, roster: dict[str, Student] | None) -> Row:
    student = Student(submission.student) if roster is None else roster.get(submission.student)
    row = Row(
        student or Student(submission.student), exercise.name, exercise.points, None, submission, student is not None, submission.timestamp or ""
    )
    return replace(row, failure=result.reason) if isinstance(result, many.Failure) else replace(row, grade=result)


def _results(exercise: source.Exercise, submissions: list[Submission], options: argparse.Namespace) -> Iterable[tuple[str, Grade | many.Failure]]:
    """Each student's grade: those of an earlier run at once, the others as they are made."""
    todo, digests = [], {s: digest(s, exercise) for s in submissions}
    for s in submissions:
        if earlier := many.stored(options.out, exercise.name, s.student, digests[s]):
            yield s.student, earlier
        else:
            todo.append(s)
    if len(todo) < len(submissions):
        print(f"{exercise.name}: {len(submissions) - len(todo)} of {len(submissions)} were graded before", file=sys.stderr)
    limits = box.Limits(cell=options.seconds, call=options.seconds) if options.seconds else box.Limits()
    work = partial(judge, exercise=exercise, seed=options.seed, limits=limits, boxed=not options.dangerously_without_a_box)
    run = partial(many.on_cluster, address=options.scheduler) if options.scheduler else partial(many.on_threads, jobs=options.jobs)
    progress = many.Progress(exercise.name, len(submissions), len(submissions) - len(todo))
    for submission, result in run(work, todo):
        if isinstance(result, Grade) and result.digest != digests[submission]:
            result = many.Failure("the submission changed meanwhile, or a worker has another kit")
        if isinstance(result, Grade):
            many.store(options.out, result)
            progress(f"{submission.student}: {result.points:g} of {result.max:g}")
        else:
            progress(f"{submission.student}: {result.reason}")
        yield submission.student, result


if __name__ == "__main__":
    sys.exit(main())
