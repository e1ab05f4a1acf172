"""Do parabolas through runs of equal compute agree with the law? Hoffmann et al.'s second approach, as a cross-check.

At one compute the loss over log N is near a parabola, whose lowest point is the best size. Studies whose budgets are FLOP have
such runs. From others the loss of each size is interpolated over log C between its runs (and never beyond them).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.polynomial import Polynomial

from titans_pretrain.scaling.collect import Point
from titans_pretrain.scaling.law import Law, optimum

LEVELS = 3
"""Interpolated levels of compute, spread over where at least three sizes have runs on both sides."""
FACTOR = 2.0
"""The best sizes of parabola and law that differ by more are told."""
LOSS_ERROR = 0.01
"""So are lowest losses that differ by more than this share."""


@dataclass(frozen=True)
class Valley:
    """One level of compute."""

    flops: float
    parameters: tuple[float, ...]
    losses: tuple[float, ...]
    interpolated: bool
    curve: tuple[float, float, float]
    """Loss = c0 + c1 x + c2 x^2, x = log N."""
    best_parameters: float | None
    """Where the parabola is lowest; None: not between the smallest and the largest size."""
    best_loss: float | None
    law_parameters: float
    law_loss: float

    @property
    def verdict(self) -> str:
        """One sentence if there is something to warn of, else nothing."""
        level = f"at {self.flops:.3g} FLOP"
        if self.best_parameters is None or self.best_loss is None:
            return f"{level} the parabola has no lowest point between the sizes: add smaller or larger ones to check the law"
        ratio = self.law_parameters / self.best_parameters
        if not 1 / FACTOR <= ratio <= FACTOR:
            return (
                f"{level} the law's best size is {self.law_parameters:.3g} parameters, the parabola's "
                f"{self.best_parameters:.3g}: do not trust the split of the budget"
            )
        if abs(self.law_loss / self.best_loss - 1) > LOSS_ERROR:
            return f"{level} the law's lowest loss is {self.law_loss:.4f}, the parabola's {self.best_loss:.4f}"
        return ""


def valleys(points: Sequence[Point], law: Law, cost: Callable[[float], float], count: str, equal: bool) -> list[Valley]:
    """The parabolas of one series.

    Args:
        cost: FLOP per token as a function of N.
        equal: the study's budgets are FLOP, so runs of one budget have equal compute.
    """
    groups = _equal(points, count) if equal else _interpolated(points, count)
    found = []
    for flops, n, losses in groups:
        curve = Polynomial.fit(np.log(n), losses, 2).convert().coef
        c0, c1, c2 = (float(c) for c in np.pad(curve, (0, 3 - len(curve))))
        lowest = -c1 / (2 * c2) if c2 > 0 else np.nan
        inside = bool(np.log(min(n)) <= lowest <= np.log(max(n)))
        best = optimum(law, flops, cost, min(n) / 30, max(n) * 30)
        found.append(
            Valley(
                flops,
                tuple(n),
                tuple(losses),
                not equal,
                (c0, c1, c2),
                float(np.exp(lowest)) if inside else None,
                c0 + c1 * lowest + c2 * lowest**2 if inside else None,
                best.parameters,
                best.loss,
            )
        )
    return found


Group = tuple[float, list[float], list[float]]


def _equal(points: Sequence[Point], count: str) -> list[Group]:
    groups = []
    for budget in dict.fromkeys(point.budget for point in points):
        here = sorted((p for p in points if p.budget == budget), key=lambda p: p.parameters[count])
        if len({p.parameters[count] for p in here}) >= 3:
            flops = float(np.exp(np.mean([np.log(p.flops) for p in here])))
            groups.append((flops, [float(p.parameters[count]) for p in here], [p.loss for p in here]))
    return groups


def _interpolated(points: Sequence[Point], count: str) -> list[Group]:
    lines = {}
    for n in sorted({point.parameters[count] for point in points}):
        runs = sorted((p.flops, p.loss) for p in points if p.parameters[count] == n)
        if len(runs) > 1:
            lines[float(n)] = (np.log([flops for flops, _ in runs]), np.array([loss for _, loss in runs]))
    if len(lines) < 3:
        return []
    ends = [(x[0], x[-1]) for x, _ in lines.values()]
    levels = [
        x
        for x in np.linspace(min(low for low, _ in ends), max(high for _, high in ends), 50)
        if sum(low <= x <= high for low, high in ends) >= 3
    ]
    if not levels:
        return []
    chosen = sorted({round(i) for i in np.linspace(0, len(levels) - 1, LEVELS + 2)[1:-1]})
    groups = []
    for x in (levels[i] for i in chosen):
        here = {n: float(np.interp(x, *line)) for n, line in lines.items() if line[0][0] <= x <= line[0][-1]}
        groups.append((float(np.exp(x)), list(here), list(here.values())))
    return groups
