"""Selection against brute force: which units go, how many, and in which order."""

import itertools

import pytest
import torch
from torch.nn.utils import prune as reference

from cmlib.core.laws import UNITS
from cmlib.core.select import _order, rank, removed, select, to_units, to_weights

SHAPES = [(10, 7), (6, 5, 3, 3), (5, 4, 3), (1, 9), (9, 1)]


def groups(shape, unit):
    """Each unit as a list of flat indices, written out by hand."""
    out, rest = shape[0], torch.Size(shape).numel() // shape[0]
    at = lambda r, c: r * rest + c  # noqa: E731
    if unit in ("row", "filter"):
        return [[at(r, c) for c in range(rest)] for r in range(out)]
    if unit == "channel":
        area = rest // shape[1]
        return [[at(r, i * area + k) for r in range(out) for k in range(area)] for i in range(shape[1])]
    if unit == "shape":
        return [[at(r, c) for r in range(out)] for c in range(rest)]
    if unit == "kernel":
        area = rest // shape[1]
        return [[at(r, i * area + k) for k in range(area)] for r in range(out) for i in range(shape[1])]
    if unit.startswith("block"):
        h, w = map(int, unit[6:].split("x"))
        corners = itertools.product(range(0, out, h), range(0, rest, w))
        return [[at(i, j) for i in range(r, min(r + h, out)) for j in range(c, min(c + w, rest))] for r, c in corners]
    return [[i] for i in range(out * rest)]


def by_hand(scores, unit, keep):
    """A mask by sorting whole units: of equal ones the lower index is dealt with last."""
    flat = scores.flatten().tolist()
    units = groups(scores.shape, unit)
    order = sorted(range(len(units)), key=lambda u: (sum(flat[i] for i in units[u]), -u))
    mask = torch.ones(scores.numel(), dtype=torch.bool)
    for u in order[: round((1 - keep) * len(units))]:
        mask[units[u]] = False
    return mask.reshape(scores.shape)


@pytest.mark.parametrize("unit", [u for u in UNITS if u[0] not in "0123456789"])
@pytest.mark.parametrize("shape", SHAPES)
def test_one_layer_is_sorting_by_hand(shape, unit):
    scores = torch.rand(shape, dtype=torch.float64)
    for keep in (0.001, 0.1, 0.25, 0.5, 0.77, 1.0):
        assert torch.equal(select(scores, keep, unit=unit), by_hand(scores, unit, keep))


@pytest.mark.parametrize("unit", ["2:4", "1:4", "4:8"])
@pytest.mark.parametrize("shape", SHAPES)
def test_n_of_m_keeps_the_best_of_each_group(shape, unit):
    n, m = map(int, unit.split(":"))
    scores = torch.rand(shape)
    mask = select(scores, unit=unit)
    for row, kept in zip(scores.flatten(1), mask.flatten(1), strict=True):
        for s, k in zip(row.split(m), kept.split(m), strict=True):
            assert set(k.nonzero().flatten().tolist()) == set(s.argsort(descending=True)[:n].tolist())


def test_n_of_m_of_equal_scores_keeps_the_first():
    assert select(torch.ones(2, 8), unit="2:4").int().tolist() == [[1, 1, 0, 0, 1, 1, 0, 0]] * 2


@pytest.mark.parametrize("unit", ["weight", "row", "block:4x4"])
def test_a_network_is_one_long_layer(unit):
    scores = {n: torch.rand(s, dtype=torch.float64) * f for n, s, f in (("a", (8, 8), 1.0), ("b", (12, 4), 0.3), ("c", (4, 3, 2, 2), 2.0))}
    for keep in (0.05, 0.4, 0.9):
        masks = select(scores, keep, unit=unit, scope="network")
        sums = [(s.flatten()[list(u)].sum().item(), n, u) for n, s in scores.items() for u in groups(s.shape, unit)]
        gone = sorted(sums, key=lambda e: e[0])[: round((1 - keep) * len(sums))]
        expected = {n: torch.ones(s.numel(), dtype=torch.bool) for n, s in scores.items()}
        for _, n, u in gone:
            expected[n][u] = False
        assert all(torch.equal(masks[n].flatten(), expected[n]) for n in scores)


def test_a_network_of_equal_scores_keeps_the_first_layers_first_weights():
    masks = select({"a": torch.ones(2, 3), "b": torch.ones(4)[None]}, 0.3, scope="network")
    assert masks["a"].flatten().tolist() == [True] * 3 + [False] * 3 and not masks["b"].any()


@pytest.mark.parametrize("unit", UNITS)
def test_ties_are_broken_the_same_way_every_time_and_the_lower_index_stays(unit):
    scores = torch.randint(0, 3, (12, 16)).double()
    masks = [select(scores, 0.4, unit=unit) for _ in range(3)]
    assert torch.equal(masks[0], masks[1]) and torch.equal(masks[0], masks[2])
    if not unit[0].isdigit():
        assert torch.equal(masks[0], by_hand(scores, unit, 0.4))


@pytest.mark.parametrize("total", [1, 2, 5, 10, 2048, 30_000])
def test_as_many_go_as_in_torch(total):
    for keep in [i / 40 for i in range(1, 41)]:
        w = torch.randn(total)
        mask = reference.L1Unstructured(1 - keep).compute_mask(w, torch.ones(total)) if keep < 1 else torch.ones(total)
        assert removed(total, keep) == int((mask == 0).sum())


@pytest.mark.parametrize("unit", UNITS)
def test_masks_are_nested_in_keep(unit):
    ranking = rank({"a": torch.rand(13, 10), "b": torch.rand(6, 3, 2, 2)}, unit, "network")
    keeps = [0.001, 0.02, 0.1, 0.33, 0.5, 0.9, 1.0]
    for small, large in zip(keeps[:-1], keeps[1:]):
        a, b = ranking.at(small), ranking.at(large)
        assert all((~a[n] | b[n]).all() for n in a)


def test_a_threshold_keeps_what_is_at_least_as_much():
    s = torch.tensor([[0.1, 0.5, 0.7], [0.2, 0.2, 0.1]])
    assert select(s, threshold=0.5).tolist() == [[False, True, True], [False] * 3]
    assert select(s, threshold=0.6, unit="row").tolist() == [[True] * 3, [False] * 3]
    assert select(s, threshold=0.0).all()


@pytest.mark.parametrize("unit", [u for u in UNITS if not u[0].isdigit()])
@pytest.mark.parametrize("shape", SHAPES)
def test_units_and_weights_speak_of_the_same_places(shape, unit):
    s = torch.rand(shape, dtype=torch.float64)
    units = to_units(s, unit)
    expected = [s.flatten()[g].sum() for g in groups(s.shape, unit)]
    assert torch.allclose(units.flatten(), torch.stack(expected), rtol=0, atol=1e-12)
    kept = torch.rand(units.shape) < 0.5
    for flag, places in zip(kept.flatten(), groups(s.shape, unit), strict=True):
        assert (to_weights(kept, unit, s.shape).flatten()[places] == flag).all()


@pytest.mark.parametrize("scores", [
    torch.rand(5000, generator=torch.Generator().manual_seed(0)), torch.arange(5000).float() % 7, torch.zeros(9), torch.rand(0),
    torch.rand(99).half(),
    torch.tensor([0.0, -0.0, 1.0, -torch.inf, torch.inf, 0.0, -torch.inf]), torch.tensor([1.0, 1.0 + 1e-12], dtype=torch.float64),
])  # fmt: skip
def test_the_order_is_that_of_a_stable_sort(scores):
    order = scores.argsort(descending=True, stable=True)
    assert torch.equal(_order(scores).long()[order], torch.arange(len(scores)))
