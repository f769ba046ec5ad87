"""Four ways to store a masked weight tensor, each as plain arrays; their bytes are what a file really holds.

``dense``     every value, zeros and all.
``bitmap``    one bit a weight that says kept or not, then the kept values.
``csr``       compressed sparse rows: the kept values, their columns, and where each row starts.
``relative``  the kept values and, in k bits each, how many removed weights lie before them; where a gap does not fit, a filler
              zero is stored (Han et al. 2016, Deep Compression, section 2). k is the one that makes the file smallest.

``nbytes(places, shape, width)`` gives the bytes of each from where the kept weights sit alone, fast enough for a slider; the tests
hold it equal to ``encode``'s arrays. Index types are the narrowest that fit.
"""

from __future__ import annotations

import math

import numpy as np

Arrays = dict[str, np.ndarray]
FORMATS = ("dense", "bitmap", "csr", "relative")
GAP_BITS = range(1, 17)


def _narrow(highest: int) -> np.dtype:
    """The narrowest unsigned integer type that holds ``highest``."""
    return np.min_scalar_type(int(highest))


def _gaps(places: np.ndarray) -> np.ndarray:
    """How many removed weights lie before each kept one, since the kept one before it."""
    return np.diff(places, prepend=-1) - 1


def _gap_bits(gaps: np.ndarray, width: int) -> tuple[int, int]:
    """(k, fillers) for which gaps of k bits take the fewest bytes; a filler bridges 2**k weights."""
    sizes = np.bincount(np.minimum(gaps, 1 << 17)) if len(gaps) else np.zeros(1, int)
    lengths = np.arange(len(sizes))

    def fillers(k: int) -> int:
        return int(sizes @ (lengths >> k)) if len(sizes) <= 1 << 17 else int((gaps >> k).sum())

    def cost(k: int) -> int:
        entries = len(gaps) + fillers(k)
        return entries * width + -(-entries * k // 8)

    best = min(GAP_BITS, key=cost)
    return best, fillers(best)


def nbytes(places: np.ndarray, shape: tuple[int, ...], width: int = 4) -> dict[str, int]:
    """Bytes that each format takes for a tensor (out, ...) whose flat indices ``places`` (rising) are kept, at ``width`` bytes a value."""
    rows, total, kept = shape[0], math.prod(shape), len(places)
    columns = total // max(1, rows)
    k, fillers = _gap_bits(_gaps(places), width)
    entries = kept + fillers
    return {
        "dense": total * width,
        "bitmap": -(-total // 8) + kept * width,
        "csr": (rows + 1) * _narrow(kept).itemsize + kept * (_narrow(columns).itemsize + width),
        "relative": entries * width + -(-entries * k // 8),
    }


def encode(values: np.ndarray, mask: np.ndarray, format: str) -> tuple[Arrays, dict[str, int]]:
    """The arrays of a format, and the few numbers (k) that its header needs. ``values`` (out, ...) as they would be used."""
    flat, kept = values.reshape(-1), mask.reshape(-1)
    if format == "dense":
        return {"values": np.where(kept, flat, flat.dtype.type(0))}, {}
    if format == "bitmap":
        return {"values": flat[kept], "bitmap": np.packbits(kept)}, {}
    if format == "csr":
        by_row = kept.reshape(mask.shape[0], -1)
        count = int(np.count_nonzero(kept))
        starts = np.concatenate([[0], by_row.sum(1).cumsum()]).astype(_narrow(count))
        return {"values": flat[kept], "columns": by_row.nonzero()[1].astype(_narrow(by_row.shape[1])), "starts": starts}, {}
    if format == "relative":
        gaps = _gaps(np.flatnonzero(kept))
        k, _ = _gap_bits(gaps, flat.itemsize)
        out, codes = _fill(flat[kept], gaps, k)
        return {"values": out, "gaps": pack_bits(codes, k)}, {"k": k}
    raise ValueError(f"storage={format!r} is not known; allowed are auto, {', '.join(FORMATS)}")


def _fill(values: np.ndarray, gaps: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Values and gaps with filler zeros put in, so that every gap fits k bits."""
    last = np.cumsum((gaps >> k) + 1) - 1
    entries = int(last[-1]) + 1 if len(last) else 0
    out, codes = np.zeros(entries, values.dtype), np.full(entries, (1 << k) - 1, np.uint32)
    out[last], codes[last] = values, gaps & ((1 << k) - 1)
    return out, codes


def decode(arrays: Arrays, format: str, shape: tuple[int, ...], k: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(values, mask) of ``shape``. ValueError where the arrays do not describe a tensor of that shape."""
    total = int(np.prod(shape))
    values = arrays["values"]
    if format == "dense":
        need(len(values) == total, "the values are not as many as the shape asks")
        return values.reshape(shape), ((values != 0) | np.signbit(values)).reshape(shape)  # a removed weight is +0, a kept one may be -0
    if format == "bitmap":
        need(len(arrays["bitmap"]) == -(-total // 8), "the bitmap does not fit the shape")
        place = np.flatnonzero(np.unpackbits(arrays["bitmap"], count=total))
    elif format == "csr":
        need(all(np.issubdtype(arrays[n].dtype, np.integer) for n in ("starts", "columns")), "the starts or columns are not whole numbers")
        starts, columns = arrays["starts"].astype(np.int64), arrays["columns"].astype(np.int64)
        width = total // shape[0]
        need(len(starts) == shape[0] + 1 and starts[0] == 0 and (np.diff(starts) >= 0).all(), "the row starts do not rise from 0")
        need(starts[-1] == len(columns) and (columns < width).all(), "the columns lie outside the shape")
        place = np.repeat(np.arange(shape[0]), np.diff(starts)) * width + columns
    elif format == "relative":
        need(k in GAP_BITS and len(arrays["gaps"]) == -(-len(values) * k // 8), "the gaps do not fit the values")
        place = np.cumsum(unpack_bits(arrays["gaps"], k, len(values)) + 1) - 1
    else:
        raise ValueError(f"storage={format!r} is not known")
    need(len(place) == len(values) and (len(place) == 0 or (place[-1] < total and (np.diff(place) > 0).all())), "the indices do not fit the shape")
    dense, mask = np.zeros(total, values.dtype), np.zeros(total, bool)
    dense[place], mask[place] = values, True
    if format == "relative":  # a filler is a zero that nobody kept
        mask[place] = ~_fillers(arrays["gaps"], values, k)
    return dense.reshape(shape), mask.reshape(shape)


def _fillers(gaps: np.ndarray, values: np.ndarray, k: int) -> np.ndarray:
    return (unpack_bits(gaps, k, len(values)) == (1 << k) - 1) & (values == 0)


def need(holds: bool, problem: str) -> None:
    """ValueError with ``problem`` where a file does not hold together."""
    if not holds:
        raise ValueError(problem)


def pack_bits(codes: np.ndarray, k: int) -> np.ndarray:
    """Unsigned codes below 2**k as a byte stream of k bits each, highest bit first, padded to a whole byte."""
    bits = (codes.astype(np.uint32)[:, None] >> np.arange(k - 1, -1, -1, dtype=np.uint32)) & 1
    return np.packbits(bits.astype(np.uint8))


def unpack_bits(stream: np.ndarray, k: int, count: int) -> np.ndarray:
    """The inverse of ``pack_bits``: ``count`` codes as int64."""
    bits = np.unpackbits(stream, count=count * k).reshape(count, k).astype(np.int64)
    return bits @ (1 << np.arange(k - 1, -1, -1, dtype=np.int64))


def with_escapes(places: np.ndarray, k: int) -> np.ndarray:
    """Rising places as gaps of k bits: how many removed weights lie before each kept one; 2**k - 1 skips as many and keeps none."""
    most, gaps = (1 << k) - 1, _gaps(places)
    last = np.cumsum(gaps // most + 1) - 1
    numbers = np.full(int(last[-1]) + 1 if len(last) else 0, most, np.int64)
    numbers[last] = gaps % most
    return numbers


def without_escapes(numbers: np.ndarray, k: int) -> np.ndarray:
    """The inverse of ``with_escapes``."""
    most = (1 << k) - 1
    return (np.cumsum(np.where(numbers == most, most, numbers + 1)) - 1)[numbers != most]
