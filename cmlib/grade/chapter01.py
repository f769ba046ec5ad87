"""Chapter 01, why compress: the visible checks and hints of its questions, and what they measure with (survey 001, sections 1.1 and 3)."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np

from ..core.storage import nbytes
from .checks import EMPTY, question
from .trial import Trial

# Picojoules of one operation, and of one access by the 32-bit word, 45 nm (Horowitz 2014), as in ``cmlib.lab.cost``.
PRICE = {"fp32 mult": 3.7, "fp32 add": 0.9, "int8 mult": 0.2, "int32 add": 0.1, "SRAM": 5.0, "DRAM": 640.0}

BY_HAND = ("1.10", "1.11")

Network = dict[str, np.ndarray]


class Machine:
    """A machine whose time is known: ``calls`` take the ``seconds`` (calls, runs) that they are told, run by run, and ``clock`` tells the time.

    ``log`` holds what happened in its order: the number of a call, or "clock".
    """

    def __init__(self, seconds: np.ndarray):
        self.seconds, self.now, self.log, self.runs = seconds, 0.0, [], [0] * len(seconds)
        self.calls = [self._call(i) for i in range(len(seconds))]

    def clock(self) -> float:
        self.log.append("clock")
        return self.now

    def _call(self, number: int) -> Callable[[], None]:
        def call() -> None:
            self.now += float(self.seconds[number, self.runs[number] % self.seconds.shape[1]])
            self.runs[number] += 1
            self.log.append(number)

        return call

    def timed(self) -> list[int]:
        """The places in the log of single runs between two readings of the clock."""
        log = self.log
        return [p for p in range(1, len(log) - 1) if log[p] != "clock" and log[p - 1] == log[p + 1] == "clock"]

    def times(self, number: int) -> np.ndarray:
        """The seconds of a call's runs that were timed."""
        before = np.cumsum(np.array([entry == number for entry in self.log], bool)) - 1
        runs = before[[p for p in self.timed() if self.log[p] == number]]
        return self.seconds[number, runs % self.seconds.shape[1]]


def outputs(network: Network, x: np.ndarray) -> np.ndarray:
    """Scores (images, classes) of a network of two dense layers: relu(x w1 + b1) w2 + b2."""
    return np.maximum(x @ network["w1"] + network["b1"], 0) @ network["w2"] + network["b2"]


def accuracy(network: Network, x: np.ndarray, y: np.ndarray) -> float:
    return float((outputs(network, x).argmax(1) == y).mean())


def fresh_network(rng: np.random.Generator, steps: int = 200) -> tuple[Network, np.ndarray, np.ndarray]:
    """A network trained just now for a task that nobody has seen, and 2,000 images (64 pixels) with their classes to measure it on.

    Ten classes of two clusters each, in 24 of the 64 pixels; the others are noise. Adam with decoupled weight decay, the step falling to zero.
    """
    centres = np.zeros((20, 64))
    centres[:, rng.choice(64, 24, replace=False)] = 1.4 * rng.normal(size=(20, 24))

    def sample(n: int) -> tuple[np.ndarray, np.ndarray]:
        cluster = rng.integers(20, size=n)
        return (centres[cluster] + rng.normal(size=(n, 64))).astype(np.float32), cluster % 10

    shapes = {"w1": (64, 64), "b1": 64, "w2": (64, 10), "b2": 10}
    w = {k: (rng.normal(size=s) / 8 if k[0] == "w" else np.zeros(s)).astype(np.float32) for k, s in shapes.items()}
    mean, square = ({k: np.zeros_like(v) for k, v in w.items()} for _ in range(2))
    for step in range(1, steps + 1):
        grad, rate = _gradient(w, *sample(128)), 0.01 * (1 - step / steps)
        for k in w:
            mean[k] = 0.9 * mean[k] + 0.1 * grad[k]
            square[k] = 0.99 * square[k] + 0.01 * grad[k] ** 2
            adam = mean[k] / (1 - 0.9**step) / (np.sqrt(square[k] / (1 - 0.99**step)) + 1e-8)
            w[k] -= rate * (adam + 0.1 * w[k] * (k[0] == "w"))
    return (w, *sample(2000))


def _gradient(w: Network, x: np.ndarray, y: np.ndarray) -> Network:
    """Of the mean cross-entropy."""
    hidden = np.maximum(x @ w["w1"] + w["b1"], 0)
    scores = hidden @ w["w2"] + w["b2"]
    p = np.exp(scores - scores.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    p[np.arange(len(y)), y] -= 1
    p /= len(y)
    back = (p @ w["w2"].T) * (hidden > 0)
    return {"w1": x.T @ back, "b1": back.sum(0), "w2": hidden.T @ p, "b2": p.sum(0)}


def compressed(t: Trial, network: Network) -> tuple[bytes, Network]:
    """What ``encode`` makes of a network, and what ``decode`` makes of that alone, as a network that fits."""
    data = t.call("encode", network)
    assert isinstance(data, bytes), "encode must return bytes"
    t.afresh()  # decode sees the bytes, and nothing that encode left behind
    decoded = t.call("decode", data)
    assert isinstance(decoded, dict) and decoded.keys() == network.keys(), "decode must return a dict with w1, b1, w2, b2"
    arrays = {name: np.asarray(value) for name, value in decoded.items()}
    wrong = [name for name, value in arrays.items() if value.shape != network[name].shape or value.dtype.kind not in "fiu"]
    assert not wrong, f"decode returns another shape, or no real numbers, for {', '.join(wrong)}"
    return data, arrays


# The visible checks


@question(
    "1.1",
    "conv_cost",
    hints=(
        "How far can the window move? It starts at 0 and its last position is size + 2·padding − kernel.",
        "With groups, each filter sees cin // groups channels: that many times kernel² weights. A weight is used once for every output pixel.",
        "out = (size + 2 * padding - kernel) // stride + 1; weights = cout * (cin // groups) * kernel**2; a bias adds cout parameters "
        "and no multiply-adds.",
    ),
)
def convolution(t: Trial) -> None:
    with t.part("3 → 8 channels, 3 × 3, on 10 × 10 pixels"):
        t.equal(t.call("conv_cost", 3, 8, 3, 10), (224, 13824), mistakes={"the biases are parameters too": (216, 13824)})
    with t.part("LeNet-5's second convolution: 25,050 parameters, 1.6 million multiply-adds"):
        t.equal(t.call("conv_cost", 20, 50, 5, 12), (25050, 1600000))
    with t.part("8 → 12 channels in 4 groups, 3 × 3 with stride 2, on 12 × 12 pixels"):
        mistakes = {"a last step that would leave the image is not taken": (228, 7776), "groups change nothing here": (876, 21600)}
        t.equal(t.call("conv_cost", 8, 12, 3, 12, stride=2, groups=4), (228, 5400), mistakes)


@question(
    "1.2",
    "my_layer",
    hints=(
        "The depthwise convolution has one filter for each input channel; the pointwise one is 1 × 1 and mixes the channels.",
        "Depthwise: cin · kernel² multiply-adds an output pixel. Pointwise: cin · cout. The output has size × size pixels, as the input.",
        'pixels = mine["size"] ** 2; full = pixels * cin * cout * kernel**2; separable = pixels * (cin * kernel**2 + cin * cout).',
    ),
    varies={"cin": (16, 24, 32, 48, 64, 96), "cout": (20, 40, 72, 80, 112, 128), "kernel": (3, 5, 7), "size": (7, 14, 28, 56)},
)
def own_layer(t: Trial) -> None:
    with t.part("three figures, by name"):
        assert sorted(t.get("my_layer")) == ["multiply_adds", "separable", "times_fewer"], "multiply_adds, separable, times_fewer are asked for"
    with t.part("the multiply-adds of your own layer"):
        assert t.student, EMPTY
        n, found = t.variant(), t.get("my_layer")["multiply_adds"]
        assert found == n["cin"] * n["cout"] * (n["kernel"] * n["size"]) ** 2, f"these are not your numbers, for {t.student!r}: {n}"
    with t.part("the separable pair is cheaper, and less than kernel² times"):
        found, kernel = t.get("my_layer"), t.variant()["kernel"]
        assert found["separable"] < found["multiply_adds"] and 1 < found["times_fewer"] < kernel**2


@question(
    "1.3",
    "network_totals",
    hints=(
        "A dense layer is a convolution with one output pixel and a 1 × 1 kernel: one formula serves both kinds.",
        "Add up four sums as you go: parameters and multiply-adds of all layers, and of the dense ones. Divide at the end.",
        'For each row: weights = cout * cin * kernel**2, parameters += weights + cout, multiply_adds += weights * out**2; where kind == "dense" the '
        "same into two more sums.",
    ),
)
def totals(t: Trial) -> None:
    lenet = [("conv", 1, 20, 5, 24), ("conv", 20, 50, 5, 8), ("dense", 800, 500, 1, 1), ("dense", 500, 10, 1, 1)]
    with t.part("LeNet-5's totals: 431,080 parameters, 2,293,000 multiply-adds"):
        found = t.call("network_totals", lenet)
        t.equal([found["parameters"], found["multiply_adds"]], [431080, 2293000])
    with t.part("a network of dense layers alone"):
        found = t.call("network_totals", lenet[2:])
        t.close([found["dense_parameters"], found["dense_multiply_adds"]], [1, 1], mistakes={"shares lie between 0 and 1": [100, 100]})


@question(
    "1.4",
    "layer_time",
    hints=(
        "Count FLOPs and bytes of the whole batch first. Which of the four byte and operation counts grow with the batch?",
        "flops = 2 · batch · multiply_adds; moved = weight_bytes + batch · (in_bytes + out_bytes): the weights are read once for all images.",
        "return flops / moved, max(flops / (gflops * 1e9), moved / (gbs * 1e9))",
    ),
)
def roofline(t: Trial) -> None:
    with t.part("a dense layer 800 → 500 at batch 1 waits for memory"):
        want = 800000 / 1607200, 1607200 / 8e9
        t.close(t.call("layer_time", 400000, 1602000, 3200, 2000, 1, 50, 8), want, mistakes={"a multiply-add is two FLOPs": (want[0] / 2, want[1])})
    with t.part("more bandwidth never makes a layer slower"):
        slow, fast = (t.call("layer_time", 400000, 1602000, 3200, 2000, 16, 50, gbs)[1] for gbs in (8, 80))
        assert fast <= slow


@question(
    "1.5",
    "energy",
    hints=(
        "A multiply-add is a product and an addition; both have a price. Memory is priced by the 32-bit word.",
        "int8 products are summed in int32. Four int8 numbers fill one word.",
        'words = bits / 32 for each number; weights · words · price["DRAM"], activations · words · price["SRAM"]; a picojoule is 1e-6 microjoules.',
    ),
)
def joules(t: Trial) -> None:
    with t.part("a million multiply-adds, a thousand weights, a hundred activations in float32"):
        want = {"arithmetic": 4.6, "weights": 0.64, "activations": 0.0005}
        t.close(t.call("energy", 10**6, 1000, 100, "fp32", PRICE), want)
    with t.part("nothing costs less in float32 than in int8"):
        dear, cheap = (t.call("energy", 10**6, 1000, 100, number, PRICE) for number in ("fp32", "int8"))
        assert all(dear[k] > cheap[k] for k in ("arithmetic", "weights", "activations"))


@question(
    "1.6",
    "sparse_bytes",
    hints=(
        "Write down the arrays of each format and the length of each; a stream of bits is padded to whole bytes at its end, once.",
        "Gaps: np.diff(np.flatnonzero(mask), prepend=-1) - 1. A gap of 2**k or more does not fit in k bits; each filler zero bridges 2**k weights.",
        "fillers = sum(gap // 2**k); entries = kept + fillers; relative = 4 * entries + ceil(entries * k / 8). CSR: (rows + 1) * narrow(kept) + "
        "kept * narrow(columns) + 4 * kept.",
    ),
)
def formats(t: Trial) -> None:
    mask = np.zeros((5, 7), bool)
    mask[[0, 0, 2, 4], [0, 3, 6, 1]] = True
    want = nbytes(np.flatnonzero(mask), mask.shape)
    for name in ("bitmap", "csr"):
        with t.part(f"{name}: 4 of 5 × 7 weights kept"):
            t.equal(t.call("sparse_bytes", mask, 4)[name], want[name])
    with t.part("relative: with the best k, as many bytes as a file of the kit"):
        found = [t.call("sparse_bytes", mask, k)["relative"] for k in range(1, 9)]
        t.equal(min(found), want["relative"])


@question(
    "1.7",
    "csr_pays_up_to",
    hints=(
        "Write both sizes as formulas of the number n of kept weights; CSR's grows with n, the dense one does not.",
        "CSR pays where (rows + 1)·4 + n·(value_bytes + index_bytes) < rows·columns·value_bytes. Which is the largest whole n?",
        "Of whole numbers, n < a / b has the largest solution n = (a - 1) // b. Where a ≤ 0 nothing pays: return 0.",
    ),
)
def break_even(t: Trial) -> None:
    with t.part("100 × 100 weights of 4 bytes, columns of 2 bytes"):
        t.equal(t.call("csr_pays_up_to", 100, 100, 4, 2), 6599, mistakes={"the row starts take bytes too": 6666})
    with t.part("9 × 14 weights of 4 bytes, columns of 4 bytes"):
        t.equal(t.call("csr_pays_up_to", 9, 14, 4, 4), 57, mistakes={"an equal size does not pay": 58})
    with t.part("fewer bits a value, fewer weights for which addresses pay"):
        few, many = (t.call("csr_pays_up_to", 100, 100, value, 2) for value in (1, 4))
        assert few < many


@question(
    "1.8",
    "fair_times",
    hints=(
        "Three loops: warm-up rounds without the clock; then rounds, and inside each round one run of every call.",
        "Read the clock directly before and directly after each single run, and keep the difference in times[i, round].",
        "np.quantile(times, (0.25, 0.5, 0.75), axis=1).T is (low, median, high) for each call.",
    ),
)
def fair(t: Trial) -> None:
    once = np.array([9.0, 9, 1, 2, 3, 4, 90])
    seconds = np.stack([once, 2 * once])
    with t.part("a call that takes 9 and 9 s, then 1, 2, 3, 4 and 90 s, and one that takes twice as long; two runs are warm-up"):
        machine = Machine(seconds)
        found = t.call("fair_times", machine.calls, machine.clock, 5, 2)
        t.close(found, [[2, 3, 4], [4, 6, 8]], mistakes={"this is the mean": [[2, 20, 4], [4, 40, 8]]})
    with t.part("each call ran 2 + 5 times"):
        machine = Machine(seconds)
        t.call("fair_times", machine.calls, machine.clock, 5, 2)
        t.equal([machine.log.count(i) for i in (0, 1)], [7, 7])
    with t.part("the two take turns"):
        machine = Machine(seconds)
        t.call("fair_times", machine.calls, machine.clock, 5, 2)
        order = [machine.log[p] for p in machine.timed()]
        assert order and all({*pair} == {0, 1} for pair in zip(order[::2], order[1::2])), "one call's runs come one after another"


@question(
    "1.9",
    "verdict",
    hints=(
        "Only the pairs matter: in how many of them was the new one quicker, and in how many slower? Equal pairs say nothing.",
        "Of n coins, at least m show heads with probability Σ comb(n, j) / 2ⁿ over j = m … n.",
        'tail = lambda m: sum(math.comb(n, j) for j in range(m, n + 1)) / 2**n; "faster" where tail(quicker) <= 0.025, "slower" where '
        "tail(slower) <= 0.025.",
    ),
)
def decision(t: Trial) -> None:
    old = np.arange(1.0, 11)
    with t.part("ten pairs, all quicker"):
        t.equal(t.call("verdict", old, old - 0.1), "faster")
    with t.part("ten pairs, all slower"):
        t.equal(t.call("verdict", old, old + 0.1), "slower")
    with t.part("three pairs are never enough"):
        t.equal(t.call("verdict", old[:3], old[:3] / 2), "inconclusive")
    with t.part("five pairs quicker and three equal; then six quicker and four equal"):
        found = [t.call("verdict", old[: q + e], old[: q + e] - np.repeat([0.1, 0], [q, e])) for q, e in ((5, 3), (6, 4))]
        mistakes = {"equal pairs are no wins": ["faster", "faster"], "equal pairs are left out of n": ["inconclusive", "inconclusive"]}
        t.equal(found, ["inconclusive", "faster"], mistakes)


@question(
    "1.12",
    "encode",
    hints=(
        "float32 has far more digits than the accuracy needs: how few levels a weight array can have, you can measure on the network of the task.",
        "Scale each array to whole numbers of a few bits, keep the scale, and let zlib take out what is regular in the codes.",
        "levels = 7; scale = abs(w).max() / levels; codes = np.round(w / scale).astype(np.int8); struct.pack the scales, join the bytes of all "
        "codes, zlib.compress(…, 9). From there: which layer bears fewer levels?",
    ),
)
def smallest_file(t: Trial) -> None:
    network, x, y, dense = _example()
    with t.part("decode gives back a network that is right as often, but for a hundredth"):
        data, decoded = compressed(t, network)
        t.figure("bytes", len(data))
        found, asked = accuracy(decoded, x, y), dense - 0.01
        t.figure("accuracy", found)
        assert found >= asked, f"{len(data):,} bytes, and {found:.2%} right where {asked:.2%} were asked for"
    with t.part("the file is smaller than the dense one"):
        whole = sum(w.nbytes for w in network.values())
        assert len(t.call("encode", network)) < whole, f"the dense network takes {whole:,} bytes"


@cache
def _example() -> tuple[Network, np.ndarray, np.ndarray, float]:
    network, x, y = fresh_network(np.random.default_rng(0))
    return network, x, y, accuracy(network, x, y)


def example_network() -> tuple[Network, np.ndarray, np.ndarray]:
    """The network that the visible check of 1.12 takes, and the images and classes that it measures on: to choose by."""
    network, x, y, _ = _example()
    return {name: w.copy() for name, w in network.items()}, x.copy(), y.copy()
