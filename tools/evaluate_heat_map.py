"""How does the needle grid look? A heat map of depth x length for each needle task, as PNG."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from titans_pretrain.errors import UserError

MEASURES = (("score", "answer written, %"), ("token_accuracy", "answer's tokens, %"), ("nll", "nats per token"))


def write_heat_map(path: Path, results: Mapping[str, Any], title: str) -> None:
    """One row of panels for each needle task of `results`: what was written, and accuracy and loss on the answer's tokens.
    Percentages are coloured from 0 to 100, losses over the range of the figure; light is good.

    Raises:
        UserError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("--png needs matplotlib: pip install 'titans_pretrain[scaling]', or drop --png") from None
    tasks = {name: result["cells"] for name, result in results.items() if name.startswith("niah_")}
    losses = [cell["nll"] for cells in tasks.values() for cell in cells if cell["nll"] is not None] or [0.0]
    figure = Figure(figsize=(13, 0.8 + 2.6 * len(tasks)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(tasks), len(MEASURES), squeeze=False)
    for (name, cells), row in zip(tasks.items(), panels, strict=True):
        lengths = sorted({cell["length"] for cell in cells})
        depths = sorted({cell["depth"] for cell in cells})
        for (key, label), axes in zip(MEASURES, row, strict=True):
            of = {(cell["depth"], cell["length"]): cell[key] for cell in cells}
            values = [[math.nan if of[d, n] is None else of[d, n] for n in lengths] for d in depths]
            percent = key != "nll"
            low, high = (0.0, 100.0) if percent else (min(losses), max(losses))
            image = axes.imshow(values, cmap="viridis" if percent else "viridis_r", vmin=low, vmax=high, aspect="auto")
            axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
            axes.set_yticks(range(len(depths)), [f"{100 * depth:g} %" for depth in depths])
            axes.set_title(f"{name}: {label}", fontsize=9)
            axes.set_xlabel("tokens")
            axes.set_ylabel("depth")
            for y, line in enumerate(values):
                for x, value in enumerate(line):
                    light = (value > 60) if percent else value < (low + high) / 2
                    text = f"{value:.0f}" if percent else f"{value:.2f}"
                    axes.text(x, y, text, ha="center", va="center", fontsize=8, color="black" if light else "white")
            figure.colorbar(image, ax=axes)
    figure.suptitle(title)
    try:
        figure.savefig(path, dpi=110)
    except OSError as error:
        raise UserError(f"cannot write --png {path}: {error.strerror}") from error
