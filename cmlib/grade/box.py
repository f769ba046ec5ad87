"""A process in a box that can be thrown away: no network, no files but the interpreter and the kit, limits on memory, time, processes and disk."""

from __future__ import annotations

from dataclasses import dataclass

MB = 1 << 20


@dataclass(frozen=True)
class Limits:
    """What a submission may use. Seconds are wall-clock."""

    start: float = 60  # until the interpreter answers
    cell: float = 60  # one cell of the notebook
    call: float = 20  # one call of an answer
    memory: int = 4096 * MB  # all processes together
    processes: int = 64
    disk: int = 256 * MB  # the work folder, which lies in memory


def missing() -> str:
    """What the box needs and this machine lacks, and how to install it; empty where all is there."""
    raise NotImplementedError
