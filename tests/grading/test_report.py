"""Tables as nbgrader, Canvas and Moodle read them, and the page that a student gets."""

import csv
import io
import re
from html.parser import HTMLParser

import pytest

from cmlib.grade.judge import Grade, Mark
from cmlib.grade.report import Row, Student, canvas_csv, feedback_html, leaderboard_csv, moodle_csv, nbgrader_csv, read_roster, summary, write
from cmlib.grade.trial import Part

ANNA = Student("anna", "Anna", "Arndt", "anna@example.org", "4711")
BEN = Student("ben", "Ben", "O'Neil, jr.", "ben@example.org")
SECRET = "array([0.123, 0.456])"
RIGHT = Part("twice each number", 2, True)
WRONG = Part("nothing in, nothing out", 1, False, "raised ValueError: <script>alert(1)</script>", f"double({SECRET})", "got 17.5", "want 18.5")


def grade(student="anna", free=None, notes=(), figure=2.0):
    marks = (
        Mark("9.1", "q9-1", 2.0, 3, (RIGHT, WRONG)),
        Mark("9.2", "q9-2", 4 / 3, 4, (), {"bytes": figure}),
        Mark("9.3", "q9-3", free, 2, text="Because <b>"),
    )
    return Grade(student, "small", marks, notes, "digest", 0.5)


@pytest.fixture
def rows():
    return [
        Row(ANNA, "small", 9, grade(), timestamp="2026-11-28 10:00:00"),
        Row(BEN, "small", 9),
        Row(Student("zoe"), "small", 9, grade("zoe"), known=False),
    ]


def read(text):
    return list(csv.reader(io.StringIO(text)))


def test_a_roster_needs_ids_alone_and_says_so(tmp_path):
    place = tmp_path / "students.csv"
    place.write_text('﻿id,last_name,first_name,email\nanna,Arndt,Anna,anna@example.org\n ben ,"O\'Neil, jr.",Ben,\n\n', "utf-8")
    assert read_roster(place) == {"anna": Student("anna", "Anna", "Arndt", "anna@example.org"), "ben": Student("ben", "Ben", "O'Neil, jr.")}
    place.write_text("name\nanna\n")
    with pytest.raises(ValueError, match=r"no column 'id', only \['name'\]"):
        read_roster(place)


def test_nbgrader_csv_has_a_line_a_student_and_zero_for_nothing(rows):
    assert nbgrader_csv(rows) == (
        "assignment,duedate,timestamp,student_id,last_name,first_name,email,raw_score,late_submission_penalty,score,max_score\n"
        "small,,2026-11-28 10:00:00,anna,Arndt,Anna,anna@example.org,3.333333333333333,0.0,3.333333333333333,9.0\n"
        'small,,,ben,"O\'Neil, jr.",Ben,ben@example.org,0.0,0.0,0.0,9.0\n'
        "small,,,zoe,,,,3.333333333333333,0.0,3.333333333333333,9.0\n"
    )


def test_canvas_csv_meets_the_importers_rules(rows):
    """lib/gradebook_importer.rb: Student, ID, SIS Login ID, Section, then titles; a row of points; no unknown student; empty is no grade."""
    header, possible, *students = read(canvas_csv(rows))
    assert header == ["Student", "ID", "SIS Login ID", "Section", "small"]
    assert "Points Possible" in possible[0] and possible[4] == "9"
    assert students == [["Arndt, Anna", "4711", "anna", "", "3.33"], ["O'Neil, jr., Ben", "", "ben", "", ""]]


def test_moodle_csv_has_grade_and_feedback_for_known_students_alone(rows):
    assert read(moodle_csv(rows)) == [
        ["Username", "First name", "Last name", "Email address", "small", "small (feedback)"],
        ["anna", "Anna", "Arndt", "anna@example.org", "3.33", "small: 9.1: 2 of 3; 9.2: 1.33 of 4; 9.3: still to be graded of 2"],
        ["ben", "Ben", "O'Neil, jr.", "ben@example.org", "", ""],
    ]


def test_two_exercises_are_two_columns_and_a_student_stays_one_line():
    rows = [Row(ANNA, "a", 9, grade()), Row(BEN, "a", 9), Row(ANNA, "b", 5), Row(BEN, "b", 5, grade())]
    assert [line[4:] for line in read(canvas_csv(rows))] == [["a", "b"], ["9", "5"], ["3.33", ""], ["", "3.33"]]


def test_being_late_costs_points_but_never_more_than_there_are():
    row = Row(ANNA, "small", 9, grade(), penalty=1.0)
    assert row.score == pytest.approx(row.raw - 1)
    assert Row(ANNA, "small", 9, grade(), penalty=99.0).score == 0


def test_the_leaderboard_ranks_small_first_and_equals_alike():
    rows = [Row(Student(s), "small", 9, grade(s, figure=f)) for s, f in (("a", 300.0), ("b", 200.0), ("c", 300.0), ("d", 400.5))]
    assert [line[3:] for line in read(leaderboard_csv([*rows, Row(BEN, "small", 9)]))] == [
        ["rank", "student_id", "value"],
        ["1", "b", "200"],
        ["2", "a", "300"],
        ["2", "c", "300"],
        ["4", "d", "400.5"],
    ]


def test_a_page_says_what_was_lost_and_why_and_shows_no_hidden_test():
    page = feedback_html([Row(ANNA, "small", 9, grade(notes=("2 notebooks: small.ipynb was read",)), comments={"9.3": "Well said <i>"})])
    for shown in (
        "small: 3.33 of 9 points",
        "nothing in, nothing out",
        "raised ValueError",
        "(1 point)",
        "(2 points)",
        "2 notebooks",
        "not yet graded",
        "bytes 2",
        "Well said &lt;i&gt;",
    ):
        assert shown in page
    for hidden in (SECRET, "got 17.5", "want 18.5"):
        assert hidden not in page


class Outline(HTMLParser):
    """The elements of a page, and that each is closed in turn."""

    VOID = ("meta", "br")

    def __init__(self, text):
        super().__init__()
        self.open, self.seen, self.attributes = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_a_page_is_self_contained_and_accessible():
    page = feedback_html([Row(ANNA, "small", 9, grade()), Row(ANNA, "other", 5), Row(ANNA, "third", 5, failure="GraderError: no memory")])
    outline = Outline(page)
    assert not {"script", "link", "img", "iframe", "object"} & set(outline.seen)
    assert not [name for name, _ in outline.attributes if name.startswith("on") or name in ("src", "href")]
    assert 'lang="en"' in page and "<title>" in page and outline.seen.count("h1") == outline.seen.count("main") == 1
    assert [int(h) for h in re.findall(r"<h(\d)", page)] == [1, 2, 3, 3, 3, 2, 2]  # no level is left out
    assert "<caption>" in page and 'scope="col"' in page and 'scope="row"' in page
    assert "Nothing was handed in." in page and "could not be graded yet" in page and "no memory" not in page


@pytest.mark.parametrize("place", ["student", "says", "reason", "note", "figure", "comment"])
def test_no_text_of_a_submission_acts_on_the_page(place):
    evil = '<img src=x onerror="alert(1)">'
    text = {key: evil if key == place else "plain" for key in ("student", "says", "reason", "note", "figure", "comment")}
    mark = Mark("9.1", "q9-1", 0.0, 3, (Part(text["says"], 1, False, text["reason"]),), {text["figure"]: 1.0})
    row = Row(Student(text["student"]), "small", 3, Grade("x", "small", (mark,), (text["note"],), "d", 0.0), comments={"9.1": text["comment"]})
    page = feedback_html([row])
    assert evil not in page and "&lt;img" in page


def test_the_summary_names_whose_grade_needs_a_hand(rows):
    text = summary([*rows, Row(Student("carl"), "small", 9, failure="GraderError: no memory")])
    assert "small: 2 graded, 2 without a grade" in text
    assert "mean 2 of 3; lost most: nothing in, nothing out (2)" in text
    assert "2 submissions have free text" in text
    assert "small zoe: is not on the roster" in text and "small carl: could not be graded, run again: GraderError: no memory" in text
    assert "anna:" not in text


@pytest.mark.parametrize("name", ["=1+1", "+x", "-2+3", "@x", "\t=x"])
def test_no_name_is_run_by_a_spreadsheet(name):
    evil = Row(Student(name, name, name, name), "small", 9, grade(name))
    for table in (nbgrader_csv, canvas_csv, moodle_csv, leaderboard_csv):
        cells = [cell for line in read(table([evil])) for cell in line]
        assert f"'{name}" in cells and not [c for c in cells if c.startswith(tuple("=+-@\t"))]


def test_an_id_that_is_no_files_name_is_told_before_the_work(tmp_path):
    (tmp_path / "students.csv").write_text("id\nanna\n../ben\n")
    with pytest.raises(ValueError, match="ben' has a slash"):
        read_roster(tmp_path / "students.csv")


def test_all_files_are_written(tmp_path, rows):
    write(tmp_path, rows)
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.*")) == [
        "canvas.csv",
        "feedback/anna.html",
        "feedback/ben.html",
        "feedback/zoe.html",
        "leaderboard.csv",
        "moodle.csv",
        "nbgrader.csv",
    ]


def test_a_note_cannot_act_on_the_terminal_or_forge_a_line():
    evil = "code cell 1: raised E: \x1b[2J\nsmall zoe: 9 of 9\r" + "x" * 1000
    text = summary([Row(ANNA, "small", 9, grade(notes=(evil,)))])
    assert "\x1b" not in text and "\r" not in text and "\nsmall zoe" not in text and len(text) < 1200
