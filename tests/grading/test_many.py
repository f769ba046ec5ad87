"""Many submissions: what was done stays done, a worker that dies costs a retry, and nobody's grade is lost with it."""

import io
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
from classroom import DOUBLE, answered, hand_in, put_source

from cmlib.grade import box
from cmlib.grade.__main__ import main
from cmlib.grade.judge import Grade, Mark, judge
from cmlib.grade.many import RETRIES, Failure, Progress, on_cluster, on_threads, store, stored
from cmlib.grade.submission import Submission

CLASS = [Submission(f"student{i}", "small", None) for i in range(6)]


def graded(submission):
    return Grade(
        submission.student, submission.exercise, (Mark("9.1", "q9-1", 1.5, 3), Mark("9.2", "q9-2", None, 2, text="free")), ("a note",), "digest", 0.1
    )


def test_a_grade_comes_back_as_it_was_stored(tmp_path):
    store(tmp_path, graded(CLASS[0]))
    assert [p.name for p in (tmp_path / "small").iterdir()] == ["student0.json"]
    assert stored(tmp_path, "small", "student0", "digest") == graded(CLASS[0])


def test_a_grade_of_something_else_or_in_pieces_is_made_again(tmp_path):
    store(tmp_path, graded(CLASS[0]))
    assert stored(tmp_path, "small", "student0", "other digest") is None
    assert stored(tmp_path, "small", "student1", "digest") is None
    place = tmp_path / "small" / "student0.json"
    for text in (place.read_text()[:-20], "", "[]", "null", '{"student": 1}'):
        place.write_text(text)
        assert stored(tmp_path, "small", "student0", "digest") is None


def test_threads_work_side_by_side():
    meet = threading.Barrier(3, timeout=20)

    def work(submission):
        meet.wait()  # passes only where three are at it at once
        return graded(submission)

    assert {s: g for s, g in on_threads(work, CLASS, jobs=3)} == {s: graded(s) for s in CLASS}


def test_a_trial_that_breaks_down_costs_a_retry():
    tries = dict.fromkeys(CLASS, 0)

    def work(submission):
        tries[submission] += 1
        if tries[submission] <= RETRIES and submission in CLASS[:2]:
            raise OSError("no memory")
        return graded(submission)

    assert dict(on_threads(work, CLASS)) == {s: graded(s) for s in CLASS}
    assert list(tries.values()) == [1 + RETRIES, 1 + RETRIES, 1, 1, 1, 1]


def test_what_fails_every_time_is_no_grade_and_touches_nobody_else():
    def work(submission):
        if submission is CLASS[3]:
            raise OSError("no memory")
        return graded(submission)

    outcome = dict(on_threads(work, CLASS))
    assert outcome.pop(CLASS[3]) == Failure("OSError: no memory")
    assert outcome == {s: graded(s) for s in CLASS if s is not CLASS[3]}


def test_stopping_early_starts_nothing_new():
    begun = []

    def work(submission):
        begun.append(submission)
        time.sleep(0.05)
        return graded(submission)

    results = on_threads(work, CLASS * 5, jobs=1)
    next(results)
    results.close()
    assert len(begun) <= 3


@pytest.fixture(scope="module")
def cluster():
    distributed, dask = pytest.importorskip("distributed"), pytest.importorskip("dask")
    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 0}),  # as few deaths as will do: each takes seconds
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0") as cluster,
    ):
        yield cluster


def test_a_killed_worker_costs_a_retry_and_who_kills_every_worker_fails_alone(cluster, tmp_path):
    (first, second, *_), grades, mark = CLASS, {s: graded(s) for s in CLASS}, tmp_path / "killed"

    def kill(submission):
        """Ends the process that runs it: for the first student each time, for the second once. Sent as it is, so that no worker imports this file."""
        if submission == first or (submission == second and not mark.exists()):
            if submission == second:
                mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return grades[submission]

    outcome = dict(on_cluster(kill, CLASS, address=cluster.scheduler_address))
    assert mark.exists(), "the second killed no worker"
    assert re.match("KilledWorker: ", outcome.pop(first).reason)
    assert outcome == {s: graded(s) for s in CLASS[1:]}


boxed = pytest.mark.skipif(bool(box.missing()), reason=f"without a box: {box.missing()}")
WRONG = DOUBLE.replace("2", "3")


class Class:
    """Submissions in a folder, and the command that grades them."""

    def __init__(self, folder):
        self.folder, self.out = folder, folder / "grades"
        put_source(folder / "source")

    def options(self, *more):
        return [str(w) for w in (self.folder / "submitted", "--out", self.out, "--source", self.folder / "source", *more)]

    def points(self):
        return {p.stem: Grade.from_json(p.read_text()).points for p in (self.out / "small").iterdir()}

    def written(self):
        return {p.stem: p.stat().st_mtime_ns for p in (self.out / "small").glob("*.json")}


@pytest.fixture
def school(tmp_path):
    school = Class(tmp_path)
    for i in range(6):
        hand_in(tmp_path / "submitted", f"student{i}", answered(double=DOUBLE if i % 2 else WRONG))
    return school


EXPECTED = {f"student{i}": 7.0 if i % 2 else 5.0 for i in range(6)}  # of nothing three times is twice


@boxed
def test_killed_and_started_again_it_goes_on_where_it_was(school):
    slow = "import time\ntime.sleep(0.5)\n" + DOUBLE
    hand_in(school.folder / "submitted", "student5", answered(double=slow))
    command = [sys.executable, "-m", "cmlib.grade", *school.options("--jobs", 1)]
    with subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL) as run:
        while not school.out.exists() or len(list(school.out.glob("small/*.json"))) < 2:
            time.sleep(0.01)
            assert run.poll() is None
        os.killpg(run.pid, signal.SIGKILL)
    before = school.written()
    assert 2 <= len(before) < 6 and not (school.out / "nbgrader.csv").exists()
    assert main(school.options()) == 0
    assert before.items() <= school.written().items() and school.points() == EXPECTED


@boxed
def test_only_what_changed_is_graded_again(school, capsys):
    assert main(school.options("--seed", 1)) == 0
    before = school.written()
    hand_in(school.folder / "submitted", "student0", answered())
    assert main(school.options("--seed", 1)) == 0
    assert "5 of 6 were graded before" in capsys.readouterr().err
    assert {s for s, t in school.written().items() if t != before[s]} == {"student0"}
    assert school.points() == EXPECTED | {"student0": 7.0}
    source = put_source(school.folder / "source2")
    source.write_text(source.read_text().replace("weight=3", "weight=1"))
    assert main(school.options("--source", school.folder / "source2")) == 0
    assert all(t != before[s] for s, t in school.written().items())


@boxed
def test_a_cluster_gives_the_same_grades(school, cluster):
    assert main(school.options("--scheduler", cluster.scheduler_address)) == 0
    assert school.points() == EXPECTED


def test_without_a_box_it_refuses_unless_told_by_a_name_that_warns(school, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(school.options()) == 2
    assert "bubblewrap" in capsys.readouterr().err and not school.out.exists()
    assert main(school.options("--dangerously-without-a-box")) == 0
    assert school.points() == EXPECTED


def test_a_grader_that_breaks_down_is_said_and_is_no_grade(school, monkeypatch, capsys):
    def broken(submission, exercise, **how):
        if submission.student == "student3":
            raise OSError("no memory")
        grade = judge(submission, exercise, **how)
        return replace(grade, digest="of another kit") if submission.student == "student4" else grade

    monkeypatch.setattr("cmlib.grade.__main__.judge", broken)
    assert main(school.options("--dangerously-without-a-box")) == 1
    report = capsys.readouterr().out
    assert "small student3: could not be graded, run again: OSError: no memory" in report
    assert "small student4: could not be graded, run again: the submission changed meanwhile, or a worker has another kit" in report
    assert school.points() == {s: p for s, p in EXPECTED.items() if s not in ("student3", "student4")}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["nowhere"], "nowhere is no folder"),
        (["submitted", "--exercise", "large"], "no exercise large; there are small"),
        (["flat"], "does not say which exercise this is: give --exercise, one of small"),
        (["submitted", "--roster", "nowhere.csv"], "nowhere.csv"),
        (["submitted", "--roster", "source/small/small.ipynb"], "names no column 'id'"),
    ],
)
def test_a_wrong_call_is_a_line_that_says_what_is_wrong(school, options, message, monkeypatch, capsys):
    monkeypatch.chdir(school.folder)
    (school.folder / "flat").mkdir()
    (school.folder / "flat" / "anna.ipynb").write_text("{}")
    assert main([*options, "--source", "source", "--dangerously-without-a-box"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("cmlib.grade: ") and message in line


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(("to", "drawn"), [(io.StringIO(), ["small 3/4 anna: 2 of 3", "small 4/4 ben: 1 of 3", ""]), (Terminal(), None)])
def test_progress_is_plain_lines_or_a_bar(to, drawn, monkeypatch):
    monkeypatch.setenv("COLUMNS", "70")
    progress = Progress("small", 4, done=2, to=to)
    progress("anna: 2 of 3")
    progress("ben: 1 of 3")
    if drawn:
        assert to.getvalue().split("\n") == drawn
    else:
        first, second = to.getvalue().removeprefix("\r").removesuffix("\n").split("\r")
        assert first.rstrip() == "small [##################......] 3/4 0:00 left, anna: 2 of 3"
        assert second.rstrip() == "small [########################] 4/4 0:00 left, ben: 1 of 3"
        assert len(first) == len(second) == 69
