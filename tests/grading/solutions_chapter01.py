"""Solutions of chapter 01's questions: right ones written in unlike ways, and wrong ones, each with the words that name its fault."""

import bisect
import itertools
import math
import pickle
import statistics
import zlib

import numpy as np
from scipy import sparse, stats
from tried import Solutions

from cmlib.grade.variants import variant

solutions = Solutions("chapter01", ladders=("1.12",))
right, wrong = solutions.right, solutions.wrong

# 1.1 The cost of a convolution


@right("1.1")
def windows_counted(cin, cout, kernel, size, stride=1, padding=0, groups=1, bias=True):
    out = len(range(0, size + 2 * padding - kernel + 1, stride))
    filters = [kernel * kernel * cin // groups for _ in range(cout)]
    return sum(filters) + (cout if bias else 0), sum(filters) * out * out


@right("1.1")
def torch_counts(cin, cout, kernel, size, stride=1, padding=0, groups=1, bias=True):
    from torch import empty, nn

    layer = nn.Conv2d(cin, cout, kernel, stride, padding, groups=groups, bias=bias, device="meta")
    out = layer(empty(1, cin, size, size, device="meta")).shape[-1]
    return sum(p.numel() for p in layer.parameters()), layer.weight.numel() * out**2


def _conv(cin, cout, kernel, size, stride=1, padding=0, groups=1, bias=True, out=None, biases=None, weights=None, used=None):
    """The right figures, but for those that are given."""
    out = (size + 2 * padding - kernel) // stride + 1 if out is None else out
    weights = cout * (cin // groups) * kernel**2 if weights is None else weights
    return weights + (bias * cout if biases is None else biases), (weights if used is None else used) * out**2


@wrong("1.1", "one bias a filter")
def always_a_bias(cin, cout, *args, **kw):
    return _conv(cin, cout, *args, **kw, biases=cout)


@wrong("1.1", "one bias a filter")
def a_bias_a_channel(cin, cout, *args, bias=True, **kw):
    return _conv(cin, cout, *args, **kw, biases=bias * cin)


@wrong("1.1", "parameters: kernel² weights")
def one_row_of_the_kernel(cin, cout, kernel, *args, groups=1, **kw):
    if groups > 1:
        return _conv(cin, cout, kernel, *args, groups=groups, **kw)
    return _conv(cin, cout, kernel, *args, **kw, weights=cin * cout * kernel, used=cin * cout * kernel**2)


@wrong("1.1", "the biases' additions are counted")
def biases_as_operations(cin, cout, kernel, size, **kw):
    parameters, multiply_adds = _conv(cin, cout, kernel, size, **kw)
    out = math.isqrt(multiply_adds // (cout * (cin // kw.get("groups", 1)) * kernel**2))
    return parameters, multiply_adds + kw.get("bias", True) * cout * out**2


@wrong("1.1", "one step too many")
def rounded_up(cin, cout, kernel, size, stride=1, padding=0, **kw):
    return _conv(cin, cout, kernel, size, **kw, out=math.ceil((size + 2 * padding - kernel) / stride) + 1)


@wrong("1.1", "one step is missing")
def no_first_place(cin, cout, kernel, size, stride=1, padding=0, **kw):
    span = size + 2 * padding - kernel
    return _conv(cin, cout, kernel, size, **kw, out=span // stride + (stride == 1))


@wrong("1.1", "padding counts on both sides")
def padding_on_one_side(cin, cout, kernel, size, stride=1, padding=0, **kw):
    return _conv(cin, cout, kernel, size, **kw, out=(size + padding - kernel) // stride + 1)


@wrong("1.1", "groups change nothing here")
def groups_ignored(*args, groups=1, **kw):
    return _conv(*args, **kw)


@wrong("1.1", "divided by the groups twice")
def channels_and_filters_divided(cin, cout, *args, groups=1, **kw):
    return _conv(cin // groups, cout // groups, *args, **kw)


@wrong("1.1", "parameters: kernel² weights")
def the_visible_example(*args, **kw):
    return 224, 13824


# 1.2 Your own layer


def _layer(n, **given):
    """The right figures, but for those that are given."""
    pixels, pairs, taps = n["size"] ** 2, n["cin"] * n["cout"], n["kernel"] ** 2
    full, separable = pixels * pairs * taps, pixels * (n["cin"] * taps + pairs)
    return {"multiply_adds": full, "separable": separable, "times_fewer": full / separable} | given


@right("1.2")
def one_output_pixel(n):
    full, separable = n["cin"] * n["cout"] * n["kernel"] ** 2, n["cin"] * (n["kernel"] ** 2 + n["cout"])
    return {"multiply_adds": full * n["size"] ** 2, "separable": separable * n["size"] ** 2, "times_fewer": full / separable}


@right("1.2")
def as_the_paper_has_it(n):
    full, separable = _layer(n)["multiply_adds"], _layer(n)["separable"]
    return {"multiply_adds": float(full), "separable": float(separable), "times_fewer": 1 / (1 / n["cout"] + 1 / n["kernel"] ** 2)}


@wrong("1.2", "with your own numbers")
def a_neighbours(n):
    other = next(v for v in (variant(s, "1.2") for s in "bcdefg") if _layer(v)["multiply_adds"] != _layer(n)["multiply_adds"])
    return _layer(other)


@wrong("1.2", "is `student` yours?")
def no_id(n):
    return _layer(variant("", "1.2"))


@wrong("1.2", "the input is padded")
def valid_convolution(n):
    return _layer(n, multiply_adds=n["cin"] * n["cout"] * (n["kernel"] * (n["size"] - n["kernel"] + 1)) ** 2)


@wrong("1.2", "the pointwise layer is missing")
def depthwise_alone(n):
    return _layer(n, separable=n["size"] ** 2 * n["cin"] * n["kernel"] ** 2)


@wrong("1.2", "the depthwise layer is missing")
def pointwise_alone(n):
    return _layer(n, separable=n["size"] ** 2 * n["cin"] * n["cout"])


@wrong("1.2", "one filter for each input channel")
def depthwise_after_pointwise(n):
    return _layer(n, separable=n["size"] ** 2 * n["cout"] * (n["kernel"] ** 2 + n["cin"]))


@wrong("1.2", "upside down")
def share_that_remains(n):
    made = _layer(n)
    return made | {"times_fewer": 1 / made["times_fewer"]}


@wrong("1.2", "the ratio is rounded")
def rounded_ratio(n):
    made = _layer(n)
    return made | {"times_fewer": round(made["times_fewer"])}


# 1.3 Where a network's cost sits


@right("1.3")
def by_arrays(layers):
    dense = np.array([row[0] == "dense" for row in layers])
    cin, cout, kernel, out = np.array([row[1:] for row in layers]).T
    parameters, multiply_adds = cin * cout * kernel**2 + cout, cin * cout * kernel**2 * out**2
    return {
        "parameters": parameters.sum(),
        "multiply_adds": multiply_adds.sum(),
        "dense_parameters": parameters[dense].sum() / parameters.sum(),
        "dense_multiply_adds": multiply_adds[dense].sum() / multiply_adds.sum(),
    }


@right("1.3")
def in_a_loop(layers):
    p = m = dense_p = dense_m = 0
    for kind, cin, cout, kernel, out in layers:
        weights = cin * cout * kernel * kernel
        p, m = p + weights + cout, m + weights * out * out
        if kind == "dense":
            dense_p, dense_m = dense_p + weights + cout, dense_m + weights
    return {"parameters": p, "multiply_adds": m, "dense_parameters": dense_p / p, "dense_multiply_adds": dense_m / m}


def _network(layers, parameters=lambda w, cout: w + cout, multiply_adds=lambda w, out, cout: w * out**2, share=lambda x, whole: x / whole):
    rows = [(kind, parameters(i * o * k**2, o), multiply_adds(i * o * k**2, out, o)) for kind, i, o, k, out in layers]
    p, m = (sum(row[i] for row in rows) for i in (1, 2))
    dense_p, dense_m = (sum(row[i] for row in rows if row[0] == "dense") for i in (1, 2))
    return {"parameters": p, "multiply_adds": m, "dense_parameters": share(dense_p, p), "dense_multiply_adds": share(dense_m, m)}


@wrong("1.3", "the biases are missing")
def no_biases(layers):
    return _network(layers, parameters=lambda w, cout: w)


@wrong("1.3", "biases are no multiply-adds")
def biases_at_every_pixel(layers):
    return _network(layers, multiply_adds=lambda w, out, cout: (w + cout) * out**2)


@wrong("1.3", "a map has out × out pixels")
def a_row_of_pixels(layers):
    return _network(layers, multiply_adds=lambda w, out, cout: w * out)


@wrong("1.3", "the dense layers' share of the multiply-adds: shares lie between 0 and 1")
def percent(layers):
    return _network(layers, share=lambda x, whole: 100 * x / whole)


@wrong("1.3", "this is the convolutions' share")
def share_of_the_others(layers):
    return _network(layers, share=lambda x, whole: 1 - x / whole)


@wrong("1.3", "the dense layers' share of the multiply-adds")
def one_share_for_both(layers):
    made = _network(layers)
    return made | {"dense_multiply_adds": made["dense_parameters"]}


@wrong("1.3", "the dense layers' share of the parameters")
def the_other_share_for_both(layers):
    made = _network(layers)
    return made | {"dense_parameters": made["dense_multiply_adds"]}


@wrong("1.3", "share of the parameters")
def the_last_layer_alone(layers):
    last = _network(layers[-1:])
    return _network(layers) | {f"dense_{k}": last[k] / _network(layers)[k] for k in ("parameters", "multiply_adds")}


# 1.4 Intensity and roofline


@right("1.4")
def per_image(multiply_adds, weight_bytes, in_bytes, out_bytes, batch, gflops, gbs):
    moved = weight_bytes / batch + in_bytes + out_bytes
    arithmetic, memory = 2e-9 * multiply_adds / gflops, 1e-9 * moved / gbs
    return 2 * multiply_adds / moved, batch * (arithmetic if arithmetic > memory else memory)


@right("1.4")
def attainable_rate(multiply_adds, weight_bytes, in_bytes, out_bytes, batch, gflops, gbs):
    flops = 2.0 * multiply_adds * batch
    intensity = flops / np.dot([1, batch, batch], [weight_bytes, in_bytes, out_bytes])
    return [intensity, flops / (1e9 * min(gflops, intensity * gbs))]


def _roofline(m, w, x, y, batch, gflops, gbs, flops=None, moved=None, intensity=None, joined=max, giga=1e9):
    flops, moved = 2 * m * batch if flops is None else flops, w + batch * (x + y) if moved is None else moved
    return flops / moved if intensity is None else intensity, joined(flops / gflops / 1e9, moved / gbs / giga)


@wrong("1.4", "a multiply-add is two FLOPs")
def one_flop(m, w, x, y, batch, *speeds):
    return _roofline(m, w, x, y, batch, *speeds, flops=m * batch)


@wrong("1.4", "intensity of one image")
def one_flop_in_the_intensity(m, w, x, y, batch, *speeds):
    return _roofline(m, w, x, y, batch, *speeds, intensity=m * batch / (w + batch * (x + y)))


@wrong("1.4", "the output moves too")
def outputs_stay(m, w, x, y, batch, *speeds):
    return _roofline(m, w, x, y, batch, *speeds, moved=w + batch * x or 1)


@wrong("1.4", "upside down")
def bytes_a_flop(m, w, x, y, batch, *speeds):
    intensity, seconds = _roofline(m, w, x, y, batch, *speeds)
    return 1 / intensity, seconds


@wrong("1.4", "the weights are read once for the batch")
def weights_read_again(m, w, x, y, batch, *speeds):
    return _roofline(m, w, x, y, batch, *speeds, moved=batch * (w + x + y))


@wrong("1.4", "a batch shares the weights' bytes")
def intensity_of_one_image(m, w, x, y, batch, *speeds):
    return _roofline(m, w, x, y, batch, *speeds, intensity=2 * m / (w + x + y))


@wrong("1.4", "seconds where arithmetic is the limit")
def one_flop_in_the_seconds(m, w, x, y, batch, gflops, gbs):
    intensity, _ = _roofline(m, w, x, y, batch, gflops, gbs)
    return intensity, max(m * batch / gflops, (w + batch * (x + y)) / gbs) / 1e9


@wrong("1.4", "1 GB is 10⁹ bytes")
def binary_gigabytes(*args):
    return _roofline(*args, giga=2**30)


@wrong("1.4", "they overlap, so they do not add up")
def added_up(*args):
    return _roofline(*args, joined=lambda a, b: a + b)


@wrong("1.4", "the slower one is the time")
def the_quicker_of_the_two(*args):
    return _roofline(*args, joined=min)


# 1.5 Energy


@right("1.5")
def by_cases(multiply_adds, weights, activations, number, price):
    if number == "fp32":
        operation, numbers_a_word = price["fp32 mult"] + price["fp32 add"], 1
    else:
        operation, numbers_a_word = price["int8 mult"] + price["int32 add"], 4
    return {
        "arithmetic": operation * multiply_adds / 1e6,
        "weights": price["DRAM"] * weights / numbers_a_word / 1e6,
        "activations": price["SRAM"] * activations / numbers_a_word / 1e6,
    }


@right("1.5")
def as_a_product_of_tables(multiply_adds, weights, activations, number, price):
    unit = {"fp32": 1, "int8": 1 / 4}[number]
    names = {"fp32": ["fp32 mult", "fp32 add"], "int8": ["int8 mult", "int32 add"]}[number]
    counts = np.array([[multiply_adds, multiply_adds, 0, 0], [0, 0, weights * unit, 0], [0, 0, 0, activations * unit]])
    prices = np.array([price[k] for k in [*names, "DRAM", "SRAM"]])
    return dict(zip(("arithmetic", "weights", "activations"), counts @ prices * 1e-6))


def _energy(m, w, x, number, price, names=None, words=None, unit=1e-6, homes=("DRAM", "SRAM")):
    names = names or {"fp32": ("fp32 mult", "fp32 add"), "int8": ("int8 mult", "int32 add")}[number]
    words = words or {"fp32": (1, 1), "int8": (0.25, 0.25)}[number]
    moved = [n * share * price[home] * unit for n, share, home in zip((w, x), words, homes)]
    return {"arithmetic": m * sum(price[k] for k in names) * unit, "weights": moved[0], "activations": moved[1]}


@wrong("1.5", "the additions are missing")
def products_alone(m, w, x, number, price):
    return _energy(m, w, x, number, price, names=[f"{number} mult"])


@wrong("1.5", "arithmetic in fp32: a product and an addition, at the prices given: the additions are missing")
def int8_adds_only(m, w, x, number, price):
    return _energy(m, w, x, number, price, names=["fp32 mult"] if number == "fp32" else None)


@wrong("1.5", "int8 products are summed in int32")
def int8_sums(m, w, x, number, price):
    return _energy(m, w, x, number, price, names=["int8 mult", "int8 add"] if number == "int8" else None)


@wrong("1.5", "these are picojoules")
def picojoules(*args):
    return _energy(*args, unit=1)


@wrong("1.5", "these are nanojoules")
def nanojoules(*args):
    return _energy(*args, unit=1e-3)


@wrong("1.5", "at the prices given")
def prices_of_one_chip(m, w, x, number, price):
    from cmlib.grade.chapter01 import PRICE

    return _energy(m, w, x, number, PRICE)


@wrong("1.5", "not for a byte")
def a_word_a_byte(m, w, x, number, price):
    words = 1 if number == "int8" else 4
    return _energy(m, w, x, number, price, words=(words, words / 4))


@wrong("1.5", "activations come from SRAM")
def all_from_dram(*args):
    return _energy(*args, homes=("DRAM", "DRAM"))


@wrong("1.5", "four int8 numbers fit one word")
def a_word_for_each_number(*args):
    return _energy(*args, words=(1, 1))


@wrong("1.5", "activations are int8 too")
def weights_alone_in_int8(m, w, x, number, price):
    return _energy(m, w, x, number, price, words=(0.25, 1) if number == "int8" else None)


# 1.6 Sparse formats


@right("1.6")
def with_the_arrays_themselves(mask, k):
    kept, matrix = int(mask.sum()), sparse.csr_array(mask)
    index = [np.asarray(a).astype(np.min_scalar_type(top)) for a, top in ((matrix.indptr, kept), (matrix.indices, mask.shape[1]))]
    places = [-1, *np.flatnonzero(mask).tolist()]
    entries = sum((b - a - 1) // 2**k + 1 for a, b in itertools.pairwise(places))
    return {
        "bitmap": np.packbits(mask).nbytes + 4 * kept,
        "csr": sum(a.nbytes for a in index) + 4 * kept,
        "relative": 4 * entries + math.ceil(entries * k / 8),
    }


@right("1.6")
def bit_by_bit(mask, k):
    def narrow(top):
        return next(n for n in (1, 2, 4) if top < 256**n)

    kept = entries = gap = 0
    for value in np.ravel(mask):
        gap = gap + 1
        if value:
            kept += 1
            while gap > 2**k:
                entries, gap = entries + 1, gap - 2**k
            entries, gap = entries + 1, 0
    rows, columns = mask.shape
    return {
        "bitmap": (rows * columns + 7) // 8 + 4 * kept,
        "csr": (rows + 1) * narrow(kept) + kept * narrow(columns) + 4 * kept,
        "relative": 4 * entries + (entries * k + 7) // 8,
    }


def _sparse(mask, k, **given):
    """The right figures, but for those that are given."""
    return with_the_arrays_themselves(np.asarray(mask), k) | given


def _gaps(mask):
    return np.diff(np.flatnonzero(mask), prepend=-1) - 1


def _relative(entries, k):
    return 4 * entries + -(-entries * k // 8)


@wrong("1.6", "bitmap: a bit for each place, padded to whole bytes: the last byte is cut off")
def bitmap_cut_off(mask, k):
    return _sparse(mask, k, bitmap=mask.size // 8 + 4 * mask.sum())


@wrong("1.6", "each row is padded")
def bitmap_by_rows(mask, k):
    return _sparse(mask, k, bitmap=np.packbits(mask, axis=1).nbytes + 4 * mask.sum())


@wrong("1.6", "a bit, not a byte, for each place")
def a_byte_a_place(mask, k):
    return _sparse(mask, k, bitmap=mask.nbytes + 4 * mask.sum())


@wrong("1.6", "the last row's end is missing")
def one_start_a_row(mask, k):
    made = _sparse(mask, k)
    return made | {"csr": made["csr"] - np.min_scalar_type(int(mask.sum())).itemsize}


@wrong("1.6", "the narrowest type is one byte here")
def indices_of_four_bytes(mask, k):
    return _sparse(mask, k, csr=4 * (len(mask) + 1) + 8 * mask.sum())


@wrong("1.6", "columns past 255 need two bytes")
def columns_of_one_byte(mask, k):
    starts = (len(mask) + 1) * np.min_scalar_type(int(mask.sum())).itemsize
    return _sparse(mask, k, csr=starts + 5 * mask.sum())


@wrong("1.6", "a start can be as large as the number kept")
def starts_of_one_byte(mask, k):
    width = np.min_scalar_type(mask.shape[1]).itemsize
    return _sparse(mask, k, csr=len(mask) + 1 + (4 + width) * mask.sum())


@wrong("1.6", "where every gap fits: the last byte is cut off")
def gaps_cut_off(mask, k):
    entries = mask.sum() + np.sum(_gaps(mask) >> k)
    return _sparse(mask, k, relative=4 * entries + entries * k // 8)


@wrong("1.6", "the fillers are missing")
def no_fillers(mask, k):
    return _sparse(mask, k, relative=_relative(int(mask.sum()), k))


@wrong("1.6", "a filler has k bits, and 4 bytes of value")
def fillers_without_a_value(mask, k):
    entries = mask.sum() + np.sum(_gaps(mask) >> k)
    return _sparse(mask, k, relative=4 * mask.sum() + -(-entries * k // 8))


@wrong("1.6", "relative: fillers in long gaps, and none where a gap just fits")
def a_filler_too_early(mask, k):
    return _sparse(mask, k, relative=_relative(int(mask.sum() + np.sum(_gaps(mask) // (2**k - 1))), k))


@wrong("1.6", "gaps run on over the ends of rows")
def gaps_by_rows(mask, k):
    return _sparse(mask, k, relative=_relative(int(mask.sum() + sum(np.sum(_gaps(row) >> k) for row in mask)), k))


@wrong("1.6", "nothing kept takes no bytes")
def gaps_from_the_first_weight(mask, k):
    places = np.flatnonzero(mask)
    gaps = [int(places[0]), *(np.diff(places) - 1).tolist()]
    return _sparse(mask, k, relative=_relative(sum((g >> k) + 1 for g in gaps), k))


# 1.7 When CSR pays


@right("1.7")
def tried_one_by_one(rows, columns, value_bytes, index_bytes):
    def csr(n):
        return 4 * (rows + 1) + n * (value_bytes + index_bytes)

    return max(0, bisect.bisect_left(range(rows * columns + 1), rows * columns * value_bytes, key=csr) - 1)


@right("1.7")
def rounded_down_from_a_ceiling(rows, columns, value_bytes, index_bytes):
    room = rows * columns * value_bytes - 4 * (rows + 1)
    return max(math.ceil(room / (value_bytes + index_bytes)) - 1, 0)


@wrong("1.7", "the row starts are missing")
def no_row_starts(rows, columns, value_bytes, index_bytes):
    return (rows * columns * value_bytes - 1) // (value_bytes + index_bytes) if columns > 1 else 0


@wrong("1.7", "an equal size does not pay")
def equal_pays(rows, columns, value_bytes, index_bytes):
    return max(0, (rows * columns * value_bytes - 4 * (rows + 1)) // (value_bytes + index_bytes))


@wrong("1.7", "rows + 1 row starts, and")
def one_start_too_few(rows, columns, value_bytes, index_bytes):
    return max(0, (rows * columns * value_bytes - 4 * rows - 1) // (value_bytes + index_bytes))


@wrong("1.7", "values need not have 4 bytes")
def float32_values(rows, columns, value_bytes, index_bytes):
    return tried_one_by_one(rows, columns, 4, index_bytes)


@wrong("1.7", "a column has index_bytes")
def columns_of_four_bytes(rows, columns, value_bytes, index_bytes):
    return tried_one_by_one(rows, columns, value_bytes, 4)


@wrong("1.7", "large matrices")
def half_the_weights(rows, columns, value_bytes, index_bytes):
    return max(0, (rows * columns * 4 - 4 * (rows + 1) - 1) // 8)


@wrong("1.7", "0 where it never pays")
def below_zero(rows, columns, value_bytes, index_bytes):
    return (rows * columns * value_bytes - 4 * (rows + 1) - 1) // (value_bytes + index_bytes)


@wrong("1.7", "large matrices")
def a_density(rows, columns, value_bytes, index_bytes):
    return tried_one_by_one(rows, columns, value_bytes, index_bytes) / (rows * columns)


# 1.8 A fair measurement


@right("1.8")
def with_python_s_statistics(calls, clock, repeats=30, warmup=3):
    times = [[] for _ in calls]
    for turn in range(-warmup, repeats):
        for call, kept in zip(calls, times):
            if turn < 0:
                call()
                continue
            before = clock()
            call()
            kept.append(clock() - before)
    return [statistics.quantiles(kept, n=4, method="inclusive") for kept in times]


@right("1.8")
def with_sorted_times(calls, clock, repeats=30, warmup=3):
    def once(call):
        start = clock()
        call()
        return clock() - start

    for call in calls * warmup:
        call()
    times = np.sort([[once(call) for call in calls] for _ in range(repeats)], axis=0).T
    places = np.array([0.25, 0.5, 0.75]) * (repeats - 1)
    return np.array([np.interp(places, np.arange(repeats), row) for row in times])


def _times(calls, clock, repeats, warmup, turns=True, warm=True):
    """Seconds (calls, repeats)."""

    def once(call):
        start = clock()
        call()
        return clock() - start

    for call in calls * warmup * warm:
        call()
    if turns:
        return np.array([[once(call) for call in calls] for _ in range(repeats)]).T
    return np.array([[once(call) for _ in range(repeats)] for call in calls])


def _rows(times, low=0.25, high=0.75, middle=np.median):
    return np.stack([np.quantile(times, low, axis=1), middle(times, axis=1), np.quantile(times, high, axis=1)], axis=1)


@wrong("1.8", "a run of the warm-up is timed, or there are too few")
def cold(calls, clock, repeats=30, warmup=3):
    return _rows(_times(calls, clock, repeats, warmup, warm=False))


@wrong("1.8", "a run of the warm-up is timed, or there are too few")
def warm_up_in_the_times(calls, clock, repeats=30, warmup=3):
    return _rows(_times(calls, clock, repeats + warmup, 0))


@wrong("1.8", "one run is missing")
def one_run_too_few(calls, clock, repeats=30, warmup=3):
    return _rows(_times(calls, clock, repeats - 1, warmup))


@wrong("1.8", "several runs share one reading of the clock")
def one_reading_for_all(calls, clock, repeats=30, warmup=3):
    for call in calls * warmup:
        call()
    means = []
    for call in calls:
        start = clock()
        for _ in range(repeats):
            call()
        means.append((clock() - start) / repeats)
    return np.repeat(np.array(means)[:, None], 3, axis=1)


@wrong("1.8", "one call's runs come one after another")
def one_after_the_other(calls, clock, repeats=30, warmup=3):
    return _rows(_times(calls, clock, repeats, warmup, turns=False))


@wrong("1.8", "this is the mean")
def mean_in_the_middle(calls, clock, repeats=30, warmup=3):
    return _rows(_times(calls, clock, repeats, warmup), middle=np.mean)


@wrong("1.8", "this is the fastest run")
def fastest_first(calls, clock, repeats=30, warmup=3):
    return _rows(_times(calls, clock, repeats, warmup), low=0)


@wrong("1.8", "this is the slowest run")
def slowest_last(calls, clock, repeats=30, warmup=3):
    return _rows(_times(calls, clock, repeats, warmup), high=1)


@wrong("1.8", "rows and columns are exchanged")
def transposed(calls, clock, repeats=30, warmup=3):
    return _rows(_times(calls, clock, repeats, warmup)).T


@wrong("1.8", "the median in the middle")
def median_first(calls, clock, repeats=30, warmup=3):
    return _rows(_times(calls, clock, repeats, warmup))[:, [1, 0, 2]]


# 1.9 A verdict


@right("1.9")
def by_scipy(old, new):
    change = np.sign(np.asarray(new) - np.asarray(old))
    n = int(np.count_nonzero(change))
    for side, word in ((-1, "faster"), (1, "slower")):
        if n and stats.binomtest(int((change == side).sum()), n, alternative="greater").pvalue <= 0.025:
            return word
    return "inconclusive"


@right("1.9")
def by_walking_in_from_the_end(old, new):
    wins = sum(b < a for a, b in zip(old, new))
    losses = sum(b > a for a, b in zip(old, new))
    n = wins + losses
    chance, fewest = 0, n + 1  # the fewest heads that are rare enough
    while fewest > 0 and chance + math.comb(n, fewest - 1) <= 0.025 * 2**n:
        fewest -= 1
        chance += math.comb(n, fewest)
    return "faster" if wins >= fewest else "slower" if losses >= fewest else "inconclusive"


def _sign_test(old, new, tail=None, limit=0.025, words=("faster", "slower"), wins_among=0, n_among=0):
    """The sign test; equal pairs count among wins, or in n alone, where told to."""
    change = np.sign(np.subtract(new, old))
    equal = int((change == 0).sum())
    wins, losses = int((change < 0).sum()) + wins_among * equal, int((change > 0).sum())
    n = wins + losses + n_among * equal
    tail = tail or (lambda m, n: sum(math.comb(n, j) for j in range(m, n + 1)) / 2**n)
    return words[0] if tail(wins, n) <= limit else words[1] if tail(losses, n) <= limit else "inconclusive"


@wrong("1.9", "faster and slower are exchanged")
def exchanged(old, new):
    return _sign_test(new, old)


@wrong("1.9", "a small gain and a small loss")
def never_slower(old, new):
    return _sign_test(old, new, words=("faster", "inconclusive"))


@wrong("1.9", "the pairs are not used")
def quartiles_apart(old, new):
    (low_old, high_old), (low_new, high_new) = (np.quantile(x, (0.25, 0.75)) for x in (old, new))
    return "faster" if high_new < low_old else "slower" if low_new > high_old else "inconclusive"


@wrong("1.9", "the pairs are not used")
def two_separate_samples(old, new):
    if stats.mannwhitneyu(old, new).pvalue > 0.05:
        return "inconclusive"
    return "faster" if np.median(new) < np.median(old) else "slower"


@wrong("1.9", "a chance of 3 % or 5 % decides nothing")
def the_smaller_median(old, new):
    return "faster" if np.median(new) < np.median(old) else "slower"


@wrong("1.9", "5 % is for both sides together")
def five_percent_a_side(old, new):
    return _sign_test(old, new, limit=0.05)


@wrong("1.9", "at least so many, not exactly so many")
def exactly_so_many(old, new):
    return _sign_test(old, new, tail=lambda m, n: math.comb(n, m) / 2**n if 2 * m >= n else 1.0)


@wrong("1.9", "decides nothing")
def more_than_so_many(old, new):
    return _sign_test(old, new, tail=lambda m, n: sum(math.comb(n, j) for j in range(m + 1, n + 1)) / 2**n)


@wrong("1.9", "equal pairs are no wins")
def equal_pairs_win(old, new):
    return _sign_test(old, new, wins_among=1)


@wrong("1.9", "equal pairs are left out of n")
def equal_pairs_counted(old, new):
    return _sign_test(old, new, n_among=1)


# 1.12 The smallest file

SHAPES = {"w1": (64, 64), "b1": (64,), "w2": (64, 10), "b2": (10,)}


def _codec(levels, keep=1.0, dtype=np.int8, pack=lambda data: zlib.compress(data, 9), unpack=zlib.decompress, scaled=True):
    """encode and decode by whole numbers up to ``levels``; ``keep`` is the share of each matrix that is not set to zero."""

    def encode(weights):
        scales, codes = [], []
        for name in SHAPES:
            w = np.where(np.abs(weights[name]) >= np.quantile(np.abs(weights[name]), 1 - keep), weights[name], 0)
            scales.append(np.abs(w).max() / levels or 1)
            codes.append(np.round(w / scales[-1]).astype(dtype).tobytes())
        return np.array(scales, np.float32).tobytes() + pack(b"".join(codes))

    def decode(data):
        scales, codes = np.frombuffer(data[:16], np.float32), np.frombuffer(unpack(data[16:]), dtype)
        parts = np.split(codes, np.cumsum([math.prod(s) for s in SHAPES.values()])[:-1])
        return {n: p.reshape(SHAPES[n]) * (scale if scaled else 1) for n, p, scale in zip(SHAPES, parts, scales)}

    return {"encode": encode, "decode": decode}


def _nibbles(data):
    codes = np.frombuffer(data, np.int8).astype(np.uint8) & 15
    codes = np.append(codes, np.zeros(len(codes) % 2, np.uint8))
    return (codes[::2] << 4 | codes[1::2]).astype(np.uint8).tobytes()


def _unnibbled(data):
    both = np.frombuffer(data, np.uint8)
    codes = np.stack([both >> 4, both & 15], 1).reshape(-1).astype(np.int8)
    return np.where(codes > 7, codes - 16, codes).astype(np.int8)[: 64 * 64 + 64 + 640 + 10].tobytes()


@right("1.12", names=True)
def six_levels_and_zlib():
    return _codec(6)


@right("1.12", names=True)
def four_bits_packed_by_hand():
    return _codec(6, pack=lambda data: zlib.compress(_nibbles(data), 9), unpack=lambda data: _unnibbled(zlib.decompress(data)))


@wrong("1.12", "at most 12,000 bytes: 19,", names=True)
def pickled():
    return {"encode": pickle.dumps, "decode": pickle.loads}


@wrong("1.12", "at most 12,000 bytes: 1", names=True)
def float32_and_zlib():
    def decode(data):
        parts = np.split(np.frombuffer(zlib.decompress(data), np.float32), np.cumsum([math.prod(s) for s in SHAPES.values()])[:-1])
        return {n: p.reshape(SHAPES[n]) for n, p in zip(SHAPES, parts)}

    return {"encode": lambda weights: zlib.compress(b"".join(weights[n].tobytes() for n in SHAPES), 9), "decode": decode}


@wrong("1.12", "at most 5,500 bytes: ", names=True)
def sixteen_bits():
    return _codec(30000, dtype=np.int16)


@wrong("1.12", "at most 3,300 bytes: ", names=True)
def eight_bits():
    return _codec(127)


@wrong("1.12", "at most 2,300 bytes: ", names=True)
def six_bits_half_of_them():
    return _codec(12)


@wrong("1.12", "right where", names=True)
def a_tenth_of_the_weights():
    return _codec(6, keep=0.1)


@wrong("1.12", "right where", names=True)
def one_bit():
    return _codec(1)


@wrong("1.12", "right where", names=True)
def zeros():
    return {"encode": lambda weights: b"", "decode": lambda data: {n: np.zeros(s) for n, s in SHAPES.items()}}


@wrong("1.12", "encode must return bytes", names=True)
def no_bytes():
    return {"encode": lambda weights: weights["w1"], "decode": lambda data: {"w1": data}}


@wrong("1.12", "decode returns another shape", names=True)
def flat():
    made = _codec(6)
    return made | {"decode": lambda data: {n: w.reshape(-1) for n, w in made["decode"](data).items()}}
