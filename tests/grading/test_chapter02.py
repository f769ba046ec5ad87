"""Exercise 02: its graders over right and wrong solutions, its visible checks, and its source notebook from top to bottom."""

import re
import time

import nbformat
import pytest
from nbclient import NotebookClient
from solutions_chapter02 import solutions
from tried import STUDENT, Graders

from cmlib.grade import chapter02, check
from cmlib.grade.checks import CheckFailed, questions


class TestGraders(Graders):
    solutions = solutions


def test_the_source_notebook_runs_with_all_points_and_every_visible_check_holding(tmp_path):
    notebook = nbformat.read(solutions.path, as_version=4)
    notebook.cells[1].source = notebook.cells[1].source.replace('student = ""', f"student = {STUDENT!r}")
    NotebookClient(notebook, kernel_name="python3", timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()  # a failed check raises
    tests = [c for c in notebook.cells if c.cell_type == "code" and c.metadata.get("nbgrader", {}).get("grade")]
    assert [c.outputs[-1].data["text/plain"] for c in tests] == [str(c.metadata.nbgrader.points) for c in tests]
    for cell in tests:
        assert "the visible checks hold" in cell.outputs[0].text and "Hidden checks remain" in cell.outputs[0].text


def test_every_question_that_is_graded_here_has_visible_checks_and_three_hints():
    known = questions(chapter02)
    assert list(known) == list(solutions.questions)
    for asked in known.values():
        assert len({*asked.hints}) == 3 and solutions.questions[asked.key].hidden.count(f'"{asked.name}"')


@pytest.mark.parametrize("key", questions(chapter02))
def test_a_visible_check_holds_for_the_reference_costs_little_and_fails_on_nothing(key, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # hints are recorded there
    own, namespace = [], dict(solutions.reference)
    name = questions(chapter02)[key].name
    if callable(answer := namespace[name]):
        namespace[name] = timed(answer, own)
    check(key, namespace)  # what it needs is loaded
    beyond = []
    for _ in range(3):
        own.clear()
        start = time.process_time()
        check(key, namespace)
        beyond.append(time.process_time() - start - sum(own))
    assert "Hidden checks remain" in capsys.readouterr().out and min(beyond) < 0.05
    with pytest.raises(CheckFailed, match="is not defined"):
        check(key, {})


PITFALLS = {
    "chosen_on_test": "the choice was made on test",
    "reports_validation": "this is the accuracy on validation",
    "too_much_removed": "right where 97 % were asked for",
    "nothing_removed": "the dense weights take",
    "of_the_neighbours_numbers": "these are not your numbers, for 'ada'",
    "nobodys": "these are not your numbers, for 'ada'",
}


@pytest.mark.parametrize("name", PITFALLS)
def test_a_visible_check_meets_the_pitfall(name):
    attempt = next(a for a in solutions.attempts if a.made.__name__ == name)
    with pytest.raises(CheckFailed) as failed:
        check(attempt.key, solutions.reference | attempt.namespace(solutions.questions[attempt.key]))
    assert PITFALLS[name] in str(failed.value)


def test_an_empty_id_is_said():
    with pytest.raises(CheckFailed, match="`student` is empty"):
        check("2.2", solutions.reference | {"student": ""})


def test_the_open_problem_tells_bytes_and_accuracy(capsys):
    check("2.13", solutions.reference)
    assert re.search(r"Measured: bytes 24\d,\d{3}\. Measured: accuracy 98\.\d\d%\.", capsys.readouterr().out)


def timed(answer, spent):
    """The same function; the processor time of each call goes into ``spent``."""

    def call(*args):
        start = time.process_time()
        result = answer(*args)
        spent.append(time.process_time() - start)
        return result

    return call
