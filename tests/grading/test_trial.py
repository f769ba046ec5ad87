"""A trial: what costs a part and what does not, how answers are compared, what crosses over as plain values."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from cmlib.grade.trial import GraderError, Local, Mismatch, Missing, NotPlain, StudentError, TimedOut, Trial, difference, judging, plain, show, trial


def make(**namespace):
    return Trial("0.0", Local(namespace), seed=0)


def double(x):
    return 2 * x


def test_parts_are_lost_one_by_one():
    t = make(double=double)
    with t.part("doubles", weight=2):
        t.close(t.call("double", 3), 6)
    with t.part("doubles arrays"):
        t.close(t.call("double", np.ones(3)), np.ones(3))
    with t.part("is there"):
        t.call("triple", 3)
    assert [p.ok for p in t.parts] == [True, False, False] and t.score(8) == 4
    wrong, missing = t.parts[1:]
    assert wrong.tried == "double([1., 1., 1.])" and wrong.got == "[2., 2., 2.]" and wrong.want == "[1., 1., 1.]"
    assert wrong.reason == "wrong values: 3 of 3" and missing.reason == "`triple` is not defined"


@pytest.mark.parametrize(
    "answer, reason",
    [
        (lambda: 1 / 0, "raised ZeroDivisionError: division by zero (line "),
        (lambda: sys.exit("bye"), "raised SystemExit: bye"),
        (lambda: object(), "returned a object"),
        (lambda: np.array([object()]), "returned an array of objects"),
        (lambda: None, "nothing (None) where numbers were expected"),
        (lambda: "12", "a text where numbers were expected"),
        (lambda: [1.0], "wrong shape: (1,) where (2,) was expected"),
        (lambda: [[1.0], [2.0, 3.0]], "rows of unequal length"),
        (lambda: [np.nan, 2.0], "not a number (nan)"),
        (lambda: [1.0, 2.1], "wrong values: 1 of 2"),
        (lambda: [2.0, 4.0], "the scale is missing"),
    ],
)
def test_a_reason_names_the_kind_of_failure(answer, reason):
    t = make(answer=answer)
    with t.part("two numbers"):
        t.close(t.call("answer"), [1.0, 2.0], mistakes={"the scale is missing": [2.0, 4.0]})
    (part,) = t.parts
    assert not part.ok and part.reason.startswith(reason) and t.score(1) == 0


def test_an_assertion_or_a_value_that_does_not_fit_costs_the_part():
    t = make(answer=lambda: 3)
    with t.part("its length"):
        assert len(t.call("answer")) == 3
    with t.part("its sign"):
        assert t.call("answer") < 0, "must be negative"
    with t.part("no words"):
        assert not t.get("answer")
    assert [p.reason for p in t.parts[:2]] == ["what came out does not fit (TypeError)", "must be negative"]
    assert t.parts[2].reason.startswith("returned a function")


def test_the_grading_s_own_trouble_is_nobody_s_fault():
    t = make()
    with pytest.raises(GraderError, match="no box"), t.part("anything"):
        raise GraderError("no box")
    with pytest.raises(GraderError, match="has no part"):
        make().score(3)
    with pytest.raises(KeyboardInterrupt), t.part("anything"):
        raise KeyboardInterrupt


def test_arguments_are_copied():
    def spoil(x, more):
        x[:] = 0
        more["t"][0].zero_()
        return x

    t, x, tensor = make(spoil=spoil), np.ones(3), torch.ones(2)
    assert (t.call("spoil", x, {"t": [tensor]}) == 0).all()
    assert (x == 1).all() and (tensor == 1).all()


def test_functions_are_passed_as_they_are():
    seen = []
    t = make(twice=lambda f: [f(1), f(2)])
    assert t.call("twice", lambda x: seen.append(x) or 10 * x) == [10, 20] and seen == [1, 2]


def test_results_are_plain():
    found = plain({"a": (np.float32(1.5), torch.tensor([1.0], requires_grad=True)), "b": [None, True, np.bool_(False), 3j, b"x"]})
    assert type(found["a"][0]) is float and type(found["a"][1]) is np.ndarray and found["b"] == [None, True, False, 3j, b"x"]

    class Liar(int):
        def __eq__(self, other):
            return True

    for value in (Liar(3), {1, 2}, print, np.array(["a"])):
        with pytest.raises(NotPlain):
            plain([value])


@pytest.mark.parametrize(
    "got, want, same",
    [
        (1, 1.0, True), (True, 1, True), (np.array(2), 2, True), ([1, 2], np.array([1.0, 2.0]), True), ((1, 2), [1, 2], True),
        (np.array([True, False]), [1, 0], True), ("a", "a", True), ("a", "b", False), ("1", 1, False), (None, None, True), (0, None, False),
        ({"a": [1, 2]}, {"a": (1, 2)}, True), ({"a": 1}, {"b": 1}, False), ([1, "x"], [1, "x"], True), ([1, "y"], [1, "x"], False),
        ([np.ones(2), np.ones(3)], [np.ones(2), np.ones(3)], True), ([np.ones(2)], [np.ones(2), np.ones(3)], False),
        (np.nan, np.nan, True), (np.inf, np.inf, True), (1.0, np.inf, False), (np.array([1]), 1, False), (b"a", b"a", True), (1 + 1e-12, 1, False),
        (2**63, 2**63, True), (True, 2, False), (0, -0.0, True),
    ],
)  # fmt: skip
def test_what_is_the_same(got, want, same):
    assert (difference(got, want) == "") is same


def test_close_and_equal():
    t = make()
    t.close(1 + 1e-7, 1)
    with pytest.raises(Mismatch):
        t.close(1 + 1e-5, 1)
    with pytest.raises(Mismatch):
        t.equal(1 + 1e-7, 1)


def test_chance_is_fixed_by_a_seed_and_fresh_without():
    draw = lambda seed: Trial("0.0", Local({}), seed=seed).rng.integers(1 << 60)  # noqa: E731
    assert draw(3) == draw(3) != draw(4) and draw(None) != draw(None)


def test_a_judge_s_answers_come_before_the_namespace():
    mine = trial("1.1", {"x": 1, "student": "ada"})
    assert mine.get("x") == 1 and mine.student == "ada"
    with judging(Local({"x": 2}), "bob", seed=5):
        t = trial("1.1", {"x": 1, "student": "ada"})
    assert t.get("x") == 2 and t.student == "bob" and t.rng.random() == np.random.default_rng(5).random()
    assert trial("1.1", {"x": 1}).get("x") == 1


def test_figures_are_kept():
    t = make()
    t.figure("bytes", 1234)
    assert t.figures == {"bytes": 1234.0}


def test_words_for_errors():
    assert str(Missing("f")) == "`f` is not defined" and str(TimedOut(2)) == "too slow: no answer within 2 s"
    assert str(StudentError("ValueError", "no", "line 3")) == "raised ValueError: no (line 3)"


def test_long_values_are_cut():
    for value in (np.zeros((300, 300)), list(range(1000)), "x" * 1000, [np.zeros(1000)] * 100, {i: i for i in range(100)}, {"w": np.zeros((64, 64))}):
        assert len(show(value)) < 800
    assert show(np.zeros((300, 300))).endswith("of shape (300, 300)") and show(double) == "double"


def test_importing_the_checks_brings_no_torch():
    code = "import sys, cmlib.grade.trial; from cmlib.grade import trial; assert callable(trial) and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
