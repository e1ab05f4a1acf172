"""How does the needle grid look? A heat map of depth x length for each needle task, as PNG."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from titans_pretrain.errors import UserError

MEASURES = (("score", "answer written, %"), ("token_accuracy", "answer's tokens, %"))


def write_heat_map(path: Path, results: Mapping[str, Any], title: str) -> None:
    """One row of panels for each needle task of `results`: what it wrote, and its accuracy on the answer's tokens.

    Raises:
        UserError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("--png needs matplotlib: pip install 'titans_pretrain[scaling]', or drop --png") from None
    tasks = {name: result["cells"] for name, result in results.items() if name.startswith("niah_")}
    figure = Figure(figsize=(10, 0.8 + 2.6 * len(tasks)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(tasks), len(MEASURES), squeeze=False)
    image = None
    for (name, cells), row in zip(tasks.items(), panels, strict=True):
        lengths = sorted({cell["length"] for cell in cells})
        depths = sorted({cell["depth"] for cell in cells})
        for (key, label), axes in zip(MEASURES, row, strict=True):
            of = {(cell["depth"], cell["length"]): cell[key] for cell in cells}
            values = [[of[depth, length] for length in lengths] for depth in depths]
            image = axes.imshow(values, cmap="RdYlGn", vmin=0, vmax=100, aspect="auto")
            axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
            axes.set_yticks(range(len(depths)), [f"{100 * depth:g} %" for depth in depths])
            axes.set_title(f"{name}: {label}", fontsize=9)
            axes.set_xlabel("tokens")
            axes.set_ylabel("depth")
            for y, line in enumerate(values):
                for x, value in enumerate(line):
                    axes.text(x, y, f"{value:.0f}", ha="center", va="center", fontsize=8)
    if image is not None:
        figure.colorbar(image, ax=panels, shrink=0.6)
    figure.suptitle(title)
    try:
        figure.savefig(path, dpi=110)
    except OSError as error:
        raise UserError(f"cannot write --png {path}: {error.strerror}") from error
