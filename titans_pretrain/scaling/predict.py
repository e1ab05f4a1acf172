"""What is the best model for a budget, how good will it be, what will it cost, and by which config is it trained?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from titans_pretrain.config import Config
from titans_pretrain.errors import UserError
from titans_pretrain.scaling.analysis import SeriesFit
from titans_pretrain.scaling.collect import Point
from titans_pretrain.scaling.fit import percentile
from titans_pretrain.scaling.grid import Series, Shape, all_series, complete, shape
from titans_pretrain.scaling.law import CostCurve, Optimum, optimum
from titans_pretrain.scaling.study import Study

REACH = 1e4
"""The best size is looked for up to so many times the largest that was trained."""
FAR = 100.0
"""Predictions beyond so many times the largest run's compute are warned of."""
MOST_LAYERS = 512
"""Where the dial ends."""

Interval = tuple[float, float]


@dataclass(frozen=True)
class Speed:
    """What a device does."""

    mfu: float
    peak_tflops: float
    source: str

    def hours(self, flops: float) -> float:
        """Device-hours."""
        return flops / (self.mfu * self.peak_tflops * 1e12) / 3600

    def flops(self, hours: float) -> float:
        return hours * 3600 * self.mfu * self.peak_tflops * 1e12


@dataclass(frozen=True)
class Prediction:
    """For one series and budget."""

    series: str
    flops: float
    best: Optimum
    """Of the law, at any size."""
    parameters_interval: Interval | None
    tokens_interval: Interval | None
    config: Config
    """Of the run that comes nearest on the dial."""
    parameters: int
    tokens: int
    run_flops: float
    loss: float
    """Of that run."""
    loss_interval: Interval | None
    warnings: tuple[str, ...]


def measured_speed(points: Sequence[Point], count: str, mfu: float | None, peak_tflops: float | None) -> Speed | None:
    """MFU and peak of the runs of the largest size, or what is given instead; None: the metrics have none.

    The largest, since small models leave a device idle: an MFU averaged over the grid would be of no model at all.
    """
    largest = max(point.parameters[count] for point in points)
    known = [p for p in points if p.parameters[count] == largest and p.mfu and p.peak_tflops]
    if known:
        seconds = sum(p.seconds for p in known)
        measured = sum(p.mfu * p.seconds for p in known) / seconds
        peak = sum(p.peak_tflops * p.seconds for p in known) / seconds
    elif not (mfu and peak_tflops):
        return None
    else:
        measured = peak = 0.0
    sources = [
        "--mfu" if mfu else "MFU measured in the largest size's runs",
        "--peak-tflops" if peak_tflops else "their peak",
    ]
    return Speed(mfu or measured, peak_tflops or peak, " and ".join(sources))


def predict(
    study: Study, fitted: SeriesFit, flops: float, vocab_size: int, base: float | None = None, name: str = ""
) -> Prediction:
    """The best run of `flops` for one series.

    Args:
        base: of the learning-rate rule; None: the study's own.
        name: of the run; empty: SERIES-FLOP.

    Raises:
        UserError: the law puts no bound on the size, or no size of the study comes near.
    """
    law, cost, count = fitted.fit.law, fitted.cost, fitted.count
    sizes = [point.parameters[count] for point in fitted.points]
    low, high = min(sizes) / REACH, max(sizes) * REACH
    series = next((each for each in all_series(study) if each.name == fitted.series), None)
    if series is None:
        raise UserError(f"the fit has a series {fitted.series} that the study lacks: run collect and fit again")
    best = optimum(law, flops, cost, low, high)
    if study.dial is not None and not best.at_edge:
        # Beyond the runs the cost is known too: what the dial's larger models do for a token.
        layers = max(study.dial.layers)
        larger: list[Shape] = []
        while layers < MOST_LAYERS and (not larger or larger[-1].counts[count] < 4 * best.parameters):
            layers *= 2
            larger.append(shape(study, series, study.dial.words(layers), vocab_size))
            known = [(p.parameters[count], p.flops_per_token) for p in fitted.points]
            known += [(of.counts[count], of.flops_per_token) for of in larger]
            cost = CostCurve([n for n, _ in known], [f for _, f in known])
            best = optimum(law, flops, cost, low, high)
    warnings = list(fitted.warnings)
    if best.at_edge:
        warnings.append("the law has no best size at this budget within reach: the size is the edge of the search")
    largest = max(point.flops for point in fitted.points)
    if flops > FAR * largest:
        warnings.append(
            f"{flops:.3g} FLOP are {flops / largest:,.0f} times the largest run: far beyond what was measured"
        )
    near = _nearest(study, fitted, series, best, flops, vocab_size)
    if study.dial is None and not min(sizes) <= best.parameters <= max(sizes):
        end = "largest" if best.parameters > max(sizes) else "smallest"
        warnings.append(
            f"the best size, {best.parameters:.3g} parameters, lies beyond the study's {end}, which is taken"
        )
    base = study.learning_rate.base if base is None else base
    config = complete(
        study, near, flops / near.flops_per_token, base, name or f"{fitted.series}-{flops:.3g}".replace("+", "")
    )
    tokens = config.steps.tokens(config.num_steps)
    n = near.counts[count]
    optima = [optimum(each, flops, cost, low, high) for each in fitted.fit.samples]
    return Prediction(
        series=fitted.series,
        flops=flops,
        best=best,
        parameters_interval=percentile([each.parameters for each in optima]) if optima else None,
        tokens_interval=percentile([each.tokens for each in optima]) if optima else None,
        config=config,
        parameters=n,
        tokens=tokens,
        run_flops=tokens * near.flops_per_token,
        loss=float(law.loss(n, tokens)),
        loss_interval=percentile([float(each.loss(n, tokens)) for each in fitted.fit.samples]) if optima else None,
        warnings=tuple(warnings),
    )


def _nearest(study: Study, fitted: SeriesFit, series: Series, best: Optimum, flops: float, vocab_size: int) -> Shape:
    """Of the sizes on both sides of the best one, that with the lower loss for these FLOP."""
    count = fitted.count
    if study.dial is None:
        near = [shape(study, series, words, vocab_size) for words in study.sizes.values()]
    else:
        dial = study.dial
        # Smallest number of layers with at least the best size, by halving: a model of 500 layers is slow to build.
        below, above = 0, 1
        while above < MOST_LAYERS and _parameters(study, series, above, vocab_size, count) < best.parameters:
            below, above = above, min(2 * above, MOST_LAYERS)
        while above - below > 1:
            middle = (below + above) // 2
            if _parameters(study, series, middle, vocab_size, count) < best.parameters:
                below = middle
            else:
                above = middle
        near = [shape(study, series, dial.words(n), vocab_size) for n in (below, above) if n]
    losses = [float(fitted.fit.law.loss(of.counts[count], flops / of.flops_per_token)) for of in near]
    return near[int(np.argmin(losses))]


def _parameters(study: Study, series: Series, layers: int, vocab_size: int, count: str) -> int:
    assert study.dial is not None
    return shape(study, series, study.dial.words(layers), vocab_size).counts[count]
