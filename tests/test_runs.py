"""Stored runs: done once, named by their recipe, whole or refused."""

import json

import pytest
import torch

from cmlib.bench import learned, quantized, structures, twice
from cmlib.lab import runs
from cmlib.lab.zoo import SEEDS, card
from cmlib.methods import catalog


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "RUNS", tmp_path / "runs")
    return tmp_path / "runs"


def test_a_run_is_done_once_for_a_recipe(folder):
    done = []

    def work():
        done.append(1)
        return {"accuracy": 0.5 + 0.1 * len(done)}

    assert runs.stored({"kind": "kind", "seed": 0}, work) == runs.stored({"kind": "kind", "seed": 0}, work) == {"accuracy": 0.6}
    assert runs.stored({"kind": "kind", "seed": 1}, work) == {"accuracy": 0.7} and len(done) == 2
    found = runs.table("kind")
    assert sorted(found.accuracy) == [0.6, 0.7] and set(found.seed) == {0, 1} and found.machine.str.contains("torch").all()


def test_nothing_is_stored_where_the_work_fails(folder):
    def work():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runs.stored({"kind": "kind", "seed": 0}, work)
    with pytest.raises(runs.RunError, match=r"no stored run of kind 'kind'.*bench --only kind"):
        runs.table("kind")


def test_an_altered_or_cut_run_is_refused(folder):
    runs.stored({"kind": "kind", "seed": 0}, lambda: {"accuracy": 0.5})
    path = next(folder.iterdir())
    whole = path.read_text()
    content = json.loads(whole)
    content["result"]["accuracy"] = 0.9
    path.write_text(json.dumps(content))
    with pytest.raises(runs.RunError, match=r"altered.*sha256 differ.*run the bench again"):
        runs.table("kind")
    path.write_text(whole[: len(whole) // 2])
    with pytest.raises(runs.RunError, match=r"cut or not a stored run"):
        runs.stored({"kind": "kind", "seed": 0}, dict)


def test_runs_are_asked_for_by_their_recipes(folder):
    recipes = [{"kind": "kind", "seed": n} for n in range(3)]
    for n, recipe in enumerate(recipes[:2]):
        runs.stored(recipe, lambda n=n: {"accuracy": n})
    assert list(runs.of(recipes[1::-1]).accuracy) == [1, 0]
    with pytest.raises(runs.RunError, match=r"no stored run of .*'seed': 2.*bench --only kind"):
        runs.of(recipes)


def test_the_runs_that_ship_are_whole_and_all_there():
    found = runs.table("structures")
    assert set(found.seed) == {0, 1, 2} and (found.groupby("method").seed.nunique() == 3).all()
    assert set(structures.CONTROLS) | {"l1_norm_filter_pruning", "lasso_channel_pruning"} <= set(found.method)
    assert len(runs.of([structures.given(m, s) for m in found.method.unique() for s in range(3)])) == len(found)


def test_what_is_stored_of_chapter_04_is_what_its_recipes_ask_for():
    """A run whose recipe has changed since is another run: it must not stay and be shown."""
    recipes = [quantized.given(net, label, seed) for net in quantized.SETS for label in quantized.LABELS for seed in SEEDS]
    recipes += [quantized.along(method, knobs, seed) for method, settings in quantized.ALONG.items() for knobs in settings for seed in SEEDS]
    wanted = {runs._path(recipe).name for recipe in recipes}
    found = {p.name for kind in ("quantized", "by_bits") for p in runs.RUNS.glob(f"{kind}-*.json")}
    assert found <= wanted and len(found) > 50


def test_what_is_stored_of_learned_masks_is_what_its_recipes_ask_for():
    assert {p.name for p in runs.RUNS.glob("learned-*.json")} == {runs._path(learned.given(key)).name for key in learned.KNOBS}
    assert set(learned.KNOBS) - {learned.DENSE} == {m.key for m in catalog().values() if m.learns_masks}
    for r in runs.table("learned").itertuples():
        assert r.validation > 0.8 and (r.left < 1) == (r.method != learned.DENSE), f"{r.method} shows nothing at these knobs"


def test_what_is_stored_towards_twice_the_speed_is_what_its_recipes_ask_for():
    recipes = [twice.given(name, seed) for name in (*twice.WIDTHS, twice.DENSE) for seed in SEEDS]
    recipes += [twice.given(name, seed, twice.LONGER) for name in (twice.HALF, twice.DENSE) for seed in SEEDS]
    wanted = {runs._path(recipe).name for recipe in recipes}
    assert {p.name for p in runs.RUNS.glob("twice-*.json")} == wanted and len(wanted) == 15


def test_a_machine_is_named_with_its_vectors():
    assert torch.backends.cpu.get_cpu_capability() in runs.machine().split(", ")


def test_runs_of_a_method_are_those_of_its_network_as_it_is_now(folder):
    """By bytes; of other seeds, networks and checkpoints none; the atlas' only where there are no others, and where its knobs are the method's."""
    now = card("lenet5", "mnist")["sha256"][:12]
    here = {"method": "vq_gong", "data": "mnist", "seed": 0, "checkpoint": now}
    kept = {"kind": "by_bits", **here, "network": "lenet5", "epochs": 1}
    atlas = {"kind": "atlas", **here, "net": "lenet5", "rounds": 2, "images": 3000, "rate": 0.003}
    for k, accuracy in ((2, 0.9), (3, 0.8)):
        runs.stored({**atlas, "knobs": {"k": k}}, lambda k=k, accuracy=accuracy: {"bytes": k, "validation": accuracy})
    runs.stored({**atlas, "knobs": {"keep": 0.5}}, lambda: {"bytes": 9, "validation": 0.99})
    (found,) = runs.along("vq_gong", "lenet5", "mnist")
    assert found == {"knobs": {"k": 2}, "training": "2 rounds of 3,000 images at learning rate 0.003", "bytes": 2, "accuracy": 0.9}
    for k in (16, 4):
        runs.stored({**kept, "knobs": {"k": k}}, lambda k=k: {"bytes": k, "validation": 0.5})
    runs.stored({**kept, "checkpoint": "another", "knobs": {"k": 8}}, lambda: {"bytes": 8, "validation": 0.5})
    runs.stored({**kept, "method": "vq_gong_2", "knobs": {"k": 8}}, lambda: {"bytes": 8, "validation": 0.5})
    assert [run["knobs"]["k"] for run in runs.along("vq_gong", "lenet5", "mnist")] == [4, 16]
    assert runs.along("vq_gong", "lenet5", "mnist")[0]["training"] == "1 epoch"
    for method, net, seed in (("vq_gong", "lenet5", 1), ("vq_gong", "lenet300", 0), ("q_cnn", "lenet5", 0)):
        assert runs.along(method, net, "mnist", seed) == []


def test_a_run_under_another_name_is_refused(folder):
    runs.stored({"kind": "kind", "seed": 0}, lambda: {})
    (held,) = folder.glob("*.json")
    held.rename(folder / "kind-000000000000.json")
    with pytest.raises(runs.RunError, match="does not hold the run of its name"):
        runs.table("kind")
