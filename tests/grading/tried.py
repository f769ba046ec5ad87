"""What the graders are tried with: the hidden checks of a source notebook over solutions right and wrong, and the tests that every chapter shares."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from cmlib.grade.source import Question, read
from cmlib.grade.trial import Local, Part, judging, trial

SOURCES = Path(__file__).resolve().parents[2] / "exercises" / "source"
STUDENT, SEEDS = "ada", range(3)


def run(question: Question, namespace: dict[str, Any], seed: int = 0, student: str = STUDENT) -> list[Part]:
    """The parts of a question's hidden checks over the names of ``namespace``."""
    space: dict[str, Any] = {"np": np, "trial": trial}
    with judging(Local(namespace), student, seed):
        exec(compile(question.hidden, question.cell, "exec"), space)
    return space["t"].parts


@dataclass(frozen=True)
class Attempt:
    """One solution of a question: under the name that the question asks for, or what it makes of the learner's numbers where it asks for a value.

    ``names``: where a question asks for several functions, ``made()`` gives them by name.
    """

    key: str
    made: Callable
    fault: str = ""  # a piece of what the learner reads; empty where the solution is right
    names: bool = False

    def namespace(self, question: Question) -> dict[str, Any]:
        if self.names:
            return self.made()
        how, name = re.search(r't\.(call|get)\("(\w+)"', question.hidden).groups()
        if how == "call":
            return {name: self.made}
        from cmlib.grade.variants import variant

        return {name: self.made(variant(STUDENT, self.key))}


class Solutions:
    """The solutions of one chapter: the source notebook's own, and functions collected by ``right`` and ``wrong``.

    ``ladders`` are questions whose parts are rungs, each of which asks for all that the one below it asks.
    """

    def __init__(self, exercise: str, ladders: tuple[str, ...] = ()):
        self.path = SOURCES / exercise / f"{exercise}.ipynb"
        self.ladders, self.attempts = ladders, []

    @cached_property
    def questions(self) -> dict[str, Question]:
        return {q.key: q for q in read(self.path).questions if not q.by_hand}

    @cached_property
    def reference(self) -> dict[str, Any]:
        """What the source notebook's own cells define, its checks left out."""
        cells = [c for c in json.loads(self.path.read_text())["cells"] if c["cell_type"] == "code"]
        space: dict[str, Any] = {}
        for cell in cells:
            if not cell["metadata"].get("nbgrader", {}).get("grade"):
                exec("".join(cell["source"]).replace('student = ""', f"student = {STUDENT!r}"), space)
        return space

    def right(self, key: str, names: bool = False) -> Callable[[Callable], Callable]:
        return self.wrong(key, "", names)

    def wrong(self, key: str, fault: str, names: bool = False) -> Callable[[Callable], Callable]:
        """``fault`` is a piece of ``says`` or ``reason`` of a part that must fail."""

        def collect(made: Callable) -> Callable:
            self.attempts.append(Attempt(key, made, fault, names))
            return made

        return collect

    def of(self, key: str, right: bool) -> list[Attempt]:
        return [a for a in self.attempts if a.key == key and right == (not a.fault)]

    def tried(self, attempt: Attempt, seed: int = 0) -> list[Part]:
        question = self.questions[attempt.key]
        return run(question, attempt.namespace(question), seed)


class Graders:
    """The tests of a chapter's hidden checks: a class of the chapter's test file inherits them and says ``solutions``."""

    solutions: Solutions

    def pytest_generate_tests(self, metafunc):
        attempts = self.solutions.attempts
        axes = {
            "key": {key: key for key in self.solutions.questions},
            "right": {f"{a.key}-{a.made.__name__}": a for a in attempts if not a.fault},
            "wrong": {f"{a.key}-{a.made.__name__}": a for a in attempts if a.fault},
        }
        for axis in set(axes) & set(metafunc.fixturenames):
            metafunc.parametrize(axis, list(axes[axis].values()), ids=list(axes[axis]))

    def test_the_reference_has_all_points(self, key):
        for seed in SEEDS:
            assert lost(run(self.solutions.questions[key], self.solutions.reference, seed)) == []

    def test_a_right_solution_has_all_points(self, right):
        for seed in SEEDS:
            assert lost(self.solutions.tried(right, seed)) == []

    def test_a_wrong_solution_loses_the_part_that_names_its_fault(self, wrong):
        for seed in SEEDS:
            failed = lost(self.solutions.tried(wrong, seed))
            assert any(wrong.fault in text for text in failed), failed

    def test_nothing_at_all_loses_every_part(self, key):
        assert not any(p.ok for p in run(self.solutions.questions[key], {}))

    def test_every_hidden_part_is_needed(self, key):
        """Without it some wrong solution would get all points; without a rung of a ladder, as many as a better one."""
        failures = [{p.says for p in self.solutions.tried(a) if not p.ok} for a in self.solutions.of(key, right=False)]
        better = [set(), *failures] if key in self.solutions.ladders else [set()]
        says = [p.says for p in run(self.solutions.questions[key], {})]
        assert len(set(says)) == len(says)
        assert [s for s in says if not any(f - b == {s} and b <= f for f in failures for b in better)] == []

    def test_two_right_and_five_wrong_solutions_at_least(self, key):
        assert len(self.solutions.of(key, right=True)) >= 2 and len(self.solutions.of(key, right=False)) >= 5


def lost(parts: list[Part]) -> list[str]:
    return [f"{p.says}: {p.reason}" for p in parts if not p.ok]
