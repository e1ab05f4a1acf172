"""How did the runs of an ablation go? From their metrics and faults to one table and one plot (tools/ablate.py)."""

from __future__ import annotations

import enum
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from launch.sweep import Run
from titans_pretrain.train.lifecycle import FAILED, FAULTS
from tools.summarize_run import read_metrics


class State(enum.Enum):
    """How a run ended."""

    STABLE = "stable"
    UNSTABLE = "unstable"
    """Finite, but the outer gradient was above the limit."""
    DIVERGED = "diverged"
    """A loss, in training or validation, or a gradient is not finite."""
    FAILED = "failed"
    """For another reason: no result."""
    MISSING = "missing"
    """It has not ended yet."""


class Outcome(NamedTuple):
    """Of one run."""

    name: str
    state: State
    note: str
    """Why it is not stable, as the end of a sentence."""
    losses: dict[int, float]
    """Validation loss at the end, nats per token, by sequence length; {} where there is none."""
    norm: float
    """Largest norm of the outer gradient after the steps that do not count; NaN: no such step."""


def outcome(run: Run, after_step: int, gradient_norm: float) -> Outcome:
    """Read one run.

    Raises:
        UserError: its metrics are damaged.
    """
    folder, status = run.config.run_dir, run.status
    name = f"{run.point['setting']}, seed {run.point['seed']}"
    if status not in ("done", "failed"):
        return Outcome(name, State.MISSING, status, {}, math.nan)
    told = (folder / FAILED).read_text().strip() if status == "failed" else ""
    if not (folder / "metrics.jsonl").exists():
        return Outcome(name, State.FAILED, told, {}, math.nan)
    metrics = read_metrics(folder)
    norms = [row["grad_norm"] for row in metrics.steps if "grad_norm" in row and row["step"] > after_step]
    norm = max(norms, default=math.nan)
    losses = {}
    for row in metrics.evaluations:
        for multiple in run.config.eval.length_multiples:
            key = "valid_loss" if multiple == 1 else f"valid_loss_x{multiple}"
            if key in row:
                losses[multiple * run.config.data.seq_len] = float(row[key])
    bad = first_not_finite(folder)
    if bad is not None:
        return Outcome(name, State.DIVERGED, str(bad["text"]), {}, norm)
    if status == "failed":
        return Outcome(name, State.FAILED, told, {}, norm)
    endless = [length for length, loss in losses.items() if not math.isfinite(loss)]
    if endless:
        text = f"the validation loss is {losses[endless[0]]} at {endless[0]} tokens"
        return Outcome(name, State.DIVERGED, text, losses, norm)
    if not all(math.isfinite(row["loss"]) for row in metrics.steps):
        return Outcome(name, State.DIVERGED, "a training loss is not finite", losses, norm)
    if norm > gradient_norm:
        return Outcome(name, State.UNSTABLE, f"the gradient norm reached {norm:.3g}", losses, norm)
    return Outcome(name, State.STABLE, "", losses, norm)


def first_not_finite(folder: Path) -> dict[str, Any] | None:
    """The first entry of a run's faults.jsonl of a step that was not finite."""
    try:
        lines = (folder / FAULTS).read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue  # still being written
        if row.get("kind") == "not_finite":
            return row
    return None


# ----------------------------------------------------------------------------------------------------------------- table


def markdown(
    outcomes: Mapping[str, Sequence[Outcome]],
    settings: Mapping[str, Mapping[str, Any]],
    after_step: int,
    gradient_norm: float,
) -> str:
    """A row a setting: mean and standard deviation over its finite runs; below, each run that is not stable."""
    lengths = sorted({length for runs in outcomes.values() for o in runs for length in o.losses})
    norm = "largest gradient norm" + (f" after step {after_step}" if after_step else "")
    heads = ["setting", "changes", *(f"validation loss at {n:,}" for n in lengths), norm, "diverged"]
    if math.isfinite(gradient_norm):
        heads.append(f"norm above {gradient_norm:g}")
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for name, runs in outcomes.items():
        ended = [o for o in runs if o.state in (State.STABLE, State.UNSTABLE)]
        diverged = [o for o in runs if o.state is State.DIVERGED]
        changes = ", ".join(f"`{key}={value}`" for key, value in settings[name].items())
        cells = [name, changes or "-", *(spread([o.losses[n] for o in ended if n in o.losses]) for n in lengths)]
        norms = [o.norm for o in runs if not math.isnan(o.norm)]
        cells += [f"{max(norms):.3g}" if norms else "-", f"{len(diverged)} of {len(ended) + len(diverged)}"]
        if math.isfinite(gradient_norm):
            cells.append(str(sum(o.norm > gradient_norm for o in runs)))
        lines.append("| " + " | ".join(cells) + " |")
    odd = [o for runs in outcomes.values() for o in runs if o.state is not State.STABLE]
    if odd:
        lines += ["", *(f"- {o.name}: {o.state.value}{': ' + o.note if o.note else ''}" for o in odd)]
    return "\n".join(lines) + "\n"


def spread(values: Sequence[float]) -> str:
    """Mean and sample standard deviation; the latter needs two values."""
    if not values:
        return "-"
    mean = f"{statistics.mean(values):.4f}"
    return f"{mean} ± {statistics.stdev(values):.4f}" if len(values) > 1 else mean


# ------------------------------------------------------------------------------------------------------------------ plot


def plot(outcomes: Mapping[str, Sequence[Outcome]], stem: Path, title: str) -> list[Path]:
    """A panel for the loss at the training length, and one for how much more it is at each longer one; a dot a run, a bar
    the mean, a cross each run that diverged -> the files STEM.png and STEM.svg."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    names = list(outcomes)
    lengths = sorted({length for runs in outcomes.values() for o in runs for length in o.losses})
    figure = Figure(figsize=(4.2 + 3.4 * len(lengths), 1.6 + 0.34 * len(names)), layout="constrained")
    panels = figure.subplots(1, max(1, len(lengths)), sharey=True, squeeze=False)[0]
    for panel, length in zip(panels, lengths, strict=False):
        first = length == lengths[0]
        points: dict[int, list[float]] = {}
        for y, runs in enumerate(outcomes.values()):
            ended = [o.losses for o in runs if o.state in (State.STABLE, State.UNSTABLE) and length in o.losses]
            points[y] = [losses[length] - (0.0 if first else losses[lengths[0]]) for losses in ended]
            if points[y]:
                panel.plot(points[y], [y] * len(points[y]), "o", color="#1f5fa8", alpha=0.55, markersize=5)
                panel.plot([statistics.mean(points[y])], [y], "|", color="#0b2545", markersize=15, markeredgewidth=2.2)
        if points.get(0):
            panel.axvline(statistics.mean(points[0]), color="#999999", linewidth=0.9, linestyle=":")
        for y, runs in enumerate(outcomes.values()):
            count = sum(o.state is State.DIVERGED for o in runs)
            if count:
                panel.annotate(
                    f"× {count} of {len(runs)} diverged",
                    (1.0, y),
                    xycoords=("axes fraction", "data"),
                    ha="right",
                    va="center",
                    color="#b3261e",
                    fontsize=8,
                    bbox={"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.85},
                )
        panel.set_xlabel(
            f"validation loss at {length:,} tokens" if first else f"at {length:,}, less that at {lengths[0]:,}"
        )
        panel.grid(axis="x", color="#dddddd", linewidth=0.6)
        panel.set_axisbelow(True)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].set_ylim(len(names) - 0.4, -0.6)
    figure.suptitle(f"{title}: a dot is a run, a bar the mean; dotted: {names[0]}", fontsize=10)
    paths = [stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "svg")]
    with rc_context({"svg.hashsalt": "titans_pretrain"}):  # the same runs give the same file
        for path in paths:
            figure.savefig(path, dpi=160, metadata={"Date": None} if path.suffix == ".svg" else None)
    return paths
