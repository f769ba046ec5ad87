"""Every student's own numbers: a question whose ``varies`` lists choices for each number draws one of them by the student's id."""

from __future__ import annotations

from hashlib import sha256
from typing import Any

from .checks import find


def variant(student: str, key: str) -> dict[str, Any]:
    """The numbers of question ``key`` for ``student``: the same ones wherever and whenever they are asked for."""

    def draw(name: str, choices: tuple) -> Any:
        digest = sha256(f"{student.strip()}/{key}/{name}".encode()).digest()
        return choices[int.from_bytes(digest[:8]) % len(choices)]

    return {name: draw(name, choices) for name, choices in find(key).varies.items()}
