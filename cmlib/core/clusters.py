"""Clusters of weights: a few centroids c_1 ... c_k stand for many numbers, and each number stores only which of them it took.

``Line`` sorts a layer's numbers once; ``cluster(k)`` is then quick. On a line a cell is an interval, so a clustering is k - 1 cuts, and prefix sums
give the cost of any cell at once: the best cuts among a few hundred places come from dynamic programming (Wang and Song 2011, Ckmeans.1d.dp), and
Lloyd's steps (1982) polish them on all numbers. Where the numbers are few, every place is tried and the result is the optimum.

``ecsq`` trades error for entropy, ``kmeans`` clusters vectors. Arrays, or tensors that need no gradient, go in; float64 centroids and an int64
index of the numbers' shape come out. The same input always gives the same output.
"""

from __future__ import annotations

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import ArrayLike
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

Clustering = tuple[np.ndarray, np.ndarray]  # centroids, and for each number the index of its own
PLACES = 512  # where cuts may lie, at least; up to so many distinct numbers the clustering is the optimum
CHUNK = 1 << 16  # distances that are made at once: they stay in the processor's cache


class Line:
    """Numbers ``x`` of any shape with weights ``h`` >= 0 (such as a Hessian diagonal), sorted and summed once.

    ``h`` counts up to a factor; None, or zeros only, weigh all numbers alike. Numbers of weight 0 move no centroid, but have one. Costs of cells are
    differences of sums, so what is less than some 1e-14 of the whole error is not told apart.
    ValueError where x is empty, x or h is not finite, h is below 0 or of another shape.
    """

    def __init__(self, x: ArrayLike, h: ArrayLike | None = None) -> None:
        self.x, h = _numbers(x), _weights(h, np.shape(x))
        flat, h = self.x.ravel(), h.ravel() / h.max()
        order = np.argsort(flat)
        order = order[h[order] > 0]
        first = np.flatnonzero(np.diff(flat[order], prepend=-np.inf))
        self.values = flat[order][first]  # distinct, rising
        mass = np.add.reduceat(h[order], first)
        self.middle = np.average(self.values, weights=mass)
        v = self.values - self.middle  # sums about the middle cancel least
        self.sums = np.zeros((3, len(v) + 1))  # of h, h v and h v^2 over all that come before a place
        np.cumsum([mass, mass * v, mass * v * v], axis=1, out=self.sums[:, 1:])
        if not np.isfinite(self.sums[:, -1]).all():
            raise ValueError(f"numbers up to {np.abs(self.values).max():.3g} are too large to be squared; scale them down")

    def cluster(self, k: int) -> Clustering:
        """At most ``k`` clusters of least sum of h (x - c)^2: (centroids (k,) rising, index of x's shape).

        The optimum where at most 512 numbers are distinct, else a local one close to it. Where k is at least the number of distinct
        numbers, all are kept as they are and the last centroid repeats, unused. k = 1 gives the weighted mean. ValueError where k is below 1.
        """
        return self._assigned(self.lloyd(self._start(k, self._places(_whole(k)))))

    def optimum(self, k: int) -> Clustering:
        """As ``cluster``, the exact optimum however many numbers are distinct: for up to some 2000, since time grows with their square."""
        return self._assigned(self._start(_whole(k), np.arange(len(self.values) + 1)))

    def _assigned(self, centroids: np.ndarray) -> Clustering:
        return centroids, nearest(self.x, centroids)

    def _start(self, k: int, places: np.ndarray) -> np.ndarray:
        """The best centroids whose cells end at ``places``, or the distinct numbers themselves where they are no more than k."""
        spare = k - len(self.values)
        return np.append(self.values, np.full(spare, self.values[-1])) if spare >= 0 else self._means(self._best_cuts(k, places))

    def lloyd(self, centroids: np.ndarray, steps: int | None = None) -> np.ndarray:
        """Rising centroids after ``steps`` of Lloyd's (None: until nothing moves): each becomes the mean of the numbers nearest to it.

        A centroid that no number is nearest to stays where it is. The weighted error never rises.
        """
        cuts, last = self._cuts(centroids), None
        while (steps is None or steps > 0) and not np.array_equal(cuts, last):
            centroids, last = self._means(cuts, centroids), cuts
            cuts, steps = self._cuts(centroids), None if steps is None else steps - 1
        return centroids

    def _best_cuts(self, k: int, places: np.ndarray) -> np.ndarray:
        """The k + 1 cuts (first and last place included) of least cost, all of them among ``places``, rising indices into the distinct numbers.

        Cells longer than ``reach`` are left out. Where every cut is allowed the result is to be exact: if one of them costs no more than the whole
        clustering found, it might belong to a better one, and reach is doubled.
        """
        last, exact = len(places) - 1, len(places) > len(self.values)
        reach = min(last, -(-8 * last // k))
        cuts, cost = self._shortest(k, places, reach)
        while exact and reach < last and self._costs(places[: -reach - 1], places[reach + 1 :]).min() <= cost:
            reach = min(last, 2 * reach)
            cuts, cost = self._shortest(k, places, reach)
        return places[cuts]

    def _shortest(self, k: int, places: np.ndarray, reach: int) -> tuple[list[int], float]:
        """Dynamic programming: least cost of the numbers before each place in 1, 2, ... k cells of at most ``reach`` places."""
        rows = np.arange(len(places))
        starts = rows[:, None] - np.arange(reach, 0, -1)
        costs = np.where(starts < 0, np.inf, self._costs(places[np.maximum(starts, 0)], places[:, None]))
        padded = np.full(reach + len(places), np.inf)
        least, before = padded[reach:], sliding_window_view(padded, reach)[: len(places)]  # before[j] views least[j - reach : j]
        least[0], back = 0.0, []
        for _ in range(k):
            total = costs + before
            back.append(total.argmin(1))
            least[:] = total[rows, back[-1]]
        cuts = [len(places) - 1]
        for choice in reversed(back):
            cuts.append(int(starts[cuts[-1], choice[cuts[-1]]]))
        return cuts[::-1], float(least[-1])

    def _costs(self, start: np.ndarray, stop: np.ndarray) -> np.ndarray:
        """Sum of h (x - mean)^2 over the distinct numbers start ... stop - 1."""
        mass, first, second = self.sums[:, stop] - self.sums[:, start]
        return np.maximum(second - np.divide(first * first, mass, out=np.zeros_like(mass), where=mass > 0), 0)

    def _places(self, k: int) -> np.ndarray:
        """Cuts to choose from for k cells: all, or some 512 (or 4 k) and the denser the denser levels would lie.

        Levels lie as the numbers to the power 1/3 (Bennett 1948, Panter and Dite 1951), counted over short runs of numbers, but no number has more
        than one. Places are so many times more, up to two a number: where the numbers have two, every cut is a place.
        """
        total, count = len(self.values), max(PLACES, 4 * k)
        if total <= max(PLACES, k):
            return np.arange(total + 1)
        edges = np.unique(np.linspace(0, total, 16 * count + 1).astype(int))
        most, bounds = np.diff(edges), np.concatenate([self.values[:1], _midpoints(self.values), self.values[-1:]])
        levels = np.cbrt(np.diff(self.sums[0, edges])) * np.cbrt(np.diff(bounds[edges])) ** 2  # (mass / width)^(1/3) width
        for _ in range(30):  # what is too much for a run is shared out among the others
            levels = np.minimum(levels * (k / levels.sum()), most)
        ends = np.append(0, np.minimum(levels * count / k, 2 * most).cumsum())
        places = np.unique(np.interp(np.linspace(0, ends[-1], int(ends[-1]) + 1), ends, edges).round().astype(int))
        return places if len(places) > k else np.union1d(places, np.linspace(0, total, k + 1).astype(int))  # numbers of most unlike sizes

    def _cuts(self, centroids: np.ndarray) -> np.ndarray:
        return np.concatenate([[0], np.searchsorted(self.values, _midpoints(centroids), side="right"), [len(self.values)]])

    def _means(self, cuts: np.ndarray, empty: np.ndarray | None = None) -> np.ndarray:
        """The weighted mean of each cell, or ``empty`` where it holds nothing; within its cell also where rounding would put it outside."""
        mass, first, _ = np.diff(self.sums[:, cuts], axis=1)
        low, high = self.values[np.minimum(cuts[:-1], len(self.values) - 1)], self.values[cuts[1:] - 1]
        means = np.clip(self.middle + np.divide(first, mass, out=np.zeros_like(mass), where=mass > 0), low, high)
        return means if empty is None else np.where(np.diff(cuts) > 0, means, empty)


_lines = WeakTensorKeyDictionary()  # tensor -> (its version, its line), as long as the tensor lives


def line_of(w: Tensor) -> Line:
    """``Line(w)``, sorted once for a tensor that is asked for again and again, as under a slider."""
    version, line = _lines.get(w, (None, None))
    if version != w._version:
        version, line = _lines[w] = w._version, Line(w.detach().cpu())
    return line


def nearest(x: ArrayLike, centroids: np.ndarray) -> np.ndarray:
    """The index (int64, of x's shape) of the centroid nearest to each number; of two as near, the lower. ``centroids`` (k,) rise."""
    return np.searchsorted(_midpoints(centroids), np.asarray(x, np.float64))


def ecsq(x: ArrayLike, k: int, lam: float, h: ArrayLike | None = None, *, steps: int = 30) -> Clustering:
    """Entropy-constrained scalar quantization: at most ``k`` centroids that lower mean h (x - c)^2 + lam H, H the index's entropy in bits.

    Each step gives every number the centroid of least h (x - c)^2 - lam log2 p, p the share of numbers that took it, drops centroids that nobody took
    and moves the others to their weighted means; no step raises the sum. It starts from ``Line.cluster`` and ends when nothing moves, or after
    ``steps``. Returns the centroids in use (k' <= k, rising) and the index. ``h`` as for ``Line``, but its scale counts against ``lam`` >= 0.
    Choi, El-Khamy and Lee 2017, Towards the limit of network quantization, section 4.2; Chou, Lookabaugh and Gray 1989.
    """
    if not 0 <= lam < np.inf:
        raise ValueError(f"lam={lam} is not allowed; it weighs bits against squared error, is finite and at least 0")
    line = Line(x, h)
    centroids, index = line.cluster(k)
    centroids, index = centroids - line.middle, index.ravel()
    flat, weights = line.x.ravel() - line.middle, _weights(h, line.x.shape).ravel()
    cost = np.stack([weights, -2 * weights * flat, np.ones_like(flat)], axis=1)  # times (c^2, c, price): h (x - c)^2 + price, less h x^2
    for _ in range(steps):
        centroids, index, counts = _used(centroids, index)
        mass = np.bincount(index, weights)
        centroids = np.divide(np.bincount(index, weights * flat), mass, out=centroids, where=mass > 0)
        index, last = _lowest(cost, np.stack([centroids**2, centroids, -lam * np.log2(counts / len(flat))])), index
        if np.array_equal(index, last):
            break
    return _rising(*_used(centroids + line.middle, index)[:2], line.x.shape)


def _used(centroids: np.ndarray, index: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Only the centroids that are in use, the index into them, and how often each is taken."""
    counts = np.bincount(index, minlength=len(centroids))
    kept = counts > 0
    return centroids[kept], (np.cumsum(kept) - 1)[index], counts[kept]


def _rising(centroids: np.ndarray, index: np.ndarray, shape: tuple[int, ...]) -> Clustering:
    order = np.argsort(centroids)
    return centroids[order], np.argsort(order)[index].reshape(shape)


def _lowest(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """For each row of a (n, d), the column of a @ b, with b (d, k), that is least; the table (n, k) is never whole."""
    rows = max(1, CHUNK // b.shape[1])
    return np.concatenate([(a[i : i + rows] @ b).argmin(1) for i in range(0, len(a), rows)])


def entropy(index: ArrayLike) -> float:
    """H = -sum p log2 p, p the share of each symbol in ``index``: the bits a symbol that a code takes at least if it knows nothing but the shares."""
    _, counts = np.unique(np.asarray(index), return_counts=True)
    p = counts / counts.sum()
    return float(abs((p * np.log2(p)).sum()))


def kmeans(points: ArrayLike, k: int, *, seed: int = 0, steps: int = 20) -> Clustering:
    """At most ``k`` clusters of vectors: (centroids (k, d), index (n,)) for ``points`` (n, d), for product and residual quantization.

    Starts as k-means++ from ``seed`` (Arthur and Vassilvitskii 2007), then up to ``steps`` of Lloyd's; a centroid without points moves to the point
    that is worst served. Where k is at least the number of distinct points, all are kept. ValueError where points are none, not (n, d) or not finite.
    """
    points, k = _numbers(points), _whole(k)
    if points.ndim != 2:
        raise ValueError(f"points of shape {points.shape}: (n, d) is asked for; reshape them")
    middle = points.mean(0)
    points = points - middle  # so that |c|^2 - 2 x c cancels little
    centroids = _plus_plus(points, k, np.random.default_rng(seed))
    index = _closest(points, centroids)
    for _ in range(steps):
        centroids, last = _moved(points, index, centroids), index
        index = _closest(points, centroids)
        if np.array_equal(index, last):
            break
    return centroids + middle, index


def _plus_plus(points: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
    """k of the points, each drawn with a chance that grows as its squared distance from those before it."""
    chosen = [int(rng.integers(len(points)))]
    far = np.full(len(points), np.inf)
    for u in rng.random(k - 1):
        far = np.minimum(far, np.square(points - points[chosen[-1]]).sum(1))
        reach = np.cumsum(far)
        chosen.append(min(int(np.searchsorted(reach, u * reach[-1], side="right")), len(points) - 1))
    return points[chosen]


def _closest(points: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """The centroid of least |c|^2 - 2 x c, which is |x - c|^2 less what all have in common."""
    return _lowest(np.insert(points, 0, 1.0, axis=1), np.vstack([np.square(centroids).sum(1), -2 * centroids.T]))


def _moved(points: np.ndarray, index: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """The mean of each cluster; centroids without points go to the points that are farthest from theirs."""
    counts = np.bincount(index, minlength=len(centroids))
    sums = np.stack([np.bincount(index, column, len(centroids)) for column in points.T], axis=1)
    empty = np.flatnonzero(counts == 0)
    moved = sums / np.maximum(counts, 1)[:, None]
    if len(empty):
        worst = np.argsort(-np.square(points - centroids[index]).sum(1), kind="stable")[: len(empty)]
        moved[empty[: len(worst)]] = points[worst]
    return moved


def _midpoints(centroids: np.ndarray) -> np.ndarray:
    return centroids[:-1] / 2 + centroids[1:] / 2


def _numbers(x: ArrayLike) -> np.ndarray:
    x = np.asarray(x, np.float64)
    if not x.size:
        raise ValueError(f"nothing to cluster: shape {x.shape} holds no number")
    if not np.isfinite(x).all():
        raise ValueError(f"{np.count_nonzero(~np.isfinite(x))} of {x.size} numbers are not finite (nan or inf); clustering needs finite ones")
    return x


def _weights(h: ArrayLike | None, shape: tuple[int, ...]) -> np.ndarray:
    """Weights as float64; ones where none are given or all are 0."""
    h = np.ones(shape) if h is None else np.asarray(h, np.float64)
    if h.shape != shape:
        raise ValueError(f"weights of shape {h.shape} for numbers of shape {shape}; give one weight a number")
    if not (np.isfinite(h) & (h >= 0)).all():
        raise ValueError("weights below 0 or not finite; clip them at 0")
    return h if h.any() else np.ones(shape)


def _whole(k: int) -> int:
    if not isinstance(k, int | np.integer) or isinstance(k, bool) or k < 1:
        raise ValueError(f"k={k!r} clusters are not possible; give a whole number from 1 up")
    return int(k)
