"""make exercises: nbgrader accepts the sources, and neither solutions nor hidden tests leave them."""

import json
import re
import shutil

import nbformat
import pytest
from nbgrader.validator import Validator

from cmlib.grade import checks, release
from cmlib.grade.source import read

NAMES = release.exercises()


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    """A course of its own with the kit's sources, all released."""
    folder = tmp_path_factory.mktemp("course")
    shutil.copytree(release.COURSE / "source", folder / "source", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    shutil.copy(release.COURSE / "nbgrader_config.py", folder)
    for name in NAMES:
        release.release(name, folder)
    return folder


def notebook(course, name):
    return course / "release" / name / f"{name}.ipynb"


def source_cells(name):
    return nbformat.read(release.COURSE / "source" / name / f"{name}.ipynb", as_version=4).cells


def secrets(name):
    """Every line of a solution or of a hidden test that the released part of the source does not have as well."""
    hidden, shown = set(), set()
    for cell in source_cells(name):
        inside = False
        for line in map(str.strip, cell.source.splitlines()):
            inside = inside or line.startswith("### BEGIN")
            (hidden if inside else shown).add(line)
            inside = inside and not line.startswith("### END")
    return {line for line in hidden - shown if len(line) > 12}


def test_the_chapters_are_there():
    assert {"chapter01", "chapter02"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_no_solution_and_no_hidden_test_is_released(course, name):
    lines, text = secrets(name), "\n".join(c.source for c in nbformat.read(notebook(course, name), as_version=4).cells)
    assert len(lines) > 100
    assert [line for line in lines if line in text] == []
    assert not re.search(r"BEGIN (SOLUTION|HIDDEN|MARK)|\btrial\(|t\.part|t\.score|Rubric|Sample answer", text)
    assert all(not cell.get("outputs") for cell in json.loads(notebook(course, name).read_text())["cells"])
    assert [p.name for p in notebook(course, name).parent.iterdir()] == [f"{name}.ipynb"]


@pytest.mark.parametrize("name", NAMES)
def test_the_search_finds_what_leaks(course, name):
    kept = next(c for c in source_cells(name) if "BEGIN HIDDEN" in c.source)
    assert any(line in kept.source for line in secrets(name))


@pytest.mark.parametrize("name", NAMES)
def test_every_question_has_its_check_its_hints_and_its_cells(course, name):
    cells = nbformat.read(notebook(course, name), as_version=4).cells
    graded = {c.metadata.nbgrader.grade_id: c for c in cells if c.metadata.get("nbgrader", {}).get("grade")}
    questions = read(release.COURSE / "source" / name / f"{name}.ipynb").questions
    coding = [q for q in questions if not q.by_hand]
    assert len(coding) >= 8 and len(questions) - len(coding) >= 2 and set(graded) == {q.cell for q in questions}
    for q in coding:
        cell, asked = graded[q.cell], checks.find(q.key)
        assert cell.source.strip() == f'check("{q.key}")' and cell.metadata.nbgrader.locked and not cell.metadata.deletable
        assert (len(set(asked.hints)) == 3 and asked.name in q.hidden) or asked.name == "encode"
    for q in questions:
        if q.by_hand:
            assert graded[q.cell].source.strip() == "YOUR ANSWER HERE"
    assert set(checks.questions(__import__(f"cmlib.grade.{name}", fromlist=[name]))) == {q.key for q in coding}


def test_validate_fails_as_released_and_holds_once_solved(course):
    made = notebook(course, "chapter01")
    found = Validator().validate(str(made))
    assert len(found["failed"]) == len(read(course / "source/chapter01/chapter01.ipynb").questions)
    assert "1.1: not answered yet" in found["failed"][0]["raw_error"] and "Traceback" not in found["failed"][0]["raw_error"]
    cells = {c.metadata.get("nbgrader", {}).get("grade_id"): c.source for c in source_cells("chapter01")}
    solved = nbformat.read(made, as_version=4)
    for cell in solved.cells:
        if cell.metadata.get("nbgrader", {}).get("solution"):
            cell.source = cells[cell.metadata.nbgrader.grade_id]
        elif cell.source == 'student = ""':
            cell.source = 'student = "ada"'
    folder = course / "solved"
    folder.mkdir()
    nbformat.write(solved, folder / "chapter01.ipynb")
    assert Validator().validate(str(folder / "chapter01.ipynb")) == {}


def test_work_is_not_overwritten(course):
    made = notebook(course, "chapter01")
    release.release("chapter01", course)  # untouched: made anew
    before, work = made.read_bytes(), nbformat.read(made, as_version=4)
    next(c for c in work.cells if c.metadata.get("nbgrader", {}).get("solution")).source += "\n# mine"
    made.chmod(0o644)
    nbformat.write(work, made)
    with pytest.raises(ValueError, match="has been worked in, and would be overwritten: move it away first"):
        release.release("chapter01", course)
    assert "# mine" in made.read_text()
    made.write_bytes(before)


def test_a_wrong_name_is_one_line(capsys):
    assert release.main(["chapter99"]) == 2
    assert capsys.readouterr().err.startswith("cmlib: no exercise 'chapter99'; there are chapter01, chapter02")


def test_a_source_that_nbgrader_refuses_is_said(course, tmp_path):
    shutil.copytree(course / "source/chapter01", tmp_path / "source/chapter01")
    shutil.copy(course / "nbgrader_config.py", tmp_path)
    place = tmp_path / "source/chapter01/chapter01.ipynb"
    place.write_text(place.read_text().replace("### END HIDDEN TESTS", "", 1))
    with pytest.raises(ValueError, match="nbgrader refuses chapter01"):
        release.release("chapter01", tmp_path)
