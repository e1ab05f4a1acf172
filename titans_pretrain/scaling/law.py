"""What is a scaling law: the loss as a function of parameters and tokens, and the best split of a budget between them.

L(N, D) = E + A / N^alpha + B / D^beta (Hoffmann et al., arXiv 2203.15556, equation 2): E is the loss of a perfect model, the
others are what a finite model and finite training add.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import minimize_scalar

CONSTANTS = ("E", "A", "B", "alpha", "beta")


@dataclass(frozen=True)
class Law:
    """The five constants. Losses in nats per token; N in parameters, D in tokens."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, parameters: Any, tokens: Any) -> Any:
        """L(N, D) of numbers or of arrays of one shape."""
        return self.E + self.A * np.power(parameters, -self.alpha) + self.B * np.power(tokens, -self.beta)

    def constants(self) -> dict[str, float]:
        return {name: float(getattr(self, name)) for name in CONSTANTS}


class Optimum(NamedTuple):
    """The best a budget buys."""

    parameters: float
    tokens: float
    loss: float
    at_edge: bool
    """The loss still falls where the search ended: the law says nothing of where it would stop."""


class CostCurve:
    """FLOP to train on one token, as a function of N: a line between the runs in logarithms, and on beyond them.

    At N = 6 it would be 6 N for N without embeddings and no attention; what a token really costs depends on the variant.

    Args:
        parameters, flops_per_token: [n], of runs or sizes; equal N count once.
    """

    def __init__(self, parameters: Any, flops_per_token: Any) -> None:
        pairs = dict(zip(np.asarray(parameters, float), np.asarray(flops_per_token, float), strict=True))
        self._x = np.log(sorted(pairs))
        self._y = np.log([pairs[n] for n in sorted(pairs)])

    def __call__(self, parameters: float) -> float:
        x = np.log(parameters)
        if len(self._x) == 1:  # proportional, for want of better
            return float(np.exp(self._y[0] + x - self._x[0]))
        place = int(np.clip(np.searchsorted(self._x, x) - 1, 0, len(self._x) - 2))
        x0, x1, y0, y1 = *self._x[place : place + 2], *self._y[place : place + 2]
        return float(np.exp(y0 + (y1 - y0) * (x - x0) / (x1 - x0)))


def optimum(law: Law, flops: float, flops_per_token: Callable[[float], float], low: float, high: float) -> Optimum:
    """The N between `low` and `high` with the lowest loss at `flops` of training, D = flops / flops_per_token(N)."""

    def loss(log_n: float) -> float:
        n = float(np.exp(log_n))
        return float(law.loss(n, flops / flops_per_token(n)))

    bounds = (float(np.log(low)), float(np.log(high)))
    # The cost curve has corners, so the best of a fine grid brackets the minimum first.
    grid = np.linspace(*bounds, 400)
    best = int(np.argmin([loss(x) for x in grid]))
    around = (grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)])
    found = minimize_scalar(loss, bounds=around, method="bounded", options={"xatol": 1e-8})
    n = float(np.exp(found.x))
    return Optimum(n, flops / flops_per_token(n), float(found.fun), best in (0, len(grid) - 1))
