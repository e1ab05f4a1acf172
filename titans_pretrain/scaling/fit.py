"""Which constants does the law have, given the points; how sure is that, and does it foretell the largest budget?

The estimate is Hoffmann et al.'s third approach (arXiv 2203.15556, appendix D.3): the Huber sum of the residuals of log L.
For given exponents the law is linear in E, A and B, so these are found by non-negative linear least squares, reweighted
until they are those of the Huber sum (variable projection); only the two exponents are searched, from a grid of starts. A last
descent in all five constants ends it to the precision of the arithmetic: a search cut short gave the published
constants of 2022 their error (arXiv 2404.10102).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize, nnls

from titans_pretrain.errors import UserError
from titans_pretrain.scaling.law import CONSTANTS, Law

Array = NDArray[np.float64]

DELTA = 1e-3
"""Where Huber's loss turns from squares to absolute values: residuals of a thousandth of the loss, as in the paper."""
STARTS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.65, 0.8, 1.0, 1.3)
"""Values of each exponent that the search begins with."""
BOUNDS = (0.01, 3.0)
"""Between which exponents are searched."""
KEPT = 3
"""Starts that are followed to their end."""
MIN_POINTS = 6
"""One more than there are constants."""
MIN_SIZES = 3
"""Different N, and different D: E, A and alpha are three numbers."""


TOGETHER = 0.99
"""Correlation of log N and log D from which they cannot be told apart."""


@dataclass(frozen=True)
class Fit:
    """A law and what there is to say about it."""

    law: Law
    huber: float
    """The sum that was made small."""
    residuals: Array
    """[n] log(measured) - log(law)."""
    samples: tuple[Law, ...] = ()
    """Laws of the bootstrap."""

    @property
    def rms(self) -> float:
        """Root of the mean squared residual of log L."""
        return float(np.sqrt(np.mean(self.residuals**2)))

    def interval(self, name: str, level: float = 0.95) -> tuple[float, float]:
        """The bootstrap's percentile interval of one constant."""
        return percentile([getattr(law, name) for law in self.samples], level)

    @property
    def warnings(self) -> list[str]:
        """What makes the constants doubtful, in sentences."""
        said = []
        for name, what in (("A", "the size"), ("B", "the tokens")):
            if getattr(self.law, name) < 1e-6:  # nats at N or D of 1, less everywhere else
                said.append(f"{name} is 0: in these points the loss does not fall with {what}")
        if self.law.E <= 0:
            said.append("E is 0: the points are too far from their limit to show one")
        for name in ("alpha", "beta"):
            if not BOUNDS[0] * 1.01 < getattr(self.law, name) < BOUNDS[1] * 0.99:
                said.append(f"{name} is at the edge of the search, {getattr(self.law, name):.3g}")
        return said


def percentile(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """The interval that holds `level` of `values`."""
    tail = 50 * (1 - level)
    low, high = np.percentile(values, [tail, 100 - tail])
    return float(low), float(high)


def check_points(parameters: Any, tokens: Any, losses: Any, what: str) -> None:
    """Refuse points that cannot hold five constants.

    Raises:
        UserError: too few points, or too few different sizes or lengths of training.
    """
    for name, values, key in (
        ("model sizes", parameters, "sizes"),
        ("numbers of training tokens", tokens, "budgets"),
    ):
        different = len(set(np.round(np.log(np.asarray(values, float)), 2)))  # within 1 %
        if different < MIN_SIZES:
            raise UserError(
                f"{what} has {different} different {name} in {len(losses)} finished runs, but a law needs {MIN_SIZES}: add "
                f"to `{key}` of the study"
            )
    if len(losses) < MIN_POINTS:
        raise UserError(
            f"{what} has {len(losses)} finished runs, but five constants need at least {MIN_POINTS}: add sizes or budgets"
        )
    if abs(np.corrcoef(np.log(parameters), np.log(tokens))[0, 1]) > TOGETHER:
        raise UserError(
            f"in {what} N and D move together (one compute, or one number of tokens per parameter), so no law can tell them "
            "apart: add to `budgets` of the study"
        )
    if not np.all(np.isfinite(losses)) or np.min(losses) <= 0:
        raise UserError(f"{what} has losses that are not positive numbers")


def fit(parameters: Any, tokens: Any, losses: Any, what: str = "the study") -> Fit:
    """The law through points [n] of N, D and loss.

    Raises:
        UserError: `what` has too few points, sizes or lengths of training.
    """
    n, d, y = (np.asarray(values, float) for values in (parameters, tokens, losses))
    check_points(n, d, y, what)
    points = _Points(n, d, y)
    starts = sorted((points.projected(np.array([a, b]))[0], a, b) for a in STARTS for b in STARTS)
    best: tuple[float, Array] | None = None
    for _, a, b in starts[:KEPT]:
        found = points.descend(points.search(a, b))
        if best is None or found[0] < best[0]:
            best = found
    assert best is not None
    return Fit(points.law(best[1]), best[0], points.residuals(best[1]))


def bootstrap(
    first: Fit, parameters: Any, tokens: Any, losses: Any, samples: int, seed: int = 0, what: str = "the study"
) -> Fit:
    """`first` with the laws of `samples` sets of runs drawn from the points with replacement. Draws that cannot hold five
    constants (too few different sizes) are drawn again."""
    n, d, y = (np.asarray(values, float) for values in (parameters, tokens, losses))
    generator = np.random.default_rng(seed)
    laws: list[Law] = []
    refused = 0
    while len(laws) < samples:
        chosen = generator.integers(len(y), size=len(y))
        try:
            check_points(n[chosen], d[chosen], y[chosen], what)
        except UserError:
            refused += 1
            if refused > 20 * samples + 100:
                raise
            continue
        points = _Points(n[chosen], d[chosen], y[chosen])
        # From the whole set's exponents: near enough for one descent, and a start of its own for those that lie elsewhere.
        found = [points.descend(points.search(a, b)) for a, b in ((first.law.alpha, first.law.beta), (0.4, 0.4))]
        laws.append(points.law(min(found, key=lambda pair: pair[0])[1]))
    return Fit(first.law, first.huber, first.residuals, tuple(laws))


@dataclass(frozen=True)
class HeldOut:
    """How a law made without the largest budget foretells it."""

    budget: str
    law: Law
    names: tuple[str, ...]
    predicted: tuple[float, ...]
    measured: tuple[float, ...]

    @property
    def error(self) -> float:
        """Mean of |predicted / measured - 1|."""
        return float(np.mean(np.abs(np.array(self.predicted) / np.array(self.measured) - 1)))


def hold_out(
    parameters: Any, tokens: Any, losses: Any, names: Sequence[str], held: Sequence[bool], budget: str
) -> HeldOut:
    """Fit the points that are not `held`, predict those that are.

    Raises:
        UserError: too little is left to fit.
    """
    n, d, y, out = np.asarray(parameters, float), np.asarray(tokens, float), np.asarray(losses, float), np.array(held)
    law = fit(n[~out], d[~out], y[~out], f"what is left without the largest budget ({budget})").law
    return HeldOut(
        budget,
        law,
        tuple(name for name, is_out in zip(names, held, strict=True) if is_out),
        tuple(float(x) for x in law.loss(n[out], d[out])),
        tuple(float(x) for x in y[out]),
    )


class _Points:
    """The points, in units in which their middle is 1: E, A' = A / N0^alpha and B' = B / D0^beta are then losses of like size
    and little correlated with the exponents.

    The five constants as one vector: (E, A', B', alpha, beta).
    """

    def __init__(self, n: Array, d: Array, y: Array) -> None:
        self.log_n, self.log_d = np.log(n), np.log(d)
        self.middle = float(self.log_n.mean()), float(self.log_d.mean())
        self.u, self.v = self.log_n - self.middle[0], self.log_d - self.middle[1]
        self.y, self.log_y = y, np.log(y)

    def law(self, x: Array) -> Law:
        e, a, b, alpha, beta = (float(value) for value in x)
        law = Law(e, a * np.exp(alpha * self.middle[0]), b * np.exp(beta * self.middle[1]), alpha, beta)
        return Law(**{name: float(getattr(law, name)) for name in CONSTANTS})

    def residuals(self, x: Array) -> Array:
        return self.log_y - np.log(x[0] + x[1] * np.exp(-x[3] * self.u) + x[2] * np.exp(-x[4] * self.v))

    def projected(self, exponents: Array) -> tuple[float, Array]:
        """The Huber sum, and all five constants, with the best E, A', B' for these exponents."""
        columns = np.stack([np.ones_like(self.u), np.exp(-exponents[0] * self.u), np.exp(-exponents[1] * self.v)], 1)
        weight = 1 / self.y  # relative errors, for small ones those of the logarithm
        best = (np.inf, np.zeros(5))
        for _ in range(6):
            linear, _ = nnls(columns * weight[:, None], self.y * weight)
            x = np.concatenate([linear, exponents])
            residuals = self.residuals(x)
            total = huber(residuals)
            if total >= best[0] * (1 - 1e-9):
                break
            best = (total, x)
            # Huber's weights: 1 within delta, delta / |r| beyond.
            weight = np.sqrt(DELTA / np.maximum(np.abs(residuals), DELTA)) / self.y
        return best

    def search(self, alpha: float, beta: float) -> Array:
        """Follow the projected sum in the two exponents alone; all five constants of where it ends."""

        def total(exponents: Array) -> float:
            inside = np.clip(exponents, *BOUNDS)
            return self.projected(inside)[0] + float(np.sum(np.abs(exponents - inside)))

        options = {"xatol": 1e-4, "fatol": 1e-10, "maxfev": 200}
        found = minimize(total, [alpha, beta], method="Nelder-Mead", options=options)
        return self.projected(np.clip(found.x, *BOUNDS))[1]

    def descend(self, x: Array) -> tuple[float, Array]:
        """From `x` down in all five constants. A constant that is 0 may stay there."""
        bounds = [(0.0, None), (0.0, None), (0.0, None), BOUNDS, BOUNDS]
        before = huber(self.residuals(x))
        options = {"maxiter": 2000, "ftol": 1e-15, "gtol": 1e-12}
        found = minimize(self._huber_and_gradient, x, jac=True, method="L-BFGS-B", bounds=bounds, options=options)
        return (float(found.fun) / 1e3, found.x) if found.fun / 1e3 < before else (before, x)

    def _huber_and_gradient(self, x: Array) -> tuple[float, Array]:
        p, q = np.exp(-x[3] * self.u), np.exp(-x[4] * self.v)
        model = np.maximum(x[0] + x[1] * p + x[2] * q, 1e-12)
        residuals = self.log_y - np.log(model)
        slope = -np.clip(residuals, -DELTA, DELTA) / model
        parts = [np.ones_like(p), p, q, -x[1] * self.u * p, -x[2] * self.v * q]
        # Times 1e3: the sums are of the size of delta squared, where the method's own tolerances would end it.
        return 1e3 * huber(residuals), 1e3 * np.array([float(np.sum(slope * part)) for part in parts])


def huber(residuals: Array) -> float:
    """The sum of r^2 / 2 within DELTA, DELTA (|r| - DELTA / 2) beyond."""
    size = np.abs(residuals)
    return float(np.sum(np.where(size <= DELTA, 0.5 * size**2, DELTA * (size - 0.5 * DELTA))))
