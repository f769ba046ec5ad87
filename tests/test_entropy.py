"""Entropy coding against brute force, bit-by-bit decoders written from the format's description, the entropy bound, and 4,000 altered streams."""

import itertools
import time
import tracemalloc

import constriction
import numpy as np
import pytest

from cmlib.core import entropy as coding
from cmlib.core.clusters import Line, entropy
from cmlib.core.entropy import CODERS, canonical, code_lengths, decode, encode, nbytes
from cmlib.core.storage import pack_bits, unpack_bits
from cmlib.lab.zoo import load_net

BOTH = pytest.mark.parametrize("coder", list(CODERS))
NAMES = ("alphabet", "model", "stream")


def bell(seed, count, bits, width):
    """Rounded Gaussian numbers about the middle, ``width`` of them within one standard deviation of it."""
    top = (1 << bits) - 1
    return np.clip(np.random.default_rng(seed).normal(top / 2, width, count).round(), 0, top).astype(int)


def streams():
    draw = np.random.default_rng(0)
    for bits in range(1, 17):
        for count in (0, 1, 2, 9, 500):
            yield bits, draw.integers(1 << bits, size=count)
            yield bits, bell(bits, count, bits, 2.0)
            yield bits, np.full(count, (1 << bits) - 1)
            yield bits, np.where(draw.random(count) < 0.9, 0, draw.integers(1 << bits, size=count))


@BOTH
def test_what_is_coded_comes_back(coder):
    for bits, symbols in streams():
        arrays, meta = encode(symbols.reshape(1, -1), bits, coder)
        for array in arrays.values():
            assert array.dtype == np.uint8 and array.ndim == 1
            array.setflags(write=False)
        back = decode(arrays, meta, bits, len(symbols), coder)
        assert np.array_equal(back, symbols) and back.dtype == np.int64
        assert nbytes(symbols, bits, coder) == sum(a.nbytes for a in arrays.values())
        assert all(type(v) is int for v in meta.values())


@BOTH
def test_long_streams_of_many_symbols_come_back(coder):
    """More than a piece of the stream at once, and codes of many lengths."""
    symbols = np.random.default_rng(0).geometric(0.001, size=120_000) % (1 << 16)
    arrays, meta = encode(symbols, 16, coder)
    assert len(arrays["stream"]) > 2 * coding.CHUNK and meta["used"] > 5000
    assert np.array_equal(decode(arrays, meta, 16, len(symbols), coder), symbols)


@BOTH
def test_nothing_to_tell_takes_no_bits(coder):
    """One symbol at most: 0 bits, where the shortest code of one bit would miss H + 1; the alphabet alone is stored."""
    for symbols, size in ((np.zeros(0, int), 0), (np.full(400_000, 9), 1)):
        arrays, meta = encode(symbols, 4, coder)
        assert [len(arrays[n]) for n in NAMES] == [size, 0, 0] and meta["used"] == size and nbytes(symbols, 4, coder) == size
        assert np.array_equal(decode(arrays, meta, 4, len(symbols), coder), symbols)


@BOTH
def test_the_table_costs_what_occurs_and_not_what_could(coder):
    draw = np.random.default_rng(0)
    few = np.sort(draw.choice(1 << 16, 30, replace=False))
    arrays, _ = encode(few[draw.integers(30, size=2000)], 16, coder)
    assert len(arrays["alphabet"]) == 60 and len(arrays["model"]) <= 30
    arrays, _ = encode(bell(0, 30_000, 8, 60), 8, coder)
    assert len(arrays["alphabet"]) == 32 and len(arrays["model"]) <= 192


# Huffman


def test_huffmans_total_is_the_least_of_all_prefix_codes():
    """Brute force over every set of lengths that Kraft's inequality allows, up to six symbols."""
    draw = np.random.default_rng(0)
    for symbols in range(2, 7):
        lengths = np.array(list(itertools.product(range(1, symbols), repeat=symbols)))
        allowed = lengths[(2.0**-lengths).sum(1) <= 1]
        for counts in [*draw.integers(1, 20, size=(30, symbols)), *draw.geometric(0.02, size=(30, symbols)), 2 ** np.arange(symbols)]:
            assert counts @ code_lengths(counts) == (allowed @ counts).min()


def test_the_mean_length_lies_between_the_entropy_and_one_bit_more():
    """hessian_weighted_kmeans' check 5, as corrected: for two symbols and more."""
    for _, symbols in streams():
        counts = np.unique(symbols, return_counts=True)[1]
        if len(counts) > 1:
            mean, bound = counts @ code_lengths(counts) / len(symbols), entropy(symbols)
            assert bound - 1e-12 <= mean < bound + 1
    for bits in range(1, 11):
        assert (code_lengths(np.full(1 << bits, 7)) == bits).all()
        arrays, _ = encode(np.tile(np.arange(1 << bits), 24), bits, "huffman")
        assert len(arrays["stream"]) == 3 * bits << bits


def fibonacci(terms):
    numbers = [1, 1]
    while len(numbers) < terms:
        numbers.append(sum(numbers[-2:]))
    return np.array(numbers)


def test_codes_are_no_longer_than_said_and_cost_next_to_nothing_for_it():
    """Fibonacci's numbers make the deepest tree."""
    for terms, longest in ((12, 6), (20, 10), (40, 24)):
        counts = fibonacci(terms)
        free, bound = code_lengths(counts, 99), code_lengths(counts, longest)
        assert free.max() == terms - 1 and bound.max() <= longest and (2.0**-bound).sum() == 1
        assert counts @ free < counts @ bound < 1.05 * (counts @ free)
    assert (code_lengths([1] * 64, 6) == 6).all()
    with pytest.raises(ValueError, match="65 symbols need codes of more than 6 bits"):
        code_lengths([1] * 65, 6)
    symbols = np.random.default_rng(0).permutation(np.repeat(np.arange(25), fibonacci(25)))
    arrays, meta = encode(symbols, 5, "huffman")
    assert unpack_bits(arrays["model"], 5, 25).max() == 24 and np.array_equal(decode(arrays, meta, 5, len(symbols), "huffman"), symbols)


def test_canonical_codes_are_the_textbooks():
    """Counting up, and doubling where the codes get longer (RFC 1951, section 3.2.2)."""
    draw = np.random.default_rng(0)
    for _ in range(50):
        lengths = code_lengths(draw.geometric(0.05, size=draw.integers(2, 40)))
        order, starts = canonical(lengths)
        code, last, expected = 0, 0, {}
        for length, symbol in sorted((length, symbol) for symbol, length in enumerate(lengths.tolist())):
            code <<= length - last
            expected[symbol], last, code = format(code, f"0{length}b"), length, code + 1
        found = {int(s): format(int(c), "024b")[: lengths[s]] for s, c in zip(order, starts, strict=True)}
        assert found == expected
        assert not any(a != b and expected[b].startswith(expected[a]) for a in expected for b in expected)
    assert canonical(np.array([3, 3, 3, 3, 3, 2, 4, 4]))[0].tolist() == [5, 0, 1, 2, 3, 4, 6, 7]


def test_a_bit_by_bit_decoder_reads_the_stream():
    """From the description of the format alone."""
    for bits, symbols in ((4, bell(0, 500, 4, 2.0)), (16, bell(1, 500, 16, 50.0)), (8, bell(2, 900, 8, 40.0))):
        arrays, meta = encode(symbols, bits, "huffman")
        if meta["used"] * bits < 1 << bits:
            alphabet = unpack_bits(arrays["alphabet"], bits, meta["used"])
        else:
            alphabet = np.flatnonzero(np.unpackbits(arrays["alphabet"]))
        lengths = unpack_bits(arrays["model"], meta["width"], meta["used"])
        order, starts = canonical(lengths)
        table = {format(int(c), "024b")[: lengths[s]]: alphabet[s] for s, c in zip(order, starts, strict=True)}
        word, out = "", []
        for bit in np.unpackbits(arrays["stream"]):
            word += str(bit)
            if word in table:
                out.append(table[word])
                word = ""
        assert np.array_equal(out[: len(symbols)], symbols) and np.array_equal(np.unique(symbols), alphabet)


# ANS


SHAPES = [
    (1, 0.1),
    (1, 0.3),
    (2, 0.3),
    (2, 0.7),
    (3, 0.4),
    (3, 1.5),
    (4, 0.5),
    (4, 3.0),
    (5, 6.0),
    (6, 3.0),
    (6, 12.0),
    (8, 5.0),
    (8, 20.0),
    (8, 60.0),
]


@pytest.mark.parametrize("bits, width", SHAPES)
def test_ans_is_within_1_percent_and_64_bytes_of_the_entropy(bits, width):
    """Tables counted, 30,000 symbols."""
    symbols = bell(3, 30_000, bits, width)
    assert nbytes(symbols, bits, "ans") <= 1.01 * len(symbols) * entropy(symbols) / 8 + 64
    assert nbytes(symbols, bits, "ans") >= len(symbols) * entropy(symbols) / 8 - 8


def test_ans_takes_a_part_of_a_bit_where_huffman_takes_one():
    symbols = (np.random.default_rng(0).random(30_000) < 0.02).astype(int)
    assert nbytes(symbols, 1, "ans") < 0.16 * nbytes(symbols, 1, "huffman")


def test_the_grid_of_frequencies_rises_by_less_than_its_precision():
    for mantissa in coding.MANTISSAS:
        grid = coding._grid(mantissa)
        assert len(grid) == 16 << mantissa and grid[: 2 << mantissa].tolist() == list(range(2 << mantissa))
        steps = np.diff(grid) / grid[:-1].clip(1)
        assert (np.diff(grid) > 0).all() and steps[1 << mantissa :].max() <= 2.0**-mantissa


def test_the_model_is_as_fine_as_pays():
    """No other precision makes table and stream together smaller, as counted from the frequencies that it says."""
    for seed, (count, bits, width) in enumerate([(300, 4, 3.0), (3000, 8, 60.0), (300_000, 4, 3.0), (300_000, 8, 40.0)]):
        counts = np.unique(bell(seed, count, bits, width), return_counts=True)[1]

        def size(mantissa, counts=counts):
            grid = coding._grid(mantissa)
            near = np.abs(grid[1:] - (counts * min(1, grid[-1] / counts.max()))[:, None]).argmin(1) + 1
            return len(counts) * (4 + mantissa) - counts @ np.log2(grid[near] / grid[near].sum())

        levels, chosen = coding._ans_model(counts)
        weights = coding._grid(chosen - 4)[levels]
        bits = len(counts) * chosen - counts @ np.log2(weights / weights.sum())
        assert bits == pytest.approx(min(size(m) for m in coding.MANTISSAS), rel=1e-6)


def test_constriction_reads_the_stream():
    """From the description of the format alone."""
    symbols = bell(0, 5000, 6, 4.0)
    arrays, meta = encode(symbols, 6, "ans")
    alphabet = np.flatnonzero(np.unpackbits(arrays["alphabet"]))
    levels, m = unpack_bits(arrays["model"], meta["width"], meta["used"]), meta["width"] - 4
    weights = [f if e == 0 else ((1 << m) + f) << (e - 1) for e, f in (divmod(int(level), 1 << m) for level in levels)]
    model = constriction.stream.model.Categorical(np.array(weights, float), perfect=False)
    ranks = constriction.stream.stack.AnsCoder(arrays["stream"].view("<u4").astype(np.uint32)).decode(model, 5000)
    assert np.array_equal(alphabet[ranks], symbols)


# speed


def seconds(work, *arguments):
    """Processor time of this thread, the least of two runs."""
    times = []
    for _ in range(2):
        begin = time.thread_time()
        work(*arguments)
        times.append(time.thread_time() - begin)
    return min(times)


@BOTH
def test_400_000_weights_are_coded_and_decoded_in_well_under_a_second(coder):
    """And their size told in the time of a slider's move; 16 clusters of a real layer, whose codes differ in length."""
    _, index = Line(load_net("lenet5", "mnist").fc1.weight.detach()).cluster(16)
    arrays, meta = encode(index, 4, coder)
    assert seconds(encode, index, 4, coder) < 0.5
    assert seconds(decode, arrays, meta, 4, index.size, coder) < 0.5
    assert seconds(nbytes, index, 4, coder) < 0.05


# what is not as it was written


def altered(draw, arrays, meta):
    """A copy with one or two things changed: bits, cuts, additions, noise, numbers that lie."""
    arrays, meta = dict(arrays), dict(meta)
    for _ in range(draw.integers(1, 3)):
        name = NAMES[draw.integers(3)]
        a = arrays[name].copy()
        match draw.integers(6):
            case 0 if len(a):
                a[draw.integers(len(a))] ^= 1 << draw.integers(8)
            case 1:
                a = a[: draw.integers(len(a) + 1)]
            case 2:
                a = np.append(a, draw.integers(256, size=draw.integers(1, 9)).astype(np.uint8))
            case 3:
                a = draw.integers(256, size=len(a)).astype(np.uint8)
            case 4:
                meta[("used", "width", "crc32")[draw.integers(3)]] += int(draw.integers(-3, 4))
            case _:
                meta["used"] = int(2 ** draw.integers(0, 62))
        arrays[name] = a
    return arrays, meta


@BOTH
def test_2000_altered_streams_decode_rightly_or_not_at_all(coder):
    draw, outcomes = np.random.default_rng(0), {"right": 0, "refused": 0}
    for _ in range(100):
        bits, count = int(draw.integers(1, 10)), int(draw.integers(1, 200))
        symbols = draw.geometric(0.3, size=count).clip(max=1 << bits) - 1
        arrays, meta = encode(symbols, bits, coder)
        for _ in range(20):
            try:
                assert np.array_equal(decode(*altered(draw, arrays, meta), bits, count, coder), symbols)
                outcomes["right"] += 1
            except ValueError as error:
                outcomes["refused"] += 1
                assert len(str(error)) > 20
    assert outcomes["right"] > 20 and outcomes["refused"] > 1700


@BOTH
def test_every_cut_and_every_addition_is_refused(coder):
    symbols = bell(0, 400, 6, 5.0)
    arrays, meta = encode(symbols, 6, coder)
    for name in NAMES:
        for short in range(len(arrays[name])):
            with pytest.raises(ValueError):
                decode(arrays | {name: arrays[name][:short]}, meta, 6, 400, coder)
        for extra in ([0], [255], [0] * 4, [1, 2, 3, 4], [0] * 100):
            for longer in (np.append(arrays[name], np.uint8(extra)), np.append(np.uint8(extra), arrays[name])):
                with pytest.raises(ValueError):
                    decode(arrays | {name: longer}, meta, 6, 400, coder)
    for count in (0, 1, 399, 401, 4000):
        with pytest.raises(ValueError):
            decode(arrays, meta, 6, count, coder)
    for bits in (5, 7, 16):
        with pytest.raises(ValueError):
            decode(arrays, meta, bits, 400, coder)


@BOTH
def test_every_flipped_bit_is_found_or_does_no_harm(coder):
    symbols = bell(0, 60, 5, 3.0)
    arrays, meta = encode(symbols, 5, coder)
    harmless = 0
    for name in NAMES:
        for bit in range(8 * len(arrays[name])):
            flipped = arrays[name].copy()
            flipped[bit >> 3] ^= 1 << (bit & 7)
            try:
                assert np.array_equal(decode(arrays | {name: flipped}, meta, 5, 60, coder), symbols)
                harmless += 1
            except ValueError:
                pass
    assert harmless < 30  # bits that pad the last byte, and a frequency's last bit


@pytest.mark.parametrize("field", ["used", "width", "crc32"])
@pytest.mark.parametrize("value", [None, -1, 0, 1, 2**40, 2**200, 5.0, "5", True, [5]])
@BOTH
def test_numbers_that_lie_are_refused(coder, field, value):
    arrays, meta = encode(bell(0, 90, 5, 3.0), 5, coder)
    with pytest.raises(ValueError):
        decode(arrays, meta | {field: value}, 5, 90, coder)


@BOTH
def test_arrays_of_another_kind_are_refused(coder):
    arrays, meta = encode(bell(0, 90, 5, 3.0), 5, coder)
    for name in NAMES:
        for other in (None, [1, 2], arrays[name].astype(np.int64), arrays[name].astype(np.float32), arrays[name][None], arrays[name].astype(object)):
            with pytest.raises(ValueError, match=name):
                decode(arrays | {name: other}, meta, 5, 90, coder)
        with pytest.raises(ValueError, match=name):
            decode({k: v for k, v in arrays.items() if k != name}, meta, 5, 90, coder)


def test_tables_that_lie_are_refused():
    """Codes that overlap or leave gaps, a code of no length, symbols twice, frequencies of zero."""
    symbols = np.tile([3, 700, 900, 65000], 50)
    arrays, meta = encode(symbols, 16, "huffman")
    for lengths in ([1, 1, 1, 1], [3, 3, 3, 3], [1, 2, 3, 0], [2, 2, 2, 25]):
        model = {"model": pack_bits(np.array(lengths), 5)}
        with pytest.raises(ValueError, match="code"):
            decode(arrays | model, meta | {"width": 5}, 16, 200, "huffman")
    for alphabet in ([3, 3, 900, 65000], [700, 3, 900, 65000], [0, 0, 0, 0]):
        with pytest.raises(ValueError, match="alphabet"):
            decode(arrays | {"alphabet": pack_bits(np.array(alphabet), 16)}, meta, 16, 200, "huffman")
    arrays, meta = encode(symbols, 16, "ans")
    with pytest.raises(ValueError, match="no frequency"):
        decode(arrays | {"model": np.zeros_like(arrays["model"])}, meta, 16, 200, "ans")


@BOTH
def test_a_file_cannot_ask_for_more_memory_than_the_network_has_room_for(coder):
    """80 MB for 20,000 symbols are refused before anything is made of them; what might be as long is decoded in pieces: 200 bytes a symbol."""
    arrays, meta = encode(bell(0, 20_000, 16, 3.0), 16, coder)
    draw = np.random.default_rng(0)
    bombs = [arrays | {name: np.zeros(80_000_000, np.uint8)} for name in NAMES]
    bombs += [arrays | {"stream": draw.integers(top, size=60_000).astype(np.uint8)} for top in (1, 256)]
    for bomb in bombs:
        tracemalloc.start()
        with pytest.raises(ValueError):
            decode(bomb, meta, 16, 20_000, coder)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 200 * 20_000


@pytest.mark.parametrize("symbols, bits", [([4], 2), ([-1], 2), ([0.5], 2), ([65536], 16), ([True], 1), ([1], 0), ([1], 17), ([1], 2.0), ([1], None)])
@BOTH
def test_what_cannot_be_coded_says_so(coder, symbols, bits):
    for work in (encode, nbytes):
        with pytest.raises(ValueError, match="symbols"):
            work(symbols, bits, coder)


@pytest.mark.parametrize("name", ["Huffman", "lzma", "", None, ["ans"]])
def test_an_unknown_coder_names_the_known(name):
    for work in (lambda: encode([1], 2, name), lambda: nbytes([1], 2, name), lambda: decode(*encode([1], 2, "ans"), 2, 1, name)):
        with pytest.raises(ValueError, match="allowed are huffman, ans"):
            work()
