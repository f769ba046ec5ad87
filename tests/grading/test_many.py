"""Many submissions: what was done stays done, a worker that dies costs a retry, and nobody's grade is lost with it."""

import io
import os
import re
import signal
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from cmlib.grade.judge import Grade, Mark
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


def kill_the_first(folder, submission):
    """Ends the process that runs it, the first time that it is asked for the first student."""
    mark = Path(folder) / "killed"
    if submission == CLASS[0] and not mark.exists():
        mark.write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGKILL)
    return graded(submission)


def kill_always(submission):
    if submission == CLASS[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    return graded(submission)


@pytest.fixture(scope="module")
def cluster():
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster:
        yield cluster


def test_a_killed_worker_costs_a_retry_and_no_grade(cluster, tmp_path):
    outcome = dict(on_cluster(partial(kill_the_first, str(tmp_path)), CLASS, address=cluster.scheduler_address))
    assert (tmp_path / "killed").exists(), "no worker died"
    assert outcome == {s: graded(s) for s in CLASS}


def test_a_submission_that_kills_every_worker_is_a_failure_of_its_own(cluster):
    outcome = dict(on_cluster(kill_always, CLASS, address=cluster.scheduler_address))
    assert re.match("KilledWorker: ", outcome.pop(CLASS[0]).reason)
    assert outcome == {s: graded(s) for s in CLASS[1:]}


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
