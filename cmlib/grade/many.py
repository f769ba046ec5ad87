"""Many submissions at once. A grade is written the moment it is known, so that a run that was stopped goes on where it was.

A grade lies in ``OUT/<exercise>/<student>.json`` and carries the digest of what it was made of (submission, source notebook, kit); with any other
digest it is made again. A worker that dies costs a retry. Where all tries fail there is a ``Failure`` in place of a grade, never a grade of zero.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TextIO

from .judge import Grade
from .submission import Submission

RETRIES = 2

Work = Callable[[Submission], Grade]
Runner = Callable[[Work, Sequence[Submission]], Iterator[tuple[Submission, "Grade | Failure"]]]


@dataclass(frozen=True)
class Failure:
    """The grader broke down over a submission, time and again. This says nothing about the student."""

    reason: str


def stored(out: Path, exercise: str, student: str, digest: str) -> Grade | None:
    """The grade of an earlier run, if it was made of the same things and can be read."""
    try:
        grade = Grade.from_json(_place(out, exercise, student).read_text("utf-8"))
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return grade if grade.digest == digest else None


def store(out: Path, grade: Grade) -> None:
    """The whole file or none of it: written aside, then renamed."""
    place = _place(out, grade.exercise, grade.student)
    place.parent.mkdir(parents=True, exist_ok=True)
    aside = place.with_name(f".{place.name}.part")
    aside.write_text(grade.to_json(), "utf-8")
    os.replace(aside, place)


def _place(out: Path, exercise: str, student: str) -> Path:
    return out / exercise / f"{student}.json"


def on_threads(work: Work, todo: Sequence[Submission], *, jobs: int = 2) -> Iterator[tuple[Submission, Grade | Failure]]:
    """On this machine: each thread drives one box at a time."""
    pool = ThreadPoolExecutor(jobs)
    try:
        futures = {pool.submit(_again, work, s): s for s in todo}
        for future in as_completed(futures):
            yield futures[future], _outcome(future)
    finally:
        pool.shutdown(cancel_futures=True)


def on_cluster(work: Work, todo: Sequence[Submission], *, address: str) -> Iterator[tuple[Submission, Grade | Failure]]:
    """On a Dask cluster, whose workers need the same kit, bubblewrap and data. The scheduler gives a dead worker's submissions to others."""
    from distributed import Client
    from distributed import as_completed as as_they_come

    with Client(address) as client:
        submit = partial(client.submit, work, retries=RETRIES, pure=False)
        futures, failed = {submit(s): s for s in todo}, []
        for future in as_they_come(futures):
            outcome = _outcome(future)
            future.release()  # else Dask makes the grade again when the worker that made it dies
            if isinstance(outcome, Failure):
                failed.append(futures[future])
            else:
                yield futures[future], outcome
        for s in failed:  # Dask blames all that waited on a worker when it died, so that a killer takes its neighbours along: each once more, alone
            yield s, _outcome(submit(s))


def _again(work: Work, submission: Submission) -> Grade:
    for _ in range(RETRIES):
        try:
            return work(submission)
        except Exception:
            time.sleep(0.1)  # what killed a box (memory that ran out) may be over
    return work(submission)


def _outcome(future: Future) -> Grade | Failure:
    try:
        return future.result()
    except Exception as error:
        return Failure(f"{type(error).__name__}: {error}")


class Progress:
    """A bar that is drawn over itself on a terminal, a plain line for each grade elsewhere."""

    def __init__(self, name: str, total: int, done: int = 0, to: TextIO | None = None) -> None:
        self.name, self.total, self.done, self.to = name, total, done, to or sys.stderr
        self.first, self.start = done, time.monotonic()

    def __call__(self, line: str) -> None:
        self.done += 1
        if not self.to.isatty():
            print(f"{self.name} {self.done}/{self.total} {line}", file=self.to, flush=True)
            return
        width = shutil.get_terminal_size().columns
        filled = 24 * self.done // self.total
        text = f"{self.name} [{'#' * filled}{'.' * (24 - filled)}] {self.done}/{self.total} {self._left()} {line}"
        print(f"\r{text[: width - 1]:<{width - 1}}", end="\n" if self.done == self.total else "", file=self.to, flush=True)

    def _left(self) -> str:
        spent, made = time.monotonic() - self.start, self.done - self.first
        seconds = round(spent / made * (self.total - self.done))
        return f"{seconds // 60}:{seconds % 60:02} left,"
