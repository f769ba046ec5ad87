"""A student notebook in a real JupyterLab: an answer is typed and run, its check and hint cells speak, locked cells stay locked."""

import json
import shutil

import nbformat
import pytest

from cmlib.bench import browser
from cmlib.grade import release

RAN = "([prompt, before]) => prompt.innerText !== before && /[0-9]/.test(prompt.innerText)"


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    folder = tmp_path_factory.mktemp("course")
    shutil.copytree(release.COURSE / "source/chapter01", folder / "source/chapter01")
    shutil.copy(release.COURSE / "nbgrader_config.py", folder)
    return folder, release.release("chapter01", folder)


@pytest.fixture(scope="module")
def page(course):
    folder, made = course
    with browser.lab(folder, str(made.relative_to(folder))) as found:
        yield found


class Cells:
    """The cells of the open notebook, by nbgrader's ids, as a learner has them: click, type, Shift+Enter, read."""

    def __init__(self, page, notebook):
        self.page = page
        self.ids = [c.metadata.get("nbgrader", {}).get("grade_id") or c.id for c in nbformat.read(notebook, as_version=4).cells]

    def cell(self, name):
        return self.page.locator(".jp-NotebookPanel .jp-Notebook-cell").nth(self.ids.index(name))

    def run(self, name):
        """Run a cell and return what it shows."""
        prompt = self.cell(name).locator(".jp-InputPrompt")
        before = prompt.inner_text()
        prompt.click()
        self.page.keyboard.press("Shift+Enter")
        self.page.wait_for_function(RAN, arg=[prompt.element_handle(), before], timeout=60_000)
        return "\n".join(self.cell(name).locator(".jp-OutputArea-output").all_inner_texts())

    def write(self, name, text):
        self.cell(name).locator(".cm-content").click()
        self.page.keyboard.press("Control+A")
        self.page.keyboard.insert_text(text)

    def text(self, name):
        return self.cell(name).locator(".cm-content").inner_text()

    def add_below(self, name, text):
        """A new cell, as the key b makes it."""
        self.cell(name).locator(".jp-InputPrompt").click()
        self.page.keyboard.press("Escape")
        self.page.keyboard.press("b")
        self.ids.insert(self.ids.index(name) + 1, text)
        self.write(text, text)
        return self.run(text)


@pytest.fixture(scope="module")
def cells(page, course):
    return Cells(page, course[1])


@pytest.fixture(scope="module")
def solution(course):
    """The reference of question 1.1, as the source has it."""
    found = nbformat.read(course[0] / "source/chapter01/chapter01.ipynb", as_version=4).cells
    return next(c.source for c in found if c.metadata.get("nbgrader", {}).get("grade_id") == "a1-1")


def test_an_answer_is_typed_run_and_checked(cells, solution):
    assert cells.run("g1") == ""
    assert "raise NotImplementedError()" in cells.text("a1-1")
    cells.run("a1-1")
    failed = cells.run("q1-1")
    assert failed.startswith("1.1: not answered yet (raised NotImplementedError") and len(failed.splitlines()) == 1
    cells.write("a1-1", solution.replace("bias * cout", "0"))
    assert cells.run("a1-1") == ""
    failed = cells.run("q1-1")
    assert failed.startswith("1.1: of 3 visible checks 3 failed.") and "Traceback" not in failed and "Hint 1 of 3 for 1.1: " in failed
    assert "tried     conv_cost(3, 8, 3, 10)" in failed and "came out  (216, 13824)" in failed
    assert "expected  (224, 13824)" in failed and "the biases are parameters too" in failed
    cells.write("a1-1", solution)
    assert cells.run("a1-1") == ""
    assert cells.run("q1-1").startswith("1.1: the visible checks hold (3 of 3). Hidden checks remain")


def test_hints_come_one_by_one_and_are_noted(cells, course):
    assert cells.add_below("q1-1", 'hint("1.3")').startswith("Hint 1 of 3 for 1.3: ")
    assert cells.run('hint("1.3")').startswith("Hint 2 of 3 for 1.3: ")
    noted = [json.loads(line) for line in (course[1].parent / "hints.jsonl").read_text().splitlines()]
    assert [n["hint"] for n in noted if n["question"] == "1.3"] == [1, 2]


def test_each_student_sees_numbers_of_their_own(cells):
    numbers = []
    for student in ("ada", "bob"):
        cells.write("student", f'student = "{student}"')
        cells.run("student")
        numbers.append(cells.run("a1-2").split("}")[0])
    assert all("'kernel': " in n for n in numbers) and numbers[0] != numbers[1]


def test_a_check_cell_cannot_be_altered(page, cells):
    before = cells.text("q1-1")
    cells.cell("q1-1").locator(".cm-content").click()
    page.keyboard.insert_text("nonsense")
    assert cells.text("q1-1") == before == 'check("1.1")'
    cells.cell("q1-1").locator(".jp-InputPrompt").click()
    count = page.locator(".jp-NotebookPanel .jp-Notebook-cell").count()
    page.keyboard.press("d")
    page.keyboard.press("d")
    assert page.locator(".jp-NotebookPanel .jp-Notebook-cell").count() == count


def test_the_open_problem_shows_its_figure(cells, course):
    source = nbformat.read(course[0] / "source/chapter01/chapter01.ipynb", as_version=4).cells
    cells.write("a1-12", next(c.source for c in source if c.metadata.get("nbgrader", {}).get("grade_id") == "a1-12"))
    assert "% right, 19,240 bytes" in cells.run("g1-12")
    assert cells.run("a1-12") == ""
    assert "Measured: bytes 2," in cells.run("q1-12")
