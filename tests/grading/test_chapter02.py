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


def timed(answer, spent):
    """The same function; the processor time of each call goes into ``spent``."""

    def call(*args):
        start = time.process_time()
        result = answer(*args)
        spent.append(time.process_time() - start)
        return result

    return call
