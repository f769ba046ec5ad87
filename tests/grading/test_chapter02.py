"""Exercise 02: its graders over right and wrong solutions, its visible checks, and its source notebook from top to bottom."""

import time

import nbformat
import pytest
from nbclient import NotebookClient
from solutions_chapter02 import solutions
from tried import Graders

from cmlib.grade import chapter02, check
from cmlib.grade.checks import CheckFailed, questions


class TestGraders(Graders):
    solutions = solutions


def test_the_source_notebook_runs_with_all_points_and_every_visible_check_holding(tmp_path):
    notebook = nbformat.read(solutions.path, as_version=4)
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
def test_a_visible_check_holds_for_the_reference_and_fails_on_nothing(key, capsys):
    check(key, solutions.reference)  # what it needs is loaded
    start = time.perf_counter()
    check(key, solutions.reference)
    spent = time.perf_counter() - start
    assert "Hidden checks remain" in capsys.readouterr().out and spent < 0.5  # 0.05 s on an idle machine, the answer's own time included
    with pytest.raises(CheckFailed, match="is not defined"):
        check(key, {})
