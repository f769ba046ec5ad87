"""Plain values over a pipe: JSON for what is small, raw bytes for arrays. Nothing that is read here is ever executed or unpickled.

A message is a length (4 bytes), a JSON text of that length, and the bytes of its arrays one after another. The end that reads trusts nothing:
every length, depth and count is bounded before anything is made of it.
"""

from __future__ import annotations

from typing import Any


class WireError(Exception):
    """What came over the pipe is no message."""


def pack(value: Any, functions: list | None = None) -> bytes:
    """A message that holds ``value``. Callables go as numbers, and are appended to ``functions`` where it is given."""
    raise NotImplementedError
