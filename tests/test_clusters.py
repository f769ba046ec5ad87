"""Clusters against brute force, dynamic programming written plainly, scikit-learn and scipy."""

import gc
import itertools
import time
import weakref

import numpy as np
import pytest
import torch
from scipy.stats import entropy as scipy_entropy
from sklearn.cluster import KMeans, kmeans_plusplus

from cmlib.core import clusters
from cmlib.core.clusters import Line, ecsq, entropy, kmeans, nearest
from cmlib.lab.zoo import load_net

SEEDS = range(5)


def error(x, found, h=1.0):
    centroids, index = found
    return float((h * (x - centroids[index]) ** 2).sum())


def line_of(seed, n, kind="normal"):
    draw = np.random.default_rng(seed)
    z = draw.normal(size=n)
    return {
        "normal": lambda: z,
        "ties": lambda: np.round(2 * z) / 2,
        "lognormal": lambda: np.exp(3 * z),
        "cauchy": lambda: draw.standard_cauchy(n),
        "wild": lambda: np.exp(20 * z),
        "zeros": lambda: np.where(draw.random(n) < 0.05, z, 0),
        "two": lambda: np.where(draw.random(n) < 0.5, -3 + 0.1 * z, 2 + 0.3 * z),
        "dense": lambda: np.where(draw.random(n) < 0.01, z, 1e-4 * z),
    }[kind]()


KINDS = ("normal", "ties", "lognormal", "cauchy", "zeros", "two", "dense")


def layer(name):
    return load_net("lenet5", "mnist").get_submodule(name).weight.detach().double().numpy()


# the optimum on a line


def by_brute_force(x, h, k):
    """Least error over all ways to cut the sorted numbers into k parts."""
    order = np.argsort(x, kind="stable")
    x, h = x[order], h[order]
    spans = itertools.combinations(range(len(x) + 1), 2)
    cells = {(i, j): (h[i:j] * (x[i:j] - np.average(x[i:j], weights=h[i:j])) ** 2).sum() for i, j in spans}
    ways = ((0, *cuts, len(x)) for cuts in itertools.combinations(range(1, len(x)), k - 1))
    return min(sum(cells[a, b] for a, b in zip(way[:-1], way[1:])) for way in ways)


@pytest.mark.parametrize("k", [1, 2, 3, 5, 8])
def test_the_optimum_is_the_best_of_all_cuts(k):
    draw = np.random.default_rng(k)
    for _ in range(6):
        x, h = draw.normal(size=10), draw.random(10) + 0.01
        for line, weights in ((Line(x), np.ones(10)), (Line(x, h), h)):
            for found in (line.optimum(k), line.cluster(k)):
                assert error(x, found, weights) == pytest.approx(by_brute_force(x, weights, k), rel=1e-9, abs=1e-15)


def plainly(x, h, most):
    """Least error for 1 ... most cells by the recursion over all starts of the last cell, costs from their definition."""
    order = np.argsort(x)
    x, h = x[order], h[order]
    n = len(x)
    costs = np.full((n + 1, n + 1), np.inf)
    for i in range(n):
        mass, mean = np.cumsum(h[i:]), np.cumsum(h[i:] * (x[i:] - x[i]))
        costs[i, i + 1 :] = np.cumsum(h[i:] * (x[i:] - x[i]) ** 2) - mean**2 / mass
    least, out = costs[0], []
    for _ in range(most):
        out.append(least[n])
        least = (least[:, None] + costs).min(0)
    return np.array(out)


@pytest.mark.parametrize("kind", ["normal", "cauchy", "two", "lognormal"])
def test_up_to_512_distinct_numbers_are_clustered_at_best(kind):
    """Also where a cell of the optimum holds far more than its share of the numbers."""
    for n in (40, 300, 512):
        x, h = line_of(n, n, kind), np.random.default_rng(n).exponential(size=n)
        best, line = plainly(x, h, 32), Line(x, h)
        scale = (h * (x - x.mean()) ** 2).sum()
        for k in (1, 2, 3, 7, 16, 32):
            for found in (line.cluster(k), line.optimum(k)):
                assert error(x, found, h) == pytest.approx(best[k - 1], rel=1e-9, abs=1e-13 * scale)


def test_the_optimum_of_2000_numbers():
    x = line_of(3, 2000)
    best, line = plainly(x, np.ones(2000), 16)[15], Line(x)
    assert error(x, line.optimum(16)) == pytest.approx(best, rel=1e-9)
    assert error(x, line.cluster(16)) == pytest.approx(best, rel=1e-3)


def test_scikit_learn_with_ten_starts_is_no_better():
    """vq_gong's check 1, as corrected: the optimum, where Lloyd's steps from ten starts stay a good way above it."""
    worse = []
    for seed in range(3):
        x = line_of(seed, 200)
        reference = KMeans(16, n_init=10, init="random", random_state=seed).fit(x[:, None]).inertia_
        worse.append(reference / error(x, Line(x).cluster(16)))
    assert min(worse) >= 1 and np.median(worse) > 1.03


# larger lines


@pytest.mark.parametrize("k", [16, 64])
def test_a_clustering_is_as_good_as_scikit_learns_one_start(k):
    """At most 1.005 of its error, on each set and not only on average: all kinds of numbers and real layers."""
    sets = [line_of(2, 3000, kind) for kind in KINDS] + [layer("fc2").ravel(), layer("conv2").ravel()[::5], layer("fc1").ravel()[::80]]
    sets = [x for x in sets if len(np.unique(x)) > k]
    ratios = [error(x, Line(x).cluster(k)) / KMeans(k, n_init=1, random_state=0).fit(x[:, None]).inertia_ for x in sets]
    assert len(sets) >= 9 and max(ratios) <= 1.005 and np.mean(ratios) < 0.97


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [2, 16, 64])
def test_near_the_optimum_and_stable(kind, k):
    """One in a hundred above the optimum at most, on lines that are too long for it; and nothing moves any more."""
    x = line_of(1, 900, kind)
    line = Line(x)
    found = line.cluster(k)
    assert error(x, found) <= 1.01 * error(x, line.optimum(k)) + 1e-15
    assert np.array_equal(line.lloyd(found[0]), found[0]) and (np.diff(found[0]) >= 0).all()


@pytest.mark.parametrize("kind", [*KINDS, "wild"])
def test_where_cuts_may_lie(kind):
    """Enough for k cells, none twice, denser where levels would be."""
    for n in (600, 5000):
        line = Line(line_of(0, n, kind))
        for k in (1, 3, 100, 256, 500, 590):
            if len(line.values) > k:
                places = line._places(k)
                assert places[0] == 0 and places[-1] == len(line.values) and (np.diff(places) > 0).all()
                assert k < len(places) <= max(clusters.PLACES, 4 * k) + 1


def seconds(work, *arguments):
    """Processor time of this thread, the least of three runs."""
    times = []
    for _ in range(3):
        begin = time.thread_time()
        work(*arguments)
        times.append(time.thread_time() - begin)
    return min(times)


def test_256_levels_for_400_000_weights_take_less_than_300_ms():
    """The sorting included, without which each further number of levels takes half of it at most."""
    x = layer("fc1")
    assert seconds(lambda: Line(x).cluster(256)) <= 0.3
    assert max(seconds(Line(x).cluster, k) for k in (2, 16, 64, 256)) <= 0.15


# Lloyd's steps


@pytest.mark.parametrize("weighted", [False, True])
def test_lloyds_steps_are_scikit_learns_from_the_same_start(weighted):
    """hessian_weighted_kmeans' check 1 with tol=0, as corrected: the default tol stops early."""
    early = 0
    for seed in SEEDS:
        draw = np.random.default_rng(seed)
        x, h = draw.normal(size=3000), draw.exponential(size=3000) if weighted else None
        start = np.sort(draw.choice(x, 24, replace=False))
        runs = [KMeans(24, init=start[:, None], n_init=1, tol=tol, max_iter=2000).fit(x[:, None], sample_weight=h) for tol in (0, 1e-4)]
        found = Line(x, h).lloyd(start)
        assert np.abs(found - np.sort(runs[0].cluster_centers_[:, 0])).max() < 1e-12
        assert error(x, (found, nearest(x, found)), 1 if h is None else h) == pytest.approx(runs[0].inertia_, rel=1e-12)
        early += np.abs(found - np.sort(runs[1].cluster_centers_[:, 0])).max() > 0.01
    assert early > 0


def test_the_weighted_error_never_rises_in_lloyds_steps():
    for seed in SEEDS:
        draw = np.random.default_rng(seed)
        x, h = draw.normal(size=900), draw.exponential(size=900)
        line, start = Line(x, h), np.sort(draw.normal(size=24))
        ways = [line.lloyd(start, steps) for steps in range(40)]
        errors = [error(x, (c, nearest(x, c)), h) for c in ways]
        assert np.array_equal(ways[0], start) and all(b <= a * (1 + 1e-12) for a, b in zip(errors[:-1], errors[1:])) and errors[-1] < 0.7 * errors[0]


def test_a_centroid_that_nothing_is_near_to_stays():
    line = Line([0.0, 1.0, 10.0, 11.0])
    for centroids in ([-9.0, 0.5, 10.5], [0.5, 5.0, 10.5], [0.5, 10.5, 30.0]):
        assert line.lloyd(np.array(centroids)).tolist() == centroids


def test_nearest_is_the_least_distance():
    draw = np.random.default_rng(0)
    x, centroids = draw.normal(size=(30, 7)), np.sort(draw.normal(size=9))
    assert np.array_equal(nearest(x, centroids), np.abs(x[..., None] - centroids).argmin(-1)) and nearest(x, centroids).dtype == np.int64
    assert nearest([0.5, 1.5], np.array([0.0, 1.0, 2.0])).tolist() == [0, 1]


# corners


def test_as_many_levels_as_distinct_numbers_lose_nothing():
    x = line_of(0, 600, "ties").reshape(20, 30)
    distinct = np.unique(x)
    for k in (len(distinct), len(distinct) + 1, 1000):
        centroids, index = Line(x).cluster(k)
        assert centroids.shape == (k,) and np.array_equal(centroids[index], x) and index.shape == x.shape and index.dtype == np.int64
        assert set(centroids) == set(distinct) and index.max() == len(distinct) - 1
    assert error(x, Line(x).cluster(len(distinct) - 1)) > 0


def test_one_level_is_the_weighted_mean():
    draw = np.random.default_rng(0)
    for n in (5, 5000):
        x, h = draw.normal(2, 1, size=n), draw.exponential(size=n)
        assert Line(x).cluster(1)[0] == pytest.approx(x.mean(), rel=1e-12)
        assert Line(x, h).cluster(1)[0] == pytest.approx(np.average(x, weights=h), rel=1e-12)


def test_two_levels_of_a_symmetric_sample_are_the_mean_magnitude():
    """vq_gong's check 3, as corrected: the sample itself must be symmetric."""
    x = np.abs(np.random.default_rng(0).normal(size=400))
    centroids, _ = Line(np.concatenate([x, -x])).cluster(2)
    assert centroids == pytest.approx([-x.mean(), x.mean()], rel=1e-12)


def test_equal_numbers():
    centroids, index = Line(np.full((3, 4), 0.3)).cluster(5)
    assert centroids.tolist() == [0.3] * 5 and (index == 0).all()
    assert Line([0.0, -0.0]).values.tolist() == [0.0]


def test_weights_count_numbers_and_only_their_ratios_matter():
    draw = np.random.default_rng(0)
    x, h = draw.normal(size=700), draw.integers(0, 4, size=700)
    repeated = Line(np.repeat(x, h)).cluster(9)[0]
    for factor in (1, 1e-30, 1e30):
        centroids, index = Line(x, h * factor).cluster(9)
        assert centroids == pytest.approx(repeated, rel=1e-9) and np.array_equal(index, nearest(x, centroids))
    assert np.array_equal(Line(x, np.zeros(700)).cluster(9)[0], Line(x).cluster(9)[0])
    centroids, index = Line([1.0, 2.0, 4.0], [0, 1, 0]).cluster(2)
    assert centroids.tolist() == [2.0, 2.0] and centroids[index].tolist() == [2.0] * 3


def test_weights_of_any_range_leave_a_centroid_in_its_cell():
    draw = np.random.default_rng(0)
    x, h = draw.normal(size=3000), 10.0 ** draw.uniform(-30, 0, size=3000)
    line = Line(x, h)
    centroids, _ = line.cluster(64)
    assert (np.diff(centroids) > 0).all() and x.min() <= centroids[0] and centroids[-1] <= x.max()
    assert error(x, line.cluster(64), h) < error(x, Line(x).cluster(64), h) / 2


def test_order_shape_and_kind_of_the_numbers_do_not_matter():
    w = torch.from_numpy(layer("conv2")).float()
    centroids, index = Line(w).cluster(32)
    shuffled = torch.randperm(w.numel(), generator=torch.Generator().manual_seed(0))
    again, places = Line(w.flatten()[shuffled].numpy()).cluster(32)
    assert np.array_equal(again, centroids) and np.array_equal(places, index.ravel()[shuffled]) and index.shape == w.shape
    assert np.array_equal(Line(w).cluster(32)[0], centroids)


@pytest.mark.parametrize(
    "x, h, says",
    [
        ([], None, "holds no number"),
        ([1.0, np.nan], None, "1 of 2 numbers are not finite"),
        ([1.0, np.inf], None, "not finite"),
        ([1.0, 2.0], [1.0, -1.0], "clip them at 0"),
        ([1.0, 2.0], [1.0, np.nan], "clip them at 0"),
        ([1.0, 2.0], [1.0], "one weight a number"),
        ([1e200, 2e200], None, "too large"),
    ],
)
def test_what_cannot_be_clustered_says_why(x, h, says):
    for work in (lambda: Line(x, h), lambda: ecsq(x, 2, 0.1, h)):
        with pytest.raises(ValueError, match=says), np.errstate(over="ignore"):
            work()


@pytest.mark.parametrize("k", [0, -1, 2.5, True, None])
def test_a_number_of_clusters_is_whole_and_above_0(k):
    for work in (Line([1.0, 2.0]).cluster, Line([1.0, 2.0]).optimum, lambda k: kmeans(np.ones((3, 2)), k)):
        with pytest.raises(ValueError, match="clusters are not possible"):
            work(k)


# entropy


def test_entropy_is_scipys():
    draw = np.random.default_rng(0)
    for n in (1, 2, 50, 3000):
        index = draw.geometric(0.2, size=(n, 3))
        assert entropy(index) == pytest.approx(scipy_entropy(np.unique(index, return_counts=True)[1], base=2), rel=1e-12, abs=1e-15)
    assert entropy(np.zeros(9, int)) == 0 and entropy([]) == 0 and entropy(np.arange(256)) == 8


def objective(x, h, lam, found):
    return error(x, found, h) / x.size + lam * entropy(found[1])


def test_without_a_price_ecsq_is_weighted_clustering():
    draw = np.random.default_rng(0)
    x, h = draw.normal(size=(40, 20)), draw.exponential(size=(40, 20))
    for a, b in zip(ecsq(x, 12, 0.0, h), Line(x, h).cluster(12), strict=True):
        assert np.allclose(a, b, rtol=0, atol=1e-12) and a.shape == b.shape


@pytest.mark.parametrize("lam", [1e-3, 0.02, 0.3])
def test_ecsq_never_rises_and_ends_where_no_number_and_no_centroid_gains_by_moving(lam):
    for seed in SEEDS:
        draw = np.random.default_rng(seed)
        x, h = 5 + draw.normal(size=500), draw.exponential(size=500)
        path = [objective(x, h, lam, ecsq(x, 20, lam, h, steps=steps)) for steps in (0, 1, 2, 3, 5, 9, 20)]
        assert all(b <= a * (1 + 1e-12) for a, b in zip(path[:-1], path[1:])) and path[-1] < path[0]
        centroids, index = ecsq(x, 20, lam, h, steps=1000)
        counts = np.bincount(index)
        assert (np.diff(centroids) > 0).all() and (counts > 0).all() and len(counts) == len(centroids) <= 20
        price = h[:, None] * (x[:, None] - centroids) ** 2 - lam * np.log2(counts / 500)
        assert (price[np.arange(500), index] <= price.min(1) + 1e-12).all()
        assert centroids == pytest.approx(np.bincount(index, h * x) / np.bincount(index, h), rel=1e-12)


def test_at_equal_entropy_ecsq_errs_less_than_fewer_levels():
    x = line_of(0, 20_000)
    plain, priced = Line(x).cluster(4), ecsq(x, 32, 0.14)
    assert entropy(priced[1]) <= entropy(plain[1]) and error(x, priced) < 0.9 * error(x, plain)


def test_a_high_price_leaves_one_cluster_but_not_of_two_equal_ones_and_entropy_may_rise_on_the_way():
    """hessian_weighted_kmeans' check 4, as corrected."""
    x = line_of(0, 300, "lognormal")
    centroids, index = ecsq(x, 16, 1e12)
    assert centroids == pytest.approx([x.mean()], rel=1e-12) and entropy(index) == 0
    assert entropy(ecsq([-1.0, -1.0, 1.0, 1.0], 2, 1e6)[1]) == 1
    x, h = line_of(5, 30), np.random.default_rng(5).exponential(size=30)
    path = [entropy(ecsq(x, 6, lam, h, steps=1000)[1]) for lam in np.geomspace(1e-4, 10, 20)]
    assert any(b > a + 0.01 for a, b in zip(path[:-1], path[1:])) and path[-1] < 0.5 < 2 < path[0]


def test_numbers_without_weight_take_the_cheapest_code():
    x, h = np.array([0.0] * 6 + [1.0] * 3 + [50.0]), np.array([1.0] * 9 + [0.0])
    centroids, index = ecsq(x, 3, 0.01, h)
    assert centroids.tolist() == [0.0, 1.0] and index.tolist() == [0] * 6 + [1] * 3 + [0]


@pytest.mark.parametrize("lam", [-1e-9, np.inf, np.nan])
def test_a_price_is_finite_and_not_below_0(lam):
    with pytest.raises(ValueError, match="weighs bits against squared error"):
        ecsq([1.0, 2.0], 2, lam)


# vectors


def blobs(seed, n=3000, d=4):
    draw = np.random.default_rng(seed)
    return draw.normal(size=(n, d)) + 3 * draw.normal(size=(12, d))[draw.integers(12, size=n)]


def inertia(points, found):
    return float(np.square(points - found[0][found[1]]).sum())


def test_vectors_end_where_scikit_learn_moves_nothing():
    for seed in range(3):
        points = blobs(seed)
        found = kmeans(points, 20, seed=seed, steps=1000)
        reference = KMeans(20, init=found[0], n_init=1, tol=0, max_iter=50).fit(points)
        assert reference.n_iter_ <= 2 and np.abs(reference.cluster_centers_ - found[0]).max() < 1e-12
        assert np.array_equal(reference.labels_, found[1]) and inertia(points, found) == pytest.approx(reference.inertia_, rel=1e-12)


def test_vectors_are_clustered_as_well_as_by_scikit_learn():
    """Mean error over ten seeds within 1 part in 100, both from plain k-means++; scikit-learn's own tries several points for each centroid."""
    points = blobs(0, 1500) / [1, 1, 1, 3]
    ours = [inertia(points, kmeans(points, 64, seed=seed, steps=100)) for seed in range(10)]
    starts = [kmeans_plusplus(points, 64, n_local_trials=1, random_state=seed)[0] for seed in range(10)]
    reference = [KMeans(64, init=start, n_init=1, max_iter=100).fit(points).inertia_ for start in starts]
    assert np.mean(ours) == pytest.approx(np.mean(reference), rel=0.01)


def test_error_of_vectors_falls_with_steps_and_a_seed_repeats_itself():
    points = blobs(1)
    errors = [inertia(points, kmeans(points, 30, steps=steps)) for steps in (0, 1, 2, 4, 8, 16, 32)]
    assert all(b < a for a, b in zip(errors[:-1], errors[1:]))
    once, again, other = (kmeans(points, 30, seed=s) for s in (0, 0, 1))
    assert np.array_equal(once[0], again[0]) and np.array_equal(once[1], again[1]) and not np.array_equal(once[0], other[0])


def test_tables_of_distances_in_pieces_are_the_whole_table(monkeypatch):
    points, x = blobs(2, 500), line_of(0, 500)
    whole = kmeans(points, 7), ecsq(x, 7, 0.05)
    monkeypatch.setattr(clusters, "CHUNK", 50)
    pieces = kmeans(points, 7), ecsq(x, 7, 0.05)
    assert all(np.allclose(a, b, rtol=0, atol=1e-12) for u, v in zip(whole, pieces, strict=True) for a, b in zip(u, v, strict=True))


def test_few_distinct_vectors_are_all_kept():
    points = np.repeat(1000 + blobs(3, 9), 5, axis=0)
    centroids, index = kmeans(points, 12)
    assert centroids.shape == (12, 4) and np.allclose(centroids[index], points, rtol=0, atol=1e-10)


def test_a_centroid_without_points_goes_to_the_point_worst_served():
    points = np.array([[0.0], [0.1], [5.0], [5.1], [9.0]])
    moved = clusters._moved(points, np.array([0, 0, 1, 1, 1]), np.array([[0.0], [5.0], [99.0]]))
    assert moved.ravel() == pytest.approx([0.05, 19.1 / 3, 9.0])


def test_vectors_of_one_number_are_a_line():
    x = line_of(0, 2000)
    centroids, index = kmeans(x[:, None], 16, steps=1000)
    stable = Line(x).lloyd(np.sort(centroids.ravel()))
    assert stable == pytest.approx(np.sort(centroids.ravel()), abs=1e-12)
    assert error(x, Line(x).cluster(16)) <= error(x, (centroids.ravel(), index))


@pytest.mark.parametrize("points, says", [(np.ones(3), "reshape"), (np.ones((0, 2)), "no number"), (np.full((2, 2), np.nan), "not finite")])
def test_points_that_are_none(points, says):
    with pytest.raises(ValueError, match=says):
        kmeans(points, 2)


def test_a_tensor_is_sorted_once_until_it_changes():
    w = torch.randn(500, generator=torch.Generator().manual_seed(0))
    first = clusters.line_of(w)
    assert clusters.line_of(w) is first and clusters.line_of(w.clone()) is not first
    for k in (3, 16):
        assert all(np.array_equal(a, b) for a, b in zip(first.cluster(k), clusters.Line(w).cluster(k), strict=True))
    w[0] = 9.0
    again = clusters.line_of(w)
    assert again is not first and again.x[0] == 9.0
    held = weakref.ref(again)
    del w, again
    gc.collect()
    assert held() is None  # nothing is kept of a tensor that is gone
