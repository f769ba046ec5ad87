"""The four formats: bytes as counted, content bit for bit, and a broken file told apart from a good one."""

import numpy as np
import pytest
import scipy.sparse
import torch

from cmlib.core import storage
from cmlib.core.packed import Masked
from cmlib.core.storage import FORMATS

SHAPES = [(1, 1), (7, 13), (300, 40), (16, 8, 3, 3), (1, 5000), (5000, 1), (70_000, 2)]


def draws():
    generator = np.random.default_rng(0)
    for shape in SHAPES:
        for density in (0.0, 0.001, 0.05, 0.3, 0.9, 1.0):
            mask = generator.random(shape) < density
            values = generator.standard_normal(shape).astype(np.float32)
            yield np.where(mask, values, np.float32(0)), mask
    lonely = np.zeros((1, 300_000), bool)
    lonely[0, [3, 200_000, 299_999]] = True
    yield np.where(lonely, 1.5, 0).astype(np.float32), lonely
    empty_rows = np.zeros((50, 20), bool)
    empty_rows[[7, 8, 30]] = generator.random((3, 20)) < 0.5
    yield np.where(empty_rows, generator.standard_normal((50, 20)), 0).astype(np.float32), empty_rows


@pytest.mark.parametrize("format", FORMATS)
def test_content_comes_back_and_bytes_are_those_counted(format):
    for dtype in (np.float16, np.float32, np.float64):
        for values, mask in draws():
            values = values.astype(dtype)
            values[mask & (values == 0)] = 1  # half precision rounds the tiniest to zero
            arrays, header = storage.encode(values, mask, format)
            assert sum(a.nbytes for a in arrays.values()) == storage.nbytes(np.flatnonzero(mask), mask.shape, values.itemsize)[format]
            back, place = storage.decode(arrays, format, mask.shape, **header)
            assert back.dtype == dtype and back.tobytes() == values.tobytes() and np.array_equal(place, mask)


def test_csr_is_scipys():
    for values, mask in draws():
        arrays, _ = storage.encode(values, mask, "csr")
        expected = scipy.sparse.csr_array(values.reshape(len(values), -1))
        assert np.array_equal(arrays["values"], expected.data)
        assert np.array_equal(arrays["columns"], expected.indices) and np.array_equal(arrays["starts"], expected.indptr)


def test_index_types_are_the_narrowest():
    mask = np.ones((2, 255), bool)
    assert [storage.encode(mask.astype(np.float32), mask, "csr")[0][n].dtype for n in ("columns", "starts")] == [np.uint8, np.uint16]
    mask = np.ones((2, 100), bool)
    assert storage.encode(mask.astype(np.float32), mask, "csr")[0]["starts"].dtype == np.uint8


def relative_by_hand(mask, k):
    """Entries (gap, is a filler) in the order of the paper's figure: a filler wherever a gap is too long for k bits."""
    entries, gap = [], 0
    for kept in mask.flatten():
        if kept:
            entries.append((gap, False))
            gap = 0
        elif gap == 2**k - 1:
            entries.append((gap, True))
            gap = 0
        else:
            gap += 1
    while entries and entries[-1][1]:  # nothing needs to be bridged behind the last weight
        entries.pop()
    return entries


def test_relative_indices_are_the_papers_and_k_is_the_best():
    generator = np.random.default_rng(1)
    for density in (0.02, 0.1, 0.5):
        mask = generator.random((20, 30)) < density
        values = np.where(mask, 1, 0).astype(np.float32)
        arrays, header = storage.encode(values, mask, "relative")
        entries = relative_by_hand(mask, header["k"])
        assert storage.unpack_bits(arrays["gaps"], header["k"], len(entries)).tolist() == [g for g, _ in entries]
        assert (arrays["values"] == 0).tolist() == [filler for _, filler in entries]
        sizes = {k: len(e := relative_by_hand(mask, k)) * 4 + -(-len(e) * k // 8) for k in storage.GAP_BITS}
        assert sum(a.nbytes for a in arrays.values()) == min(sizes.values()) == sizes[header["k"]]


@pytest.mark.parametrize("k", range(1, 17))
def test_bits_pack_and_unpack(k):
    codes = np.random.default_rng(k).integers(0, 2**k, 101)
    stream = storage.pack_bits(codes, k)
    assert stream.nbytes == -(-101 * k // 8) and np.array_equal(storage.unpack_bits(stream, k, 101), codes)


def test_bits_are_the_highest_first():
    assert storage.pack_bits(np.array([1, 2, 3]), 4).tolist() == [0x12, 0x30]


def spoiled():
    values = np.arange(1, 13, dtype=np.float32).reshape(3, 4)
    mask = values % 3 != 0
    for format in FORMATS:
        arrays, header = storage.encode(values * mask, mask, format)
        for name in arrays:
            if (format, name) != ("relative", "values"):  # 7 gaps fill as many bytes as 8: only a file's hash can tell
                yield format, {**arrays, name: arrays[name][:-1]}, header
            yield format, {**arrays, name: np.concatenate([arrays[name], arrays[name][-1:]])}, header
    arrays, _ = storage.encode(values * mask, mask, "csr")
    yield "csr", {**arrays, "columns": arrays["columns"][::-1].copy()}, {}
    yield "csr", {**arrays, "columns": arrays["columns"] + 4}, {}
    yield "csr", {**arrays, "starts": arrays["starts"][::-1].copy()}, {}
    arrays, header = storage.encode(values * mask, mask, "relative")
    yield "relative", arrays, {"k": 0}
    yield "relative", arrays, {"k": 99}
    yield "relative", {**arrays, "gaps": np.full_like(arrays["gaps"], 255)}, header


CASES = list(spoiled())


@pytest.mark.parametrize("format, arrays, header", CASES, ids=[f"{f}-{i}" for i, (f, *_) in enumerate(CASES)])
def test_spoiled_arrays_are_refused(format, arrays, header):
    with pytest.raises(ValueError, match=r"\w+ \w+"):
        storage.decode(arrays, format, (3, 4), **header)


def test_an_unknown_format_is_named():
    with pytest.raises(ValueError, match=r"'zip'.*bitmap"):
        storage.encode(np.ones((2, 2)), np.ones((2, 2), bool), "zip")
    with pytest.raises(ValueError, match="'zip'"):
        storage.decode({"values": np.ones(4)}, "zip", (2, 2))


def test_auto_is_the_smallest_and_says_which():
    for density, expected in [(0.999, "dense"), (0.5, "bitmap"), (0.01, "relative")]:
        packed = Masked(torch.randn(100, 100), torch.rand(100, 100) < density)
        assert packed.format() == packed.meta()["storage"] == expected
        assert packed.bits() == 8 * min(packed.sizes().values())


def test_a_kept_weight_that_is_zero_keeps_its_place_where_the_format_holds_places():
    """dense and relative see a zero and count it as removed (the weight is 0 either way); bitmap and csr keep the mask."""
    values, mask = torch.ones(2, 8), torch.ones(2, 8, dtype=torch.bool)
    values[0, 3] = 0.0
    for format, whole in [("dense", False), ("bitmap", True), ("csr", True), ("relative", True)]:
        packed = Masked(values, mask, format)
        back = Masked.decode(packed.arrays(), packed.meta())
        assert torch.equal(back.dense(), values) and torch.equal(back.mask, mask) is whole


@pytest.mark.parametrize("format", FORMATS)
def test_the_memory_layout_does_not_matter(format):
    values = torch.randn(6, 5, 3, 3)
    mask = torch.rand(6, 5, 3, 3) < 0.4
    plain = Masked(values, mask, format)
    last = Masked(*(t.to(memory_format=torch.channels_last) for t in (values, mask)), format)
    assert all(a.tobytes() == last.arrays()[n].tobytes() for n, a in plain.arrays().items())
    assert torch.equal(Masked.decode(last.arrays(), last.meta()).dense(), plain.dense())


def test_masked_says_what_stays():
    packed = Masked(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[True, False], [False, True]]))
    assert packed.kept == 2 and packed.dense().tolist() == [[1, 0], [0, 4]]
    assert packed.through(torch.full((2, 2), 7.0)).tolist() == [[7, 0], [0, 7]]


@pytest.mark.parametrize("straight", [False, True])
def test_gradients_pass_a_straight_mask_and_stop_at_any_other(straight):
    w = torch.randn(3, 4, requires_grad=True)
    mask = torch.rand(3, 4) < 0.5
    packed = Masked(w, mask, straight=straight)
    assert torch.equal(packed.dense() == 0, ~mask)
    packed.dense().sum().backward()
    assert torch.equal(w.grad, torch.ones(3, 4) if straight else mask.float())
    frozen = packed.frozen()
    assert not frozen.straight and not frozen.values.requires_grad and frozen.state == {}


def test_places_that_are_not_whole_numbers_are_refused_before_they_are_read():
    values, mask = np.array([[1.0, 0.0], [0.0, 2.0]], np.float32), np.array([[True, False], [False, True]])
    arrays, _ = storage.encode(values, mask, "csr")
    with pytest.raises(ValueError, match="not whole numbers"):
        storage.decode({**arrays, "starts": arrays["starts"].astype(np.float32) * np.nan}, "csr", (2, 2))
