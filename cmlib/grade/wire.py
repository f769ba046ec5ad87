"""Plain values over a pipe: JSON for what is small, raw bytes for arrays. Nothing that is read is ever executed or unpickled.

A message is two lengths (4 bytes each), a JSON text of the first length, and the bytes of its arrays one after another, of the second. An array's
dtype and shape stand in the JSON. It does not go as npy, whose header is an expression to evaluate and whose reader makes room for a shape before it
has seen the data. The end that reads trusts nothing: every length, depth and count is bounded before anything is made of it.
"""

from __future__ import annotations

import json
import math
import os
import select
import struct
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

TEXT, ARRAYS = 4 << 20, 64 << 20  # bytes of one message
DEPTH, KEYS, VALUES, DIMENSIONS = 32, 4096, 500_000, 16  # of one message; KEYS also bounds what colliding keys can cost
WORD = 1 << 64

_LENGTHS = struct.Struct("<II")
_DTYPES = {np.dtype(c).newbyteorder("<").str for c in "?bBhHiIlLqQefdFD"}


class WireError(Exception):
    """What came over the pipe is no message, or a value cannot go over it."""


def pack(value: Any, functions: list[Callable] | None = None) -> bytes:
    """A message that holds ``value``. Callables go as their places in ``functions``, to which they are appended."""
    arrays: list[bytes] = []
    text = json.dumps(_tree(value, arrays, functions)).encode()
    size = sum(map(len, arrays))
    if len(text) > TEXT or size > ARRAYS:
        raise WireError(f"{len(text) + size:,} bytes, more than can be handed over at once")
    return b"".join((_LENGTHS.pack(len(text), size), text, *arrays))


def _tree(value: Any, arrays: list[bytes], functions: list[Callable] | None) -> Any:
    def trees(values: Iterable) -> list:
        return [_tree(v, arrays, functions) for v in values]

    if isinstance(value, np.generic) and not isinstance(value, (str, bytes)):
        value = value.item()
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, list):
        return trees(value)
    if isinstance(value, tuple):
        return {"tuple": trees(value)}
    if isinstance(value, dict):
        return {"dict": [trees(pair) for pair in value.items()]}
    if type(value) is complex:
        return {"complex": [value.real, value.imag]}
    if isinstance(value, bytes):
        arrays.append(value)
        return {"bytes": len(value)}
    if isinstance(value, np.ndarray):
        return {"array": _array(value, arrays)}
    if "torch" in sys.modules and isinstance(value, sys.modules["torch"].Tensor):
        return {"tensor": _array(value.detach().cpu().numpy(), arrays)}
    if callable(value) and functions is not None:
        functions.append(value)
        return {"function": len(functions) - 1}
    raise WireError(f"a {type(value).__name__} cannot be handed over")


def _array(value: np.ndarray, arrays: list[bytes]) -> list:
    dtype = value.dtype.newbyteorder("<")
    if dtype.str not in _DTYPES:
        raise WireError(f"an array of {value.dtype} cannot be handed over")
    arrays.append(np.ascontiguousarray(value, dtype).tobytes())
    return [dtype.str, list(value.shape)]


def unpack(text: bytes, arrays: bytes, function: Callable[[int], Any] | None = None, tensor: Callable[[np.ndarray], Any] = lambda a: a) -> Any:
    """The value of a message. ``function`` makes a callable of its place, and without it none is taken; ``tensor`` makes a tensor of an array."""
    reader = _Reader(arrays, function, tensor)
    try:
        value = reader.value(json.loads(text), 0)
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError, MemoryError) as error:
        raise WireError(f"no message: {type(error).__name__}") from error
    if reader.at != len(arrays):
        raise WireError("bytes left over")
    return value


class _Reader:
    def __init__(self, arrays: bytes, function: Callable[[int], Any] | None, tensor: Callable[[np.ndarray], Any]):
        self.arrays, self.function, self.tensor = arrays, function, tensor
        self.at = self.values = self.keys = 0

    def value(self, tree: Any, depth: int) -> Any:
        self.values += 1
        if depth > DEPTH or self.values > VALUES:
            raise WireError("nested too deep" if depth > DEPTH else "too many values")
        if isinstance(tree, list):
            return [self.value(t, depth + 1) for t in tree]
        if isinstance(tree, dict):
            ((kind, body),) = tree.items()
            return _KINDS[kind](self, body, depth + 1)
        if isinstance(tree, str):
            return tree.encode("utf-8", "replace").decode()  # half a surrogate pair can be read but never written again
        if type(tree) is int and abs(tree) >= WORD:
            raise WireError("a whole number of more than 64 bits")
        return tree

    def dict(self, pairs: list, depth: int) -> dict:
        self.keys += len(pairs)
        if self.keys > KEYS:
            raise WireError("too many keys")
        return {self.value(key, depth): self.value(value, depth) for key, value in pairs}

    def take(self, size: int) -> bytes:
        if type(size) is not int or not 0 <= size <= len(self.arrays) - self.at:
            raise WireError("more announced than sent")
        self.at += size
        return self.arrays[self.at - size : self.at]

    def array(self, body: list) -> np.ndarray:
        name, shape = body
        if name not in _DTYPES or len(shape) > DIMENSIONS or not all(type(n) is int and n >= 0 for n in shape):
            raise WireError("no array")
        dtype = np.dtype(name)
        if math.prod(n or 1 for n in shape) * dtype.itemsize > ARRAYS:  # of an empty array too: a sum over its axis of length 0 would be as large
            raise WireError("an array too large")
        data = self.take(math.prod(shape) * dtype.itemsize)
        if dtype.kind == "b":  # any byte but 0 and 1 would be a third truth value
            return (np.frombuffer(data, np.uint8) != 0).reshape(shape)
        return np.frombuffer(data, dtype).reshape(shape).astype(dtype.newbyteorder("="))

    def callable(self, place: int) -> Any:
        if self.function is None or type(place) is not int:
            raise WireError("a function, where data was expected")
        return self.function(place)


_KINDS: dict[str, Callable[[_Reader, Any, int], Any]] = {
    "tuple": lambda reader, body, depth: tuple(reader.value(body, depth)),
    "dict": _Reader.dict,
    "complex": lambda _, body, __: complex(*map(float, body)),
    "bytes": lambda reader, body, _: reader.take(body),
    "array": lambda reader, body, _: reader.array(body),
    "tensor": lambda reader, body, _: reader.tensor(reader.array(body)),
    "function": lambda reader, body, _: reader.callable(body),
}


class Pipe:
    """Messages over two file descriptors. At ``until`` (``time.monotonic``) waits end with ``TimeoutError``; ``EOFError``: the other end is gone."""

    def __init__(self, readable: int, writable: int):
        self.readable, self.writable, self.taken = readable, writable, 0
        os.set_blocking(readable, False)
        os.set_blocking(writable, False)

    def send(self, message: bytes, until: float = math.inf) -> None:
        rest = memoryview(message)
        while rest:
            _wait(self.writable, select.POLLOUT, until)
            try:
                rest = rest[os.write(self.writable, rest[: 1 << 16]) :]
            except BlockingIOError:
                continue
            except OSError as error:
                raise EOFError("the other end is gone") from error

    def receive(self, until: float = math.inf, **kinds: Callable) -> Any:
        text, arrays = _LENGTHS.unpack(self._read(_LENGTHS.size, until))
        if text > TEXT or arrays > ARRAYS:
            raise WireError("a message too large")
        self.taken += text + arrays
        return unpack(self._read(text, until), self._read(arrays, until), **kinds)

    def _read(self, size: int, until: float) -> bytes:
        data = bytearray()
        while len(data) < size:
            _wait(self.readable, select.POLLIN, until)
            try:
                piece = os.read(self.readable, min(size - len(data), 1 << 20))
            except BlockingIOError:
                continue
            if not piece:
                raise EOFError("the other end is gone")
            data += piece
        return bytes(data)


def _wait(fd: int, event: int, until: float) -> None:
    left = until - time.monotonic()
    poll = select.poll()
    poll.register(fd, event)
    if left <= 0 or not poll.poll(None if left == math.inf else left * 1000):
        raise TimeoutError
