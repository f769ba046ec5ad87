"""One submission, judged: points as earned, whatever state the notebook is in; and what is read of a folder of submissions."""

import json
import os
import pickle
import re
from dataclasses import replace

import pytest
from small import QUICK, SLOW, answered, exercise, named, needs_a_box, notebook, submit, test_cell

from cmlib.grade.judge import Grade, digest, judge
from cmlib.grade.source import read as read_source
from cmlib.grade.submission import LARGEST, find, read
from cmlib.grade.trial import GraderError

DOUBLE = """
x = t.rng.normal(size=(4, 3))
with t.part("twice, entry by entry", weight=3):
    t.close(t.call("double", x), 2 * x)
with t.part("of nothing, nothing"):
    t.close(t.call("double", x[:0]), x[:0])
"""
TOTAL = """
x = t.rng.normal(size=5)
with t.part("the sum"):
    t.close(t.call("total", x), x.sum())
"""
RIGHT = ("import numpy as np", "def double(x):\n    return 2 * x", "def total(x):\n    return np.sum(x)")


@pytest.fixture
def small(tmp_path):
    return exercise(tmp_path, {"1.1": DOUBLE, "1.2": TOTAL})


def points(grade: Grade) -> list[float | None]:
    return [m.points for m in grade.marks]


LEAVES_A_KILLER = """
import os, time
def double(x):
    own = os.getpid()
    if not os.fork():
        time.sleep(0.1)
        os.kill(own, 9)
        os._exit(0)
    return 2 * x
"""
STATES = {  # cells, points of the two questions
    "as it should be": (RIGHT, [2, 2]),
    "cells in another order": (RIGHT[::-1], [2, 2]),
    "cells copied": (RIGHT * 2, [2, 2]),
    "all in one cell": (["\n".join(RIGHT)], [2, 2]),
    "a cell split": (["import numpy as np", "def double(x):\n    y = x + x\n    return y", *RIGHT[2:]], [2, 2]),
    "a cell deleted": (RIGHT[:2], [2, 0]),
    "the released tests left in": ([*RIGHT, 'check("1.1")', 'hint("1.2")', 'from cmlib.grade import check, hint\ncheck("nonsense")'], [2, 2]),
    "an import forgotten": (RIGHT[1:], [2, 0]),
    "a syntax error": ([*RIGHT[:2], "def total(x:\n    return 0"], [2, 0]),
    "an error before the answers": (["1 / 0", *RIGHT], [2, 2]),
    "an error in the cell of one": ([*RIGHT[:2], "undefined\n" + RIGHT[2]], [2, 0]),
    "a later cell that spoils one": ([*RIGHT, "double = None"], [0, 2]),
    "no function": (["double = 3", *RIGHT[::2]], [0, 2]),
    "magics and shell": (
        ["%matplotlib inline\n!pip install x\n?print\nimport numpy as np", "%%time\n" + RIGHT[1], "%%bash\nrm -rf /", RIGHT[2]],
        [2, 2],
    ),
    "a percent sign at a line's start": (["y = (7\n % 4)", *RIGHT], [2, 2]),
    "a warning and a print": (["import sys, warnings\nwarnings.warn('x')\nprint('y', file=sys.stderr)\nprint('z' * 10**6)", *RIGHT], [2, 2]),
    "sys.exit in a cell": (["import sys\nsys.exit()", *RIGHT], [2, 2]),
    "the process ended in a cell": (["import os\nos._exit(0)", *RIGHT], [2, 2]),
    "an endless cell": (["while True: pass", *RIGHT], [2, 2]),
    "wrong for the empty": (["def double(x):\n    return 2 * x if len(x) else None", *RIGHT[::2]], [1.5, 2]),
    "raises": (["def double(x):\n    raise KeyError('a')", *RIGHT[::2]], [0, 2]),
    "argument written over": (["def double(x):\n    x *= 2\n    return x", *RIGHT[::2]], [2, 2]),
    "as nested lists": (["def double(x):\n    return [[2 * float(v) for v in row] for row in x] or x", *RIGHT[::2]], [2, 2]),
    "too slow": (["import time\ndef double(x):\n    time.sleep(9)", *RIGHT[::2]], [0, 2]),
    "a call that leaves a process to spoil the next question": (
        [LEAVES_A_KILLER, "import time\ndef total(x):\n    time.sleep(0.3)\n    return x.sum()"],
        [2, 2],
    ),
    "folder changed, streams closed": (
        ["import os, sys\nos.chdir('/')\nsys.stdout.close(); sys.stderr.close(); os.close(1); os.close(2)", *RIGHT],
        [2, 2],
    ),
}


@needs_a_box
@pytest.mark.parametrize(("cells", "expected"), named(STATES))
def test_a_notebook_in_any_state_is_graded_by_what_can_be_judged(tmp_path, small, cells, expected):
    grade = judge(submit(tmp_path, *cells), small, limits=QUICK)
    assert points(grade) == expected, (grade.marks, grade.notes)


@needs_a_box
def test_reasons_and_notes_name_the_fault(tmp_path, small):
    cells = ["x = [1,", "import os\nos.abort()", "def double(x):\n    raise ValueError('only flat')"]
    grade = judge(submit(tmp_path, *cells), small, limits=QUICK)
    reasons = [p.reason for m in grade.marks for p in m.parts]
    assert reasons[0] == "raised ValueError (line 2: raise ValueError('only flat'))"
    assert grade.marks[0].parts[0].got == "raised ValueError: only flat (line 2: raise ValueError('only flat'))"
    assert reasons[2] == "`total` is not defined"
    assert grade.notes[0].startswith("code cell 1: raised SyntaxError") and grade.notes[1] == "code cell 2: the code ended its own process"


TELLING = {  # ways to say what came in
    "message": "raise ValueError(str(x))",
    "type of the exception": "raise type(str(x), (ValueError,), {})",
    "text of the line": "import linecache\n    linecache.getline = lambda *_: str(x)\n    raise ValueError",
    "type of the result": "return type(str(x), (), {})()",
    "reply": "import gc\n    from cmlib.grade.wire import Pipe, pack\n"
    "    pipe = next(o for o in gc.get_objects() if isinstance(o, Pipe))\n    [pipe.send(pack([n, 'error', str(x)])) for n in range(30)]",
}


@needs_a_box
def test_no_hidden_input_comes_back_in_a_reason(tmp_path):
    hidden = 'x = t.draw(10**11, 10**12)\nt.figure("x", x)\nwith t.part("kept"):\n    t.close(t.call("tell", x), 0)'
    source = exercise(tmp_path, {f"1.{i}": hidden.replace("tell", f"tell{i}") for i in range(len(TELLING))})
    grade = judge(submit(tmp_path, *(f"def tell{i}(x):\n    {text}" for i, text in enumerate(TELLING.values()))), source, limits=QUICK)
    for mark in grade.marks:
        (part,) = mark.parts
        assert str(int(mark.figures["x"])) in part.got and not re.search("[0-9]{6}", part.reason), part
        assert part.reason


@needs_a_box
def test_another_students_id_in_the_notebook_is_a_note(tmp_path, small):
    said = {
        "": "",
        "student = 'ada '": "",
        "student = ''": "`student` is '' in the notebook",
        "student = 'b\\x1b'": "`student` is 'b ' in the notebook",
    }
    grades = [judge(submit(tmp_path, *RIGHT, cell), small, limits=QUICK) for cell in said]
    assert [(*g.notes, "")[0] for g in grades] == [*said.values()] and {g.points for g in grades} == {4}


@needs_a_box
def test_many_broken_cells_are_few_lines(tmp_path, small):
    notes = judge(submit(tmp_path, *["1 / 0"] * 40, *RIGHT), small, limits=QUICK).notes
    assert len(notes) == 11 and notes[-1] == "and 30 more cells"


@needs_a_box
def test_inputs_are_fresh_unless_a_seed_is_given(tmp_path):
    seen = exercise(tmp_path, {"1.1": 'x = t.rng.random()\nt.figure("x", x)\nwith t.part("a"):\n    t.close(t.call("same", x), x)'})
    submission = submit(tmp_path, "def same(x):\n    return x")
    figures = [judge(submission, seen, seed=seed, limits=QUICK).marks[0].figures["x"] for seed in (None, None, 5, 5)]
    assert len(set(figures)) == 3 and figures[2] == figures[3]


@needs_a_box
def test_a_check_can_watch_how_the_code_works(tmp_path):
    hidden = """
asked = []
def accuracy(keep, *, split="test"):
    asked.append(split)
    if keep > 1:
        raise ValueError("keep is a share")
    return 1 - (keep - .3) ** 2, np.arange(3)
with t.part("the best is chosen"):
    t.close(t.call("choose", accuracy, [.1, .2, .3, .4, 2.]), .3)
with t.part("on the validation split"):
    assert asked == ["validation"] * 5
"""
    code = """
def choose(accuracy, ratios):
    def score(r):
        try:
            return accuracy(r, split="validation")[0]
        except ValueError as error:
            assert str(error) == "keep is a share"
            return 0
    return max(ratios, key=score)
"""
    watched = exercise(tmp_path, {"1.1": hidden})
    assert points(judge(submit(tmp_path, code), watched, limits=QUICK)) == [2]
    assert points(judge(submit(tmp_path, code.replace("validation", "test")), watched, limits=QUICK)) == [1]


@needs_a_box
def test_tensors_arrive_as_tensors_and_come_back_as_arrays(tmp_path):
    hidden = 'x = t.rng.normal(size=(2, 3))\nwith t.part("relu"):\n    t.close(t.call("relu", t.tensor(x)), np.maximum(x, 0))'
    code = "import torch\ndef relu(x):\n    assert isinstance(x, torch.Tensor)\n    return x.clamp(min=0).requires_grad_()"
    assert points(judge(submit(tmp_path, code), exercise(tmp_path, {"1.1": hidden}), limits=replace(QUICK, cell=60, memory=2**31))) == [2]


@needs_a_box
def test_afresh_leaves_nothing_that_a_call_left(tmp_path):
    hidden = 'with t.part("hidden"):\n    t.call("hide", 7)\n    t.afresh()\n    t.close(t.call("found"), 7)'
    code = """
import cmlib.grade as kit, os, tempfile
memory, left = {}, tempfile.gettempdir() + "/x"
def hide(x):
    memory["x"] = kit.x = x
    open(left, "w").write(str(x))
    if not os.fork():
        while True: pass
    return x
def found():
    return memory.get("x") or getattr(kit, "x", None) or os.path.exists(left) and 7
"""
    assert points(judge(submit(tmp_path, code), exercise(tmp_path, {"1.1": hidden}), limits=QUICK)) == [0]
    assert points(judge(submit(tmp_path, code), exercise(tmp_path, {"1.1": hidden.replace("    t.afresh()\n", "")}), limits=QUICK)) == [2]


@needs_a_box
def test_free_text_waits_for_a_person_unless_there_is_none(tmp_path):
    source = exercise(tmp_path, {"1.1": TOTAL}, answered("q1.2", "Why?\n### BEGIN SOLUTION\nBecause.\n### END SOLUTION"))
    why = [answered("q1.2", text) for text in ("Why?\nSo.", "Why?\nYOUR ANSWER HERE", "YOUR ANSWER HERE", " why? ".strip().title())]
    grades = [
        judge(submit(tmp_path, RIGHT[0], RIGHT[2], *cells), source, limits=QUICK) for cells in ([why[0]], [why[1]], [why[2]], [], [why[1], why[0]])
    ]
    assert [points(g)[1] for g in grades] == [None, 0, 0, 0, None]
    assert [g.marks[1].text for g in grades][::4] == ["Why?\nSo."] * 2
    assert [(g.points, g.max) for g in grades] == [(2, 4)] * 5


@needs_a_box
def test_a_grade_is_plain_json_and_comes_back_equal(tmp_path, small):
    grade = judge(submit(tmp_path, *RIGHT[:2], "def total(x): return float('nan')"), small, limits=QUICK)
    assert Grade.from_json(grade.to_json()) == grade
    json.loads(grade.to_json(), parse_constant=pytest.fail)
    assert pickle.loads(pickle.dumps((grade, small))) == (grade, small)


def test_the_digest_changes_with_all_that_a_grade_is_made_of(tmp_path, small):
    first = submit(tmp_path, *RIGHT)
    assert digest(first, small) == digest(submit(tmp_path, *RIGHT), small)
    others = [
        digest(submit(tmp_path, *RIGHT, student="eve"), small),
        digest(submit(tmp_path, *RIGHT, "1"), small),
        digest(submit(tmp_path, *RIGHT), exercise(tmp_path, {"1.1": DOUBLE, "1.2": TOTAL + "#"})),
        digest(replace(first, path=None), small),
    ]
    assert len({digest(first, small), *others}) == 5


@needs_a_box
def test_a_fault_of_the_checks_is_no_fault_of_the_student(tmp_path):
    for hidden in ("x = undefined", 'with t.part("a"):\n    t.call("total", object())', "pass"):
        with pytest.raises(GraderError):
            judge(submit(tmp_path, *RIGHT), exercise(tmp_path, {"1.1": hidden}), limits=QUICK)


def test_without_a_notebook_nothing_is_run_and_every_part_says_why(tmp_path, small):
    path = submit(tmp_path, *RIGHT).path
    for data in (b"", b"PK\3\4 a zip", b'{"cells": 3}', b"[]"):
        path.write_bytes(data)
        grade = judge(find(tmp_path / "submitted", "small")[0], small)
        assert points(grade) == [0, 0] and len(grade.notes) == 1
        assert {p.reason for m in grade.marks for p in m.parts} == {"`double` is not defined", "`total` is not defined"}


UNREADABLE = {
    "empty": (b"", "empty"),
    "no json": (b"hello", "not JSON"),
    "json of another kind": (b'["cells"]', "without cells"),
    "cells of another kind": (b'{"cells": {"a": 1}}', "without cells"),
    "not utf-8": (b'{"cells": ["\xff\xfe"]}', "not JSON"),
    "nested ten thousand deep": (b'{"cells": ' + b"[" * 10_000 + b"]" * 10_000 + b"}", "not JSON"),
    "a number of a million digits": (b'{"cells": [' + b"1" * 10**6 + b"]}", "not JSON"),
}


@pytest.mark.parametrize(("data", "says"), named(UNREADABLE))
def test_what_is_no_notebook_is_a_line_of_the_report(tmp_path, data, says):
    submission = submit(tmp_path)
    submission.path.write_bytes(data)
    notebook = read(submission)
    assert notebook.content is None and says in notebook.notes[0] and notebook.code == ()


def test_a_notebook_of_100_mb_is_not_read(tmp_path):
    submission = submit(tmp_path)
    os.truncate(submission.path, 100 << 20)
    assert "100 MB, more than the 16 MB" in read(submission).notes[0]
    assert LARGEST == 16 << 20


def test_another_language_is_said_and_cells_of_any_kind_are_taken_as_far_as_they_can(tmp_path):
    submission = submit(tmp_path)
    odd = [
        None,
        3,
        "x",
        {},
        {"cell_type": "code"},
        {"cell_type": "code", "source": 3},
        {"cell_type": "code", "source": ["a\n", 3, "b"], "metadata": "x"},
    ]
    submission.path.write_text(json.dumps(notebook(*RIGHT, language="R") | {"cells": [*odd, {"cell_type": "code", "source": "\ud800"}]}))
    got = read(submission)
    assert got.code == ("a\nb", "?") and "'R'" in got.notes[0]
    submission.path.write_text(json.dumps(notebook(answered("q1.2", "text"))))
    assert read(submission).notes == ("the notebook has no code",)


def test_links_pipes_and_folders_are_not_followed(tmp_path):
    secret = submit(tmp_path, "secret = 1", student="bob").path
    for student, make in {
        "file": lambda p: p.symlink_to(secret),
        "pipe": os.mkfifo,
        "folder": lambda p: p.mkdir(),
        "device": lambda p: p.symlink_to("/dev/zero"),
        "loop": lambda p: p.symlink_to(p),
    }.items():
        path = tmp_path / "submitted" / student / "small.ipynb"
        path.parent.mkdir()
        make(path)
    (tmp_path / "submitted" / "whole").symlink_to(secret.parent)
    (tmp_path / "submitted" / "flat.ipynb").symlink_to(secret)
    (tmp_path / "submitted" / "inner").mkdir()
    (tmp_path / "submitted" / "inner" / "small").symlink_to(secret.parent)
    found = {s.student: read(s) for s in find(tmp_path / "submitted", "small")}
    assert set(found) == {"bob", "file", "pipe", "folder", "device", "loop", "whole", "flat", "inner"}
    assert [name for name, n in found.items() if n.content is not None] == ["bob"]
    assert "link" in found["file"].notes[0] and found["pipe"].notes == ("'small.ipynb' is no file",)


def test_every_layout_is_found_once_a_student(tmp_path):
    text = json.dumps(notebook(*RIGHT))
    for path in (
        "ada/small/small.ipynb",  # nbgrader's
        "ada/other/other.ipynb",
        "ben/small.ipynb",
        "ben/notes.ipynb",
        "cem.ipynb",
        "dora/anything.ipynb",
        "eve/small/a.ipynb",
        "eve.ipynb",
        "Jürgen Ω/small.ipynb",
        "a\nb/small.ipynb",
        "empty/readme.txt",
        ".hidden/small.ipynb",
        "ben/.ipynb_checkpoints/small.ipynb",
        "stray.txt",
    ):
        place = tmp_path / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)
    (tmp_path / "ada/small/timestamp.txt").write_text("2030-01-02 03:04:05 UTC\n")
    found = {s.student: s for s in find(tmp_path, "small")}
    where = {name: s.path and str(s.path.relative_to(tmp_path)) for name, s in found.items()}
    assert where == {
        "Jürgen Ω": "Jürgen Ω/small.ipynb",
        "a\\nb": "a\nb/small.ipynb",
        "ada": "ada/small/small.ipynb",
        "ben": "ben/small.ipynb",
        "cem": "cem.ipynb",
        "dora": "dora/anything.ipynb",
        "empty": None,
        "eve": "eve/small/a.ipynb",
    }
    assert found["ada"].timestamp == "2030-01-02 03:04:05 UTC" and found["ben"].timestamp is None
    assert found["ben"].notes == ("2 notebooks: 'small.ipynb' was read",) and found["eve"].notes == ("handed in twice: 'eve.ipynb' was not read",)
    assert found["empty"].notes == ("no notebook was handed in",) and found["ada"].notes == ()


def test_the_source_is_read_in_order_and_its_faults_are_told(tmp_path):
    source = exercise(tmp_path, {"1.2": DOUBLE, "1.1": TOTAL}, answered("q1.3", "Why?\n### BEGIN SOLUTION\nBecause.\n### END SOLUTION\n"))
    assert [(q.key, q.cell, q.points, q.by_hand) for q in source.questions] == [
        ("1.2", "q1.2", 2, False),
        ("1.1", "q1.1", 2, False),
        ("1.3", "q1.3", 2, True),
    ]
    assert 'check("' not in source.questions[0].hidden and source.questions[0].released == 'check("1.2")\n'
    assert source.questions[2].released == "Why?\n" and source.points == 6
    for cells in (
        [],
        [test_cell("1.1", TOTAL, 1)] * 2,
        [test_cell("1.1", TOTAL, 0)],
        [test_cell("1.1", "x = (", 1)],
        [{"cell_type": "code", "metadata": {"nbgrader": {"grade_id": "q1", "grade": True, "points": 1}}, "source": ["check('1')"]}],
    ):
        path = tmp_path / "bad.ipynb"
        path.write_text(json.dumps(notebook(*cells)))
        with pytest.raises((ValueError, SyntaxError)):
            read_source(path)


@needs_a_box
def test_what_a_submission_says_is_one_line_that_no_terminal_obeys(tmp_path, small):
    cells = ["raise ValueError('\\x1b[2J\\nSCORE 100\\u202e' * 1000)", "def double(x):\n    raise type('\\x1b]0;', (Exception,), {})('\\r' * 9)"]
    grade = judge(submit(tmp_path, *cells), small, limits=QUICK)
    said = [*grade.notes, *(p.reason for m in grade.marks for p in m.parts)]
    assert all(line.isprintable() and len(line) < 1000 for line in said) and "SCORE" in said[0]


@needs_a_box
@pytest.mark.parametrize(("first", "seconds"), [("", 1), ("import torch", 5)], ids=["numpy", "torch"])
def test_a_submission_with_six_questions_takes_a_second_or_five_with_torch(tmp_path, first, seconds):
    six = exercise(tmp_path, {f"1.{i}": DOUBLE for i in range(6)})
    grade = judge(submit(tmp_path, first, *RIGHT), six, limits=replace(QUICK, cell=60 * SLOW, memory=2**31))
    assert grade.points == 12 and grade.seconds < seconds * SLOW
