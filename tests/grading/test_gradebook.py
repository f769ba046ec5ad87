"""With the real nbgrader: what it releases and validates, that safe grades show in its gradebook and formgrader, and that its feedback reads them."""

import logging
import shutil
import sqlite3
from contextlib import closing
from dataclasses import replace

import nbformat
import pytest

pytest.importorskip("nbgrader")
from classroom import DOUBLE, NAME, TEXT, answered, hand_in, put_source
from nbgrader.api import Gradebook
from nbgrader.apps import NbGraderAPI
from nbgrader.plugins import CsvExportPlugin
from nbgrader.validator import Validator
from traitlets.config import Config

from cmlib.grade import box, gradebook, source
from cmlib.grade.__main__ import SOURCES, main
from cmlib.grade.judge import Grade, Mark
from cmlib.grade.report import Row, Student, nbgrader_csv
from cmlib.grade.submission import find
from cmlib.grade.trial import Part

pytestmark = pytest.mark.filterwarnings("ignore:.*:sqlalchemy.exc.SAWarning")
LOST = Part("nothing in, nothing out", 1, False, "raised ValueError: <b>x</b> [y](javascript:z)", "double(array([0.5]))", "got 17.5", "want 18.5")
ANNA = Student("anna", "Anna", "Arndt", "anna@example.org")


class Course:
    """nbgrader's own course folder with the small exercise, and what the class hands in."""

    def __init__(self, folder):
        self.folder, self.url = folder, f"sqlite:///{folder}/gradebook.db"
        self.source = put_source(folder / "source")
        config = Config()
        config.CourseDirectory.root = str(folder)
        config.ExecutePreprocessor.kernel_name = "python3"
        self.api = NbGraderAPI(config=config)
        self.api.log.setLevel(logging.ERROR)
        self.points = source.read(self.source).points

    def row(self, student, first=2.0, second=4.0, free=None, notebook=None):
        """A row as the judge would have graded it."""
        hand_in(self.folder / "submitted", student.id, answered() if notebook is None else notebook)
        marks = (
            Mark("9.1", "q9-1", first, 3, (Part("twice each number", 2, True), replace(LOST, ok=first == 3))),
            Mark("9.2", "q9-2", second, 4),
            Mark("9.3", "q9-3", free, 2, text=TEXT),
        )
        submission = next(s for s in find(self.folder / "submitted", NAME) if s.student == student.id)
        return Row(student, NAME, self.points, Grade(student.id, NAME, marks, (), "digest", 0.1), submission)

    def enter(self, *rows):
        return list(gradebook.enter(self.url, rows, gradebook.register(self.url, NAME, self.source)))

    def copy(self, student="anna"):
        return nbformat.read(self.folder / "autograded" / student / NAME / f"{NAME}.ipynb", as_version=4)

    def by_a_person(self, points, comment=None, student="anna"):
        with Gradebook(self.url) as book:
            grade = book.find_grade("q9-3", NAME, NAME, student)
            grade.manual_score, grade.needs_manual_grade = points, False
            book.find_comment("q9-3", NAME, NAME, student).manual_comment = comment
            book.db.commit()

    def waits_for_a_person(self, cell="q9-3", student="anna"):
        with Gradebook(self.url) as book:
            return book.find_grade(cell, NAME, NAME, student).needs_manual_grade


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A course whose gradebook knows the exercise, without generate_assignment first and without alembic on the path; making one takes seconds."""
    course = Course(tmp_path_factory.mktemp("course"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", "")
        gradebook.register(course.url, NAME, course.source)
    return course.folder


@pytest.fixture
def course(begun, tmp_path):
    shutil.copy(begun / "gradebook.db", tmp_path)
    return Course(tmp_path)


def test_the_whole_way_with_the_real_nbgrader(begun, tmp_path, monkeypatch):
    course = Course(tmp_path)
    with closing(sqlite3.connect(begun / "gradebook.db")) as book:
        ((version,),) = book.execute("SELECT version_num FROM alembic_version")
    monkeypatch.setattr("nbgrader.api.get_alembic_version", lambda: version)  # as alembic told it once; it takes seconds
    assert course.api.generate_assignment(NAME)["success"]
    student_version = course.folder / "release" / NAME / f"{NAME}.ipynb"
    assert not [s for s in ("HIDDEN", "return 2", "Rubric") if s in student_version.read_text()]

    mine = course.folder / "mine.ipynb"
    nbformat.write(answered(), mine)
    assert Validator().validate(str(mine)) == {}

    course.enter(course.row(ANNA), course.row(Student("ben"), first=3.0, second=1.5))
    with Gradebook(course.url) as book:
        assert book.find_submission(NAME, "anna").score == 6.0 and book.find_submission(NAME, "ben").score == 4.5
        assert book.find_submission(NAME, "anna").max_score == course.points == 9
        assert book.find_grade("q9-1", NAME, NAME, "anna").auto_score == 2.0
        assert book.find_student("anna").last_name == "Arndt"

    shown = {s["student"]: s for s in course.api.get_submissions(NAME)}
    assert shown["anna"]["autograded"] and shown["anna"]["score"] == 6.0 and shown["anna"]["needs_manual_grade"]

    feedback = course.api.generate_feedback(NAME)
    assert feedback["success"], feedback
    page = (course.folder / "feedback" / "anna" / NAME / f"{NAME}.html").read_text()
    assert "Score: 6.0 / 9.0" in page and "nothing in, nothing out: raised ValueError" in page
    assert not [s for s in ("HIDDEN", "Rubric", "t.call", "got 17.5", "want 18.5", "<b>x</b>", 'href="javascript') if s in page]


def test_entered_without_generate_assignment_first_and_without_alembic_on_the_path(course, monkeypatch):
    monkeypatch.setenv("PATH", "")
    (row,) = course.enter(course.row(ANNA))
    assert row.score == 6.0 and [m.key for m in row.waiting] == ["9.3"]


def test_our_table_is_what_nbgrader_exports(course):
    hand_in(course.folder / "submitted", "anna", answered()).with_name("timestamp.txt").write_text("2026-11-28 10:00:00 UTC")
    rows = course.enter(course.row(ANNA), course.row(Student("ben"), free=0.0))
    with Gradebook(course.url) as book:
        CsvExportPlugin(to=str(course.folder / "theirs.csv")).export(book)
    ours, theirs = nbgrader_csv(rows), (course.folder / "theirs.csv").read_text()
    assert sorted(ours.split("\n")) == sorted(theirs.split("\n"))  # theirs goes by last names


def test_a_persons_points_and_comments_come_back_and_stay(course):
    course.enter(course.row(ANNA))
    course.by_a_person(1.5, "well seen")
    (row,) = course.enter(course.row(ANNA))
    assert row.score == 7.5 and not row.waiting and row.comments == {"9.3": "well seen"}
    assert not course.waits_for_a_person()


def test_points_that_a_person_changed_stay_and_are_marked_when_the_judge_changes_its_own(course):
    course.enter(course.row(ANNA))
    with Gradebook(course.url) as book:
        grade = book.find_grade("q9-1", NAME, NAME, "anna")
        grade.manual_score, grade.needs_manual_grade = 2.5, False
        book.db.commit()
    (row,) = course.enter(course.row(ANNA))
    assert row.grade.marks[0].points == 2.5 and not course.waits_for_a_person("q9-1")
    (row,) = course.enter(course.row(ANNA, first=3.0))
    assert row.grade.marks[0].points == 2.5 and course.waits_for_a_person("q9-1")


def test_another_submission_asks_the_person_again(course):
    course.enter(course.row(ANNA))
    course.by_a_person(1.5)
    (row,) = course.enter(course.row(ANNA, notebook=answered(text="Because I say so.")))
    assert course.waits_for_a_person() and row.score == 7.5
    assert [c.source for c in course.copy().cells if "Because" in c.source] == ["Because I say so."]


def test_free_text_without_an_answer_needs_nobody(course):
    (row,) = course.enter(course.row(ANNA, free=0.0))
    assert not course.waits_for_a_person() and not row.waiting


def test_unknown_students_stay_out(course):
    row = replace(course.row(Student("zoe")), known=False)
    assert course.enter(row) == [row]
    with Gradebook(course.url) as book:
        assert not book.students


@pytest.mark.skipif(bool(box.missing()), reason=f"without a box: {box.missing()}")
def test_the_command_enters_grades_and_takes_a_persons_points_into_its_tables(course):
    hand_in(course.folder / "submitted", "anna", answered())
    told = [
        str(w)
        for w in (course.folder / "submitted", "--source", course.folder / "source", "--out", course.folder / "grades", "--gradebook", course.url)
    ]
    assert main(told) == 0
    assert ",7.0,0.0,7.0,9.0\n" in (course.folder / "grades" / "nbgrader.csv").read_text()
    course.by_a_person(1.5, "well seen")
    assert main(told) == 0
    assert ",8.5,0.0,8.5,9.0\n" in (course.folder / "grades" / "nbgrader.csv").read_text()
    assert "well seen" in (course.folder / "grades" / "feedback" / "anna.html").read_text()


@pytest.mark.parametrize("url", ["gradebook.db", "sqlite:////nowhere/gradebook.db", "oracel://x"])
def test_a_gradebook_that_cannot_be_opened_is_told_before_the_work(course, url, capsys):
    hand_in(course.folder / "submitted", "anna", answered())
    told = [course.folder / "submitted", "--source", course.folder / "source", "--out", course.folder / "grades", "--dangerously-without-a-box"]
    assert main([*map(str, told), "--gradebook", url]) == 2
    assert f"no gradebook at '{url}'" in capsys.readouterr().err and not list((course.folder / "grades").iterdir())


@pytest.mark.parametrize("place", sorted(SOURCES.glob("*/*.ipynb")), ids=lambda p: p.stem)
def test_the_kits_own_exercises_enter_the_gradebook(course, place):
    exercise = source.read(place)
    hand_in(course.folder / "submitted", "anna", "")
    (submission,) = find(course.folder / "submitted", NAME)
    marks = tuple(Mark(q.key, q.cell, None if q.by_hand else q.points / 2, q.points) for q in exercise.questions)
    row = Row(
        ANNA, exercise.name, exercise.points, Grade("anna", exercise.name, marks, (), "digest", 0.1), replace(submission, exercise=exercise.name)
    )
    (row,) = gradebook.enter(course.url, [row], gradebook.register(course.url, exercise.name, place))
    assert row.score == sum(q.points for q in exercise.questions if not q.by_hand) / 2 and len(row.waiting) >= 2
    copy = nbformat.read(course.folder / "autograded" / "anna" / exercise.name / f"{exercise.name}.ipynb", as_version=4)
    assert not [word for word in ("HIDDEN TESTS", "SOLUTION", "Rubric", "t.part") if word in nbformat.writes(copy)]
    assert {q.cell for q in exercise.questions} <= set(ids(copy))


def ids(notebook):
    return [c.metadata.nbgrader.grade_id for c in notebook.cells if "nbgrader" in c.metadata]


def test_the_copy_has_every_graded_cell_once_as_released(course):
    notebook = answered(double=DOUBLE + "  # mine")
    title, double, test = notebook.cells[1:4]
    title.source = "# My title"
    test.source, test.metadata.nbgrader.points = "t.score(1000)", 1000
    notebook.cells = [notebook.cells[6], test, double, nbformat.v4.new_code_cell("extra = 1", outputs=[]), {**double, "source": "short"}, title]
    course.enter(course.row(ANNA, notebook=notebook))
    copy = course.copy()
    assert ids(copy) == ["q9-3", "q9-1", "double", "title", "shortest", "q9-2"]
    by_id = {c.metadata.nbgrader.grade_id: c for c in copy.cells if "nbgrader" in c.metadata}
    assert by_id["title"].source == "# Small" and by_id["double"].source.endswith("# mine")
    assert by_id["q9-1"].source.strip() == "" and by_id["q9-1"].metadata.nbgrader.points == 3
    assert [c.source for c in copy.cells if "nbgrader" not in c.metadata] == ["extra = 1", "short"]
    nbformat.validate(copy)


def test_a_submission_that_is_no_notebook_still_has_a_copy_to_look_at(course):
    broken = ["", "no JSON", "[1, 2", b"\xff\xfe", '{"cells": 3}', '{"cells": [1, null, {"source": {}}]}']
    rows = [course.row(Student(f"student{i}"), first=0.0, second=0.0, free=0.0, notebook=text) for i, text in enumerate(broken)]
    assert [row.score for row in course.enter(*rows)] == [0] * len(broken)
    for row in rows:
        assert ids(course.copy(row.student.id)) == ["title", "double", "q9-1", "shortest", "q9-2", "q9-3"]
    assert course.api.generate_feedback(NAME)["success"]


def test_nothing_in_the_copy_acts_in_a_browser(course):
    notebook = answered(text='<script>alert(1)</script><img src=x onerror="alert(2)"> a < b')
    notebook.cells[0].outputs = [nbformat.v4.new_output("display_data", {"text/html": "<script>alert(3)</script>"})]
    notebook.cells.append(nbformat.v4.new_raw_cell("<script>alert(4)</script>"))
    course.enter(course.row(ANNA, notebook=notebook))
    text = nbformat.writes(course.copy())
    assert "<script" not in text and "<img" not in text and "alert(3)" not in text and "&lt;script&gt;" in text


@pytest.mark.parametrize("time", ["tomorrow", "9" * 90, "2026-11-28 10:00:00 +99999999"])
def test_a_time_that_is_none_is_left_out(course, time):
    hand_in(course.folder / "submitted", "anna", answered()).with_name("timestamp.txt").write_text(time)
    (row,) = course.enter(course.row(ANNA))
    assert row.timestamp == "" and not (course.folder / "autograded" / "anna" / NAME / "timestamp.txt").exists()


def test_what_nbgraders_exchange_needs_is_beside_the_copy(course):
    place = hand_in(course.folder / "submitted", "anna", answered())
    place.with_name("submission_secret.txt").write_text("ab12")
    place.with_name("notes.txt").write_text("not copied")
    course.enter(course.row(ANNA))
    beside = {p.name: p.read_text() for p in (course.folder / "autograded" / "anna" / NAME).iterdir() if p.suffix == ".txt"}
    assert beside == {"submission_secret.txt": "ab12"}
