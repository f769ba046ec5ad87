"""The panel without a browser: what it says when asked, in which order, and that every figure is the one that ``evaluate`` and ``save`` give."""

import asyncio
import csv
import io
import json
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Annotated

import pytest
import torch
from torch import nn

import cmlib
from cmlib.core.bake import bake
from cmlib.core.knobs import Keep, Span
from cmlib.core.method import score
from cmlib.core.packed import Masked
from cmlib.lab.cost import multiply_adds
from cmlib.lab.files import length, save
from cmlib.lab.measure import threads_at
from cmlib.lab.train import evaluate
from cmlib.lab.zoo import load_net
from cmlib.methods import catalog
from cmlib.view import cards as pictures
from cmlib.view import explorer, walk, words
from cmlib.view.explorer import explore

HAN = "magnitude_pruning_han"


@pytest.fixture(autouse=True)
def no_rest(monkeypatch):
    """The hand rests for a moment only."""
    monkeypatch.setattr(explorer, "REST", 0.01)


@pytest.fixture(scope="module")
def mnist():
    return cmlib.load_data("mnist")


@pytest.fixture(scope="module")
def lenet_panel(mnist):
    return explore(HAN, net="lenet300", data=mnist)


class Browser:
    """What a page does to a panel, and what it hears of it."""

    def __init__(self, panel):
        self.panel, self.heard, self.last = panel, [], panel.seq
        panel.send = lambda content, buffers=None: self.heard.append({**content, "buffers": buffers or []})

    def says(self, kind, **message):
        self.panel._receive(self.panel, {"type": kind, **message}, [])

    def moves(self, layer=None, **knobs):
        self.last += 1
        self.says("move", seq=self.last, knobs=knobs, **({"layer": layer} if layer else {}))
        return self.last

    def of(self, kind, seq=None):
        return [m for m in self.heard if m["type"] == kind and seq in (None, m.get("seq"))]

    async def hears(self, kind, seq=None, patience=20):
        end = asyncio.get_running_loop().time() + patience
        while not self.of(kind, seq):
            assert asyncio.get_running_loop().time() < end, f"no {kind} for {seq}; heard {[(m['type'], m.get('seq')) for m in self.heard]}"
            await asyncio.sleep(0.005)
        return self.of(kind, seq)[-1]


def digits_panel(method=HAN, net="mlp", **settings):
    return explore(method, net=net, data="digits", **settings)


@contextmanager
def page(panel):
    """A browser at the panel, which is let go afterwards."""
    send = panel.send
    try:
        yield Browser(panel)
    finally:
        panel.send = send


def row(message, label):
    return next(cells for cells in message["cells"] if cells[0] == label)


def percent(text):
    return float(text.removesuffix(" %")) / 100


# A move: picture, estimate, exact figure, file


def test_a_move_is_answered_in_order(lenet_panel, mnist):
    async def go(browser):
        seq = browser.moves(keep=0.03)
        assert [m["type"] for m in browser.heard] == ["picture"]  # before anything else runs
        await browser.hears("rest", seq)
        return seq

    with page(lenet_panel) as browser:
        seq = asyncio.run(go(browser))
    assert all(m["seq"] == seq for m in browser.heard)
    kinds = [m["type"] for m in browser.heard]
    count = kinds.count("estimate")
    assert count >= 1 and kinds == ["picture", *["estimate"] * count, "exact", "rest"]
    figure = evaluate(cmlib.compress(lenet_panel.net, HAN, keep=0.03), mnist)
    assert browser.of("exact")[0]["accuracy"] == figure
    halves = [m["half"] for m in browser.of("estimate")]
    assert halves == sorted(halves, reverse=True) and halves[0] <= 0.02
    assert row(browser.of("picture")[0], "accuracy, exact")[2] == "…"
    assert row(browser.of("exact")[0], "accuracy, exact")[2] == f"{100 * figure:.2f} %"
    json.dumps([{k: v for k, v in m.items() if k != "buffers"} for m in browser.heard], allow_nan=False)


def test_pictures_come_as_bytes_of_their_size(lenet_panel):
    async def go(browser):
        return browser.moves(keep=0.1, layer="fc2")

    with page(lenet_panel) as browser:
        asyncio.run(go(browser))
    (message,) = browser.of("picture")
    kinds = [c["kind"] for c in message["cards"]]
    assert kinds == ["histogram", "image", "bars"]
    image = message["cards"][1]
    assert len(message["buffers"][image["buffer"]]) == image["h"] * image["w"]
    histogram = message["cards"][0]
    assert sum(histogram["counts"]) == 30_000 and sum(histogram["kept"]) == 3_000


def test_a_newer_move_overtakes_the_older(lenet_panel):
    async def go(browser):
        for keep in (0.5, 0.4, 0.3):
            browser.moves(keep=keep)
            await asyncio.sleep(0.005)
        last = browser.moves(keep=0.2)
        await browser.hears("rest", last)
        return last

    with page(lenet_panel) as browser:
        walked = len(lenet_panel.path)
        last = asyncio.run(go(browser))
    assert [m["seq"] for m in browser.of("picture")] == [last - 3, last - 2, last - 1, last]
    assert [m["seq"] for m in browser.of("exact")] == [last]
    assert [m["seq"] for m in browser.of("rest")] == [last]
    assert len(lenet_panel.path) == walked + 1 and lenet_panel.path[-1].knobs["keep"] == 0.2


def test_a_move_during_the_rest_takes_over(lenet_panel, monkeypatch):
    monkeypatch.setattr(explorer, "REST", 0.2)

    async def go(browser):
        first = browser.moves(keep=0.31)
        await browser.hears("exact", first)
        second = browser.moves(keep=0.32)
        await browser.hears("rest", second)
        return first

    with page(lenet_panel) as browser:
        first = asyncio.run(go(browser))
    assert browser.of("exact", first) and not browser.of("rest", first)


def test_while_one_move_follows_another_the_exact_figure_waits_for_rest(lenet_panel, monkeypatch):
    monkeypatch.setattr(explorer, "REST", 1.5)

    async def go(browser):
        lenet_panel._moved = -float("inf")
        lone = browser.moves(keep=0.041)
        await browser.hears("estimate", lone)
        await asyncio.wait_for(browser.hears("exact", lone), 1.4)  # nothing to wait for
        second = browser.moves(keep=0.042)
        await browser.hears("estimate", second)
        await asyncio.sleep(0.7)
        early = browser.of("exact", second)
        await browser.hears("exact", second)
        return early, len(browser.of("estimate", second))

    with page(lenet_panel) as browser:
        early, estimates = asyncio.run(go(browser))
    assert not early and estimates >= 1


def test_without_a_loop_a_move_is_measured_at_once():
    panel = digits_panel()
    with page(panel) as browser:
        browser.moves(keep=0.2)
        assert [m["type"] for m in browser.heard] == ["picture", "exact", "rest"]


WRONG = [
    ({"keep": 7}, "keep=7 is not allowed"),
    ({"kep": 0.1}, "did you mean 'keep'"),
    ({"keep": None}, "keep=None is not allowed"),
    ({"scope": "planet"}, "scope"),
]


@pytest.mark.parametrize(("knobs", "said"), WRONG)
def test_a_wrong_knob_is_said_and_the_sliders_live_on(digits, knobs, said):
    panel = digits_panel()
    before = panel.state

    async def go(browser):
        wrong = browser.moves(**knobs)
        right = browser.moves(keep=0.25)
        await browser.hears("rest", right)
        return wrong, right

    with page(panel) as browser:
        wrong, right = asyncio.run(go(browser))
    (error,) = browser.of("error")
    assert error["seq"] == wrong and said in error["message"]
    assert browser.of("exact", right)[0]["accuracy"] == evaluate(cmlib.compress(panel.net, HAN, keep=0.25), digits)
    assert panel.state is not before and before.step() in panel.path


def test_an_unknown_layer_is_said_once():
    panel = digits_panel()
    with page(panel) as browser:
        browser.moves(layer="fc9", keep=0.5)
        browser.says("move", seq=2, knobs={"keep": 0.4})  # without a layer: the last good one
    (error,) = browser.of("error")
    assert error["seq"] == 1 and "fc9" in error["message"] and "fc1" in error["message"]
    assert browser.of("exact", 2) and panel.layer == "fc1"


@pytest.mark.parametrize("message", [{"type": "dance"}, {}, {"type": "move", "seq": 3}, {"type": "guess"}, {"type": "seed", "value": "seven"}])
def test_a_message_that_makes_no_sense_is_an_error(message):
    panel = digits_panel()
    with page(panel) as browser:
        panel._receive(panel, message, [])
        assert [m["type"] for m in browser.heard] == ["error"]
        browser.last = panel.seq
        assert browser.of("exact", browser.moves(keep=0.3))


@pytest.mark.parametrize("broken", ["measure", "estimates"])
def test_a_measurement_that_fails_is_said_and_the_panel_lives(monkeypatch, broken):
    panel = digits_panel()

    def fail(*_, **__):
        raise RuntimeError("no such thing as a free lunch")

    async def go(browser):
        with monkeypatch.context() as patch:
            patch.setattr(*((walk, "latency") if broken == "measure" else (panel.live, "estimates")), fail)
            failed = browser.moves(keep=0.3)
            error = await browser.hears("error")
        fine = browser.moves(keep=0.2)
        await browser.hears("rest", fine)
        return failed, error

    with page(panel) as browser:
        failed, error = asyncio.run(go(browser))
    assert error["seq"] == failed and "no such thing as a free lunch" in error["message"]
    assert len(browser.of("exact", failed)) == (broken == "measure")


# A view that opens, pins, guesses, seeds


def test_a_view_that_opens_is_told_where_the_kernel_stands(digits):
    panel = digits_panel()

    async def go(browser):
        first = browser.moves(keep=0.15, layer="fc2")
        await browser.hears("rest", first)
        browser.heard.clear()
        browser.says("ready", seq=0, knobs={"keep": 0.1}, layer="fc1")
        await browser.hears("exact", first)
        return first

    with page(panel) as browser:
        seq = asyncio.run(go(browser))
    picture = browser.of("picture")[0]
    assert (picture["seq"], picture["knobs"]["keep"], picture["layer"]) == (seq, 0.15, "fc2")
    assert "threshold" not in picture["knobs"]  # what has no slider is not sent to one
    assert browser.of("exact")[0]["accuracy"] == evaluate(cmlib.compress(panel.net, HAN, keep=0.15), digits)
    assert [s.knobs["keep"] for s in panel.path] == [0.1, 0.15]  # looking again is no step


def test_pins_hold_the_two_newest_and_go():
    panel = digits_panel()
    with page(panel) as browser:
        for keep in (0.5, 0.2, 0.05):
            browser.moves(keep=keep)
            browser.says("pin")
        pins = browser.of("pinned")[-1]["pins"]
        assert [p["label"] for p in pins] == ["A", "B"]
        assert ["keep=0.2" in pins[0]["line"], "keep=0.05" in pins[1]["line"]] == [True, True]
        assert [dict(p["cells"])["weights kept"] for p in pins] == [f"{s.kept:,}" for s in panel.pins]
        assert pins[0]["point"]["accuracy"] == panel.pins[0].accuracy
        browser.says("unpin")
    assert browser.of("pinned")[-1]["pins"] == [] == panel.pins


def test_a_pin_keeps_the_network_that_it_was_made_of():
    panel = digits_panel()
    with page(panel) as browser:
        browser.says("pin")
        browser.says("seed", value=1)
        browser.says("pin")
    lines = [p["line"] for p in browser.of("pinned")[-1]["pins"]]
    assert "seed=0" in lines[0] and "seed=1" in lines[1]


def test_a_guess_is_answered_by_measuring(digits):
    panel = digits_panel(predict={"keep": 0.03})
    assert panel.spec["predict"]["at"] == {"keep": 0.03} and "keep = 0.03" in panel.spec["predict"]["question"]
    actual = evaluate(cmlib.compress(panel.net, HAN, keep=0.03), digits)
    with page(panel) as browser:
        browser.says("guess", value=actual, knobs={"keep": 0.1})
        browser.says("guess", value=min(1.0, actual + 0.2))
        browser.says("guess", value=actual - 0.2)
    said = browser.of("guess")
    assert [m["actual"] for m in said] == [actual] * 3
    assert [re.search("spot on|too high|too low", m["text"]).group() for m in said] == ["spot on", "too high", "too low"]
    assert [g["actual"] for g in panel.guesses] == [actual] * 3


def test_a_guess_is_of_the_sliders_where_they_stand(digits):
    panel = digits_panel(predict={"keep": 0.3})
    with page(panel) as browser:
        browser.says("guess", value=0.5, knobs={"keep": 0.9, "unit": "row", "scope": "network"})
    expected = evaluate(cmlib.compress(panel.net, HAN, keep=0.3, unit="row", scope="network"), digits)
    assert browser.of("guess")[0]["actual"] == expected != evaluate(cmlib.compress(panel.net, HAN, keep=0.3), digits)
    assert panel.guesses[0]["at"]["unit"] == "row"


def test_a_guess_is_measured_beside_and_moves_go_on():
    panel = digits_panel(predict={"keep": 0.3})

    async def go(browser):
        browser.says("guess", value=0.5, knobs={})
        assert browser.heard == []  # the kernel is free again
        browser.moves(keep=0.7)
        await browser.hears("guess")

    with page(panel) as browser:
        asyncio.run(go(browser))


def test_another_seed_is_another_network(digits):
    panel = digits_panel(keep=0.2)
    with page(panel) as browser:
        browser.moves(keep=0.3)
        browser.says("seed", value=2)
    other = load_net("mlp", "digits", 2)
    assert panel.net.source["seed"] == 2 and panel.spec["seed"]["value"] == 2
    assert panel.dense.accuracy == panel.spec["dense"]["accuracy"] == evaluate(other, digits)
    assert [(s.knobs["keep"], s.accuracy) for s in panel.path] == [(0.3, evaluate(cmlib.compress(other, HAN, keep=0.3), digits))]
    assert browser.of("picture")[-1]["knobs"]["keep"] == 0.3
    assert len(panel.spec["walked"]) == 1


def test_the_path_can_be_cleared_and_walked_anew():
    panel = digits_panel()
    with page(panel) as browser:
        browser.moves(keep=0.5)
        browser.says("clear")
        assert panel.path == []
        browser.moves(keep=0.4)
    assert [s.knobs["keep"] for s in panel.path] == [0.4]
    assert panel.text() and panel.line()


def test_a_cleared_path_leaves_the_knobs_where_they_are():
    panel = digits_panel()
    panel.move(scope="network")
    panel._on_clear({})
    assert panel.move(keep=0.4).knobs["scope"] == "network"


def test_a_move_from_code_is_seen_in_the_views(digits):
    panel = digits_panel()

    async def go(browser):
        last = browser.moves(keep=0.5)
        panel.move(keep=0.3)
        await browser.hears("rest", last + 1)
        return last + 1

    with page(panel) as browser:
        seq = asyncio.run(go(browser))
    assert browser.of("picture", seq)[0]["knobs"]["keep"] == 0.3
    (exact,) = browser.of("exact", seq)
    assert exact["accuracy"] == evaluate(cmlib.compress(panel.net, HAN, keep=0.3), digits)
    assert exact["point"]["knobs"]["keep"] == 0.3 and exact["point"]["epochs"] == 0
    assert "threshold" not in exact["point"]["knobs"] and panel.spec["walked"][0]["knobs"]["keep"] == 0.1


def test_a_move_does_not_wait_for_the_timing_before_it(monkeypatch):
    panel, timed, latency = digits_panel(), [], walk.latency

    def slow(models, *rest):
        timed.append(models["now"])
        time.sleep(0.1)
        return latency(models, *rest)

    monkeypatch.setattr(walk, "latency", slow)

    async def go(browser):
        first = browser.moves(keep=0.31)
        while not timed:
            await asyncio.sleep(0.005)
        second = browser.moves(keep=0.32)
        await browser.hears("rest", second)
        return first

    with page(panel) as browser:
        first = asyncio.run(go(browser))
    assert not browser.of("rest", first)
    assert len(timed) == 1 + walk.SLICES and len(set(map(id, timed))) == 2  # one slice of the first state


def test_the_worker_keeps_the_threads_of_the_kernel(monkeypatch):
    monkeypatch.setattr(explorer, "WORKER", ThreadPoolExecutor(1, initializer=explorer._humbly))
    with threads_at(2):
        digits_panel()
        with threads_at(1):  # as in a move
            assert explorer.WORKER.submit(torch.get_num_threads).result() == 2


def test_an_unknown_layer_or_knob_is_told_when_the_panel_is_made():
    with pytest.raises(ValueError, match=r"fc7.*fc1, fc2"):
        digits_panel(layer="fc7")
    with pytest.raises(ValueError, match="did you mean 'keep'"):
        digits_panel(kep=0.1)
    with pytest.raises(ValueError, match="did you mean 'magnitude_pruning_han'"):
        digits_panel("magnitude_prunning")


# What it says: text, csv, line, file


def test_the_text_twin_has_every_figure_of_the_table():
    panel = digits_panel(keep=0.05)
    with page(panel) as browser:
        browser.moves(keep=0.08)
    text = panel.text()
    for cells in panel.cells(panel.state):
        line = next(line for line in text.split("\n") if line.startswith(cells[0]))
        assert all(cell in line for cell in cells)
    assert f"{100 * panel.state.accuracy:.2f} %" in text and f"{100 * panel.dense.accuracy:.2f} %" in text
    assert percent(row(browser.of("exact")[0], "accuracy, exact")[2]) == pytest.approx(panel.state.accuracy, abs=5e-5)
    for name, packed in panel.state.plan.items():
        assert re.search(rf"kept in {name} +{packed.mask.numel():,} +{packed.kept:,} ", text)
    assert text.endswith(panel.line()) and panel.method.paper in text and "…" not in text
    assert len({len(line) for line in text.split("\n")[2:-1]}) == 1  # columns stand under one another


def test_the_worst_classes_are_those_that_lost_most(digits):
    panel = digits_panel(keep=0.03)
    labels = panel.live.labels
    before, after = panel.live.dense == labels, panel.live.answers(panel.state.weights) == labels
    lost = {str(c): (before[labels == c].float().mean() - after[labels == c].float().mean()).item() for c in range(10)}
    shown = {w["label"]: w["dense"] - w["now"] for w in panel.state.worst}
    assert sorted(shown.values()) == pytest.approx(sorted(lost.values())[-3:])
    assert all(shown[c] == pytest.approx(lost[c]) for c in shown)


def test_the_flipped_images_are_the_flipped_images():
    panel = digits_panel()
    with page(panel) as browser:
        browser.moves(keep=0.03)
    (message,) = browser.of("exact")
    flips, labels, answers = message["flips"], panel.live.labels, panel.live.answers(panel.state.weights)
    lost = ((panel.live.dense == labels) & (answers != labels)).nonzero().flatten()
    assert flips["total"] == len(lost) and flips["n"] == min(12, len(lost)) > 0
    assert bytes(message["buffers"][0]) == panel.live.images[lost[:12]].numpy().tobytes()
    assert [(x["truth"], x["after"]) for x in flips["labels"]] == [(str(int(labels[i])), str(int(answers[i]))) for i in lost[:12]]


def test_the_path_as_csv():
    panel = digits_panel(keep=0.5)
    panel.move(keep=0.1)
    panel.move(scope="network")
    rows = list(csv.DictReader(io.StringIO(panel.path_csv())))
    assert [float(r["keep"]) for r in rows] == [0.5, 0.1, 0.1] and [r["scope"] for r in rows][-1] == "network"
    figures = [(int(r["weights_kept"]), float(r["weight_bits"]), int(r["file_bytes"]), float(r["accuracy"])) for r in rows]
    assert figures == [(s.kept, s.weight_bits, s.file_bytes, s.accuracy) for s in panel.path]
    assert list(rows[0]) == [*panel.method.knobs, "epochs", "weights_kept", "weight_bits", "activation_bits", "file_bytes", "accuracy"]


LINES = [
    (HAN, "mlp", {}, {"keep": 0.1}),
    (HAN, "cnn", {"where": "conv*"}, {"keep": 0.0123456789, "storage": "bitmap"}),
    (HAN, "mlp", {}, {"keep": 1 / 3, "scope": "network"}),
    ("random_pruning", "mlp", {"where": "*, !last"}, {"keep": 0.3, "seed": 7}),
    ("optimal_brain_damage", "mlp", {}, {"keep": 0.07}),
    ("layerwise_obs", "mlp", {}, {"keep": 0.05, "damping": 1e-8}),
    ("snip", "cnn", {}, {"keep": 0.2, "unit": "weight"}),
    ("l1_weight_regularization", "mlp", {}, {"lam": 1e-7}),
    ("dynamic_network_surgery", "mlp", {}, {"c": 1.25}),
]


@pytest.mark.parametrize(("method", "net", "settings", "knobs"), LINES, ids=[f"{m}-{n}-{i}" for i, (m, n, *_) in enumerate(LINES)])
def test_the_line_makes_what_is_shown(digits, tmp_path, method, net, settings, knobs):
    panel = digits_panel(method, net, **settings)
    with page(panel) as browser:
        browser.moves(**{**{n: k for n, k in panel.start.items() if k is not None}, **knobs})
    assert not browser.of("error")
    scope = {}
    exec("from cmlib import *", scope)
    model = eval(panel.line(), scope)
    assert evaluate(model, digits) == panel.state.accuracy
    length = save(model, tmp_path / "line.cml")
    assert length == os.path.getsize(tmp_path / "line.cml") == panel.state.file_bytes
    save(panel.model(), tmp_path / "panel.cml")
    assert os.path.getsize(tmp_path / "panel.cml") == length


def test_the_line_of_mnist_makes_what_is_shown(lenet_panel, mnist, tmp_path):
    with page(lenet_panel) as browser:
        browser.moves(keep=0.044, layer="fc1")
    scope = {}
    exec("from cmlib import *", scope)
    model = eval(lenet_panel.line(), scope)
    assert evaluate(model, mnist) == lenet_panel.state.accuracy == browser.of("exact")[0]["accuracy"]
    assert save(model, tmp_path / "line.cml") == lenet_panel.state.file_bytes
    assert row(browser.of("rest")[0], "file on disk")[2] == f"{lenet_panel.state.file_bytes / 1e3:,.0f} kB"


def test_the_size_shown_at_once_is_near_that_of_the_file():
    for keep in (1.0, 0.3, 0.05):
        panel = digits_panel(net="cnn")
        early = panel.look({**panel.start, "keep": keep}).file_bytes
        with page(panel) as browser:
            browser.moves(keep=keep)
        assert panel.state.file_bytes == pytest.approx(early, abs=700)  # the header's length alone is not known yet


def test_the_dense_file_is_that_of_the_dense_network(tmp_path):
    panel = digits_panel()
    assert panel.dense.file_bytes == save(panel.net, tmp_path / "dense.cml") == os.path.getsize(tmp_path / "dense.cml")


@pytest.mark.parametrize(("key", "net", "data"), [("ista_channel_pruning", "resnet", "fashion_mnist"), ("perforated_cnn", "lenet5", "mnist"),
                                                  ("vibnet", "lenet5", "mnist"), ("random_pruning", "lenet300", "mnist")])  # fmt: skip
def test_without_a_network_there_is_one_that_has_what_the_method_asks_for(key, net, data, mnist, monkeypatch):
    few = {part: tuple(t[:600] for t in getattr(mnist, part)) for part in ("train", "validation")}
    monkeypatch.setattr(explorer, "load_data", lambda name: replace(mnist, name=name, **few))  # what is shown asks for no accuracy
    panel = explore(key)
    assert (panel.source["net"], panel.source["data"]) == (net, data) and panel.pictures(panel.state).cards
    with pytest.raises(ValueError, match=r"find\('eyeriss_energy_model'\)"):
        explore("eyeriss_energy_model")


def test_moves_leave_the_network_as_it_was():
    net = load_net("mlp", "digits")
    before = {n: (t, t.clone()) for n, t in net.state_dict(keep_vars=True).items()}
    panel = explore(HAN, net=net, data="digits")
    parameters = dict(panel.live.model.named_parameters())
    for keep in (0.5, 0.01, 1.0):
        panel.move(keep=keep)
        panel.pictures(panel.state)
    assert all(t is net.state_dict(keep_vars=True)[n] and torch.equal(t, values) for n, (t, values) in before.items())
    assert all(p is parameters[n] for n, p in panel.live.model.named_parameters())


def test_no_move_copies_the_model(monkeypatch):
    panel = digits_panel()
    monkeypatch.setattr(walk, "deepcopy", lambda *_: pytest.fail("copied"))
    monkeypatch.setattr(nn.Module, "__deepcopy__", lambda *_: pytest.fail("copied"), raising=False)
    assert panel.move(keep=0.3).accuracy > 0


def test_pages_without_widgets_get_a_table():
    panel = digits_panel(keep=0.04)
    data, _ = panel._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in data
    assert data["text/plain"] == panel.text()
    page = data["text/html"]
    assert page.count("<table") == 1 and 'role="img"' not in page  # a table is read cell by cell, a picture is not
    for cells in panel.cells(panel.state):
        assert cells[0] in page and cells[2] in page
    assert "&quot;mlp&quot;" in page  # the line, escaped


def test_everything_kept_changes_nothing_and_nothing_kept_says_so():
    panel = digits_panel()
    state = panel.move(keep=1.0)
    assert state.accuracy == panel.dense.accuracy and state.kept == state.total
    assert panel.notes(state)[0]["text"] == "Every weight stays."
    empty = panel.move(threshold=1e6)
    assert empty.kept == 0 and panel.notes(empty)[0]["title"] == "A layer is empty."
    assert row({"cells": panel.cells(empty)}, "weights kept")[3] == "∞" and panel.pictures(empty).cards


@pytest.mark.parametrize("knobs", [{"storage": "bitmap"}, {"storage": "csr"}, {"storage": "relative"}, {"keep": 0.02}])
def test_bits_of_value_and_index_are_those_that_measure_explains(knobs):
    panel = digits_panel(**{"keep": 0.1, **knobs})
    said = " ".join(cmlib.measure(panel.model(), panel.net).explain())
    expected = re.search(r"[\d.]+ bits of value.* bits of index", said).group()
    assert any(expected in n["text"] for n in panel.notes(panel.state))


def test_bits_of_index_leave_out_what_is_stored_dense():
    panel = digits_panel("random_pruning", keep=0.5)
    mixed = {"fc1": panel.state.plan["fc1"], "fc2": replace(panel.state.plan["fc2"], storage="dense")}
    assert words.index_bits(mixed) == (32, 2)  # a bitmap, of which half is kept
    assert words.index_bits({"fc2": mixed["fc2"]}) is None
    assert not any("bits" in n["text"] for n in panel.notes(panel.look(panel.start)))  # not known while the slider moves


def test_what_a_plan_warns_of_is_a_note(recwarn):
    panel = digits_panel(net="cnn", keep=0.01, unit="filter")
    notes = {n["title"]: n["text"] for n in panel.notes(panel.state)}
    assert "conv1 would keep none of its 8 channels; its best one stays" in notes["Warning."] and not recwarn.list
    plain = {n["title"] for n in panel.notes(panel.move(unit="row", keep=0.5))}
    assert "Why did the multiply-adds not move?" in plain and "Filters go whole." not in plain and "Warning." not in plain


def test_a_move_does_not_mind_a_measurement_under_way():
    panel = digits_panel(net="cnn", keep=0.5, unit="filter")
    found = []
    hook = panel.live.model.conv1.register_forward_pre_hook(lambda *_: found.append(panel.look({**panel.start, "keep": 0.25}).weights))
    next(panel.live.batches(panel.state.weights))  # other weights are in place of the model's own meanwhile
    hook.remove()
    assert found[0]["bn1.bias"].count_nonzero() == 2


def test_filters_that_go_whole_are_timed_without_them():
    panel = digits_panel(net="cnn", keep=0.5, unit="filter")
    *_, panel.state.speed = panel.speeds(panel.state)
    small = bake(panel.model())
    assert panel.state.speed.multiply_adds == multiply_adds(small, torch.zeros(1, 1, 8, 8)) < 0.5 * panel.dense.multiply_adds
    notes = {n["title"]: n["text"] for n in panel.notes(panel.state)}
    assert "Why did the multiply-adds not move?" not in notes and "Filters go whole." in notes
    table, size = {label: row for label, *row in panel.cells(panel.state)}, length(small, {})
    assert table["file, filters taken out"] == [words.size_text(n) for n in (panel.dense.file_bytes, size)] + [
        words.times(panel.dense.file_bytes, size)
    ]
    assert table["file, filters taken out"] != table["file on disk"]
    rows = {label for label, *_ in panel.cells(panel.look({**panel.start, "unit": "row"}))}
    assert "file, filters taken out" not in rows


# Every method, and methods of one's own


def corners(knob, start):
    """Every choice, or both ends of a span, and its middle where it starts at an end; the start itself has been seen."""
    ends = knob.span.points(2)
    return [value for value in (knob.span.points(3) if start in ends else ends) if value != start]


@pytest.fixture(scope="module")
def few(digits):
    """The digits, but few of them."""
    return replace(digits, **{part: tuple(t[:n] for t in getattr(digits, part)) for part, n in (("train", 150), ("validation", 100))})


@pytest.mark.parametrize("net", ["mlp", "cnn"])
@pytest.mark.parametrize("key", [k for k, m in catalog().items() if not m.no_plan])
def test_every_method_can_be_explored_to_its_corners(key, net, few, monkeypatch):
    monkeypatch.setattr(walk, "SLICES", 1)  # of timing, which is the same for all
    if net == "mlp" and "bn_gamma" in catalog()[key].asks:
        pytest.skip("the net has no batch norm")
    small = {"where": "fc2" if net == "mlp" else "conv1, fc"} if key == "optimal_brain_surgeon" else {}
    panel = explore(key, net=load_net(net, "digits"), data=few, **small)
    sliders = {k["name"] for k in panel.spec["knobs"]}
    with page(panel) as browser:
        browser.moves(**{n: v for n, v in panel.start.items() if n in sliders})
        for name, knob in panel.method.knobs.items():
            for value in corners(knob, panel.start[name]):
                if value == "filter" and small.get("where") == "fc2":
                    continue  # only the output layer is covered, whose units cannot go
                state = panel.look({**panel.start, name: value})
                panel._finish(state, panel.live.answers(state.weights))
                assert 0 <= state.accuracy <= 1 and state.file_bytes > 0
                panel._picture(state)
    assert not browser.of("error") and browser.of("rest")
    json.dumps([{k: v for k, v in m.items() if k != "buffers"} for m in [*browser.heard, panel.spec]], allow_nan=False)


def test_a_plain_function_with_knobs_is_a_panel(digits):
    def far_from_mean(w, *, power: Annotated[float, Span(0.5, 2)] = 1.0):
        """Far from the mean."""
        return (w - w.mean()).abs() ** power

    panel = digits_panel(far_from_mean, keep=0.2)
    assert panel.title == "Far from the mean"
    names = [k["name"] for k in panel.spec["knobs"]]
    assert names[0] == "keep" and names[-1] == "power"
    with page(panel) as browser:
        browser.moves(keep=0.5, power=2.0)
    method = score("of one's own", chapter="-")(far_from_mean)
    assert browser.of("exact")[0]["accuracy"] == evaluate(cmlib.compress(panel.net, method, keep=0.5), digits)
    scope = {"far_from_mean": far_from_mean}
    exec("from cmlib import *", scope)
    assert evaluate(eval(panel.line(), scope), digits) == panel.state.accuracy


def test_a_method_in_ten_lines_is_a_panel(digits):
    @score("a method of one's own", chapter="02")
    def mean_field(w, grad, *, sharp: Annotated[float, Span(0.5, 4)] = 1.0):
        return (w * grad).abs() ** sharp

    panel = digits_panel(mean_field)
    assert panel.title == "mean_field" and panel.spec["train"] is None  # a second process cannot find it by name
    panel.move(keep=0.3, sharp=2.0)
    scope = {"mean_field": mean_field}
    exec("from cmlib import *", scope)
    assert evaluate(eval(panel.line(), scope), digits) == panel.state.accuracy
    with page(panel) as browser:
        browser.says("train")
    assert "fit(" in browser.of("error")[0]["message"]


def test_a_function_without_a_knob_of_its_own_and_one_that_asks_for_too_much():
    assert digits_panel(lambda w: w.abs()).state.accuracy > 0.1
    with pytest.raises(ValueError, match="nothing provides"):
        digits_panel(lambda w, astrology: w)


def test_a_shared_knob_annotated_by_oneself():
    def mine(w, *, keep: Keep = 0.25):
        return w.abs()

    panel = digits_panel(mine)
    assert panel.state.kept == round(0.25 * 2048) + round(0.25 * 320)


def test_ones_own_network_and_data_in_five_lines():
    images, labels = torch.rand(300, 1, 6, 6), torch.randint(0, 3, (300,))
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    panel = explore(HAN, net=net, data=(images, labels), keep=0.3)
    with page(panel) as browser:
        browser.moves(keep=0.1)
    assert not browser.of("error")
    assert browser.of("rest")[0]["seq"] == 1
    assert panel.spec["seed"] is None and panel.spec["train"] is None
    assert "Sequential of your own on data of your own · 300 validation images" in panel.subtitle()
    model = eval(panel.line(), {"compress": cmlib.compress, "net": net})
    assert evaluate(model, (images, labels)) == panel.state.accuracy
    with page(panel) as browser:
        browser.says("train")
        browser.says("seed", value=1)
    assert len(browser.of("error")) == 2


@pytest.mark.parametrize("shape", [(12,), (6, 6), (3, 6, 6)], ids=["features", "pictures without channels", "colour"])
@pytest.mark.parametrize("classes", [(0, 1), (0, 9), (0, 5, 9)])
def test_data_of_other_shapes_and_classes(shape, classes):
    x = torch.randn(400, *shape)
    labels = torch.tensor(classes)[torch.randint(0, len(classes), (400,))]
    features = x[0].numel()
    net = nn.Sequential(nn.Flatten(), nn.Linear(features, 20), nn.ReLU(), nn.Linear(20, max(classes) + 1))
    panel = explore(HAN, net=net, data=(x, labels))
    with page(panel) as browser:
        browser.moves(keep=0.01)
    assert not browser.of("error")
    exact = browser.of("exact")[0]
    json.dumps({k: v for k, v in exact.items() if k != "buffers"}, allow_nan=False)
    assert {w["label"] for w in exact["worst"]} <= {str(c) for c in classes}
    flips = exact["flips"]
    colours = 3 if len(shape) == 3 else 1
    assert len(bytes(exact["buffers"][0])) == flips["n"] * flips["h"] * flips["w"] * colours
    assert flips["palette"] == ("rgb" if colours == 3 else "grey")
    if flips["n"] and colours == 3:  # red, green, blue of a pixel beside each other
        live, answers = panel.live, panel.state.answers
        first = ((live.dense == live.labels) & (answers != live.labels)).nonzero()[0, 0]
        expected = (live.images[first].clamp(0, 1) * 255).to(torch.uint8).movedim(0, -1)
        assert bytes(exact["buffers"][0])[: expected.numel()] == expected.contiguous().numpy().tobytes()
    assert flips["n"] == 0 or (flips["h"], flips["w"]) == shape[-2:]
    assert len(flips["labels"]) == flips["n"] and flips["n"] == (0 if len(shape) == 1 else min(12, flips["total"]))


def test_a_network_of_one_layer():
    net = nn.Linear(12, 4)
    panel = explore(HAN, net=nn.Sequential(net), data=(torch.randn(300, 12), torch.randint(0, 4, (300,))))
    assert panel.move(keep=0.5).kept == 24


# The pictures


@pytest.mark.parametrize(("net", "data", "layer", "kinds"), [
    ("lenet5", "mnist", "conv1", ["histogram", "image", "strip", "strip", "bars"]),
    ("lenet5", "mnist", "fc1", ["histogram", "image", "bars"]),
    ("lenet300", "mnist", "fc1", ["histogram", "image", "strip", "bars"]),
    ("resnet", "mnist", "block2.conv1", ["histogram", "image", "strip", "strip", "bars"]),
    ("resnet", "mnist", "block2.shortcut.conv", ["histogram", "image", "strip", "bars"]),
    ("resnet", "mnist", "fc", ["histogram", "image", "bars"]),
    ("lenet300", "mnist", "fc3", ["histogram", "image", "bars"]),
    ("mlp", "digits", "fc2", ["histogram", "image", "bars"]),
])  # fmt: skip
def test_every_layer_has_its_pictures(net, data, layer, kinds, mnist):
    few = tuple(t[:300] for t in (cmlib.load_data("digits") if data == "digits" else mnist).validation)
    panel = explore(HAN, net=load_net(net, data), data=few, layer=layer)
    found = panel.pictures(panel.state)
    assert [c["kind"] for c in found.cards] == kinds
    for card in found.cards:
        for name in {"buffer", "before", "after"} & card.keys():
            assert len(found.buffers[card[name]]) == card.get("n", 1) * card["h"] * card["w"]


def test_the_map_is_the_share_kept():
    panel = explore("random_pruning", net="mlp", data="digits", keep=0.3, scope="network")
    pixels = panel.state.plan["fc1"].mask.double().mean(0)
    for layer, expected in (("fc1", pixels / pixels.max()), ("fc2", panel.state.plan["fc2"].mask.double())):
        panel.layer = layer
        found = panel.pictures(panel.state)
        image = next(c for c in found.cards if c["kind"] == "image")
        drawn = torch.frombuffer(bytearray(found.buffers[image["buffer"]]), dtype=torch.uint8)
        assert (drawn.double() - 255 * expected.flatten()).abs().max() <= 1
    far = pictures.LayerView("wide", torch.randn(128, 192))
    out, mask = pictures.Cards([], []), torch.rand(128, 192) < 0.3
    far.map(out, mask.flatten().nonzero().flatten().numpy())
    blocks = torch.nn.functional.avg_pool2d(mask.double()[None, None], 2).flatten()  # 64 by 96 cells of 2 by 2 weights
    drawn = torch.frombuffer(bytearray(out.buffers[0]), dtype=torch.uint8)
    assert (drawn.double() - 255 * blocks).abs().max() <= 1


def test_only_a_first_layer_is_pictured_as_what_it_sees():
    wide = pictures.LayerView("fc", torch.arange(24.0).reshape(1, 24), (2, 3, 4))
    assert wide.grid == (3, 4) and wide.before.shape == (1, 3, 4) and wide.in_cell.tolist() == [2] * 12
    assert "input" not in caption(pictures.LayerView("fc3", torch.randn(10, 100)))
    assert "pixel of the input" in caption(wide)
    assert pictures.LayerView("conv", torch.randn(8, 64, 1, 1)).before is None


def caption(view):
    out = pictures.Cards([], [])
    view.map(out, torch.arange(view.weight.numel()).numpy())
    return out.cards[0]["caption"].replace("inputs across", "")


def test_the_threshold_drawn_is_the_one_that_cut():
    panel = digits_panel(keep=0.2)
    weight, mask = panel.planner.weights["fc1"], panel.state.plan["fc1"].mask
    cut = panel.pictures(panel.state).cards[0]["cut"]
    assert torch.equal(weight.abs() > cut, mask)
    other = digits_panel("random_pruning", keep=0.2)
    assert other.pictures(other.state).cards[0]["cut"] is None  # size did not decide here


def test_a_layer_of_zeros_can_be_drawn():
    view = pictures.LayerView("fc", torch.zeros(10, 64))
    assert sum(view.histogram(Masked(torch.zeros(10, 64), torch.ones(10, 64, dtype=torch.bool)))["kept"]) == 640
