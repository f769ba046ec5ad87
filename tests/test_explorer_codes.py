"""The panel of a quantizer: pictures that count what the codes hold, figures that are those of ``measure`` and ``save``, rounded inputs included."""

import asyncio
import csv
import io
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import cmlib
from cmlib.core.codes import Codes, grouped
from cmlib.core.knobs import Bits, Per, WideBits
from cmlib.core.method import quantizer
from cmlib.core.rounding import Affine
from cmlib.lab.files import load, save
from cmlib.lab.measure import threads_at
from cmlib.lab.train import evaluate, fit
from cmlib.lab.zoo import load_net
from cmlib.methods import catalog
from cmlib.view import cards, explorer, walk, words
from cmlib.view.explorer import explore
from cmlib.view.live import Live

HAN = "magnitude_pruning_han"
QUANTIZERS = [k for k, m in catalog().items() if m.kind == "quantizer"]


def _inputs(*, a_bits: WideBits = 32):
    return None if a_bits == 32 else Affine(torch.tensor(1 / (2**a_bits - 1)), torch.tensor(0.0), 2**a_bits)


@quantizer("evenly spaced levels", chapter="04", acts=_inputs)
def uniform(w, *, bits: Bits = 4, per: Per = "tensor"):
    """A uniform grid from the largest magnitude to its negative; inputs from 0 to 1."""
    g, count = grouped(w, per), 1 << bits
    scale = 2 * g.abs().amax(1, keepdim=True).clamp(min=1e-12) / (count - 1)
    return Codes(w, (g / scale + (count - 1) / 2).round().clamp(0, count - 1).long(), scale, count)


@pytest.fixture(autouse=True)
def no_rest(monkeypatch):
    """The hand rests for a moment only."""
    monkeypatch.setattr(explorer, "REST", 0.01)


def panel_of(method=uniform, net="mlp", **settings):
    return explore(method, net=net, data="digits", **settings)


def pruned_panel(keep=0.3, **knobs):
    return explore(uniform, net=cmlib.compress(load_net("cnn", "digits"), HAN, keep=keep), data=cmlib.load_data("digits"), **knobs)


def drawn(panel, kind):
    return [c for c in panel.pictures(panel.state).cards if c["kind"] == kind]


def table(panel):
    return {row[0]: row[1:] for row in panel.cells(panel.state)}


def notes(panel):
    return {n["title"]: n["text"] for n in panel.notes(panel.state)}


def weight(panel):
    return panel.planner.weights[panel.layer], panel.state.plan[panel.layer].dense()


# The pictures


@pytest.mark.parametrize("bits", [1, 3, 8])
def test_sticks_count_the_weights_at_each_level(bits):
    panel = panel_of(bits=bits, layer="fc2")
    (card,) = drawn(panel, "histogram")
    w, after = weight(panel)
    values, counts = torch.unique(after, return_counts=True)
    sticks = {np.float32(v): n for v, n, _ in card["sticks"]}
    assert len(sticks) == 2**bits and sum(sticks.values()) == w.numel()
    assert {v: n for v, n in sticks.items() if n} == dict(zip(values.numpy(), counts.tolist(), strict=True))  # the others are levels that none took
    lo, hi = card["span"]
    assert lo < after.min() and after.max() < hi and lo == -hi
    edges = torch.linspace(*card["edges"], len(card["counts"]) + 1)
    assert card["edges"][1] == w.abs().max() and sum(card["counts"]) == w.numel()
    assert (torch.tensor(card["counts"]).cumsum(0) - torch.searchsorted(w.flatten().sort().values, edges[1:])).abs().max() <= 2  # ties at an edge


def test_few_levels_far_apart_say_their_shares():
    ternary = panel_of("ternary_weight_networks", layer="fc1")
    (card,) = drawn(ternary, "histogram")
    _, after = weight(ternary)
    shares = [(after < 0).double().mean(), (after == 0).double().mean(), (after > 0).double().mean()]
    assert [text for *_, text in card["sticks"]] == [f"{100 * s:.0f}\u00a0%" for s in shares] and card["cut_label"] == ""
    (card,) = drawn(panel_of(bits=4), "histogram")
    assert not any(text for *_, text in card["sticks"]) and card["cut_label"] == "16 levels"
    assert cards.share_text(0.004) == "<1\u00a0%"


def test_many_levels_are_merged_and_none_is_lost():
    panel = panel_of(bits=8, per="filter", layer="fc1")
    (card,) = drawn(panel, "histogram")
    _, after = weight(panel)
    lo, hi = card["span"]
    counts, edges = np.histogram(after.double().numpy(), cards.STICKS, (lo, hi))
    assert len(card["sticks"]) == (counts > 0).sum() and "256 levels in 32 groups" in card["caption"]
    middles = (edges[1:] + edges[:-1]) / 2
    assert np.allclose([v for v, *_ in card["sticks"]], middles[counts > 0]) and [n for _, n, _ in card["sticks"]] == counts[counts > 0].tolist()


@pytest.mark.parametrize(("key", "knobs", "said", "values"), [
    ("vq_gong", {"scheme": "product", "k": 4, "sub_vector_dim": 8}, "4 vectors of 8 in 8 groups", 256),
    ("vq_gong", {"scheme": "residual", "k": 4, "sub_vector_dim": 4}, "4 vectors of 4 + 4 vectors of 4", None),
    ("inq", {"portion": 0.5}, "17 levels + floats", None),
    ("trained_ternary_quantization", {}, "3 levels", 3),
])  # fmt: skip
def test_whatever_the_levels_are_every_weight_stands_at_one(key, knobs, said, values):
    panel = panel_of(key, layer="fc1", **knobs)
    (card,) = drawn(panel, "histogram")
    w, after = weight(panel)
    assert said in card["caption"] and sum(n for _, n, _ in card["sticks"]) == w.numel()
    assert values is None or len(card["sticks"]) == values
    lo, hi = card["span"]
    near = (hi - lo) / cards.STICKS / 2 * (1 + 1e-6)
    stands = torch.tensor([v for v, n, _ in card["sticks"] if n])
    assert ((after.flatten()[:, None] - stands).abs().min(1).values <= near).all()


def test_the_staircase_is_what_each_value_became():
    panel = panel_of(bits=3, per="filter", layer="fc2")
    (card,) = drawn(panel, "stairs")
    w, after = (t.flatten().double() for t in weight(panel))
    top, bins = card["edges"][1], card["bins"]
    assert top == pytest.approx(w.abs().max().item())
    bar = ((w / top + 1) / 2 * bins).floor().clamp(max=bins - 1).long()
    found = [[b, after[bar == b].min().item(), after[bar == b].max().item()] for b in bar.unique().tolist()]
    assert torch.allclose(torch.tensor(card["steps"]), torch.tensor(found))
    error = (w - after).square().mean()
    said = re.search(r"mean squared error (\S+), (\S+)\u00a0%", card["caption"]).groups()
    assert float(said[0]) == pytest.approx(error.item(), rel=0.05) and float(said[1]) == pytest.approx(
        100 * (error / w.square().mean()).item(), rel=0.05
    )


def test_what_a_layer_reads_is_a_staircase_too():
    panel = panel_of(net="cnn", a_bits=2, layer="conv2")
    inputs = [c for c in drawn(panel, "stairs") if "reads" in c["caption"]]
    assert len(inputs) == 1 and "4 levels" in inputs[0]["caption"]
    lo, hi = inputs[0]["edges"]
    assert lo < 0 and hi > 1
    edges = torch.linspace(lo, hi, inputs[0]["bins"] + 1)
    expected = (edges * 3).round().clamp(0, 3) / 3
    assert torch.tensor([[low, high] for _, low, high in inputs[0]["steps"]]).flatten().tolist() == pytest.approx(
        torch.stack([expected[:-1], expected[1:]], 1).flatten().tolist()
    )
    panel.layer = "conv1"  # reads the image, whose bits are its own
    assert len(drawn(panel, "stairs")) == 1


def test_bars_are_bits_a_weight_as_stored():
    panel = panel_of(net="cnn", bits=3, per="filter")
    (card,) = drawn(panel, "bars")
    for row, (name, packed) in zip(card["rows"], panel.state.plan.items(), strict=True):
        bits = 8 * sum(a.nbytes for a in packed.arrays().values()) / packed.values.numel()
        assert row["label"].startswith(name) and row["text"] == f"{bits:.2f}" and row["share"] == pytest.approx(bits / 32)


def test_codes_of_what_pruning_left_show_both():
    panel = pruned_panel(bits=3, layer="conv2")
    kept = int((weight(panel)[0] != 0).sum())
    found = panel.pictures(panel.state).cards
    assert [c["kind"] for c in found] == ["histogram", "stairs", "image", "strip", "strip", "bars"]
    assert sum(n for _, n, _ in found[0]["sticks"]) == kept == sum(found[0]["counts"])  # the removed zeros are no codes
    plan = panel.state.plan.values()
    assert [r["text"] for r in found[-1]["rows"]] == [
        f"{p.bits() / p.values.numel():.2f} ({100 * p.kept / p.values.numel():.1f} % kept)" for p in plan
    ]
    rows = table(panel)
    assert rows["weights kept"][1] == f"{panel.state.kept:,}" and rows["levels"][1] == "8"
    assert " of index" in notes(panel)[f"{rows['bits a covered weight'][2]} fewer bits, {rows['file on disk'][2]} smaller file."]
    total = sum(p.values.numel() for p in panel.state.plan.values())
    before = 8 * sum(sum(a.nbytes for a in p.arrays().values()) for p in panel.planner.previous.values()) / total
    assert rows["bits a covered weight"][0] == f"{before:.3g}"  # of the network as it was given


@pytest.mark.parametrize("value", [0.0, 0.5])
@pytest.mark.parametrize("key", ["ternary_weight_networks", "dorefa_net", "integer_only_quantization", "inq"])
def test_a_layer_of_one_value_can_be_drawn(key, value):
    net = load_net("mlp", "digits")
    nn.init.constant_(net.fc2.weight, value)
    panel = explore(key, net=net, data=cmlib.load_data("digits"), layer="fc2")
    (card, *_), after = drawn(panel, "histogram"), weight(panel)[1]
    json.dumps(panel.pictures(panel.state).cards, allow_nan=False)
    assert [(v, n) for v, n, _ in card["sticks"] if n] == [(after[0, 0].item(), 320)] and sum(card["counts"]) == 320


# The figures


@pytest.mark.parametrize(("knobs", "inputs"), [({"bits": 2, "per": "filter"}, None), ({"bits": 5, "a_bits": 3}, 3)])
def test_bits_are_those_that_measure_finds(knobs, inputs):
    panel = panel_of(net="cnn", **knobs)
    row = cmlib.measure(panel.model(), panel.net)
    rows = table(panel)
    assert rows["bits a covered weight"][:2] == ["32", f"{row.weight_bits:.2f}"] and panel.state.weight_bits == row.weight_bits
    assert ("bits an activation" in rows) == (inputs is not None) and panel.state.activation_bits == inputs
    assert row.activation_bits == (inputs or 32)
    assert rows["levels"] == (["floats", "4", "34 groups"] if inputs is None else ["floats", "32", ""]) and "weights kept" not in rows
    assert panel.state.file_bytes == row.file_bytes


@pytest.mark.parametrize("net", ["mlp", "cnn"])
@pytest.mark.parametrize(("knobs", "where"), [({"a_bits": 1}, "*"), ({"a_bits": 2, "bits": 3}, "*, !first, !last"), ({"a_bits": 3}, "fc*")])
def test_the_accuracy_is_that_with_rounded_inputs(digits, net, knobs, where):
    if net == "mlp" and "last" in where:
        where = "fc2"
    panel = panel_of(net=net, where=where, **knobs)
    assert panel.state.accuracy == evaluate(cmlib.compress(panel.net, uniform, where=where, **knobs), digits)
    assert panel.state.accuracy != panel_of(net=net, where=where, **{**knobs, "a_bits": 32}).state.accuracy
    assert panel.live.accuracy({}) == panel.dense.accuracy == evaluate(panel.net, digits)  # no rounding is left behind


@pytest.mark.parametrize(("method", "knobs"), [(HAN, {"keep": 0.5}), (uniform, {"a_bits": 32}), (uniform, {"a_bits": 1}), ("binaryconnect", {})])
@pytest.mark.parametrize("where", ["*", "fc"])
def test_a_network_whose_inputs_are_rounded_already(digits, method, knobs, where):
    net = cmlib.compress(load_net("cnn", "digits"), uniform, bits=8, a_bits=3)
    panel = explore(method, net=net, data=digits, where=where, layer="fc", **knobs)
    made = cmlib.compress(net, method, where=where, **knobs)
    assert panel.dense.accuracy == evaluate(net, digits) and panel.state.accuracy == evaluate(made, digits) == evaluate(panel.model(), digits)
    assert panel.move().accuracy == panel.state.accuracy
    assert panel.pictures(panel.state).cards and evaluate(net, digits) == panel.dense.accuracy


def test_estimates_too_are_of_rounded_inputs():
    panel = panel_of(net="cnn", a_bits=1, bits=3)
    *_, (last, _) = panel.live.estimates(panel.state.weights, panel.state.around)
    assert last.exact and last.accuracy == pytest.approx(panel.state.accuracy, abs=1e-12)
    heard = []
    panel.send = lambda content, buffers=None: heard.append(content)
    panel._receive(panel, {"type": "move", "seq": 1, "knobs": {"a_bits": 1, "bits": 2}}, [])
    panel._receive(panel, {"type": "guess", "value": 0.5, "knobs": {"a_bits": 1, "bits": 2}}, [])
    exact, guess = (next(m for m in heard if m["type"] == kind) for kind in ("exact", "guess"))
    assert exact["accuracy"] == guess["actual"] == evaluate(panel.model(), cmlib.load_data("digits"))


def test_a_feature_map_is_of_the_rounded_input():
    panel = panel_of(net="cnn", a_bits=1, layer="conv2")
    maps = panel.pictures(panel.state)
    card = [c for c in maps.cards if c["kind"] == "strip"][-1]
    seen = []
    model = panel.model().eval()
    model.conv2.register_forward_hook(lambda m, i, o: seen.append(o))
    with torch.no_grad():
        model(panel.live.starts[0][0][:1])
    expected = cards.Cards([], [])
    cards.maps_strip(expected, "conv2", panel.maps["conv2"], seen[0][0, : cards.UNITS])
    assert maps.buffers[card["after"]] == expected.buffers[1]


@pytest.mark.parametrize("key", QUANTIZERS)
def test_the_line_of_every_quantizer_makes_what_is_shown(digits, tmp_path, key):
    panel = panel_of(key, net="cnn", where="*, !first")
    scope = {}
    exec("from cmlib import *", scope)
    model = eval(panel.line(), scope)
    assert evaluate(model, digits) == panel.state.accuracy
    assert save(model, tmp_path / "line.cml") == panel.state.file_bytes
    assert panel.look(panel.start).file_bytes == panel.state.file_bytes  # reckoned, with the header of the last file


def test_a_plain_function_that_returns_codes_is_a_quantizer(digits):
    def halves(w, *, bits: Bits = 3) -> Codes:
        """Halves."""
        return uniform(w, bits=bits)

    panel = panel_of(halves)
    assert panel.method.kind == "quantizer" and drawn(panel, "stairs")
    scope = {"halves": halves}
    exec("from cmlib import *", scope)
    assert evaluate(eval(panel.line(), scope), digits) == panel.state.accuracy


def test_text_and_csv_say_bits():
    panel = panel_of(bits=4)
    panel.move(bits=2)
    text = panel.text()
    for name, packed in panel.state.plan.items():
        assert re.search(rf"bits a weight in {name} +32 +{packed.bits() / packed.values.numel():.2f} ", text)
    assert all(label in text for label in ("bits a covered weight", "levels", "file on disk")) and "weights kept" not in text
    rows = list(csv.DictReader(io.StringIO(panel.path_csv())))
    assert [int(r["bits"]) for r in rows] == [4, 2] and [r["activation_bits"] for r in rows] == ["", ""]
    assert [float(r["weight_bits"]) for r in rows] == [s.weight_bits for s in panel.path] and float(rows[1]["weight_bits"]) < 2.1
    assert [int(r["weights_kept"]) for r in rows] == [2368, 2368]


def test_notes_say_why_time_stays_and_what_levels_cost():
    panel = panel_of("vq_gong", k=256)
    said = notes(panel)
    assert "float32" in said["Why does the latency not fall?"] and "integer_network()" in said["Why does the latency not fall?"]
    assert "fc2" in said["Levels that cost more than they save."] and "fc1" not in said["Levels that cost more than they save."]
    parts = [(p.index.numel(), p.params.nbytes) for p in panel.state.plan.values()]
    values, levels = sum(n for n, _ in parts), sum(n for _, n in parts)  # a byte a code
    title = next(t for t in said if "fewer bits" in t)
    assert said[title] == f"Bits a covered weight: {8 * values / 2368:.2f} of value, {8 * levels / 2368:.2f} of levels (scales, codebooks)."
    few = notes(panel_of(a_bits=2, bits=3))
    assert "Levels that cost more than they save." not in few
    assert (
        few["Inputs are rounded too."].startswith("What fc2 read has 2 bits.")
        and "rounding the inputs takes time" in few["Why does the latency not fall?"]
    )


def test_floats_whose_inputs_are_rounded():
    panel = panel_of("hwgq", net="cnn", binarize_weights="off")
    rows = table(panel)
    assert rows["levels"][1] == "floats" and rows["bits an activation"][1] == "2" and panel.state.weight_bits > 32
    assert panel.pictures(panel.state).cards[0]["kind"] == "histogram"


@pytest.mark.parametrize("net", ["mlp", "cnn"])
def test_what_is_sent_is_plain_json(net):
    panel = panel_of("xnor_net", net=net)
    for layer in panel.planner.layers:
        panel.layer = layer
        found = panel.pictures(panel.state)
        json.dumps(found.cards, allow_nan=False)
        for card in found.cards:
            for name in {"buffer", "before", "after"} & card.keys():
                assert len(found.buffers[card[name]]) == card.get("n", 1) * card["h"] * card["w"]


# What is not done twice


def test_a_plan_seen_before_is_not_made_again(monkeypatch):
    asked = []

    @quantizer("counted", chapter="04")
    def counted(w, *, bits: Bits = 4):
        asked.append(bits)
        return uniform(w, bits=bits)

    panel = panel_of(counted)
    for bits in (3, 4, 3, 2, 4):
        panel.look({"bits": bits})
    assert asked == [4, 4, 3, 3, 2, 2]  # both layers, once a setting
    monkeypatch.setattr(walk, "SEEN", 2)
    for bits in (5, 6, 5, 7):
        panel.look({"bits": bits})
    assert len(panel._seen) == 2 and asked[6:] == [5, 5, 6, 6, 7, 7]
    panel.look({"bits": 6})
    assert asked[12:] == [6, 6]  # the one that was looked at least lately is forgotten
    before = len(asked)
    panel._take(load_net("mlp", "digits", 1))
    panel.look({"bits": 6})
    assert len(asked) == before + 2  # another network, another plan


def test_a_picture_needs_no_file(monkeypatch):
    panel = panel_of(bits=3, a_bits=2)
    for name in ("length", "save", "deepcopy"):
        monkeypatch.setattr(walk, name, lambda *_: pytest.fail("written or copied"))
    state = panel.look({**panel.start, "bits": 2})
    assert panel.pictures(state).cards and panel.cells(state) and panel.notes(state)


# Training and stored runs


@pytest.mark.parametrize("key", QUANTIZERS)
def test_what_training_made_of_a_quantizer_is_shown(digits, tmp_path, key):
    half = {n: 0.5 for n in ("portion", "depth") if n in catalog()[key].knobs}
    panel = panel_of(key, where="fc1" if key == "hessian_weighted_kmeans" else "*", **half)
    before, model = panel.state, panel.model()
    fit(model, digits, epochs=1, lr=0.05, batch=128, keep_best=False)
    save(model, tmp_path / "model.cml")
    panel.state = state = panel.trained(before, load(tmp_path / "model.cml"), {"epochs": 1})
    assert state.accuracy == evaluate(model, digits) == evaluate(panel.model(), digits)
    assert state.file_bytes == (tmp_path / "model.cml").stat().st_size
    assert any(not torch.equal(p.dense(), before.plan[n].dense()) for n, p in state.plan.items())
    assert state.around.keys() == before.around.keys() and state.activation_bits == before.activation_bits
    assert table(panel)["levels"] == ["floats", *words.levels_text(before.plan)] and "fit(" in panel.line()
    assert sum(n for _, n, _ in drawn(panel, "histogram")[0]["sticks"]) == panel.planner.weights[panel.layer].numel()


def test_the_button_trains_a_quantizer(digits):
    panel, heard = panel_of("dorefa_net", bits=2, a_bits=2), []
    panel.send = lambda content, buffers=None: heard.append(content)

    async def go():
        panel._receive(panel, {"type": "train", "epochs": 3}, [])
        end = asyncio.get_running_loop().time() + 150
        while not any(m["type"] == "rest" for m in heard):
            assert asyncio.get_running_loop().time() < end and not any(m.get("state") == "failed" for m in heard), heard
            await asyncio.sleep(0.02)

    asyncio.run(go())
    exact = next(m for m in heard if m["type"] == "exact")
    assert exact["accuracy"] == panel.state.accuracy == evaluate(load(panel._child.path / "model.cml"), digits)
    assert any("3 epochs" in n["text"] for n in exact["notes"])
    scope = {}
    exec("from cmlib import *", scope)
    with threads_at(1):  # as the child trains
        exec(panel.line(), scope)
    assert evaluate(scope["model"], digits) == panel.state.accuracy


@pytest.fixture
def all_right(monkeypatch):
    """Every answer is right and no network runs: stored runs do not ask what the panel measures."""
    monkeypatch.setattr(Live, "batches", lambda live, *_: iter(live.labels.split(125)))


def stored_notes(panel):
    return {title: text for title, text in notes(panel).items() if title.startswith("Stored run")}


def test_stored_runs_are_shown_as_stored():
    given = [{"knobs": {"bits": b}, "training": "5 epochs", "bytes": 1000 * b, "accuracy": 0.9 + b / 100} for b in (1, 2, 4)]
    panel = panel_of(bits=4, stored=iter(given))
    assert panel.spec["stored"] == given
    assert stored_notes(panel) == {"Stored run at bits = 4.": "94.00 % of the validation images after 5 epochs, 4.0 kB."}
    panel.move(bits=3)
    assert not stored_notes(panel)
    with pytest.raises(ValueError, match=r"a stored run has accuracy, bytes, knobs, training; got one with knobs, epochs"):
        panel_of(stored=[{"knobs": {}, "epochs": 1}])


def test_runs_that_the_kit_has_stand_where_the_file_of_their_knobs_would(all_right):
    panel = cmlib.explore("integer_only_quantization", net="lenet5", data="mnist", a_bits=32)
    assert len(panel.stored) > 3
    for run in panel.stored:
        assert run["bytes"] == pytest.approx(panel.move(**run["knobs"]).file_bytes, abs=1_500)  # the header's length
        assert list(stored_notes(panel)) == [f"Stored run at {', '.join(f'{k} = {v}' for k, v in run['knobs'].items())}."]


@pytest.mark.parametrize("change", [{}, {"where": "fc*"}, {"part": "test"}, {"stored": []}, "other images"], ids=str)
def test_runs_are_shown_where_they_are_of_this_network_and_these_images(all_right, change):
    mnist, shown = cmlib.load_data("mnist"), not change
    if change == "other images":
        change = {"data": replace(mnist, validation=tuple(t[:500] for t in mnist.validation))}
    panel = cmlib.explore(**{"method": "soft_filter_pruning", "net": "lenet5", "data": mnist, **change})
    assert bool(panel.stored) == bool(panel.spec["stored"]) == bool(stored_notes(panel)) == shown


def test_a_single_run_is_told_at_any_knobs_but_not_before_a_guess(all_right):
    panel = cmlib.explore("soft_filter_pruning", predict={"keep": 0.7})
    assert panel.source["net"] == "lenet5" and len(panel.stored) == 1 and not stored_notes(panel)
    panel._receive(panel, {"type": "guess", "value": 0.9}, [])
    panel.move(keep=0.5)
    assert list(stored_notes(panel)) == ["Stored run at keep = 0.7, not at these knobs."]


def test_a_state_says_in_one_line_what_it_is():
    panel = panel_of(bits=3)
    assert repr(panel.move(bits=2)).startswith("State(") and len(repr(panel.state)) < 200 and "bits=2" in repr(panel.state)
    assert f"{100 * panel.state.accuracy:.2f} %" in repr(panel.state) or "not measured yet" in repr(panel.state)
