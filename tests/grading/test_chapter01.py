"""Chapter 01's graders, tried with solutions right and wrong, here and in the box; its functions beside the kit's own."""

import json
from pathlib import Path

import numpy as np
import pytest
import solutions_chapter01
import torch
from small import needs_a_box, submit
from solutions_chapter01 import solutions
from torch import nn
from tried import STUDENT, Graders, lost, run

from cmlib.core.storage import FORMATS, encode, nbytes
from cmlib.grade.chapter01 import PRICE, Machine, accuracy, example_network, fresh_network
from cmlib.grade.checks import CheckFailed, check, find
from cmlib.grade.judge import judge
from cmlib.grade.source import read
from cmlib.grade.variants import variant
from cmlib.lab import cost

MINE = solutions.reference
ENTRIES = [
    "parameters", "multiply_adds", "dense_parameters", "dense_multiply_adds", "separable", "times_fewer", "arithmetic", "weights", "activations",
    "bitmap", "csr", "relative", "w1", "b1", "w2", "b2",
]  # fmt: skip
CONSTANTS = [0, 1, -1.5, np.nan, np.inf, None, True, "", "faster", "inconclusive", b"", (0, 0), (1, 1), (np.nan, np.nan), np.ones((3, 3))]


class TestChapter01(Graders):
    solutions = solutions

    @pytest.mark.parametrize("value", CONSTANTS, ids=repr)
    def test_a_constant_earns_nothing(self, key, value):
        for answer in (value, dict.fromkeys(ENTRIES, value)):
            names = dict.fromkeys(MINE, lambda *args, answer=answer, **kw: answer) | {"my_layer": answer}
            assert [p.says for p in run(solutions.questions[key], names) if p.ok] == []


def test_the_visible_checks_hold_for_the_reference(capsys):
    for key in solutions.questions:
        check(key, MINE)
        assert capsys.readouterr().out.startswith(f"{key}: the visible checks hold")


PITFALLS = {
    "rounded_up": "a last step that would leave the image is not taken",
    "groups_ignored": "groups change nothing here",
    "equal_pays": "an equal size does not pay",
    "one_after_the_other": "one call's runs come one after another",
    "mean_in_the_middle": "this is the mean",
    "equal_pairs_win": "equal pairs are no wins",
    "equal_pairs_counted": "equal pairs are left out of n",
    "a_neighbours": "these are not your numbers, for 'ada'",
    "no_id": "these are not your numbers, for 'ada'",
}


@pytest.mark.parametrize("name", PITFALLS)
def test_a_visible_check_meets_the_pitfall(name):
    attempt = next(a for a in solutions.attempts if a.made.__name__ == name)
    with pytest.raises(CheckFailed) as failed:
        check(attempt.key, MINE | attempt.namespace(solutions.questions[attempt.key]))
    assert PITFALLS[name] in str(failed.value)


def test_an_empty_id_is_said():
    with pytest.raises(CheckFailed, match="`student` is empty"):
        check("1.2", MINE | {"student": "", "my_layer": solutions_chapter01.no_id(None)})


def test_costs_are_the_kit_s():
    net = nn.Sequential(nn.Conv2d(4, 6, 3, 2, 1, groups=2), nn.ReLU(), nn.Conv2d(6, 8, 5), nn.Flatten(), nn.Linear(8 * 4 * 4, 10))
    rows = cost.layer_costs(net, torch.zeros(1, 4, 15, 15))
    by_hand = [MINE["conv_cost"](4, 6, 3, 15, 2, 1, 2), MINE["conv_cost"](6, 8, 5, 8)]
    assert [tuple(r) for r in rows[["parameters", "multiply_adds"]].to_numpy()[:2]] == by_hand
    totals = MINE["network_totals"]([("conv", 2, 6, 3, 8), ("conv", 6, 8, 5, 4), ("dense", 128, 10, 1, 1)])
    assert totals["parameters"] == rows.parameters.sum() and totals["multiply_adds"] == rows.multiply_adds.sum()
    assert totals["dense_parameters"] == rows.parameters[2] / rows.parameters.sum()
    roof = cost.Roof(50, 8, 80)
    for row in rows.itertuples():
        intensity, seconds = MINE["layer_time"](row.multiply_adds, row.weight_bytes, row.in_bytes, row.out_bytes, 1, roof.gflops, roof.memory)
        assert intensity == pytest.approx(row.intensity)
        assert 2e-9 * row.multiply_adds / seconds == pytest.approx(roof.attainable(row.intensity))
    for number in ("fp32", "int8"):
        bill = cost.energy(rows, number)
        for row, priced in zip(rows.itertuples(), bill.itertuples()):
            mine = MINE["energy"](row.multiply_adds, row.weight_bytes // 4, (row.in_bytes + row.out_bytes) // 4, number, PRICE)
            assert mine == pytest.approx({k: getattr(priced, k) for k in mine})


@pytest.mark.parametrize("shape, share", [((30, 50), 0.3), ((7, 900), 0.05), ((64, 11), 0.9), ((300, 300), 0.01), ((3, 5), 0.0)])
def test_bytes_are_the_kit_s(shape, share):
    rng = np.random.default_rng(0)
    mask, values = rng.random(shape) < share, np.ones(shape, np.float32)
    want = nbytes(np.flatnonzero(mask), shape)
    for name in set(FORMATS) - {"dense"}:
        arrays, header = encode(values, mask, name)
        assert MINE["sparse_bytes"](mask, header.get("k", 4))[name] == sum(a.nbytes for a in arrays.values()) == want[name]


@pytest.mark.parametrize("rows, columns", [(30, 300), (10, 257), (9, 12)])
def test_what_pays_by_the_formula_pays_in_bytes(rows, columns):
    sizes = 4 * (rows + 1) + 6 * np.arange(rows * columns)
    assert MINE["csr_pays_up_to"](rows, columns, 4, 2) == np.flatnonzero(sizes < 4 * rows * columns).max()


def test_every_student_has_numbers_of_their_own():
    mine = variant(STUDENT, "1.2")
    assert mine == variant(f" {STUDENT} ", "1.2")
    assert len({tuple(variant(f"s{i}", "1.2").values()) for i in range(200)}) > 120


def test_a_machine_s_time_is_known():
    m = Machine(np.array([[1.0, 2, 3], [10, 20, 30]]))
    m.calls[0]()
    start = m.clock()
    m.calls[1](), m.calls[0]()
    assert m.clock() - start == 12 and m.timed() == [] and m.log == [0, "clock", 1, 0, "clock"]
    m.calls[1](), m.clock()
    assert m.timed() == [5] and m.times(1).tolist() == [20] and m.times(0).tolist() == []
    assert Machine(m.seconds).times(0).tolist() == []
    for _ in range(50_000):  # a submission may ask as often: no minutes of the grader's
        m.calls[0](), m.clock()
    assert len(m.times(0)) == 50_000


def test_a_fresh_network_is_good_and_no_other_s():
    (a, x, y), (b, *_) = (fresh_network(np.random.default_rng(seed)) for seed in (0, 1))
    assert accuracy(a, x, y) > 0.98 and accuracy(b, x, y) < 0.3
    network, images, classes = example_network()
    assert all((network[k] == a[k]).all() for k in a) and (images == x).all() and (classes == y).all()
    network["w1"][:] = 0
    assert (example_network()[0]["w1"] == a["w1"]).all()


# The same through the box

EXERCISE = read(solutions.path)
CODING = [q for q in EXERCISE.questions if not q.by_hand]
STANDS_IN = """
class Solutions:
    def __init__(self, *args, **kw): self.path = None
    def right(self, *args, **kw): return lambda made: made
    wrong = right
STUDENT = "ada"
"""
NAMES = {q.key: find(q.key).name for q in CODING}


def handed_in(folder, *cells):
    return judge(submit(folder, *cells, student=STUDENT), EXERCISE, seed=0)


def using(attempts):
    """A submission's cells: the file of the solutions, then these of them under the names that the questions ask for."""
    text = Path(solutions_chapter01.__file__).read_text().replace("from tried import Solutions", STANDS_IN)
    chosen = [
        f"globals().update({a.made.__name__}())" if a.names
        else f'my_layer = {a.made.__name__}(variant(STUDENT, "1.2"))' if a.key == "1.2"
        else f"{NAMES[a.key]} = {a.made.__name__}"
        for a in attempts
    ]  # fmt: skip
    return [text, *chosen]


@needs_a_box
def test_the_reference_has_all_points_in_the_box(tmp_path):
    cells = [
        c for c in json.loads(solutions.path.read_text())["cells"] if c["cell_type"] == "code" and not c["metadata"].get("nbgrader", {}).get("grade")
    ]
    grade = handed_in(tmp_path, *("".join(c["source"]).replace('student = ""', f"student = {STUDENT!r}") for c in cells))
    marks = {m.key: m for m in grade.marks}
    assert {q.key: marks[q.key].points for q in CODING} == {q.key: q.points for q in CODING}, grade.notes
    assert marks["1.12"].figures["bytes"] < 2300 and sum(m.by_hand for m in grade.marks) == 0


@needs_a_box
def test_right_solutions_have_all_points_in_the_box(tmp_path):
    grade = handed_in(tmp_path, *using([solutions.of(q.key, right=True)[1] for q in CODING]))
    assert [m.points for m in grade.marks if m.parts] == [q.points for q in CODING], grade.notes


@needs_a_box
@pytest.mark.parametrize("which", [0, 3])
def test_wrong_solutions_lose_the_same_parts_in_the_box(tmp_path, which):
    attempts = [solutions.of(q.key, right=False)[which] for q in CODING]
    grade = handed_in(tmp_path, *using(attempts))
    for attempt, mark in zip(attempts, [m for m in grade.marks if m.parts]):
        assert [(p.says, p.ok) for p in mark.parts] == [(p.says, p.ok) for p in solutions.tried(attempt, seed=0)]
        assert mark.points < mark.max and any(attempt.fault in text for text in lost(mark.parts))


@needs_a_box
def test_a_network_left_behind_is_not_found(tmp_path):
    """encode keeps the network, in a global and in a file, and hands on nothing."""
    cheat = """
    import pickle, pathlib
    kept = {}

    def encode(weights):
        kept.update(weights)
        pathlib.Path("kept").write_bytes(pickle.dumps(weights))
        return b""

    def decode(data):
        return kept or pickle.loads(pathlib.Path("kept").read_bytes())
    """
    mark = next(m for m in handed_in(tmp_path, cheat).marks if m.key == "1.12")
    assert mark.points == 0 and mark.figures == {} and "FileNotFoundError" in mark.parts[0].reason
