"""Training beside the panel: it ends, it can be stopped, it says why it failed, and the panel hears of all three."""

import asyncio
import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from cmlib.core.apply import plan_of
from cmlib.lab import child as module
from cmlib.lab.child import Child
from cmlib.lab.files import load
from cmlib.lab.measure import threads_at
from cmlib.lab.train import evaluate
from cmlib.lab.zoo import load_net
from cmlib.view import explorer, words
from cmlib.view.explorer import explore

HAN = "magnitude_pruning_han"
JOB = {"net": "mlp", "data": "digits", "seed": 0, "method": HAN, "where": "*", "knobs": {"keep": 0.2}, "training": {"epochs": 2, "batch": 128}}
ENDLESS = {"epochs": 100_000, "batch": 128}


def finish(child, patience=150):
    end = time.monotonic() + patience
    while child.running:
        assert time.monotonic() < end, child.path.joinpath("log").read_text()
        time.sleep(0.02)


@pytest.fixture
def started():
    """Makes children, and ends those that a test leaves."""
    made = []

    def start(**job):
        made.append(Child(**{**JOB, **job}))
        return made[-1]

    yield start
    for child in made:
        child.stop()


@pytest.fixture(scope="module")
def trained():
    """A training that has run to its end."""
    child = Child(**JOB)
    finish(child)
    yield child
    child.stop()


def test_a_training_runs_to_its_end(trained, digits):
    report = trained.report()
    assert trained.failure == "" and report["step"] == report["steps"] == 2 * -(-len(digits.train[1]) // 128)
    made = load(trained.path / "model.cml")
    assert report["accuracy"] == evaluate(made, digits)
    assert report["bytes"] == os.path.getsize(trained.path / "model.cml")
    assert [p.kept for p in plan_of(made).values()] == [round(0.2 * 2048), round(0.2 * 320)]  # the masks held
    steps = [json.loads(line)["step"] for line in (trained.path / "reports").read_text().splitlines()]
    assert steps == sorted(steps) and len(steps) >= 2


def test_it_leaves_the_machine_to_others_and_ends_unfinished_at_an_interrupt(started, monkeypatch):
    seen = {}
    popen = module.subprocess.Popen
    monkeypatch.setattr(module.subprocess, "Popen", lambda *a, **k: seen.update(k["env"]) or popen(*a, **k))
    child = started(training=ENDLESS)
    while not child.report():
        assert child.running, child.failure
        time.sleep(0.02)
    assert seen["OMP_NUM_THREADS"] == seen["MKL_NUM_THREADS"] == "1"
    if hasattr(os, "getpriority"):
        assert os.getpriority(os.PRIO_PROCESS, child.process.pid) >= 10
    assert os.getpgid(child.process.pid) != os.getpgid(0)  # an interrupt of the kernel does not reach it
    log = (child.path / "log").read_text()
    assert log == "", log  # whose last line would be taken for the reason of its end
    child.process.send_signal(signal.SIGINT)
    finish(child)
    assert "interrupted" in child.failure and "accuracy" not in child.report()


def test_a_training_that_is_killed_says_so(started):
    child = started(training=ENDLESS)
    child.process.kill()
    finish(child)
    assert "exit code -9" in child.failure


def gone(pid):
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks for the process in /proc")
def test_a_training_ends_with_its_parent(tmp_path):
    job = {**JOB, "training": ENDLESS}
    code = f"""import os, time
from cmlib.lab.child import Child
child = Child(**{job})
while not child.report(): time.sleep(0.02)
print(child.process.pid, flush=True)
os._exit(0)"""
    parent = subprocess.run([sys.executable, "-c", code], env={**os.environ, "TMPDIR": str(tmp_path)}, capture_output=True, text=True, check=True)
    pid, end = int(parent.stdout), time.monotonic() + 20
    try:
        while not gone(pid):
            assert time.monotonic() < end
            time.sleep(0.05)
    finally:
        if not gone(pid):
            os.kill(pid, signal.SIGKILL)


def test_a_failure_has_its_reason(started):
    child = started(knobs={"kep": 1})
    assert child.failure == ""
    finish(child)
    assert "did you mean 'keep'" in child.failure and child.report() == {}


def test_the_folder_goes_with_the_child(started):
    child = Child(**{**JOB, "training": ENDLESS})
    folder = child.path
    child.stop()
    del child
    assert not folder.exists()


# The button of the panel


def conversation(panel, patience=150):
    heard = []
    panel.send = lambda content, buffers=None: heard.append(content)

    async def until(*states):
        end = asyncio.get_running_loop().time() + patience
        while not any(m["type"] == "train" and m["state"] in states for m in heard):
            assert asyncio.get_running_loop().time() < end, heard
            await asyncio.sleep(0.02)
        return [m for m in heard if m["type"] == "train"]

    return heard, until


def test_the_button_trains_what_is_left(digits):
    panel = explore(HAN, net="mlp", data="digits", keep=0.1)
    heard, until = conversation(panel)
    state = panel.state

    async def go():
        panel._receive(panel, {"type": "train"}, [])
        await asyncio.sleep(0.05)
        panel._receive(panel, {"type": "move", "seq": 1, "knobs": {"keep": 0.5}}, [])  # the sliders live on meanwhile
        return await until("done", "failed", "stopped")

    messages = asyncio.run(go())
    done = messages[-1]
    assert [m["state"] for m in messages[:-1]] == ["running"] * (len(messages) - 1) and done["state"] == "done"
    assert "progress" not in done and all(0 <= m["epoch"] <= m["epochs"] for m in messages)
    report, step = panel._child.report(), panel.path[-1]
    assert done["point"]["accuracy"] == step.accuracy == report["accuracy"] == evaluate(load(panel._child.path / "model.cml"), digits)
    assert not torch.equal(load(panel._child.path / "model.cml").fc1.weight, panel.model(state).fc1.weight)
    assert done["point"]["bytes"] == step.file_bytes == report["bytes"] == os.path.getsize(panel._child.path / "model.cml")
    assert step.knobs["keep"] == 0.1 and f"{100 * state.accuracy:.2f} %" in done["text"]
    assert any(m["type"] == "exact" and m["seq"] == 1 for m in heard)
    assert panel.state.knobs["keep"] == 0.5 and panel.state.net is None  # the hand had moved on


async def retrained(panel, heard, until, epochs):
    """The panel's last word on a training, and then its table is whole."""
    heard.clear()
    panel._receive(panel, {"type": "train", "epochs": epochs}, [])
    said = (await until("done", "failed", "stopped"))[-1]
    while not any(m["type"] == "rest" for m in heard):
        await asyncio.sleep(0.02)
    return said


def assert_shown(panel, heard, before, epochs, digits):
    """What training left is what the panel shows."""
    state, picture, exact = panel.state, *(next(m for m in heard if m["type"] == kind) for kind in ("picture", "exact"))
    made = load(panel._child.path / "model.cml")
    assert state.net is not None and state.training["epochs"] == epochs and exact["accuracy"] == state.accuracy == evaluate(made, digits)
    masks = {n: p.mask for n, p in plan_of(made).items()}
    assert {n: p.kept for n, p in state.plan.items()} == {n: int(m.sum()) for n, m in masks.items()}
    bars = picture["cards"][0]["kept"]
    assert sum(bars) == masks["fc1"].sum() and bars != panel.views["fc1"].histogram(before.plan["fc1"])["kept"]
    assert any(words.epochs(epochs) in n["text"] for n in exact["notes"]) and evaluate(panel.model(), digits) == state.accuracy
    scope = {}
    exec("from cmlib import *", scope)
    with threads_at(1):  # as the child trains
        exec(panel.line(), scope)
    assert evaluate(scope["model"], digits) == state.accuracy


L1, L0, SURGERY = "l1_weight_regularization", "l0_hard_concrete", "dynamic_network_surgery"


@pytest.mark.parametrize(("key", "knobs", "epochs"), [(L1, {"lam": 0.1}, 3), (L0, {"lam": 5.0, "start": 0.5}, 10), (SURGERY, {"c": 1.5}, 3)])
def test_what_training_left_is_shown(key, knobs, epochs, digits):
    panel = explore(key, net="mlp", data="digits", **knobs)
    before = panel.state
    heard, until = conversation(panel)
    asyncio.run(retrained(panel, heard, until, epochs))
    assert_shown(panel, heard, before, epochs, digits)
    if key in (L1, L0):
        assert panel.state.kept < before.kept  # zeros appear while training
    panel.move(**knobs)
    assert panel.state.net is None and panel.state.accuracy == before.accuracy  # the sliders still act on the network as it shipped


def test_training_again_starts_from_the_same_plan_and_a_move_undoes_it(digits):
    panel = explore(HAN, net="mlp", data="digits", keep=0.05)
    plain = panel.state
    heard, until = conversation(panel)
    first = asyncio.run(retrained(panel, heard, until, 1))
    assert_shown(panel, heard, plain, 1, digits)
    assert first == asyncio.run(retrained(panel, heard, until, 1)) and f"(before: {100 * plain.accuracy:.2f} %)" in first["text"]
    assert panel.state.net is not None and first["point"]["knobs"]["keep"] == 0.05 and first["point"]["epochs"] == 1
    assert [s.epochs for s in panel.path] == [0, 1, 1]
    rows = list(csv.DictReader(io.StringIO(panel.path_csv())))
    assert [r["epochs"] for r in rows] == ["0", "1", "1"]
    panel._receive(panel, {"type": "move", "seq": 1, "knobs": {"keep": 0.05}, "layer": "fc2"}, [])
    assert panel.state.net is not None and panel.layer == "fc2"  # only looked elsewhere
    panel._receive(panel, {"type": "move", "seq": 2, "knobs": {"keep": 0.05}, "layer": "fc2"}, [])
    assert panel.state.net is None and panel.state.accuracy == plain.accuracy and panel.path[-1].epochs == 0


def test_another_seed_ends_the_training_of_this_one(trained, monkeypatch):
    panel = explore(HAN, net="mlp", data="digits", keep=0.05)
    heard, until = conversation(panel)
    looks = iter([True])
    monkeypatch.setattr(explorer, "Child", lambda **_: trained)
    monkeypatch.setattr(Child, "running", property(lambda _: next(looks, False)))  # it finishes, and the panel has not yet looked again

    async def go():
        panel._receive(panel, {"type": "train", "epochs": 1}, [])
        await until("running")
        training = panel._training
        panel._receive(panel, {"type": "seed", "value": 1}, [])
        await asyncio.sleep(0.6)
        return training.cancelled()

    assert asyncio.run(go())
    assert [s.epochs for s in panel.path] == [0] and panel.state.source["seed"] == 1
    trains = [m for m in heard if m["type"] == "train"]
    assert trains[-1] == {"type": "train"}  # the panel's own line on it goes


def test_the_button_stops_it():
    panel = explore(HAN, net="mlp", data="digits")
    _, until = conversation(panel)

    async def go():
        panel._receive(panel, {"type": "train", "epochs": ENDLESS["epochs"]}, [])
        while not panel._child.report():
            assert panel._child.running, panel._child.failure
            await asyncio.sleep(0.02)
        panel._receive(panel, {"type": "stop"}, [])
        return await until("stopped", "failed", "done")

    assert asyncio.run(go())[-1]["state"] == "stopped"
    child, report = panel._child, panel._child.report()
    assert report["step"] < report["steps"] and "accuracy" not in report
    assert not child.running and child.failure == "" and len(panel.path) == 1
    child.stop()  # and again does no harm


def test_a_training_that_fails_is_said(monkeypatch):
    panel = explore(HAN, net="mlp", data="digits")
    heard, until = conversation(panel)
    monkeypatch.setattr(explorer, "Child", lambda **job: Child(**{**job, "seed": 77}))

    async def go():
        panel._receive(panel, {"type": "train"}, [])
        return await until("failed", "stopped", "done")

    last = asyncio.run(go())[-1]
    assert last["state"] == "failed" and "does not ship" in last["text"] and panel._child.report() == {}
    panel._receive(panel, {"type": "move", "seq": 1, "knobs": {"keep": 0.5}}, [])
    assert any(m["type"] == "exact" for m in heard)


def test_closing_the_panel_ends_its_training():
    panel = explore(HAN, net="mlp", data="digits")

    async def go():
        panel._receive(panel, {"type": "move", "seq": 1, "knobs": {"keep": 0.5}}, [])
        panel._receive(panel, {"type": "train"}, [])
        await asyncio.sleep(0.01)
        panel.close()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        return panel._task.cancelled(), panel._training.cancelled()

    assert asyncio.run(go()) == (True, True)
    assert not panel._child.running


def test_without_a_loop_no_training_is_left_behind():
    panel = explore(HAN, net="mlp", data="digits")
    heard, _ = conversation(panel)
    panel._receive(panel, {"type": "train"}, [])
    assert "fit(panel.model(), data)" in heard[-1]["message"] and panel._child is None


def test_data_of_ones_own_is_not_retrained_on(digits):
    inverted = tuple(255 - t if i == 0 else t for i, t in enumerate(digits.train))
    panel = explore(HAN, net=load_net("mlp", "digits"), data=inverted)
    assert panel.spec["train"] is None and panel.spec["seed"] is not None
    assert "64-32-10 net on data of your own" in panel.subtitle() and "8×8" not in panel.subtitle()
    heard, _ = conversation(panel)
    panel._receive(panel, {"type": "train"}, [])
    assert "its data set" in heard[-1]["message"]
    assert explore(HAN, net=load_net("mlp", "digits"), data=digits).spec["train"]


def test_stop_without_training_is_nothing():
    panel = explore(HAN, net="mlp", data="digits")
    heard, _ = conversation(panel)
    panel._receive(panel, {"type": "stop"}, [])
    assert heard == []
