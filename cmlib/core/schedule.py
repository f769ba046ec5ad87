"""Schedules: how much is kept and how long is trained, stage by stage. Plain values, to be composed with any score.

A schedule is a tuple of stages; ``one_shot(.1, 4) + (Stage(.1, 2),)`` is a schedule too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple


class Stage(NamedTuple):
    """Prune to ``keep`` (share of the dense network's units), then train for ``epochs``."""

    keep: float
    epochs: int


Schedule = tuple[Stage, ...]


class Step(NamedTuple):
    """A step of a recipe: attach the method ``key`` with ``knobs``, then train for ``share`` of the epochs.

    ``guide`` is the weight with which a network of full precision, trained beside it, guides this one.
    """

    key: str
    knobs: dict[str, Any]
    share: float
    guide: float = 0.0


Recipe = tuple[Step, ...]


def one_shot(keep: float, epochs: int) -> Schedule:
    """Prune once, train once."""
    return (Stage(keep, epochs),)


def iterative(keep: float, epochs: int, rounds: int = 4) -> Schedule:
    """``rounds`` rounds that each keep the same share of what is left, down to ``keep`` (Han et al. 2015); the epochs are shared out evenly."""
    return _stages([keep ** ((r + 1) / rounds) for r in range(rounds)], epochs)


def gradual(keep: float, epochs: int, rounds: int = 8) -> Schedule:
    """Quick at first and slow at the end: keep_t = keep + (1 - keep)(1 - t)^3 (Zhu & Gupta 2017, To prune, or not to prune)."""
    return _stages([keep + (1 - keep) * (1 - (r + 1) / rounds) ** 3 for r in range(rounds)], epochs)


def _stages(keeps: list[float], epochs: int) -> Schedule:
    """A stage for each share, the epochs dealt out evenly with what is left over at the end."""
    return tuple(Stage(k, e) for k, e in zip(keeps, shared_out([1] * len(keeps), epochs), strict=True))


def shared_out(shares: Sequence[float], epochs: int) -> list[int]:
    """The epochs dealt out in proportion to ``shares``, what is left over at the end."""
    ends = [int(epochs * sum(shares[: i + 1]) / sum(shares) + 1e-9) for i in range(len(shares))]
    return [e - s for s, e in zip([0, *ends[:-1]], ends, strict=True)]
