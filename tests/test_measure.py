"""Every number of a row against arithmetic by hand, an outside counter or a network built to have it; every explanation where it is due."""

import html.parser
import time
import warnings
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from cmlib.core.apply import attach, plan_of, with_plain_weights
from cmlib.core.bake import bake
from cmlib.core.packed import Masked
from cmlib.lab.files import load, save, sizes
from cmlib.lab.measure import first_faster, latency, measure, peak_memory, sparse_crossover
from cmlib.lab.row import over_seeds, rows_table
from cmlib.lab.train import evaluate
from cmlib.lab.verbs import compress
from cmlib.lab.zoo import build, load_net


def digits_net(net="mlp", seed=0):
    return build(net, "digits", seed)


def pruned(model, keep=0.1, **how):
    return compress(model, "magnitude_pruning_han", keep=keep, **how)


@pytest.fixture(scope="module")
def some():
    """80 images of digits with labels that the mlp gets right, all but those of class 3."""
    torch.manual_seed(0)
    images = torch.randint(0, 256, (80, 1, 8, 8), dtype=torch.uint8)
    with torch.no_grad():
        answers = digits_net()(images.float() / 255).argmax(1)
    return images, answers


@pytest.fixture(scope="module")
def row(some):
    model = digits_net()
    return measure(pruned(model), model, some, rounds=5, threads=1)


def test_counts_by_hand(row):
    assert row.dense.parameters == 64 * 32 + 32 + 32 * 10 + 10
    kept = round(0.1 * 2048) + 32
    assert row.parameters == kept + 42
    assert row.parameters_ratio == pytest.approx(2410 / (kept + 42))
    assert row.multiply_adds == row.dense.multiply_adds == 64 * 32 + 32 * 10
    assert row.flops_ratio == 1
    assert (row.activation_bits, row.seeds, row.mode, row.dense.mode) == (32, 1, "simulated", "baked")


@pytest.mark.parametrize("net, million", [("lenet300", 0.2662), ("lenet5", 2.293)])
def test_multiply_adds_of_one_image_whatever_the_batch(net, million):
    data = torch.zeros(3, 1, 28, 28), torch.zeros(3, dtype=torch.int64)
    for batch in (1, 7):
        assert measure(build(net, "mnist"), data=data, batch=batch, rounds=1, threads=1).multiply_adds == round(million * 1e6)


def test_batch_norm_counts_as_parameters_and_its_statistics_do_not():
    model = build("resnet", "mnist")
    assert measure(model, threads=1).parameters == 147_066
    small = pruned(model, 0.2, where="*, !last")
    kept = sum(p.kept for p in plan_of(small).values())
    weights = sum(p.mask.numel() for p in plan_of(small).values())
    assert measure(small, threads=1).parameters == 147_066 - weights + kept


@pytest.mark.parametrize("storage", ["auto", "dense", "bitmap", "csr", "relative"])
def test_bytes_are_those_of_the_file_that_save_writes(storage, tmp_path):
    model = digits_net("cnn")
    small = pruned(model, 0.3, storage=storage)
    found, path = measure(small, model, threads=1), tmp_path / "a"
    assert save(small, path) == path.stat().st_size == found.file_bytes == found.header_bytes + found.array_bytes
    assert found.header_bytes == sizes(path)["header"]
    save(model, path)
    assert found.file_ratio == path.stat().st_size / found.file_bytes
    plan = plan_of(small).values()
    assert found.weight_bits == sum(p.bits() for p in plan) / sum(p.mask.numel() for p in plan)
    if storage == "dense":
        assert found.weight_bits == 32 and found.index_bytes == 0
    else:
        assert found.index_bytes > 0


def test_loading_is_timed(row):
    assert 0 < row.load_ms < 1000 and 0 < row.dense.load_ms < 1000


def test_accuracy_and_what_changed(some, digits):
    images, labels = some
    model = digits_net()
    small = pruned(model)
    found = measure(small, model, some, rounds=1, threads=1)
    assert found.dense.accuracy == 1 and found.images == 80
    assert found.accuracy == evaluate(small, some)
    assert found.accuracy_change == pytest.approx(100 * (found.accuracy - 1))
    assert found.flipped == round(80 * (1 - found.accuracy)) and found.flipped_share == found.flipped / 80
    label, before, now = found.worst_class
    with torch.no_grad():
        right = small(images.float() / 255).argmax(1) == labels
    classes = {c: right[labels == c].double().mean().item() for c in labels.unique().tolist()}
    assert now == min(classes.values()) == classes[int(label)] and before == 1
    part = measure(model, data=digits, part="test", rounds=1, threads=1)
    assert part.images == 360 and part.accuracy == evaluate(model, digits, part="test") and part.worst_class[1] is None


def test_the_worst_class_bears_its_name():
    from cmlib.lab.data import load_data

    data = load_data("digits")
    named = replace(data, classes=tuple("abcdefghij"))
    assert measure(digits_net(), data=named, rounds=1, threads=1).worst_class[0] in named.classes


def test_what_cannot_be_measured_is_none(some):
    model = pruned(digits_net())
    bare = measure(model, threads=1)
    absent = "accuracy accuracy_change multiply_adds flops_ratio file_ratio parameters_ratio latency_ms latency_ratio latency_per_image_ms "
    absent += "peak_memory_bytes worst_class flipped flipped_share dense"
    assert all(getattr(bare, name) is None for name in absent.split())
    assert bare.file_bytes > 0 and bare.parameters > 0 and bare.load_ms > 0
    alone = measure(model, data=some, rounds=1, threads=1)
    assert alone.latency_ms > 0 and alone.accuracy is not None
    assert alone.latency_ratio is None and alone.flipped is None and alone.accuracy_change is None
    for each in (bare, alone, measure(model, digits_net(), threads=1)):
        assert str(each) and each._repr_html_() and each.explain()


def test_nothing_is_disturbed(some):
    model, threads = digits_net("cnn").train(), torch.get_num_threads()
    model.bn1.eval()
    small = pruned(model)
    before = deepcopy(small.state_dict())
    measure(small, model, some, rounds=2, threads=threads + 1)
    assert torch.get_num_threads() == threads
    assert model.training and not model.bn1.training and small.training and not small.bn1.training
    assert all(torch.equal(v, before[k]) for k, v in small.state_dict().items()) and plan_of(small)
    with pytest.raises(RuntimeError):
        latency({"a": nn.Linear(3, 3)}, torch.zeros(1, 4), threads=threads + 1)
    assert torch.get_num_threads() == threads
    for wrong in ({"batch": 0}, {"rounds": 0}, {"threads": 0}):
        with pytest.raises(ValueError, match="1 at least"):
            measure(small, data=some, **wrong)


def test_a_users_own_network_with_a_plain_pair():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(12, 20), nn.Linear(20, 3)

        def forward(self, x):
            return self.second(torch.tanh(self.first(x)))

    torch.manual_seed(2)
    model, data = Own(), (torch.randn(50, 12), torch.randint(0, 3, (50,)))
    found = measure(pruned(model, 0.5), model, data, batch=4, rounds=2, threads=1)
    assert found.multiply_adds == 12 * 20 + 20 * 3 and found.images == 50 and found.batch == 4
    assert found.dense.accuracy == evaluate(model, data)


def test_rewritten_networks_are_called_baked(some):
    wide = digits_net()
    thin = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))
    found = measure(thin, wide, some, rounds=2, threads=1)
    assert found.mode == "baked" and found.flops_ratio == (64 * 32 + 320) / (64 * 8 + 80)
    assert not any("not compressed" in s or "dense kernel" in s for s in found.explain())


# time and memory


class Slow(nn.Module):
    def __init__(self, seconds):
        super().__init__()
        self.seconds = seconds

    def forward(self, x):
        time.sleep(self.seconds)
        return x


def test_a_slow_model_is_slower_and_turns_are_taken():
    table = latency({"quick": Slow(0.002), "slow": Slow(0.008)}, torch.zeros(4, 1), rounds=9, threads=1)
    assert list(table.index) == ["quick", "slow"] and (table.rounds == 9).all()
    assert table.ms["quick"] >= 2 and table.ms["slow"] >= 8 and (table.low <= table.ms).all() and (table.ms <= table.high).all()
    assert table.ratio["quick"] == 1 and 0.1 < table.ratio["slow"] < 0.8
    assert np.allclose(table.ms_per_image, table.ms / 4)


def test_a_model_against_itself():
    model, x = build("lenet300", "mnist"), torch.rand(64, 1, 28, 28)
    assert 0.4 < latency({"a": model, "b": deepcopy(model)}, x, rounds=41, threads=1).ratio["b"] < 2.5


def test_a_wide_model_is_slower_than_a_thin_one():
    wide, thin = nn.Linear(3000, 3000), nn.Linear(3000, 30)
    assert latency({"wide": wide, "thin": thin}, torch.rand(16, 3000), rounds=11, threads=1).ratio["thin"] > 4


def test_plain_weights_lie_as_the_models_own():
    model = build("resnet", "mnist")
    stride = model.block1.conv1.weight.stride()
    assert with_plain_weights(pruned(model)).block1.conv1.weight.stride() == stride != model.block1.conv1.weight.contiguous().stride()


@pytest.mark.parametrize("batch", [1, 16])
def test_peak_memory_by_hand(batch):
    model = build("lenet5", "mnist")
    held = 4 * (431_080 + batch * 784)
    first, second = 4 * batch * 20 * 24 * 24, 4 * batch * 20 * 12 * 12
    pooled = first + second + 2 * second  # a convolution, what is pooled of it, and where from (int64): the pass's largest moment
    assert peak_memory(model, torch.rand(batch, 1, 28, 28)) == held + pooled


def test_peak_memory_forgets_what_is_freed_and_keeps_what_is_held():
    x = torch.rand(1000)

    class Chain(nn.Module):
        def forward(self, x):
            for _ in range(10):
                x = x * 2
            return x

    class Hoard(nn.Module):
        def forward(self, x):
            return sum([x * i for i in range(10)])

    assert peak_memory(Chain(), x) == 3 * 4000  # the input, what is read and what is written
    assert peak_memory(Hoard(), x) >= 11 * 4000
    assert peak_memory(nn.Flatten(0), x) == 4000  # a view takes nothing


# words and tables


def said(row, *words):
    return any(all(w in sentence for w in words) for sentence in row.explain())


def test_what_is_not_compressed_says_so(some):
    model = digits_net()
    assert said(measure(model, threads=1), "not compressed") and said(measure(model, model, some, rounds=1, threads=1), "not compressed")
    assert not said(measure(pruned(model), model, threads=1), "not compressed")


def test_a_mask_stored_dense_is_found_out(some):
    model = digits_net()
    found = measure(pruned(model, storage="dense"), model, threads=1)
    smallest = min(plan_of(pruned(model))["fc1"].sizes().values())
    assert said(found, "fc1", "dense, zeros and all", f"{2048 * 4:,}", f"{smallest:,}")
    assert not said(measure(pruned(model), model, threads=1), "zeros and all")
    assert said(measure(pruned(model, 0.99), model, threads=1), "indices would cost more")


def test_unchanged_work_is_explained(row, some):
    assert said(row, "Multiply-adds stay at 2,368") and said(row, "sparse_crossover") and said(row, "Peak memory")
    whole = measure(pruned(digits_net(), keep=1), digits_net(), some, rounds=1, threads=1)
    assert not said(whole, "Multiply-adds") and not said(whole, "sparse_crossover")


def test_a_doubtful_latency_is_doubted(row):
    assert said(replace(row, latency_ratio=1.02), "1.02 is noise") and said(replace(row, latency_ratio=1.6), "measured again")


def test_less_work_and_no_less_time_is_explained(row):
    less = replace(row, multiply_adds=592)  # a quarter
    assert said(replace(less, latency_ratio=1.3), "fell 4.0 times, the time 1.30 times", "batch")
    assert said(replace(less, latency_ratio=0.5), "fell 4.0 times", "2.0 times as long")
    assert not said(replace(less, latency_ratio=3.9), "fell 4.0 times") and not said(row, "Multiply-adds fell")


def test_an_unsteady_latency_is_said_to_be_so(row):
    assert said(replace(row, latency_low=0.05, latency_high=12.0), "0.050 to 12.000 ms", "threads=1")
    assert not said(replace(row, latency_low=1.0, latency_high=1.5), "something else was at work")


def test_layers_left_out_and_the_header_are_named(row):
    model = digits_net()
    found = measure(pruned(model, where="fc1"), model, threads=1)
    assert said(found, "Not covered: fc2", "1,280 bytes", f"{1280 / found.file_bytes:.1%}") and not said(row, "Not covered")
    assert said(found, "header", f"{found.header_bytes:,}") and said(row, "Biases", f"{4 * 42:,} bytes")
    assert not said(measure(build("lenet300", "mnist"), threads=1), "header")


def test_indices_are_weighed_beside_values():
    model = digits_net()
    found = measure(pruned(model, 0.25, storage="bitmap"), model, threads=1)
    assert said(found, "32.0 bits of value", "4.0 bits of index") and said(found, "Parameters fell")
    assert said(measure(pruned(model, 0.05, storage="relative"), model, threads=1), "fillers")
    assert not said(replace(found, parameters=found.dense.parameters), "Parameters fell")


def test_layer_collapse_is_seen(some):
    model = digits_net()
    small = deepcopy(model)
    attach(small.fc1, Masked(model.fc1.weight.detach(), torch.zeros(32, 64, dtype=torch.bool)))
    found = measure(small, model, some, rounds=1, threads=1)
    assert found.collapsed == ("fc1",) and said(found, "fc1 has no weight left") and not said(found, "fc2 has no weight")
    assert len({tuple(answer) for answer in found.lines()}) == len(found.lines())


def test_flips_that_cancel(row):
    steady = replace(row, accuracy=0.9, flipped=9, dense=replace(row.dense, accuracy=0.925))
    assert said(steady, "moved by 2 images of 80", "9 answers changed")
    assert not said(replace(steady, flipped=3), "answers changed")


def test_slow_loading_is_explained(row):
    assert said(replace(row, load_ms=5.0, dense=replace(row.dense, load_ms=1.0)), "5.0 ms against 1.0")
    assert said(replace(row, load_ms=5.0, file_bytes=9999, dense=replace(row.dense, load_ms=1.0, file_bytes=9000)), "its bytes have to be")
    assert not said(replace(row, load_ms=1.0, dense=replace(row.dense, load_ms=1.0)), "decoded")


class Table(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.open = [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs).get("scope")))
        self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_table_is_well_formed_and_has_heads(row):
    found = Table(row._repr_html_()).tags
    assert found.count(("th", "col")) == 4 and found.count(("th", "row")) == len(row.lines()) >= 12
    assert found.count(("td", None)) == 3 * len(row.lines()) and ("caption", None) in found
    alone = Table(replace(row, dense=None, latency_ratio=None)._repr_html_()).tags
    assert alone.count(("th", "col")) == 2
    nasty = replace(row, worst_class=("<b>&", 0.5, 0.2), device="<script>")
    assert "<b>" not in nasty._repr_html_() and "<script" not in nasty._repr_html_()


def test_plain_text_holds_the_same_numbers(row):
    text = str(row).splitlines()
    assert text[0].split() == ["measured", "dense", "now", "change"] and "one seed" in text[-1] and "1 threads" in text[-1]
    assert len({len(line) for line in text[:-1]}) == 1
    assert f"{row.file_bytes:,}" in str(row) and f"{row.file_ratio:.2f}×" in str(row) and f"{row.accuracy:.2%}" in str(row)


def test_rows_side_by_side(row):
    table = rows_table({"pruned": row, "dense": row.dense})
    assert list(table.index) == ["pruned", "dense"]
    assert table["file bytes"]["pruned"] == row.file_bytes and table["accuracy %"]["dense"] == 100
    assert pd.isna(table["file ratio"]["dense"]) and table["file ratio"]["pruned"] == row.file_ratio
    assert pd.api.types.is_numeric_dtype(table["latency ratio"])


def test_over_seeds(row):
    rows = [replace(row, accuracy=a, file_bytes=b) for a, b in ((0.982, 1000), (0.983, 1010), (0.984, 1020))]
    found = over_seeds(rows)
    assert found["accuracy %"] == "98.3 ± 0.1" and found["file bytes"] == "1,010 ± 10" and found["n"] == 3
    assert found["multiply-adds"] == "2,368 ± 0"
    assert over_seeds(rows[:1])["accuracy %"] == "98.2" and over_seeds(rows[:1])["n"] == 1
    assert "accuracy %" not in over_seeds([row, replace(row, accuracy=None)])
    with pytest.raises(ValueError, match="at least one"):
        over_seeds([])


# sparse kernels


@pytest.mark.parametrize("block", [None, 4])
def test_crossover_measures_and_keeps_quiet(block):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = sparse_crossover((40, 80), (1, 8), (0.5, 0.05), block, rounds=5, threads=1)
    assert list(zip(table.batch, table.keep, strict=True)) == [(1, 0.5), (1, 0.05), (8, 0.5), (8, 0.05)]
    assert (table[["dense_ms", "sparse_ms", "speedup"]] > 0).all(axis=None)
    assert (table.low <= table.speedup).all() and (table.speedup <= table.high).all() and (table.max_error < 1e-3).all()
    assert set(first_faster(table)) == {1, 8}


def test_full_density_never_pays_for_indices():
    table = sparse_crossover((400, 800), (64,), (1.0,), rounds=9, threads=1)
    assert table.speedup[0] < 1 and first_faster(table) == {64: None}


def test_nearly_empty_pays():
    table = sparse_crossover((1200, 1200), (32,), (0.5, 0.002), rounds=9, threads=1)
    assert table.speedup[1] > 1 and table.speedup[1] > table.speedup[0]


def test_first_faster_takes_the_highest_keep():
    rows = pd.DataFrame({"batch": [1, 1, 1, 2], "keep": [0.5, 0.2, 0.1, 0.5], "sparse_faster": [False, True, True, False]})
    assert first_faster(rows) == {1: 0.2, 2: None}


def test_wrong_products_and_shapes_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="blocks of 3 by 3"):
        sparse_crossover((40, 80), block=3)
    real = torch.Tensor.to_sparse_csr
    monkeypatch.setattr(torch.Tensor, "to_sparse_csr", lambda w: real(w * 1.01))
    with pytest.raises(ArithmeticError, match="differs"):
        sparse_crossover((40, 80), (1,), (0.5,), rounds=1, threads=1)


def test_a_loaded_model_measures_like_the_saved_one(some, tmp_path):
    model = digits_net()
    small = pruned(model)
    save(small, tmp_path / "a")
    first, second = (measure(m, model, some, rounds=1, threads=1) for m in (small, load(tmp_path / "a")))
    same = ("accuracy", "parameters", "file_bytes", "weight_bits", "multiply_adds", "peak_memory_bytes", "layers", "flipped", "worst_class")
    assert all(getattr(first, name) == getattr(second, name) for name in same)


def test_masked_filters_are_told_from_removed_ones():
    net = load_net("cnn", "digits")
    masked = compress(net, "magnitude_pruning_han", unit="filter", keep=0.5)
    row, small = measure(masked, reference=net), measure(bake(masked), reference=net)
    told = [r for r in row.explain() if "bake(model)" in r]
    assert len(told) == 1 and "conv1 4 of 8" in told[0] and "conv2 8 of 16" in told[0]
    assert not any("bake(model)" in r for r in small.explain())
    rows = [r for r in measure(compress(net, "magnitude_pruning_han", unit="row", keep=0.5), reference=net).explain() if "bake(model)" in r]
    assert len(rows) == 1 and 'unit="filter" silences' in rows[0]
    assert small.parameters < 0.4 * row.dense.parameters and small.file_bytes < row.file_bytes
