"""Stored runs: done once, named by their recipe, whole or refused."""

import json

import pytest

from cmlib.lab import runs


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "RUNS", tmp_path / "runs")
    return tmp_path / "runs"


def test_a_run_is_done_once_for_a_recipe(folder):
    done = []

    def work():
        done.append(1)
        return {"accuracy": 0.5 + 0.1 * len(done)}

    assert runs.stored("kind", {"seed": 0}, work) == runs.stored("kind", {"seed": 0}, work) == {"accuracy": 0.6}
    assert runs.stored("kind", {"seed": 1}, work) == {"accuracy": 0.7} and len(done) == 2
    found = runs.table("kind")
    assert sorted(found.accuracy) == [0.6, 0.7] and set(found.seed) == {0, 1} and found.machine.str.contains("torch").all()


def test_nothing_is_stored_where_the_work_fails(folder):
    def work():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runs.stored("kind", {"seed": 0}, work)
    with pytest.raises(runs.RunError, match=r"no stored run of kind 'kind'.*bench --only kind"):
        runs.table("kind")


def test_an_altered_or_cut_run_is_refused(folder):
    runs.stored("kind", {"seed": 0}, lambda: {"accuracy": 0.5})
    path = next(folder.iterdir())
    whole = path.read_text()
    content = json.loads(whole)
    content["result"]["accuracy"] = 0.9
    path.write_text(json.dumps(content))
    with pytest.raises(runs.RunError, match=r"altered.*sha256 differ.*run the bench again"):
        runs.table("kind")
    path.write_text(whole[: len(whole) // 2])
    with pytest.raises(runs.RunError, match=r"cut or not a stored run"):
        runs.stored("kind", {"seed": 0}, dict)


def test_the_runs_that_ship_are_whole():
    for kind in {p.name.split("-")[0] for p in runs.RUNS.glob("*.json")}:
        assert len(runs.table(kind))
