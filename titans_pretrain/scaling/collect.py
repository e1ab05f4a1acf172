"""Which points do the finished runs leave, and which runs are left out, and why?

Reads RUN/config.yaml and RUN/metrics.jsonl (train/report.py says what is in them), never logs. Where metrics end early, the
launcher's marker RUN/FAILED tells a run that diverged and was stopped from one that is not finished.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titans_pretrain.config import Config, load_config
from titans_pretrain.errors import UserError
from titans_pretrain.model.cost import flops_per_token
from titans_pretrain.scaling.grid import Grid, PlannedRun, counts, ranks
from titans_pretrain.scaling.study import COUNTS, Collecting, Study

POINTS, RATES = "points.json", "learning_rate.json"
FAILED = "FAILED"
"""The marker of launch/ for a run that was given up, with the reason."""


@dataclass(frozen=True)
class Point:
    """What one run came to."""

    run: str
    series: str
    size: str
    budget: str
    swept: bool
    parameters: Mapping[str, int]
    """N by study.COUNTS."""
    tokens: int
    """D: tokens trained on."""
    flops_per_token: float
    loss: float
    """The one of study.collect.loss, nats per token."""
    valid_loss: float
    """Of the last step; NaN where there is none."""
    train_loss: float
    """Mean of the last steps."""
    learning_rate: float
    batch_tokens: int
    seconds: float
    """Of training steps, evaluation and saving not counted."""
    tokens_per_second: float
    mfu: float
    """Mean over the run, weighted by time; 0: not in the metrics."""
    peak_tflops: float
    """What MFU divides by, of one rank; 0: unknown."""

    @property
    def flops(self) -> float:
        return self.flops_per_token * self.tokens


class LeftOut(Exception):
    """Why a run is no point."""


def read_rows(run: Path) -> list[dict[str, Any]]:
    """All rows of metrics.jsonl but a last one cut short.

    Raises:
        LeftOut: there are none, or one before the last is damaged.
    """
    try:
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError:
        raise LeftOut("not started: no metrics.jsonl") from None
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise LeftOut(f"metrics.jsonl is damaged in line {number}") from None
    return rows


def read_point(planned: PlannedRun, rules: Collecting) -> Point:
    """The point of one run.

    Raises:
        LeftOut: it is not finished, diverged, or was trained by other settings than the study has now.
    """
    folder = planned.config.run_dir
    rows = read_rows(folder)
    try:
        config = load_config(folder / "config.yaml")
    except UserError as error:
        raise LeftOut(str(error)) from None
    differs = differences(planned.config, config)
    if differs:
        raise LeftOut(f"trained with other settings than the study has: {'; '.join(differs)}")
    steps = [row for row in rows if "loss" in row]
    skipped = sum(1 for row in rows if row.get("skipped"))
    last = max((row["step"] for row in rows), default=0)
    _check_finite(steps)
    if skipped:
        raise LeftOut(f"diverged: {skipped} bad steps were skipped")
    rise, at = largest_rise(steps, rules.last)
    if rise > rules.spike:
        raise LeftOut(f"diverged: the loss rose by {rise:.2f} nats up to step {at}")
    if not steps or last < config.num_steps:
        raise LeftOut(_why_incomplete(folder, f"step {last} of {config.num_steps}"))
    evaluations = [row for row in rows if "valid_loss" in row and row["step"] == last]
    valid = float(evaluations[-1]["valid_loss"]) if evaluations else math.nan
    end = [row["loss"] for row in steps[-rules.last :]]
    train = sum(end) / len(end)
    loss = valid if rules.loss == "valid" else train
    if not math.isfinite(loss):
        why = f"is {valid}" if evaluations else "is not in the metrics"
        raise LeftOut(f"incomplete: the validation loss of the last step ({last}) {why}")
    seconds = sum(row["seconds"] for row in steps)
    tokens = int(steps[-1]["tokens"])
    mfu = sum(row.get("mfu", 0.0) * row["seconds"] for row in steps) / seconds
    tflops = sum(row.get("tflops", 0.0) * row["seconds"] for row in steps) / seconds
    return Point(
        run=planned.name,
        series=planned.series,
        size=planned.size,
        budget=planned.budget,
        swept=planned.swept,
        parameters=counts(config.model),
        tokens=tokens,
        flops_per_token=flops_per_token(config.model, config.data.seq_len),
        loss=loss,
        valid_loss=valid,
        train_loss=train,
        learning_rate=config.optimizer.learning_rate,
        batch_tokens=config.data.batch_tokens,
        seconds=seconds,
        tokens_per_second=tokens / seconds,
        mfu=mfu,
        peak_tflops=tflops / mfu / ranks(config) if mfu else 0.0,
    )


def _why_incomplete(folder: Path, place: str) -> str:
    try:
        text = " ".join((folder / FAILED).read_text(encoding="utf-8").split())
    except OSError:
        return f"incomplete: {place}"
    # What the trainer says when it stops at a number that is none (faults.on_not_finite=stop).
    kind = "diverged" if re.search(r"the (loss|gradient norm) is (nan|-?inf)", text) else "failed"
    return f"{kind}: {place}: {text}"


def _check_finite(steps: Sequence[Mapping[str, Any]]) -> None:
    for row in steps:
        for name in ("loss", "grad_norm"):
            if not math.isfinite(row.get(name, 0.0)):
                raise LeftOut(f"diverged: {name} is {row[name]} at step {row['step']}")


def largest_rise(steps: Sequence[Mapping[str, Any]], window: int) -> tuple[float, int]:
    """How far the mean training loss of `window` steps ever rises above its lowest before, and the step where it does."""
    losses = [row["loss"] for row in steps]
    lowest, rise, at = math.inf, 0.0, 0
    for end in range(min(window, len(losses)), len(losses) + 1):
        mean = sum(losses[max(0, end - window) : end]) / min(window, end or 1)
        lowest = min(lowest, mean)
        if mean - lowest > rise:
            rise, at = mean - lowest, steps[end - 1]["step"]
    return rise, at


def differences(planned: Config, trained: Config) -> list[str]:
    """Settings that decide the loss and differ, as `key is A in the run, B in the study`."""
    found = []
    kept_data = ("seq_len", "batch_tokens", "batch_ramp", "reset_at_documents", "phases")
    for section in ("model", "optimizer", "schedule", "data", "run", "engine"):
        ours, theirs = getattr(planned, section), getattr(trained, section)
        if section == "model":
            ours, theirs = ours.resolved(), theirs.resolved()
        keys = [f.name for f in dataclasses.fields(ours)]
        keys = {"data": list(kept_data), "run": ["seed"], "engine": ["precision"]}.get(section, keys)
        for key in keys:
            a, b = getattr(theirs, key), getattr(ours, key)
            if a != b and key != "compile":
                found.append(f"{section}.{key} is {a} in the run, {b} in the study")
    sources = [
        [Path(p).name for p in (c.data.path, *(s.path for s in c.data.sources)) if p] for c in (trained, planned)
    ]
    if sources[0] != sources[1]:
        found.append(f"the data is {', '.join(sources[0])} in the run, {', '.join(sources[1])} in the study")
    return found


@dataclass(frozen=True)
class Collected:
    """All that a study's runs tell."""

    points: tuple[Point, ...]
    """Of the grid; the winners of a learning-rate sweep among them."""
    swept: tuple[Point, ...]
    """All that a sweep tried."""
    left_out: Mapping[str, str]
    """Run: why."""
    rates: Mapping[str, Mapping[str, Any]]
    """By series, what the sweep settled: base, losses by value, warning."""


def collect(study: Study, grid: Grid) -> Collected:
    """Read every run of the grid, and settle what a complete sweep can settle. What was settled before stays, since the other
    runs were trained by it."""
    found: dict[str, Point] = {}
    left_out: dict[str, str] = {}
    for run in grid.runs:
        try:
            found[run.name] = read_point(run, study.collect)
        except LeftOut as error:
            left_out[run.name] = str(error)
    rates = {}
    before = read_rates(study)
    for series in dict.fromkeys(run.series for run in grid.sweep):
        runs = [run for run in grid.sweep if run.series == series]
        settled = before.get(series) or choose_rate(runs, found, left_out)
        if settled:
            rates[series] = settled
    bases = {series: settled["base"] for series, settled in rates.items()}
    winners = [run for run in grid.sweep if run.base == bases.get(run.series)]
    names = {run.name for run in (*winners, *(run for run in grid.points if not run.swept))}
    points = tuple(point for name, point in found.items() if name in names)
    return Collected(points, tuple(point for point in found.values() if point.swept), left_out, rates)


def choose_rate(
    runs: Sequence[PlannedRun], found: Mapping[str, Point], left_out: Mapping[str, str]
) -> dict[str, Any] | None:
    """The base with the lowest mean loss over the swept sizes; None while runs are missing. A base of which a run
    diverged is out.

    Raises:
        UserError: every base diverged.
    """
    losses: dict[float, float | str] = {}
    for base in sorted({run.base for run in runs}):
        reasons = [left_out.get(run.name, "") for run in runs if run.base == base]
        bad = [reason for reason in reasons if reason]
        if any(not reason.startswith("diverged") for reason in bad):
            return None
        values = [found[run.name].loss for run in runs if run.base == base and run.name in found]
        losses[base] = bad[0] if bad else sum(values) / len(values)
    numbers = {base: loss for base, loss in losses.items() if isinstance(loss, float)}
    if not numbers:
        raise UserError(f"every learning rate of {runs[0].series} diverged: lower learning_rate.sweep.values")
    best = min(numbers, key=lambda base: numbers[base])
    warning = ""
    if len(losses) > 1 and best in (min(losses), max(losses)):
        side = "smallest" if best == min(losses) else "largest"
        warning = (
            f"{best:g} is the {side} value tried, so a better one may lie beyond: widen learning_rate.sweep.values"
        )
    return {"base": best, "losses": {f"{base:g}": loss for base, loss in losses.items()}, "warning": warning}


def write(study: Study, collected: Collected) -> tuple[Path, Path]:
    """Write STUDY/points.json and STUDY/points.csv, and what the sweep settled to STUDY/learning_rate.json (delete it to
    choose anew).

    Raises:
        UserError: the folder cannot be written.
    """
    folder = study.folder
    tree = {
        "study": study.name,
        "loss": study.collect.loss,
        "points": [dataclasses.asdict(point) for point in collected.points],
        "sweep": [dataclasses.asdict(point) for point in collected.swept],
        "left_out": dict(collected.left_out),
        "learning_rate": dict(collected.rates),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / POINTS).write_text(json.dumps(tree, indent=1) + "\n")
        with open(folder / "points.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            names = [f.name for f in dataclasses.fields(Point) if f.name != "parameters"]
            writer.writerow([*names, *(f"parameters_{name}" for name in COUNTS), "flops"])
            for point in collected.points:
                row = [getattr(point, name) for name in names]
                writer.writerow([*row, *(point.parameters[name] for name in COUNTS), point.flops])
        if collected.rates:
            (folder / RATES).write_text(json.dumps(collected.rates, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; change dir or name of the study") from error
    return folder / POINTS, folder / "points.csv"


def read_points(path: Path) -> Collected:
    """What `write` wrote.

    Raises:
        UserError: it is not there or damaged.
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        points, swept = (tuple(Point(**each) for each in tree[key]) for key in ("points", "sweep"))
        return Collected(points, swept, tree["left_out"], tree["learning_rate"])
    except OSError:
        raise UserError(f"there is no {path}: run `tools/scaling_law.py collect` first") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not what `collect` writes: run it again ({error})") from None


def read_rates(study: Study) -> dict[str, Any]:
    """What an earlier `collect` settled, by series; empty where there is nothing.

    Raises:
        UserError: the file is damaged.
    """
    path = study.folder / RATES
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        if study.learning_rate.sweep is None:
            return {}
        for series, settled in tree.items():
            if settled["base"] not in study.learning_rate.sweep.values:
                raise UserError(
                    f"{path} settles {settled['base']} for {series}, which is not in learning_rate.sweep.values: delete the "
                    "file to choose anew, or put the value back"
                )
        return tree
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is not what `collect` writes: delete it and collect again") from None
