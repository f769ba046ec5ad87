"""One submission, judged: its code runs in a box, the checks run here, and only plain values pass between them.

A hidden check is trusted text that handles results of any size and shape: it hands them to ``t.close`` before it computes with them.
"""

from __future__ import annotations

import builtins
import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..house.process import ROOT
from . import submission as submissions
from .box import Box, Limits
from .source import Exercise, Question
from .submission import Notebook, Submission
from .trial import AnswerError, GraderError, Local, Missing, NotPlain, Part, StudentError, TimedOut, judging, one_line, trial
from .wire import ARRAYS, WireError, pack

STARTS = 3  # of a box, for one question
NOTES = 10  # on cells
ASKS = 100_000  # calls of a check's function during one call of an answer
TYPES = {"function", "generator", *(name for name, value in vars(builtins).items() if isinstance(value, type))}
NO_VALUE = "what came back is no plain value, or too much of it"


@dataclass(frozen=True)
class Mark:
    """The points of one question; None while a person has yet to give them, and then ``text`` is the answer that they will read."""

    key: str
    cell: str
    points: float | None
    max: float
    parts: tuple[Part, ...] = ()
    figures: dict[str, float] = dataclasses.field(default_factory=dict)
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
        return json.dumps(dataclasses.asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Grade:
        fields = json.loads(text)
        marks = tuple(Mark(**m | {"parts": tuple(Part(**p) for p in m["parts"])}) for m in fields["marks"])
        return cls(**fields | {"marks": marks, "notes": tuple(fields["notes"])})


def judge(submission: Submission, exercise: Exercise, *, seed: int | None = None, limits: Limits = Limits(), boxed: bool = True) -> Grade:  # noqa: B008
    """The grade of a submission. It raises ``GraderError`` where the grading itself is broken, and never for what a submission does.

    ``seed=None``: fresh inputs each time. ``boxed=False``: without the box; whoever says so trusts every line of the submission.
    """
    start = time.monotonic()
    notebook = submissions.read(submission)
    with Boxed(notebook.code, limits, boxed) as answers, judging(answers if notebook.code else Local({}), submission.student, seed):
        marks = tuple(_mark(question, notebook, answers) for question in exercise.questions)
        notes = (*submission.notes, *notebook.notes, *_few([*answers.notes.values()]), *_whose(answers, submission.student))
    return Grade(submission.student, exercise.name, marks, notes, digest(submission, exercise), round(time.monotonic() - start, 3))


def digest(submission: Submission, exercise: Exercise) -> str:
    """Of all that a grade is made of: the submission's bytes, the source notebook, the kit. Cheap: nothing is run."""
    return hashlib.sha256("\n".join((submissions.digest(submission), exercise.digest, _kit())).encode()).hexdigest()


@functools.cache
def _kit() -> str:
    files = sorted((ROOT / "cmlib").rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _mark(question: Question, notebook: Notebook, answers: Boxed) -> Mark:
    if question.by_hand:
        written = [text for text in notebook.texts(question.cell) if _bare(text) not in ("", _bare(question.released))]
        return Mark(question.key, question.cell, None if written else 0.0, question.points, text="\n\n".join(written))
    answers.next_question()
    namespace: dict[str, Any] = {"np": np, "trial": trial, "__name__": question.cell}
    try:
        exec(compile(question.hidden, f"<{question.cell}>", "exec"), namespace)
        t = namespace["t"]
        points = t.score(question.points)
    except GraderError:
        raise
    except Exception as error:
        raise GraderError(f"the hidden checks of question {question.key} failed outside of their parts: {type(error).__name__}: {error}") from error
    figures = {name: value for name, value in t.figures.items() if math.isfinite(value)}
    return Mark(question.key, question.cell, points, question.points, tuple(t.parts), figures)


def _whose(answers: Boxed, student: str) -> Iterator[str]:
    """A note where the notebook takes its numbers from another id; none where its box is gone, or it names nobody."""
    if answers.box and answers.box.alive:
        with contextlib.suppress(AnswerError):
            if (named := str(answers.get("student")).strip()) != student:
                yield f"`student` is {one_line(named)[:80]!r} in the notebook"


def _few(notes: list[str]) -> list[str]:
    return [*notes[:NOTES], f"and {len(notes) - NOTES} more cells"] if len(notes) > NOTES else notes


def _bare(text: str) -> str:
    return "".join(text.replace("YOUR ANSWER HERE", "").split())


class Boxed:
    """The answers of a submission whose cells ran in a box.

    A box that was stopped is started anew at the next call, without the cell that a box ended in before: so each costs what it defines, and no more.
    """

    def __init__(self, cells: Sequence[str], limits: Limits, boxed: bool = True):
        self.cells, self.limits, self.boxed = cells, limits, boxed
        self.lines = {f"line {n}: {line.strip()[:100]}" for text in cells for n, line in enumerate(text.splitlines(), 1)}
        self.box: Box | None = None
        self.notes: dict[int, str] = {}  # by cell
        self.ended: set[int] = set()
        self.number, self.starts, self.end = 0, STARTS, time.monotonic() + limits.total
        self.processes = 0  # in the box, once its cells have run

    def __enter__(self) -> Boxed:
        return self

    def __exit__(self, *_: object) -> None:
        if self.box:
            self.box.close()

    def call(self, name: str, args: tuple, kwargs: dict) -> Any:
        return self._asked("call", name, list(args), kwargs)

    def get(self, name: str) -> Any:
        return self._asked("get", name)

    def next_question(self) -> None:
        """A box in which calls left processes behind is put away: what these do next shall not cost another question."""
        self.starts = STARTS
        if self.box and self.box.alive and len([*self.box.pids()]) > self.processes:
            self.box.kill()

    def afresh(self) -> None:
        """The next call finds a new box, in which nothing is left of the calls before."""
        if self.box:
            self.box.kill()
            self.starts += 1

    def names(self) -> list[str]:
        return [name for name in self._asked("names") if isinstance(name, str)]

    def _asked(self, *request: Any) -> Any:
        while not (self.box and self.box.alive):
            if not self.starts or time.monotonic() > self.end:
                raise AnswerError("not tried: the code was stopped too often before" if not self.starts else "not tried: the time for all is over")
            self.starts -= 1
            self._open()
        return self._ask(self.limits.call, *request)

    def _open(self) -> None:
        if self.box:
            self.box.close()
        self.box = Box(self.limits, self.boxed)
        for i, text in enumerate(self.cells):
            if i in self.ended:
                continue
            try:
                self._ask(self.limits.cell, "run", text, f"<cell {i + 1}>")
            except AnswerError as error:
                self.notes[i] = f"code cell {i + 1}: {error.got or error}"  # no hidden input has come in yet
            if not self.box.alive:
                self.ended.add(i)
                return
        self.processes = len([*self.box.pids()])

    def _ask(self, seconds: float, kind: str, *rest: Any) -> Any:
        """Send a request and wait for its reply; the box is ended where that takes too long or what comes is no reply."""
        functions: list[Callable] = []
        self.number += 1
        until = min(time.monotonic() + seconds, self.end)
        try:
            message = pack([kind, self.number, *rest], functions)
        except WireError as error:
            raise GraderError(f"an argument of a hidden check: {error}") from error
        try:
            self.box.pipe.send(message, until)
            return self._reply(functions, until, str(rest[0]) if rest else "")
        except TimeoutError:
            reason: AnswerError = TimedOut(seconds)
        except EOFError:
            reason = AnswerError(self.box.why or "the code ended its own process")
        except (WireError, TypeError, ValueError, LookupError):
            reason = AnswerError(NO_VALUE)
        self.box.kill()
        raise reason

    def _reply(self, functions: list[Callable], until: float, name: str) -> Any:
        most = self.box.pipe.taken + 4 * ARRAYS
        for _ in range(ASKS):
            number, kind, *body = self.box.pipe.receive(until)
            if self.box.pipe.taken > most:
                raise WireError("too much")
            if number != self.number:  # a thread that an earlier call left behind
                continue
            if kind == "ask":
                self.box.pipe.send(_outside(functions, *body), until)
            elif kind == "value":
                (value,) = body
                return value
            else:
                raise self._failure(kind, name, *map(one_line, body))
        raise WireError("too many")

    def _failure(self, kind: str, name: str, *words: str) -> AnswerError:
        """What a learner reads of a failure in the box. Code there knows the hidden inputs, so no text that it can make up gets through: only names
        of Python's own types, lines of this notebook, and the kit's sentences. The lecturer finds the rest in the stored grade (``got``)."""
        if kind == "raised":
            type, _, line = words
            whole = str(StudentError(*words))
            told: AnswerError = StudentError(type if type in TYPES else "an exception of its own", "", line if line in self.lines else "")
        else:
            (whole,) = words
            known = Missing(name), Missing(name, "is not a function"), NotPlain("an array of objects"), *(NotPlain(f"a {t}") for t in TYPES)
            told = AnswerError(whole if whole in map(str, known) else NO_VALUE)
        told.got = whole
        return told


def _outside(functions: list[Callable], place: int, args: list, kwargs: dict) -> bytes:
    """What a check's own function answers to the submission, or raises there."""
    try:
        return pack(["value", functions[place](*args, **kwargs)])
    except GraderError:
        raise
    except Exception as error:
        return pack(["error", type(error).__name__, str(error)[:500]])
