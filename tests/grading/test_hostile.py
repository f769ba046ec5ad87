"""Hostile submissions: no point that was not earned, nothing read or written outside, nothing left running, and the next one graded as usual."""

import contextlib
import json
import os
import secrets
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from hostile import ATTACKS
from small import QUICK, exercise, named, needs_a_box, notebook, submit

import cmlib.grade.box as box_module
from cmlib.grade.judge import judge
from cmlib.grade.submission import Submission, find
from cmlib.house.process import ROOT

pytestmark = needs_a_box

HIDDEN = {
    "1.1": 'x = t.rng.normal(size=(4, 3))\nwith t.part("twice"):\n    t.close(t.call("double", x), 2 * x)',
    "1.2": 'x = t.rng.normal(size=5)\nwith t.part("sum"):\n    t.close(t.call("total", x), x.sum())',
    "1.3": 'with t.part("secret"):\n    t.equal(t.call("secret"), "TOKEN")',
    "1.4": 'goal = t.rng.random()\nwith t.part("best"):\n    t.close(t.call("best", lambda x: -abs(x - goal)), goal, atol=1e-3)',
}
TOTAL = "def total(x):\n    return sum(float(v) for v in x)"
HONEST = ("def double(x):\n    return 2 * x", TOTAL)
SITE = Path(json.__file__).parents[1]


class World:
    """An exercise, a neighbour and a machine that hold a secret, and what must not change of them."""

    def __init__(self, folder: Path):
        self.folder, self.token, self.mark = folder, f"swordfish-{secrets.token_hex(8)}", f"mark-{secrets.token_hex(8)}"
        self.exercise = exercise(folder, {key: text.replace("TOKEN", self.token) for key, text in HIDDEN.items()})
        self.neighbour = submit(folder, *HONEST, f"def secret(): return '{self.token}'", student="bob")
        self.file = folder / "outside" / "secret.txt"
        self.file.parent.mkdir()
        self.file.write_text(self.token)
        self.places = [self.file.parent, folder, folder / "source", folder / "submitted/bob", ROOT, ROOT / "cmlib/grade", Path.home(), SITE]
        self.places += [Path(p) for p in ("/tmp", "/var/tmp", "/dev/shm", sys.prefix, "/")]
        self.namespaces: list[int] = []  # of pids, held open: their numbers are used again
        self.server = socket.create_server(("127.0.0.1", 0))
        self.local = socket.socket(socket.AF_UNIX)
        self.local.bind(f"\0grader-{self.token}")
        self.local.listen()
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.back = free.getsockname()[1]
        for server in (self.server, self.local):
            threading.Thread(target=self._serve, args=(server,), daemon=True).start()

    def _serve(self, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                server.accept()[0].send(self.token.encode())

    def fill(self, text: str) -> str:
        paths = [str(p) for p in (self.exercise.path, self.neighbour.path, self.file)]
        words = {"PATHS": paths, "PLACES": [str(p) for p in self.places], "PLACE": self.file.parent, "MARK": self.mark}
        words |= {"PORT": self.server.getsockname()[1], "BACK": self.back, "GRADING": os.getpid()}
        for word, value in words.items():
            text = text.replace(word, str(value))
        return text

    def state(self) -> list:
        """Every file of the world with its bytes, and whatever of the mark is anywhere."""
        files = [(str(p), p.read_bytes()) for p in sorted(self.folder.rglob("*")) if p.is_file() and "eve" not in p.parts]
        return [files, [str(p / self.mark) for p in self.places if (p / self.mark).exists()], [str(p) for p in SITE.glob("*customize.py")]]

    def left_running(self) -> list[str]:
        """Processes of the boxes; not those that are dead and only wait for their parent to take notice."""
        found, ours = [], {os.fstat(n).st_ino for n in self.namespaces}
        assert ours and os.stat("/proc/self/ns/pid").st_ino not in ours
        for pid in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                if os.stat(f"/proc/{pid}/ns/pid").st_ino in ours and "State:\tZ" not in (status := Path(f"/proc/{pid}/status").read_text()):
                    found.append(status.split("\n")[0])
        return found


@pytest.fixture
def world(tmp_path, monkeypatch):
    world = World(tmp_path)
    monkeypatch.setenv("GRADERS_SECRET", world.token)
    greet = box_module.Box._greet

    def greeted(self):
        greet(self)
        world.namespaces.append(os.open(f"/proc/{[*self.pids()][-1]}/ns/pid", os.O_RDONLY))

    monkeypatch.setattr(box_module.Box, "_greet", greeted)
    yield world
    world.server.close()
    world.local.close()
    for namespace in world.namespaces:
        os.close(namespace)


def points(grade) -> list[float]:
    return [m.points for m in grade.marks]


def said(grade) -> str:
    """What a learner may read of a grade."""
    return repr((grade.notes, [(p.says, p.reason, p.got) for m in grade.marks for p in m.parts]))


@pytest.mark.parametrize("attack", named(ATTACKS))
def test_an_attack_gains_nothing_and_leaves_nothing(world, attack):
    before, start = world.state(), time.monotonic()
    grade = judge(submit(world.folder, world.fill(attack.text), TOTAL, student="eve"), world.exercise, limits=QUICK)
    assert points(grade) == [0, 0 if attack.spoils else 2, 0, 0], (grade.marks, grade.notes)
    assert time.monotonic() - start < QUICK.total
    assert world.left_running() == []
    assert world.state() == before
    assert world.token not in said(grade)


def test_the_secret_is_there_to_be_found(world):
    """Without the box the attacks on it succeed: it is the box that stops them."""
    for name in ("answer, neighbour and file read by their paths", "environment", "socket out"):
        text = world.fill(ATTACKS[name].text)
        grade = judge(submit(world.folder, text, TOTAL, student="eve"), world.exercise, limits=QUICK, boxed=False)
        assert points(grade)[2] == 2, name


def test_there_are_thirty_kinds_at_least():
    assert len(ATTACKS) + len(FILES) >= 30


def test_attacks_beside_an_honest_submission_cost_it_nothing(world):
    """Two at a time, as on a machine with two cores: the greediest kinds beside work that is timed."""
    greedy = ("fork bomb", "memory bomb of many processes", "threads left running", "processes left running")
    attackers = [submit(world.folder, world.fill(ATTACKS[name].text), TOTAL, student=f"eve{i}") for i, name in enumerate(greedy)]
    honest = [submit(world.folder, *HONEST, student=f"ada{i}") for i in range(8)]
    with ThreadPoolExecutor(2) as pool:
        hostile = pool.submit(lambda: [judge(s, world.exercise, limits=QUICK) for s in attackers])
        graded = list(pool.map(lambda s: judge(s, world.exercise, limits=QUICK), honest))
        assert [points(g) for g in graded] == [[2, 2, 0, 0]] * 8
        assert [points(g)[::2] for g in hostile.result()] == [[0, 0]] * 4
    assert world.left_running() == []


def link(target: str):
    return lambda path, world: path.symlink_to(world.fill(target))


def content(data: bytes):
    return lambda path, world: path.write_bytes(data)


FILES = {
    "no json": content(b"\x80\x04\x95 a pickle"),
    "nothing": content(b""),
    "nested ten thousand deep": content(b'{"cells": ' + b"[" * 10_000 + b"]" * 10_000 + b"}"),
    "100 MB": lambda path, world: (path.touch(), os.truncate(path, 100 << 20)),
    "16 MB of brackets": content(b'{"cells": [' + b"[]," * (5 << 20) + b"[]]}"),
    "another language": content(json.dumps(notebook("x <- 3", "double <- function(x) 2 * x", language="R")).encode()),
    "cells that are no cells": content(b'{"cells": [1, null, {"source": {"a": 1}}, {"cell_type": "code", "source": [3]}]}'),
    "a cell of brackets": content(json.dumps(notebook("(" * 10**6, "x = " + "-" * 10**6 + "1")).encode()),
    "bytes of zero in a cell": content(json.dumps(notebook("x = 1\0", "\ud800")).encode()),
    "a thousand cells": content(json.dumps(notebook(*["1 / 0"] * 1_000)).encode()),
    "ten thousand cells": content(json.dumps(notebook(*["1 / 0"] * 10_000)).encode()),
    "link to the source": lambda path, world: path.symlink_to(world.exercise.path),
    "link to a neighbour": lambda path, world: path.symlink_to(world.neighbour.path),
    "link to an endless device": lambda path, world: path.symlink_to("/dev/zero"),
    "link to itself": lambda path, world: path.symlink_to(path),
    "pipe that nobody fills": lambda path, world: os.mkfifo(path),
    "folder": lambda path, world: path.mkdir(),
}


@pytest.mark.parametrize("make", named(FILES))
def test_a_file_that_is_no_submission_is_a_line_of_the_report(world, make):
    path = world.folder / "submitted" / "eve" / "small.ipynb"
    path.parent.mkdir(parents=True)
    make(path, world)
    start = time.monotonic()
    (eve,) = [s for s in find(world.folder / "submitted", "small") if s.student == "eve"]
    grade = judge(eve, world.exercise, limits=QUICK)
    assert points(grade) == [0, 0, 0, 0] and grade.notes
    assert time.monotonic() - start < QUICK.total and world.token not in said(grade)


def test_after_all_of_it_an_honest_submission_has_its_points(world):
    """Once: what an attack could leave behind is looked for after each."""
    grade = judge(submit(world.folder, *HONEST), world.exercise, limits=QUICK)
    assert points(grade) == [2, 2, 0, 0] and grade.notes == ()


def test_a_name_that_is_a_path_stays_a_name(world):
    for name in ("..ipynb", "...ipynb", "~root.ipynb", "-rf.ipynb", "a;touch x.ipynb", "=cmd().ipynb"):
        (world.folder / "submitted" / name).write_text(json.dumps(notebook(*HONEST)))
    names = [s.student for s in find(world.folder / "submitted", "small")]
    assert names == sorted(names) and not any("/" in n or n.startswith(".") for n in names)
    assert points(judge(Submission("-rf", "small", world.folder / "submitted" / "-rf.ipynb"), world.exercise, limits=replace(QUICK, call=2))) == [
        2,
        2,
        0,
        0,
    ]
