"""Entropy coding, lossless: a stream of small unsigned integers in as few bytes as how often each occurs allows.

``huffman``  a whole number of bits a symbol, written out here: between H and H + 1 bits a symbol, H the entropy (Huffman 1952).
``ans``      asymmetric numeral systems (Duda 2014) by the library constriction: within a few bytes of H and its model's rounding.

A coded stream is three arrays of bytes and three numbers:

``alphabet``  which symbols occur: a bitmap of 2^bits, or a list of ``bits`` bits each, whichever is smaller.
``model``     a level of ``width`` bits for each of them, rising: the length of its Huffman code, or how often it occurs, rounded (``_grid``).
``stream``    the codes. Empty where one symbol at most occurs: there is nothing to tell, so it takes 0 bits.
``used``, ``width``, ``crc32`` (meta): how many symbols occur, a level's bits, a check of all symbols as little-endian 16-bit numbers.

``decode`` trusts none of them. How many symbols there are is told by the network's own shape: that bounds memory and time, and whatever does not
decode to symbols with the right check is a ValueError.
"""

from __future__ import annotations

import heapq
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from .storage import Arrays, need, pack_bits, unpack_bits

BITS = range(1, 17)  # of a symbol
LONGEST = 24  # bits of a Huffman code: a code and the 7 bits before it in its byte fit 32
MANTISSAS = range(1, 9)  # bits of precision of a frequency, beside 4 bits of exponent
CHUNK = 1 << 13  # symbols that are coded, or bytes that are looked up, at once


def encode(symbols: ArrayLike, bits: int, coder: str) -> tuple[Arrays, dict[str, int]]:
    """(arrays, meta) of unsigned integers below 2**bits, by "huffman" or "ans". ValueError where a symbol or ``bits`` (1 to 16) does not fit."""
    symbols = _checked(symbols, bits)
    used, ranks, counts = _alphabet(symbols, bits)
    chosen = _coder(coder, len(used))
    levels, width = chosen.model(counts)
    listed = pack_bits(used, bits) if _is_listed(len(used), bits) else np.packbits(np.isin(np.arange(1 << bits), used))
    arrays = {"alphabet": listed, "model": pack_bits(levels, width), "stream": chosen.encode(ranks, levels, width)}
    return arrays, {"used": len(used), "width": width, "crc32": _check(symbols)}


def nbytes(symbols: ArrayLike, bits: int, coder: str) -> int:
    """Bytes of ``encode``'s arrays, exactly, in a few milliseconds for a layer: from the counts alone where the coder allows it."""
    used, ranks, counts = _alphabet(_checked(symbols, bits), bits)
    chosen = _coder(coder, len(used))
    levels, width = chosen.model(counts)
    return _alphabet_bytes(len(used), bits) + _bytes(len(used) * width) + chosen.nbytes(ranks, counts, levels, width)


def decode(arrays: Arrays, meta: dict[str, int], bits: int, count: int, coder: str) -> np.ndarray:
    """The ``count`` symbols, int64. ``arrays`` and ``meta`` may be cut, altered or lies: then ValueError says what does not fit."""
    _check_bits(bits)
    _check_kinds(arrays, meta)
    used, width, stream = meta["used"], meta["width"], arrays["stream"]
    need(min(count, 1) <= used <= min(count, 1 << bits), f"{used} symbols are said to occur among {count} of {bits} bits")
    chosen = _coder(coder, used)
    need(width in chosen.widths, f"levels of {width} bits are not used by this coder")
    need(len(arrays["model"]) == _bytes(used * width), "the model has not the bytes that its levels need")
    need(len(stream) <= _bytes(count * LONGEST) + 8, "the stream is longer than its symbols can be")
    alphabet = _read_alphabet(arrays["alphabet"], used, bits)
    symbols = alphabet[chosen.decode(stream, unpack_bits(arrays["model"], width, used), width, count)]
    need(_check(symbols) == meta["crc32"], "the stream decodes to other symbols than were coded: it was altered")
    return symbols


def _check_kinds(arrays: Arrays, meta: dict[str, int]) -> None:
    for name in ("alphabet", "model", "stream"):
        array = arrays.get(name)
        need(isinstance(array, np.ndarray) and array.dtype == np.uint8 and array.ndim == 1, f"the array {name!r} of bytes is missing")
    for name in ("used", "width", "crc32"):
        need(type(meta.get(name)) is int, f"the whole number {name!r} is missing")


def _checked(symbols: ArrayLike, bits: int) -> np.ndarray:
    _check_bits(bits)
    symbols = np.asarray(symbols).ravel()
    need(symbols.dtype.kind in "iu" or not len(symbols), f"symbols of type {symbols.dtype}; whole numbers are coded")
    need(not len(symbols) or (symbols.min() >= 0 and symbols.max() < 1 << bits), f"symbols must lie in 0 ... {(1 << bits) - 1} for bits={bits}")
    return symbols.astype(np.int64)


def _check_bits(bits: int) -> None:
    need(isinstance(bits, int) and bits in BITS, f"bits={bits!r} is not allowed; symbols have 1 to 16")


def _check(symbols: np.ndarray) -> int:
    return zlib.crc32(symbols.astype("<u2").tobytes())


def _alphabet(symbols: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The symbols that occur, each symbol's rank among them, and how often each occurs."""
    counts = np.bincount(symbols, minlength=1 << bits)
    used = np.flatnonzero(counts)
    return used, (np.cumsum(counts > 0) - 1)[symbols], counts[used]


def _is_listed(used: int, bits: int) -> bool:
    return used * bits < 1 << bits


def _alphabet_bytes(used: int, bits: int) -> int:
    return _bytes(min(used * bits, 1 << bits))


def _read_alphabet(array: np.ndarray, used: int, bits: int) -> np.ndarray:
    need(len(array) == _alphabet_bytes(used, bits), "the alphabet has not the bytes that its symbols need")
    listed = _is_listed(used, bits)
    alphabet = unpack_bits(array, bits, used) if listed else np.flatnonzero(np.unpackbits(array, count=1 << bits))
    need(len(alphabet) == used and (np.diff(alphabet) > 0).all(), "the alphabet does not name as many symbols, rising, as are said to occur")
    return alphabet


# Huffman


def code_lengths(counts: ArrayLike, longest: int = LONGEST) -> np.ndarray:
    """The length in bits of each symbol's Huffman code, from how often each occurs: the least total that whole bits allow.

    Where a code would be longer than ``longest`` the counts are halved, which flattens them, until none is: that costs little. ValueError where
    ``longest`` bits do not tell so many symbols apart.
    """
    counts = np.asarray(counts, np.int64)
    need(len(counts) <= 1 << longest, f"{len(counts)} symbols need codes of more than {longest} bits")
    lengths = _depths(counts)
    while lengths.max() > longest:
        counts = (counts + 1) // 2
        lengths = _depths(counts)
    return lengths


def _depths(counts: np.ndarray) -> np.ndarray:
    """Depth of each leaf in the tree that joins the two rarest nodes until one is left."""
    leaves = len(counts)
    heap = [(count, node) for node, count in enumerate(counts.tolist())]
    parent = [0] * (2 * leaves - 1)
    heapq.heapify(heap)
    for node in range(leaves, 2 * leaves - 1):
        (a, i), (b, j) = heapq.heappop(heap), heapq.heappop(heap)
        parent[i] = parent[j] = node
        heapq.heappush(heap, (a + b, node))
    depth = [0] * (2 * leaves - 1)
    for node in range(2 * leaves - 3, -1, -1):
        depth[node] = depth[parent[node]] + 1
    return np.array(depth[:leaves])


def canonical(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(order, codes): the symbols from the shortest code to the longest, and their codes as numbers of 24 bits, followed by zeros.

    A code of l bits, read as a binary fraction, begins an interval of 2^-l that is its own. Canonical codes lie side by side in this order, so the
    lengths say all. ValueError where the intervals do not fill [0, 1) exactly (Kraft's equality).
    """
    order = np.argsort(lengths, kind="stable")
    ends = np.cumsum(1 << (LONGEST - lengths[order]))
    need(ends[-1] == 1 << LONGEST, "the code lengths do not belong to a complete prefix code")
    return order, np.append(0, ends[:-1]).astype(np.uint32)


def _huffman_model(counts: np.ndarray) -> tuple[np.ndarray, int]:
    lengths = code_lengths(counts)
    return lengths, int(lengths.max()).bit_length()


def _huffman_encode(ranks: np.ndarray, lengths: np.ndarray, width: int) -> np.ndarray:
    order, starts = canonical(lengths)
    codes = np.empty_like(starts)
    codes[order] = starts
    parts = np.array_split(ranks, len(ranks) // CHUNK + 1)
    return np.packbits(np.concatenate([_bits(codes[part], lengths[part]) for part in parts]))


def _bits(codes: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The codes' bits one after another."""
    ends = np.cumsum(lengths)
    place = np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)  # of each bit in its code
    return (np.repeat(codes, lengths) >> (LONGEST - 1 - place)) & 1 == 1


def _huffman_decode(stream: np.ndarray, lengths: np.ndarray, width: int, count: int) -> np.ndarray:
    need(lengths.min() >= 1 and lengths.max() <= LONGEST, f"code lengths outside 1 ... {LONGEST}")
    order, starts = canonical(lengths)
    short, first = np.unique(lengths[order], return_index=True)  # a code is as long as those from the first of its length to that of the next
    steps = b"".join(_steps(stream, starts[first], short.astype(np.uint8)))
    places = np.fromiter(_walk(steps + bytes(LONGEST), count), np.int64, count + 1)
    need(places[-2] < places[-1] <= len(steps) < places[-1] + 8, "the stream ends too early or too late")
    places, words = places[:-1], _windows(stream)
    return order[np.searchsorted(starts, (words[places >> 3] << (places & 7).astype(np.uint32)) >> 8, side="right") - 1]


def _windows(stream: np.ndarray) -> np.ndarray:
    """The 32 bits that begin at each byte, zeros behind the end."""
    padded = np.append(stream, np.zeros(3, np.uint8)).astype(np.uint32)
    return padded[:-3] << 24 | padded[1:-2] << 16 | padded[2:-1] << 8 | padded[3:]


def _steps(stream: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> Iterator[bytes]:
    """For each bit of the stream, how long a code that began there would be, by bisection in where the codes of each length start."""
    words = _windows(stream)
    for i in range(0, len(words), CHUNK):
        window = (words[i : i + CHUNK, None] << np.arange(8, dtype=np.uint32)) >> 8
        yield lengths[np.searchsorted(starts, window.ravel(), side="right") - 1].tobytes()


def _walk(steps: bytes, count: int) -> Iterator[int]:
    """Where the codes really begin, and where the last one ends."""
    place = 0
    for _ in range(count):
        yield place
        place += steps[place]
    yield place


# ANS


def _grid(mantissa: int) -> np.ndarray:
    """The frequencies that levels of 4 + m bits stand for, m = ``mantissa``: level 2^m e + f means f where e = 0, else (2^m + f) 2^(e - 1).

    They rise, by at most 1 part in 2^m; level 0 is not used.
    """
    e, f = np.divmod(np.arange(16 << mantissa), 1 << mantissa)
    return np.where(e == 0, f, ((1 << mantissa) + f) << np.maximum(e - 1, 0))


def _ans_model(counts: np.ndarray) -> tuple[np.ndarray, int]:
    """The frequencies rounded as coarsely as pays: finer levels make a longer table and a shorter stream."""

    def rounded(mantissa: int) -> np.ndarray:
        grid = _grid(mantissa)
        fitting = counts * min(1.0, grid[-1] / counts.max())
        return np.maximum(np.searchsorted((grid[:-1] + grid[1:]) / 2, fitting), 1)

    def bits(mantissa: int) -> float:
        weights = _grid(mantissa)[rounded(mantissa)]
        return len(counts) * (4 + mantissa) - counts @ np.log2(weights / weights.sum())

    best = min(MANTISSAS, key=bits)
    return rounded(best), 4 + best


def _categorical(levels: np.ndarray, width: int):
    import constriction

    return constriction.stream.model.Categorical(_grid(width - 4)[levels].astype(np.float64), perfect=False)


def _ans_encode(ranks: np.ndarray, levels: np.ndarray, width: int) -> np.ndarray:
    import constriction

    coder = constriction.stream.stack.AnsCoder()
    coder.encode_reverse(ranks.astype(np.int32), _categorical(levels, width))
    return coder.get_compressed().astype("<u4").view(np.uint8)


def _ans_decode(stream: np.ndarray, levels: np.ndarray, width: int, count: int) -> np.ndarray:
    import constriction

    need(levels.min() >= 1, "the model gives a symbol that occurs no frequency")
    need(len(stream) % 4 == 0, "the stream is not made of whole words of 32 bits")
    try:
        coder = constriction.stream.stack.AnsCoder(np.frombuffer(stream.tobytes(), "<u4").astype(np.uint32))
        ranks = coder.decode(_categorical(levels, width), count)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of the library is no Exception
        raise ValueError(f"the stream cannot be decoded: {error}") from error
    need(coder.is_empty(), "the stream ends too early or too late")
    return ranks


@dataclass(frozen=True)
class Coder:
    """A way to code the ranks of symbols, given a level for each that tells its model to the decoder."""

    widths: range  # bits that a level may have
    model: Callable[[np.ndarray], tuple[np.ndarray, int]]  # counts -> levels, width
    encode: Callable[[np.ndarray, np.ndarray, int], np.ndarray]  # ranks, levels, width -> bytes
    decode: Callable[[np.ndarray, np.ndarray, int, int], np.ndarray]  # bytes, levels, width, count -> ranks
    nbytes: Callable[[np.ndarray, np.ndarray, np.ndarray, int], int]  # ranks, counts, levels, width -> of what encode would give


def _silent(stream: np.ndarray, levels: np.ndarray, width: int, count: int) -> np.ndarray:
    need(len(stream) == 0, "a stream where one symbol at most occurs")
    return np.zeros(count, np.int64)


CODERS = {
    "huffman": Coder(range(1, 6), _huffman_model, _huffman_encode, _huffman_decode, lambda _, counts, lengths, __: _bytes(int(counts @ lengths))),
    "ans": Coder(range(5, 13), _ans_model, _ans_encode, _ans_decode, lambda ranks, _, levels, width: len(_ans_encode(ranks, levels, width))),
}
SILENT = Coder(range(1), lambda counts: (np.zeros_like(counts), 0), lambda *_: np.zeros(0, np.uint8), _silent, lambda *_: 0)


def _coder(name: str, used: int) -> Coder:
    """The coder of that name, or where one symbol at most occurs the one that has nothing to tell."""
    need(name in list(CODERS), f"coder={name!r} is not known; allowed are {', '.join(CODERS)}")
    return CODERS[name] if used > 1 else SILENT


def _bytes(bits: int) -> int:
    return -(-bits // 8)
