"""What do the points and laws look like: loss over compute, isoFLOP curves, residuals; each as PNG and SVG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from titans_pretrain.scaling.analysis import SeriesFit
from titans_pretrain.scaling.law import optimum
from titans_pretrain.scaling.study import Study

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999933")
"""Okabe and Ito's, which the colour-blind can tell apart too."""
MARKERS = "osD^vPX*"


def plot(study: Study, fitted: Sequence[SeriesFit]) -> list[Path]:
    """Write STUDY/plots/{loss_vs_compute,isoflop,residuals}.{png,svg}; returns the files."""
    folder = study.folder / "plots"
    folder.mkdir(parents=True, exist_ok=True)
    figures = {"loss_vs_compute": _loss(fitted), "isoflop": _isoflop(fitted), "residuals": _residuals(fitted)}
    files = []
    with matplotlib.rc_context({"svg.hashsalt": "titans_pretrain"}):  # the same points give the same file
        for name, figure in figures.items():
            for kind in ("png", "svg"):
                path = folder / f"{name}.{kind}"
                figure.savefig(path, dpi=150, metadata={"Date": None} if kind == "svg" else None)
                files.append(path)
    return files


def _figure(columns: int, rows: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, columns, squeeze=False).ravel())


def _style(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _loss(fitted: Sequence[SeriesFit]) -> Figure:
    """Every run, and the best loss of each compute by the law: solid within the runs, dashed for three times on."""
    figure, (axes,) = _figure(1, 1, 8, 5.5)
    for number, each in enumerate(fitted):
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        flops = np.array([p.flops for p in each.points])
        law = each.fit.law
        axes.scatter(
            flops, [p.loss for p in each.points], s=22, color=colour, marker=marker, alpha=0.75, label=each.series
        )
        sizes = [p.parameters[each.count] for p in each.points]
        span = np.geomspace(flops.min(), 3 * flops.max(), 60)
        best = [optimum(law, c, each.cost, min(sizes) / 30, max(sizes) * 30).loss for c in span]
        inside = span <= flops.max()
        axes.plot(span[inside], np.array(best)[inside], color=colour, lw=1.6)
        axes.plot(span[~inside], np.array(best)[~inside], color=colour, lw=1.6, ls="--")
    axes.set_xscale("log")
    _style(axes, "training compute, FLOP", "loss, nats per token")
    axes.set_title("Runs, and the best loss of each compute by the law", fontsize=11)
    axes.legend(frameon=False)
    return figure


def _isoflop(fitted: Sequence[SeriesFit]) -> Figure:
    """A panel a series: loss over N at some levels of compute; parabola dashed, law solid, their lowest points marked."""
    columns = min(2, len(fitted))
    figure, panels = _figure(columns, -(-len(fitted) // columns), 5.5, 4)
    for axes, each in zip(panels, fitted, strict=False):
        for number, valley in enumerate(each.valleys):
            colour = COLOURS[number % len(COLOURS)]
            n = np.geomspace(min(valley.parameters) * 0.8, max(valley.parameters) * 1.25, 80)
            fill = "none" if valley.interpolated else colour
            axes.scatter(valley.parameters, valley.losses, s=26, facecolors=fill, edgecolors=colour)
            c0, c1, c2 = valley.curve
            axes.plot(n, c0 + c1 * np.log(n) + c2 * np.log(n) ** 2, color=colour, ls="--", lw=1)
            tokens = valley.flops / np.array([each.cost(x) for x in n])
            axes.plot(n, each.fit.law.loss(n, tokens), color=colour, lw=1.5, label=f"{valley.flops:.2g} FLOP")
            if valley.best_parameters is not None and valley.best_loss is not None:
                axes.plot(valley.best_parameters, valley.best_loss, marker="v", color=colour, ms=7)
            if n[0] <= valley.law_parameters <= n[-1]:
                axes.plot(valley.law_parameters, valley.law_loss, marker="*", color=colour, ms=10)
        axes.set_xscale("log")
        axes.set_title(each.series, fontsize=11)
        _style(axes, f"parameters ({each.count.replace('_', ' ')})", "loss, nats per token")
        if each.valleys:
            axes.legend(frameon=False, fontsize=8)
        else:
            axes.text(0.5, 0.5, "no compute is spanned by three sizes", ha="center", transform=axes.transAxes)
    for axes in panels[len(fitted) :]:
        axes.set_axis_off()
    return figure


def _residuals(fitted: Sequence[SeriesFit]) -> Figure:
    """How far every run is from its law, in per cent of the loss; a pattern along compute is a law of the wrong form."""
    figure, (axes,) = _figure(1, 1, 8, 4)
    for number, each in enumerate(fitted):
        axes.scatter(
            [p.flops for p in each.points],
            100 * np.expm1(each.fit.residuals),
            s=22,
            color=COLOURS[number % len(COLOURS)],
            marker=MARKERS[number % len(MARKERS)],
            label=f"{each.series} (rms {100 * each.fit.rms:.2f} %)",
        )
    axes.axhline(0, color="black", lw=0.8)
    axes.set_xscale("log")
    _style(axes, "training compute, FLOP", "measured above the law, %")
    axes.legend(frameon=False, fontsize=8)
    return figure
