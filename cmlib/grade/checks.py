"""What a learner asks for in a notebook: ``check("1.3")`` and ``hint("1.3")``.

A question's visible checks are a function of a chapter's module, ``chapter01`` for "1.3", under ``@question``. They run on fixed inputs over the
names that the notebook defines, and never claim more than that they hold: hidden checks remain.
"""

from __future__ import annotations

import json
import re
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from .trial import Local, Part, Trial

RECORD = Path("hints.jsonl")  # beside the notebook: one line for each hint given
REMAIN = "Hidden checks remain: grading tries other inputs and further properties."
BY_HAND = "read by a person; compare with what the task asks for."
EMPTY = "`student` is empty: enter your id there, and run its cell and the cells of this question again"
BLANK = re.compile(r"`\w+` is not defined|raised NotImplementedError( \(line \d+(: raise NotImplementedError.*)?\))?")  # as nbgrader leaves a cell


@dataclass(frozen=True)
class Question:
    """A question of a chapter: ``run`` tries the visible checks; ``name`` is what the learner defines; ``varies`` has each student's choices."""

    key: str
    name: str
    hints: tuple[str, str, str]
    run: Callable[[Trial], None]
    varies: dict[str, tuple] = field(default_factory=dict)


def question(key: str, name: str, hints: tuple[str, str, str], varies: dict[str, tuple] | None = None) -> Callable[[Callable], Question]:
    """Makes a function of a trial the visible checks of a question."""
    return lambda run: Question(key, name, hints, run, varies or {})


def questions(module: ModuleType) -> dict[str, Question]:
    """The questions of a chapter's module, by key."""
    return {q.key: q for q in vars(module).values() if isinstance(q, Question)}


def chapter_of(key: str) -> ModuleType:
    """The module of a question's chapter; ValueError where there is none."""
    chapter = str(key).partition(".")[0]
    name = f"{__package__}.chapter{chapter.zfill(2)}"
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise ValueError(f"no exercises for chapter {chapter!r}") from None


def find(key: str) -> Question:
    """A question by its key; ValueError that lists the chapter's questions where there is none."""
    known = questions(chapter_of(key))
    if key not in known:
        raise ValueError(f"no question {key!r}; chapter {key.partition('.')[0]} has {', '.join(known)}")
    return known[key]


def by_hand(key: str) -> bool:
    """Whether a question is answered in words; if so, that is said."""
    found = key in chapter_of(key).BY_HAND
    if found:
        print(f"{key}: {BY_HAND}")
    return found


class CheckFailed(Exception):
    """A visible check does not hold; a notebook shows its text in place of a traceback."""

    def _render_traceback_(self) -> list[str]:
        return str(self).splitlines()


def check(key: str, namespace: dict[str, Any] | None = None) -> None:
    """Try a question's visible checks on what the notebook defines; CheckFailed with what was tried, came out and was expected."""
    namespace = _callers() if namespace is None else namespace
    if by_hand(key):
        return
    asked, trial = find(key), Trial(key, Local(namespace), seed=0)
    trial.student = str(namespace.get("student", ""))
    asked.run(trial)
    lost = [part for part in trial.parts if not part.ok]
    if blank := next((part.reason for part in lost if BLANK.fullmatch(part.reason)), ""):
        raise CheckFailed(f"{key}: not answered yet ({blank}).")
    if lost:
        says = f"{key}: of {len(trial.parts)} visible checks {len(lost)} failed."
        raise CheckFailed("\n".join([says, *map(_words, lost), _wrapped(_hint(key, max(1, _given(key))), "  "), REMAIN]))
    figures = "".join(f" Measured: {name} {_figure(value)}." for name, value in trial.figures.items())
    print(f"{key}: the visible checks hold ({len(trial.parts)} of {len(trial.parts)}).{figures} {REMAIN}")


def hint(key: str) -> None:
    """Show the question's next hint, each more telling than the last; the third stays. Which were shown is noted in ``hints.jsonl``."""
    if by_hand(key):
        return
    print(_wrapped(_hint(key, min(_given(key) + 1, len(find(key).hints)))))


def _hint(key: str, number: int) -> str:
    """The text of a hint, which is noted as given."""
    hints = find(key).hints
    _note(key, number)
    return f"Hint {number} of {len(hints)} for {key}: {hints[number - 1]}"


def _callers() -> dict[str, Any]:
    """The globals of the cell that called ``check``."""
    return sys._getframe(2).f_globals


def _words(part: Part) -> str:
    lines = {"tried": part.tried, "came out": part.got, "expected": part.want, "so": part.reason}
    told = [_wrapped(text, f"    {label:<9} ") for label, text in lines.items() if text]
    return "\n".join([_wrapped(part.says, "  "), *told])


def _wrapped(text: str, label: str = "") -> str:
    """Text after its label in lines that break between words: a notebook breaks long ones anywhere."""
    wrap = textwrap.TextWrapper(110 - len(label), break_long_words=False, break_on_hyphens=False)
    lines = [short for line in text.splitlines() for short in wrap.wrap(line)]
    return label + f"\n{' ' * len(label)}".join(lines)


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value > 1 else f"{value:.2%}"


def _given(key: str) -> int:
    """How many of a question's hints were shown; a line that cannot be read counts for nothing."""
    most = 0
    for line in RECORD.read_text().splitlines() if RECORD.is_file() else ():
        try:
            entry = json.loads(line)
            most = max(most, entry["hint"]) if entry["question"] == key else most
        except (ValueError, TypeError, KeyError):
            continue
    return most


def _note(key: str, number: int) -> None:
    """Record a hint when it is first shown; where the folder cannot be written, the hint is shown all the same."""
    if number > _given(key):
        try:
            with RECORD.open("a") as file:
                file.write(json.dumps({"question": key, "hint": number, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}) + "\n")
        except OSError:
            return
