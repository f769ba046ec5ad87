"""Twenty submissions, most of them odd: each gets what can be judged, the tables are compared in full, and the report says what was odd."""

import json

import pytest
from classroom import DOUBLE, SHORTEST, UNANSWERED, answered, hand_in, put_source
from nbformat.v4 import new_code_cell

from cmlib.grade import box
from cmlib.grade.__main__ import main

pytestmark = pytest.mark.skipif(bool(box.missing()), reason=f"without a box: {box.missing()}")


def reordered(notebook, change):
    notebook.cells = change(notebook.cells)
    return notebook


def in_another_language(notebook, cells=None):
    notebook.metadata.kernelspec = {"name": "ir", "display_name": "R", "language": "R"}
    notebook.metadata.language_info = {"name": "R"}
    notebook.cells = cells or notebook.cells
    return notebook


def hand_in_all(folder):
    """What the class hands in; Tina does nothing, Zoe is not on the roster."""
    wrong, split = "def double(x):\n    return x", ["def double(x):\n    return twice(np.asarray(x))", "def twice(x):\n    return x + x"]
    notebooks = {
        "anna": answered(),
        "ben": answered(double="def double(x):\n    return x / x[0] * x[0] * 2"),
        "carl": answered(shortest='def shortest(n):\n    return "X" * n'),
        "dora": "",
        "emil": None,
        "fred": "Dear professor, my computer broke.",
        "gina": '{"answers": [1, 2, 3]}',
        "hana": answered(double="def double(x)\n    return 2 * x"),
        "ivan": reordered(answered(double=wrong), lambda cells: [*cells, *answered().cells]),
        "jana": reordered(answered(), lambda cells: cells[::-1]),
        "kurt": reordered(answered(double=split[0]), lambda cells: [c for c in cells if "q9-1" not in str(c.metadata)] + [new_code_cell(split[1])]),
        "lena": in_another_language(answered(), [new_code_cell("double <- function(x) 2 * x")]),
        "mara": in_another_language(answered()),
        "nils": answered(double=DOUBLE.replace("double", "doubled")),
        "olga": reordered(answered(), lambda cells: [cells[0], new_code_cell("while True:\n    pass"), *cells[1:]]),
        "pete": answered(),
        "quin": answered(text=UNANSWERED),
        "rosa": answered(),
        "sven": answered(
            double="def double(x):\n    raise NotImplementedError()", shortest="def shortest(n):\n    raise NotImplementedError()", text=UNANSWERED
        ),
        "zoe": answered(shortest=SHORTEST + ' + "x"'),
    }
    assert len(notebooks) == 20
    for student, notebook in notebooks.items():
        hand_in(folder, student, notebook)
    hand_in(folder, "pete", answered(double=wrong), name="draft.ipynb")
    (folder / "rosa.ipynb").write_text(json.dumps(answered(double=wrong)))


@pytest.fixture(scope="module")
def graded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("class")
    put_source(folder / "source")
    hand_in_all(folder / "submitted")
    roster = [f"{s},{s.capitalize()},Smith,{s}@example.org" for s in MOODLE]
    (folder / "students.csv").write_text("\n".join(["id,first_name,last_name,email", *roster]))
    told = [
        *("--source", folder / "source"),
        *("--out", folder / "grades"),
        *("--roster", folder / "students.csv"),
        *("--seconds", 5),
        *("--seed", 1),
    ]
    with pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr("builtins.print", lambda *text, **how: printed.append(" ".join(map(str, text))))
        assert main([str(folder / "submitted"), *map(str, told)]) == 0
    return folder / "grades", "\n".join(printed)


NBGRADER = """\
assignment,duedate,timestamp,student_id,last_name,first_name,email,raw_score,late_submission_penalty,score,max_score
small,,,anna,Smith,Anna,anna@example.org,7.0,0.0,7.0,9.0
small,,,ben,Smith,Ben,ben@example.org,6.0,0.0,6.0,9.0
small,,,carl,Smith,Carl,carl@example.org,4.0,0.0,4.0,9.0
small,,,dora,Smith,Dora,dora@example.org,0.0,0.0,0.0,9.0
small,,,emil,Smith,Emil,emil@example.org,0.0,0.0,0.0,9.0
small,,,fred,Smith,Fred,fred@example.org,0.0,0.0,0.0,9.0
small,,,gina,Smith,Gina,gina@example.org,0.0,0.0,0.0,9.0
small,,,hana,Smith,Hana,hana@example.org,4.0,0.0,4.0,9.0
small,,,ivan,Smith,Ivan,ivan@example.org,7.0,0.0,7.0,9.0
small,,,jana,Smith,Jana,jana@example.org,7.0,0.0,7.0,9.0
small,,,kurt,Smith,Kurt,kurt@example.org,7.0,0.0,7.0,9.0
small,,,lena,Smith,Lena,lena@example.org,0.0,0.0,0.0,9.0
small,,,mara,Smith,Mara,mara@example.org,7.0,0.0,7.0,9.0
small,,,nils,Smith,Nils,nils@example.org,4.0,0.0,4.0,9.0
small,,,olga,Smith,Olga,olga@example.org,7.0,0.0,7.0,9.0
small,,,pete,Smith,Pete,pete@example.org,7.0,0.0,7.0,9.0
small,,,quin,Smith,Quin,quin@example.org,7.0,0.0,7.0,9.0
small,,,rosa,Smith,Rosa,rosa@example.org,7.0,0.0,7.0,9.0
small,,,sven,Smith,Sven,sven@example.org,0.0,0.0,0.0,9.0
small,,,zoe,,,,7.0,0.0,7.0,9.0
small,,,tina,Smith,Tina,tina@example.org,0.0,0.0,0.0,9.0
"""

FULL, NOTHING = "small: 9.1: 3 of 3; 9.2: 4 of 4; 9.3: still to be graded of 2", "small: 9.1: 0 of 3; 9.2: 0 of 4; 9.3: 0 of 2"
HALF = "small: 9.1: 0 of 3; 9.2: 4 of 4; 9.3: still to be graded of 2"
MOODLE = {
    "anna": ("7", FULL),
    "ben": ("6", FULL.replace("3 of 3", "2 of 3")),
    "carl": ("4", FULL.replace("4 of 4", "1 of 4")),
    "dora": ("0", NOTHING),
    "emil": ("0", NOTHING),
    "fred": ("0", NOTHING),
    "gina": ("0", NOTHING),
    "hana": ("4", HALF),
    "ivan": ("7", FULL),
    "jana": ("7", FULL),
    "kurt": ("7", FULL),
    "lena": ("0", NOTHING),
    "mara": ("7", FULL),
    "nils": ("4", HALF),
    "olga": ("7", FULL),
    "pete": ("7", FULL),
    "quin": ("7", FULL.replace("still to be graded", "0")),
    "rosa": ("7", FULL),
    "sven": ("0", NOTHING),
    "tina": ("", ""),
}

NOTES = {
    "dora": "the file is empty",
    "emil": "no notebook was handed in",
    "fred": "no notebook: the file is not JSON",
    "gina": "no notebook: JSON without cells",
    "hana": "code cell 2: raised SyntaxError",
    "lena": "the notebook's language is 'R'",
    "mara": "the notebook's language is 'R'",
    "olga": "code cell 2: too slow",
    "pete": "2 notebooks: 'small.ipynb' was read",
    "rosa": "handed in twice: 'rosa.ipynb' was not read",
    "zoe": "is not on the roster",
}


def test_nbgraders_table_in_full(graded):
    assert (graded[0] / "nbgrader.csv").read_text() == NBGRADER


def test_moodles_table_in_full(graded):
    lines = [f"{s},{s.capitalize()},Smith,{s}@example.org,{points},{words}" for s, (points, words) in MOODLE.items()]
    assert (graded[0] / "moodle.csv").read_text() == "\n".join(["Username,First name,Last name,Email address,small,small (feedback)", *lines, ""])


def test_canvas_table_in_full(graded):
    lines = [f'"Smith, {s.capitalize()}",,{s},,{points}' for s, (points, _) in MOODLE.items()]
    assert (graded[0] / "canvas.csv").read_text() == "\n".join(["Student,ID,SIS Login ID,Section,small", "    Points Possible,,,,9", *lines, ""])


def test_the_leaderboard_has_who_solved_it(graded):
    lines = (graded[0] / "leaderboard.csv").read_text().splitlines()[1:]
    assert lines[-1] == "small,9.2,letters too many,14,zoe,1"
    solvers = sorted(line.split(",")[4] for line in lines[:-1])
    assert solvers == sorted(s for s, (_, words) in MOODLE.items() if "9.2: 4" in words or s == "carl")
    assert {line.rsplit(",", 1)[1] for line in lines[:-1]} == {"0"} and {line.split(",")[3] for line in lines[:-1]} == {"1"}


@pytest.mark.parametrize("student", [*MOODLE, "zoe"])
def test_the_report_says_what_was_odd_and_only_that(graded, student):
    lines = [line for line in graded[1].split("\n") if line.startswith(f"  small {student}: ")]
    assert [NOTES[student] in line for line in lines] == [True] if student in NOTES else not lines


def test_every_student_has_a_page(graded):
    pages = {p.stem: p.read_text() for p in (graded[0] / "feedback").iterdir()}
    assert pages.keys() == {*MOODLE, "zoe"}
    assert "Nothing was handed in." in pages["tina"] and "`double` is not defined" in pages["nils"] and "a letter is a capital" in pages["carl"]


def test_free_text_is_left_to_a_person(graded):
    assert "13 submissions have free text to be graded by a person" in graded[1]
