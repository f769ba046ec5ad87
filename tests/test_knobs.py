"""Knobs: what is allowed, what is refused and with which words."""

import inspect
import math
import weakref

import pytest
import torch

from cmlib.core.knobs import Keep, Pick, Span, Steps, knobs_of, nearest
from cmlib.core.laws import UNITS
from cmlib.core.method import call, score
from cmlib.core.planner import PROVIDERS
from cmlib.methods import catalog, find
from cmlib.methods.prune import magnitude_pruning_han

METHODS = catalog().values()


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.key)
def test_every_methods_defaults_are_allowed_and_its_corners_bind(method):
    assert method.bind({}) == {n: k.default for n, k in method.knobs.items()}
    for name, knob in method.knobs.items():
        for value in knob.span.points(3):
            assert method.bind({name: value})[name] == value


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.key)
def test_every_method_says_what_it_is_and_asks_for_what_there_is(method):
    assert method.title and ("survey 00" in method.__doc__.lower() or method.key == "random_pruning")
    kinds = {"02": {"score"}, "03": {"score", "tool", "dynamic"}, "04": {"quantizer", "tool", "recipe", "block"}}
    assert method.kind in kinds[method.chapter] and method.paper
    assert method.kind in ("tool", "block") or set(method.asks) <= {"w", "training", *PROVIDERS}
    keyword = [p for fn in method.companions for p in inspect.signature(fn).parameters.values() if p.kind is p.KEYWORD_ONLY]
    told = {"stride", "padding", "bias"} if method.kind == "block" else {"state", "training"}
    assert {p.name for p in keyword} - told == set(method.own_knobs)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.key)
def test_a_value_outside_is_refused_with_knob_value_and_range(method):
    for name, knob in method.knobs.items():
        wrong = "no such" if isinstance(knob.span, Pick) else knob.span.hi * 1.01 + 1
        with pytest.raises(ValueError) as caught:
            method.bind({name: wrong})
        assert f"{name}={wrong!r}" in str(caught.value) and str(knob.span) in str(caught.value)


def test_a_misspelt_knob_is_answered_with_the_nearest_and_all():
    with pytest.raises(ValueError, match=r"magnitude_pruning_han has no knob 'kep' \(did you mean 'keep'\?\); its knobs are keep, threshold, unit"):
        magnitude_pruning_han.bind({"kep": 0.1})
    with pytest.raises(ValueError, match=r"no knob 'zzz'; its knobs are"):
        magnitude_pruning_han.bind({"zzz": 0.1})


@pytest.mark.parametrize("value", [0, 0.0, 1.5, -1, math.nan, math.inf, "0.1", True, None, [0.1]])
def test_keep_takes_numbers_in_its_range_only(value):
    with pytest.raises(ValueError, match=r"keep=.*a number from 0.001 to 1"):
        magnitude_pruning_han.bind({"keep": value})


def test_none_passes_where_it_is_the_default():
    assert magnitude_pruning_han.bind({"threshold": None})["threshold"] is None


def test_whole_numbers_are_whole():
    bind = find("random_pruning").bind
    assert bind({"seed": 3.0})["seed"] == 3 and isinstance(bind({"seed": 3.0})["seed"], int)
    with pytest.raises(ValueError, match=r"seed=0.5 .*a whole number from 0 to 100000"):
        bind({"seed": 0.5})


def test_the_plain_function_takes_what_the_slider_refuses():
    assert (find("l1_weight_regularization")(torch.ones(2), lam=1e9).mask).all()


def test_points_reach_both_ends_evenly():
    assert Span(0, 1).points(5) == [0, 0.25, 0.5, 0.75, 1]
    assert Span(1, 100, log=True).points(3) == pytest.approx([1, 10, 100])
    assert Span(1, 4, integer=True).points(10) == [1, 2, 3, 4]
    ends = Span(0.001, 1, log=True).points(7)
    assert (ends[0], ends[-1]) == pytest.approx((0.001, 1), rel=1e-12)
    assert all(p in Span(1e-10, 0.1, log=True) for p in Span(1e-10, 0.1, log=True).points(9))
    assert Pick("a", "b").points(9) == ["a", "b"]


def test_knobs_are_the_annotated_keyword_only_arguments():
    def method(w, grad, *, keep: Keep = 0.3, count: Steps = 4, state=None):
        return w

    found = knobs_of(method)
    assert list(found) == ["keep", "count"] and found["keep"].default == 0.3 and found["count"].span.integer


def test_shared_defaults_can_be_the_methods_own():
    assert find("snip").knobs["scope"].default == "network" and find("magnitude_pruning_han").knobs["scope"].default == "layer"

    @score("nobody", chapter="00", keep=0.7)
    def generous(w):
        """Generous."""
        return w

    assert generous.knobs["keep"].default == 0.7 and generous.title == "Generous" and UNITS[0] == "weight"


def test_call_hands_over_by_name_what_is_asked():
    def f(b, a, *, t=1):
        return b, a, t

    assert call(f, {"a": 1, "b": 2, "c": 3}, {"t": 5, "u": 6}) == (2, 1, 5)


def test_a_function_that_was_called_is_not_kept():
    held = torch.zeros(3)

    def closure(w):
        return w + held

    call(closure, {"w": 1}, {})
    seen = weakref.ref(closure)
    del closure
    assert seen() is None


def test_an_unknown_method_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match=r"^sum is a plain function; make it a method with @score"):
        find(sum)
    with pytest.raises(ValueError, match=r"no method 'snipe' \(did you mean 'snip'\?\); catalog\(\) lists random_pruning"):
        find("snipe")
    assert find(magnitude_pruning_han) is magnitude_pruning_han
    assert nearest("abc", ["xyz"]) == ""


def test_a_method_in_print_says_what_each_knob_may_be():
    said = str(catalog()["vibnet"])
    assert said.startswith("vibnet (score). VIBNet: variational information bottleneck.")
    assert "  gamma = 0.001: a number from 1e-07 to 10" in said.split("\n") and "Dai" in said
    for method in catalog().values():
        assert str(method).count("\n  ") >= len(method.knobs)
