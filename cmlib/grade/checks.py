"""What a learner asks for in a notebook: ``check("1.3")`` and ``hint("1.3")``.

A question's visible checks are a function of a chapter's module, ``chapter01`` for "1.3", under ``@question``. They run on fixed inputs over the
names that the notebook defines, and never claim more than that they hold: hidden checks remain.
"""

from __future__ import annotations

import json
import sys
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


def find(key: str) -> Question:
    """A question by its key; ValueError that lists the chapter's questions where there is none."""
    chapter = str(key).partition(".")[0]
    name = f"{__package__}.chapter{chapter.zfill(2)}"
    try:
        known = questions(import_module(name))
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise ValueError(f"no exercises for chapter {chapter!r}") from None
    if key not in known:
        raise ValueError(f"no question {key!r}; chapter {chapter} has {', '.join(known)}")
    return known[key]


class CheckFailed(Exception):
    """A visible check does not hold; a notebook shows its text in place of a traceback."""

    def _render_traceback_(self) -> list[str]:
        return str(self).splitlines()


def check(key: str, namespace: dict[str, Any] | None = None) -> None:
    """Try a question's visible checks on what the notebook defines; CheckFailed with what was tried, came out and was expected."""
    asked = find(key)
    trial = Trial(key, Local(_callers() if namespace is None else namespace), seed=0)
    trial.student = str(trial.answers.namespace.get("student", ""))
    asked.run(trial)
    lost = [part for part in trial.parts if not part.ok]
    if lost:
        raise CheckFailed("\n".join([f"{key}: of {len(trial.parts)} visible checks {len(lost)} failed.", *map(_words, lost), *_help(asked), REMAIN]))
    figures = "".join(f" Measured: {name} {value:,.0f}." for name, value in trial.figures.items())
    print(f"{key}: the visible checks hold ({len(trial.parts)} of {len(trial.parts)}).{figures} {REMAIN}")


def hint(key: str) -> None:
    """Show the question's next hint, each more telling than the last; the third stays. Which were shown is noted in ``hints.jsonl``."""
    asked = find(key)
    number = min(_given(key) + 1, len(asked.hints))
    _note(key, number)
    print(f"Hint {number} of {len(asked.hints)} for {key}: {asked.hints[number - 1]}")


def _callers() -> dict[str, Any]:
    """The globals of the cell that called ``check``."""
    return sys._getframe(2).f_globals


def _words(part: Part) -> str:
    lines = {"tried": part.tried, "came out": part.got, "expected": part.want, "so": part.reason}
    told = [f"    {label:<9} {text.replace(chr(10), chr(10) + ' ' * 14)}" for label, text in lines.items() if text]
    return "\n".join([f"  {part.says}", *told])


def _help(asked: Question) -> list[str]:
    """The hint that was shown last, or the first one, and how to get the next."""
    number = _given(asked.key) or 1
    _note(asked.key, number)
    more = f' hint("{asked.key}") tells more.' if number < len(asked.hints) else ""
    return [f"  Hint {number} of {len(asked.hints)}: {asked.hints[number - 1]}{more}"]


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
