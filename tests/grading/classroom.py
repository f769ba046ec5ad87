"""A small exercise and submissions to it, for the tests of what happens to a whole class."""

import json

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

NAME = "small"
FIRST = "import numpy as np\nfrom cmlib.grade import trial"
DOUBLE = "def double(x):\n    return 2 * np.asarray(x)"
SHORTEST = 'def shortest(n):\n    return "x" * n'
TEXT = "Because each weight is read once."
UNANSWERED = "YOUR ANSWER HERE"  # what nbgrader puts into the student version

DOUBLE_TESTS = """### BEGIN HIDDEN TESTS
t = trial("9.1", globals())
x = t.rng.normal(size=5)
with t.part("twice each number", weight=2):
    t.close(t.call("double", x), 2 * x)
with t.part("nothing in, nothing out"):
    t.close(t.call("double", x[:0]), x[:0])
t.score(3)
### END HIDDEN TESTS"""

SHORTEST_TESTS = """### BEGIN HIDDEN TESTS
t = trial("9.2", globals())
n = int(t.rng.integers(3, 6))
with t.part("a text of at least n letters"):
    text = t.call("shortest", n)
    assert isinstance(text, str) and len(text) >= n, "too short"
    t.figure("letters too many", len(text) - n)
with t.part("in lower case", weight=3):
    assert t.call("shortest", n).islower(), "a letter is a capital"
t.score(4)
### END HIDDEN TESTS"""


def _info(grade_id, *, points=None, solution=False, locked=False):
    graded = {"grade": points is not None, **({} if points is None else {"points": points})}
    return {"nbgrader": {"schema_version": 3, "grade_id": grade_id, "solution": solution, "locked": locked, "task": False, **graded}}


def _solved(code):
    first, *rest = code.split("\n")
    return "\n".join([first, "    ### BEGIN SOLUTION", *rest, "    ### END SOLUTION"])


def source():
    """The source notebook: two questions with hidden tests (3 and 4 points), one that a person grades (2 points)."""
    cells = [
        new_code_cell(FIRST),
        new_markdown_cell("# Small", metadata=_info("title", locked=True)),
        new_code_cell(_solved(DOUBLE), metadata=_info("double", solution=True)),
        new_code_cell(DOUBLE_TESTS, metadata=_info("q9-1", points=3, locked=True)),
        new_code_cell(_solved(SHORTEST), metadata=_info("shortest", solution=True)),
        new_code_cell(SHORTEST_TESTS, metadata=_info("q9-2", points=4, locked=True)),
        new_markdown_cell("**Rubric**: reuse of weights.", metadata=_info("q9-3", points=2, solution=True)),
    ]
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}, "language_info": {"name": "python"}}
    return new_notebook(cells=cells, metadata=kernel)


def put_source(folder):
    """``folder/small/small.ipynb``; returns its path."""
    place = folder / NAME / f"{NAME}.ipynb"
    place.parent.mkdir(parents=True)
    nbformat.write(source(), place)
    return place


def answered(double=DOUBLE, shortest=SHORTEST, text=TEXT):
    """A submission's notebook with these answers, as a student hands it in."""
    notebook = source()
    for cell in notebook.cells:
        name = cell.metadata.get("nbgrader", {}).get("grade_id")
        cell.source = {"double": double, "shortest": shortest, "q9-3": text, "q9-1": "", "q9-2": ""}.get(name, cell.source)
    return notebook


def hand_in(folder, student, notebook=None, name=f"{NAME}.ipynb"):
    """``folder/<student>/small/small.ipynb``: a notebook, or text or bytes as they are; None leaves the folder empty."""
    place = folder / student / NAME / name
    place.parent.mkdir(parents=True, exist_ok=True)
    if notebook is not None:
        content = json.dumps(notebook) if isinstance(notebook, dict) else notebook
        place.write_bytes(content if isinstance(content, bytes) else content.encode())
    return place
