"""ADMM's splitting: two wishes for one vector, each granted on a copy of its own, and the copies drawn together (Boyd et al. 2011, chapter 3).

min f(x) + g(z) so that x = z. Methods give x to the optimizer, which sees f and ``pull``, and ``split`` now and then.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def pull(x: Tensor, z: Tensor, u: Tensor, rho: float | Tensor) -> Tensor:
    """rho / 2 |x - z + u|^2, what the other copy adds to f; u is the scaled dual, the sum of all x - z so far."""
    return rho / 2 * (x - z + u).square().sum()


def split(x: Tensor, z: Tensor, u: Tensor, prox: Callable[[Tensor], Tensor], relaxation: float = 1.0) -> tuple[Tensor, Tensor]:
    """z <- prox(x + u), u <- u + x - z: (z, u). Relaxed, relaxation x + (1 - relaxation) z stands for x."""
    x = x if relaxation == 1 else relaxation * x + (1 - relaxation) * z
    z = prox(x + u)
    return z, u + x - z
