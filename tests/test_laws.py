"""Every law over every method of the catalogue; and every law fails on a method planted to break it."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from cmlib.core import laws
from cmlib.core.knobs import Keep
from cmlib.core.method import score
from cmlib.core.packed import Masked
from cmlib.methods import catalog

CASES = [(law, method) for method in catalog().values() for law in laws.laws_of(method)]


@pytest.mark.parametrize("law, method", CASES, ids=[f"{m.key}-{law.__name__}" for law, m in CASES])
def test_law(law, method):
    if reason := laws.exemption(law, method):
        pytest.skip(f"exempt: {reason}")
    law(method)


@pytest.mark.parametrize("method", catalog().values(), ids=catalog())
def test_exemptions_name_laws_and_are_needed(method):
    known = {law.__name__: law for law in laws.laws_of(method)}
    for name, reason in method.exempt.items():
        assert name in known and len(reason) > 10
        with pytest.raises(AssertionError):
            known[name](method)


def test_methods_without_keep_are_bound_by_the_other_laws():
    bound = {m.key: laws.laws_of(m) for m in catalog().values()}
    assert laws.count in bound["magnitude_pruning_han"] and laws.count not in bound["l0_hard_concrete"]
    assert laws.bits in bound["l0_hard_concrete"]


# methods that are wrong on purpose


@score("wrong", chapter="00")
def logarithm_of_a_negative(w):
    return w.log()


@score("wrong", chapter="00")
def one_number_too_many(w):
    return torch.ones(w.numel() + 1)


@score("wrong", chapter="00")
def by_place(w):
    return w.abs() * torch.arange(w.numel()).reshape(w.shape)


@score("wrong", chapter="00")
def above_the_mean(w, *, keep: Keep = 0.1) -> Masked:
    return Masked(w, w.abs() > w.abs().mean())


@score("wrong", chapter="00")
def keep_turns_the_order(w, *, keep: Keep = 0.1):
    return w.abs() if keep > 0.4 else 1 / w.abs()


@score("wrong", chapter="00")
def unseeded(w):
    return torch.rand_like(w)


@score("wrong", chapter="00")
def the_last_of_equals(w, *, keep: Keep = 0.1) -> Masked:
    place = torch.arange(w.numel()).reshape(w.shape)
    return Masked(w, place >= round((1 - keep) * w.numel()))


@score("wrong", chapter="00")
def one_row_only(w) -> Masked:
    return Masked(w[:1], w[:1] > 0)


@score("wrong", chapter="00")
def single_precision(w) -> Masked:
    return Masked(w.float(), w > 0)


@dataclass(frozen=True, eq=False)
class Rounded(Masked):
    def arrays(self):
        return {n: a.astype(np.float16).astype(a.dtype) if n == "values" else a for n, a in super().arrays().items()}


@dataclass(frozen=True, eq=False)
class Shifted(Masked):
    def arrays(self):
        return {n: np.roll(a, 1) for n, a in super().arrays().items()}


@dataclass(frozen=True, eq=False)
class Flattered(Masked):
    def bits(self):
        return 8 * self.values.element_size() * self.kept


@dataclass(frozen=True, eq=False)
class Shrinking(Masked):
    def through(self, w):
        return 0.9 * super().through(w)


@score("wrong", chapter="00")
def rounds_on_disk(w) -> Masked:
    return Rounded(w, w > 0)


@score("wrong", chapter="00")
def shifts_on_disk(w) -> Masked:
    return Shifted(w, w > 0)


@score("wrong", chapter="00")
def masks_for_free(w) -> Masked:
    return Flattered(w, w > 0)


@score("wrong", chapter="00")
def shrinks_each_time(w) -> Masked:
    return Shrinking(w, w > 0)


@pytest.mark.parametrize(
    "law, method, says",
    [
        (laws.finite, logarithm_of_a_negative, "NaN"),
        (laws.finite, one_number_too_many, "does not broadcast"),
        (laws.permutation, by_place, "not the permuted ones"),
        (laws.count, above_the_mean, "units stay"),
        (laws.nested, keep_turns_the_order, "smaller keep only"),
        (laws.ties, unseeded, "two masks"),
        (laws.ties, the_last_of_equals, "a higher index stays"),
        (laws.shape, one_row_only, "its packed weight (1,"),
        (laws.shape, single_precision, "float32"),
        (laws.round_trip, rounds_on_disk, "not the one written"),
        (laws.round_trip, shifts_on_disk, "not the one written|do not fit|do not rise|lie outside"),
        (laws.bits, masks_for_free, "its arrays hold"),
        (laws.projection, shrinks_each_time, "changes it"),
    ],
    ids=lambda v: getattr(v, "key", None),
)
def test_the_law_fails_on_a_wrong_method(law, method, says):
    with pytest.raises((AssertionError, ValueError), match=says.replace("(", r"\(")):
        law(method)
