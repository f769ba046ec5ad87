"""check() and hint() in a notebook: what they say, what they keep, how quick they are; a variant is a student's own."""

import json
import subprocess
import sys
import textwrap
import time

import pytest

from cmlib.grade import check, hint
from cmlib.grade import checks as kit
from cmlib.grade.checks import REMAIN, CheckFailed, Question, find
from cmlib.grade.variants import variant


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A notebook's own folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def given(folder):
    return [(e["question"], e["hint"]) for e in map(json.loads, (folder / "hints.jsonl").read_text().splitlines())]


def conv_cost(cin, cout, kernel, size, stride=1, padding=0, groups=1, bias=True):
    out = (size + 2 * padding - kernel) // stride + 1
    weights = cout * (cin // groups) * kernel**2
    return weights + bias * cout, weights * out**2


def test_what_holds_is_said_with_what_remains(capsys):
    check("1.1")  # finds the function above, as it finds a cell's
    said = capsys.readouterr().out
    assert said == f"1.1: the visible checks hold (3 of 3). {REMAIN}\n"


def test_a_failure_shows_tried_came_out_expected_and_a_hint(folder):
    def wrong(*args, **kw):
        return conv_cost(*args, **kw, bias=False)

    with pytest.raises(CheckFailed) as failed:
        check("1.1", {"conv_cost": wrong})
    said = str(failed.value)
    assert said.startswith("1.1: of 3 visible checks 3 failed.") and said.endswith(REMAIN)
    for line in ("tried     conv_cost(3, 8, 3, 10)", "came out  (216, 13824)", "expected  (224, 13824)", "so        the biases are parameters too"):
        assert f"    {line}\n" in said
    assert "    tried     conv_cost(8, 12, 3, 12, stride=2, groups=4)" in said and "\n  Hint 1 of 3 for 1.1: " in said
    assert failed.value._render_traceback_() == said.splitlines() and given(folder) == [("1.1", 1)]


def test_lines_break_between_words(monkeypatch, capsys):
    def run(t):
        with t.part("too long"):
            raise AssertionError("some words " * 30)

    monkeypatch.setattr(kit, "find", lambda key: Question(key, "f", ("some words " * 30,) * 3, run))
    with pytest.raises(CheckFailed) as failed:
        check("1.1", {})
    hint("1.1")
    for said, count in ((str(failed.value), 60), (capsys.readouterr().out, 30)):
        assert said.count("some") == said.count("words") == count and all(len(line) <= 110 for line in said.splitlines())


def unanswered(*args, **kw):
    # YOUR CODE HERE
    raise NotImplementedError()


def test_a_blank_is_not_answered_yet():
    for namespace in ({"conv_cost": unanswered}, {}):
        with pytest.raises(CheckFailed, match=r"^1\.1: not answered yet \(.*\)\.$"):
            check("1.1", namespace)
    with pytest.raises(CheckFailed, match=r"^1\.12: not answered yet"):
        check("1.12", {"encode": lambda weights: b"", "decode": unanswered})
    with pytest.raises(CheckFailed, match="visible checks 3 failed"):  # an answer that calls another question's blank
        check("1.1", {"conv_cost": lambda *args, **kw: unanswered()})


@pytest.mark.parametrize("key", ["1.10", "1.11", "2.6", "2.9"])
def test_a_question_in_words_is_read_by_a_person(key, capsys):
    check(key, {})
    hint(key)
    assert capsys.readouterr().out == 2 * f"{key}: read by a person; compare with what the task asks for.\n"


def test_an_error_of_the_learner_s_is_shown_with_its_line():
    def broken(*args, **kw):
        return undefined  # noqa: F821

    with pytest.raises(CheckFailed, match=r"raised NameError: name 'undefined' is not defined .line [0-9]+: return undefined"):
        check("1.1", {"conv_cost": broken})


def test_three_hints_each_recorded_once(folder, capsys):
    for number in (1, 2, 3, 3):
        hint("1.3")
        assert " ".join(capsys.readouterr().out.split()) == f"Hint {number} of 3 for 1.3: {find('1.3').hints[number - 1]}"
    hint("1.4")
    assert given(folder) == [("1.3", 1), ("1.3", 2), ("1.3", 3), ("1.4", 1)]


def test_a_record_that_cannot_be_read_or_written_stops_nobody(folder, capsys):
    lines = "nonsense", '{"question": "1.1"}', "[]", '{"question": "1.1", "hint": "x"}', '{"question": "1.1", "hint": 1}'
    (folder / "hints.jsonl").write_text("\n".join(lines))
    hint("1.1")
    assert capsys.readouterr().out.startswith("Hint 2 of 3")
    (folder / "hints.jsonl").unlink()
    (folder / "hints.jsonl").mkdir()
    hint("1.1")
    assert capsys.readouterr().out.startswith("Hint 1 of 3")


@pytest.mark.parametrize(
    "key, said", [("1.99", "no question '1.99'; chapter 1 has 1.1, 1.2"), ("77.1", "no exercises for chapter '77'"), ("x", "no exer")]
)
def test_an_unknown_question(key, said):
    with pytest.raises(ValueError, match=said):
        check(key, {})


def test_a_measured_figure_is_told(monkeypatch, capsys):
    def run(t):
        with t.part("runs"):
            t.call("f")
        t.figure("bytes", 12345)

    monkeypatch.setattr(kit, "find", lambda key: Question(key, "f", ("a", "b", "c"), run))
    check("1.1", {"f": lambda: None})
    assert "Measured: bytes 12,345." in capsys.readouterr().out


def test_variants():
    assert variant("ada", "1.2") == variant("ada", "1.2") != variant("bob", "1.2")
    for name, choices in find("1.2").varies.items():
        assert {variant(f"s{i}", "1.2")[name] for i in range(100)} == set(choices)
    assert variant("ada", "1.1") == {}


TIMED = """
import json, sys, time
started = time.thread_time()
from cmlib.grade import check, hint, trial, variant
imported = time.thread_time() - started
spent = [0.0]
def conv_cost(*args, **kw):
    start = time.thread_time()
    try:
        weights = args[1] * args[0] * args[2] ** 2 // kw.get("groups", 1)
        return weights + args[1], weights * ((args[3] - args[2]) // kw.get("stride", 1) + 1) ** 2
    finally:
        spent[0] += time.thread_time() - start
times = []
for _ in range(5):
    start, spent[0] = time.thread_time(), 0.0
    check("1.1")
    times.append(time.thread_time() - start - spent[0])
assert "torch" not in sys.modules
print(json.dumps([imported, *times]))
"""


def test_a_check_takes_no_time_and_no_torch(folder):
    """At most 50 ms beside the learner's own code, the very first one, with the chapter's module, included.

    Time of this thread: a busy machine stretches the clock's.
    """

    def run():
        out = subprocess.run([sys.executable, "-c", textwrap.dedent(TIMED)], capture_output=True, text=True, check=True).stdout
        return json.loads(out.splitlines()[-1])

    runs = [run() for _ in range(3)]
    assert min(r[1] for r in runs) < 0.05 and min(min(r[2:]) for r in runs) < 0.01


def test_every_check_of_the_chapter_is_quick(capsys):
    """All of them beside the reference solutions, whose own time is not taken off."""
    from solutions_chapter01 import solutions

    for key in solutions.questions:
        check(key, solutions.reference)
        times = []
        for _ in range(5):
            start = time.thread_time()
            check(key, solutions.reference)
            times.append(time.thread_time() - start)
        assert min(times) < 0.05, (key, times)
