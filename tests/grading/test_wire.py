"""Values over a pipe: what comes out is what went in, and whatever else is sent is refused, whole and early."""

import contextlib
import json
import os
import random
import struct
import threading
import time

import numpy as np
import pytest
import torch
from small import named

from cmlib.grade.wire import ARRAYS, DEPTH, KEYS, TEXT, VALUES, Pipe, WireError, pack, unpack


def parts(message: bytes) -> tuple[bytes, bytes]:
    text, arrays = struct.unpack("<II", message[:8])
    assert len(message) == 8 + text + arrays
    return message[8 : 8 + text], message[8 + text :]


def there(value, **kinds):
    return unpack(*parts(pack(value)), **kinds)


@pytest.mark.parametrize(
    "value", [None, True, 7, -(2**63), 0.1, float("inf"), "é✓", b"\0\xff", 1 + 2j, [], (), {}, [1, (2, [3])], {"a": {(1, 2): [b"x"]}, 3: None}]
)
def test_a_value_comes_back_with_its_type(value):
    got = there(value)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize("dtype", [*"?bBhHiIqQefdFD", ">f8", ">i4"])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3), (2, 0, 4)])
def test_an_array_comes_back_bit_for_bit(dtype, shape):
    array = np.asarray(np.random.default_rng(0).normal(size=shape) * 9).astype(dtype)
    got = there(array)
    assert got.shape == shape and got.dtype == array.dtype.newbyteorder("=") and got.tobytes() == array.astype(got.dtype).tobytes()
    got[...] = 0  # it can be written to
    np.testing.assert_array_equal(there(np.asfortranarray(array)), array)


def test_nan_and_signed_zeros_keep_their_bits():
    array = np.array([0x7FF8000000000001, 0xFFF8000000000000, 0x8000000000000000], np.uint64).view(float)
    assert there(array).tobytes() == array.tobytes()
    assert str(there([float("nan"), -0.0])) == "[nan, -0.0]"


def test_scalars_of_numpy_are_numbers_and_tensors_are_what_the_reader_makes_of_them():
    assert there([np.float32(0.5), np.bool_(True), np.int64(3)]) == [0.5, True, 3]
    tensor = torch.arange(3.0, requires_grad=True)
    assert isinstance(there(tensor), np.ndarray)
    assert torch.equal(there(tensor, tensor=torch.from_numpy), tensor)


def test_a_function_goes_as_its_place_and_only_where_one_is_awaited():
    functions = []
    message = parts(pack([len, [np.sum]], functions))
    assert functions == [len, np.sum]
    assert unpack(*message, function=lambda place: f"stub {place}") == ["stub 0", ["stub 1"]]
    with pytest.raises(WireError):
        unpack(*message)
    with pytest.raises(WireError):
        pack(len)


@pytest.mark.parametrize(
    "value",
    [object(), {1, 2}, np.array([object()]), np.array(["a"]), np.zeros(2, "datetime64[s]"), np.zeros(2, "i4,f8"), np.longdouble(1), [2**64, ...]],
)
def test_what_is_not_plain_is_not_sent(value):
    with pytest.raises((WireError, TypeError)):
        pack(value)


def array(dtype="<f8", shape=(2,)):
    return {"array": [dtype, shape]}


BAD = {
    "no json": b"{",
    "not utf-8": b"\xff\xfe\xfa",
    "unknown kind": {"pickle": "x"},
    "two kinds": {"tuple": [], "bytes": 0},
    "no kind": {},
    "dtype of objects": array("|O"),
    "dtype of texts": array("<U8"),
    "dtype of records": array([["a", "<f8"], ["b", "<f8"]]),
    "dtype that numpy would know": array("float64"),
    "shape of text": array(shape="22"),
    "negative shape": array(shape=[-1, -2]),
    "shape with a truth value": array(shape=[True, 2]),
    "shape of fractions": array(shape=[2.0]),
    "shape larger than what is sent": array(shape=[3]),
    "shape smaller than what is sent": array(shape=[1]),
    "shape beyond all memory": array(shape=[2**31, 2**31]),
    "empty shape beyond all memory": [array(), array(shape=[2**40, 0])],
    "shape that wraps around": array(shape=[2**32, 2**32, 0]),
    "shape of too many dimensions": array(shape=[1] * 17 + [2]),
    "bytes beyond the end": {"bytes": 17},
    "bytes of negative length": {"bytes": -1},
    "bytes of no length": {"bytes": "16"},
    "list as a key": {"dict": [[[1], 2]]},
    "array as a key": {"dict": [[array(), 2]]},
    "dict of triples": {"dict": [[1, 2, 3]]},
    "dict of text": {"dict": "abcd"},
    "complex of text": {"complex": ["1", "x"]},
    "too many keys": {"dict": [[i, 0] for i in range(KEYS + 1)]},
    "too many keys in many dicts": [{"dict": [[i, 0] for i in range(1000)]} for _ in range(1 + KEYS // 1000)],
    "too many values": [0] * VALUES,
    "a number of many digits": 10**400,
    "a number of too many digits": b"1" * 100_000,
    "nested": json.loads("[" * (DEPTH + 1) + "]" * (DEPTH + 1)),
    "nested in kinds": b'{"tuple": [' * 400 + b"1" + b"]}" * 400,
    "nested beyond the reader": b"[" * 200_000 + b"]" * 200_000,
    "nested and open": b"[" * 200_000,
}


@pytest.mark.parametrize("tree", named(BAD))
def test_what_is_no_message_is_refused_at_once(tree):
    start = time.perf_counter()
    with pytest.raises(WireError):
        unpack(tree if isinstance(tree, bytes) else json.dumps(tree).encode(), bytes(16))
    assert time.perf_counter() - start < 2


def test_colliding_keys_cost_little():
    """Multiples of 2^61 - 1 all have the hash 0."""
    tree = {"dict": [[i * (2**61 - 1), 0] for i in range(8)] + [[float(i) * 2**52, 0] for i in range(KEYS - 8)]}
    start = time.perf_counter()
    assert len(unpack(json.dumps(tree).encode(), b"")) >= KEYS - 8
    assert time.perf_counter() - start < 2


def test_truth_values_are_true_or_false():
    got = unpack(json.dumps(array("|b1", [4])).encode(), bytes([0, 1, 2, 255]))
    assert got.tolist() == [False, True, True, True] and got.view(np.uint8).max() == 1


def test_half_a_surrogate_pair_is_replaced():
    got = unpack(b'["\\ud800x", {"dict": [["\\udfff", 1]]}]', b"")
    assert got == ["?x", {"?": 1}] and str(got).encode()


def test_changed_bytes_give_a_plain_value_or_are_refused():
    rng = random.Random(0)
    message = pack([{"w": np.arange(6.0).reshape(2, 3), "b": b"abc", 3: (1, None, "x")}, np.array([True]), 1j])
    text, arrays = parts(message)
    refused = 0
    for _ in range(5000):
        changed = bytearray(text)
        for _ in range(rng.randint(1, 3)):
            changed[rng.randrange(len(changed))] = rng.choice(b'[]{}",:0123456789-eE.xtrue\\\xff')
        try:
            unpack(bytes(changed), arrays)
        except WireError:
            refused += 1
    assert 2500 < refused < 5000


@pytest.fixture
def ends():
    """Two connected pipes, the first end ours."""
    (a, b), (c, d) = os.pipe(), os.pipe()
    yield Pipe(a, d), Pipe(c, b)
    for fd in (a, b, c, d):
        with contextlib.suppress(OSError):
            os.close(fd)


def test_a_large_value_crosses_while_the_other_end_reads(ends):
    ours, theirs = ends
    value = np.random.default_rng(0).normal(size=1_000_000)
    thread = threading.Thread(target=theirs.send, args=(pack([value]),))
    thread.start()
    np.testing.assert_array_equal(ours.receive(time.monotonic() + 20)[0], value)
    thread.join()


@pytest.mark.parametrize("sent", [b"", b"\x08\0\0", struct.pack("<II", 5, 0) + b"[1,"], ids=["nothing", "half a length", "half a text"])
def test_a_wait_ends(ends, sent):
    ours, theirs = ends
    os.write(theirs.writable, sent)
    start = time.monotonic()
    with pytest.raises(TimeoutError):
        ours.receive(start + 0.1)
    assert 0.09 < time.monotonic() - start < 2


def test_a_wait_to_send_ends_where_nobody_reads(ends):
    with pytest.raises(TimeoutError):
        ends[0].send(pack(b"x" * 10_000_000), time.monotonic() + 0.1)


def test_after_its_end_nothing_is_read_even_if_it_is_there(ends):
    ends[1].send(pack(1))
    with pytest.raises(TimeoutError):
        ends[0].receive(time.monotonic())


@pytest.mark.parametrize("lengths", [(TEXT + 1, 0), (2, ARRAYS + 1), (2**32 - 1, 2**32 - 1)])
def test_a_message_too_large_is_refused_before_it_is_read(ends, lengths):
    ours, theirs = ends
    os.write(theirs.writable, struct.pack("<II", *lengths))
    with pytest.raises(WireError, match="too large"):
        ours.receive(time.monotonic() + 5)


def test_the_other_end_gone(ends):
    ours, theirs = ends
    os.close(theirs.writable)
    with pytest.raises(EOFError):
        ours.receive(time.monotonic() + 5)
    os.close(theirs.readable)
    with pytest.raises(EOFError):
        ours.send(pack(1), time.monotonic() + 5)


def test_what_is_too_large_to_hand_over_says_so():
    with pytest.raises(WireError, match="more than can be handed over"):
        pack(np.zeros(ARRAYS // 8 + 1))
    with pytest.raises(WireError, match="more than can be handed over"):
        pack("x" * TEXT)
