"""All that the points of a study say, series by series: the law, how sure it is, and its checks; kept in STUDY/fit.json."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from titans_pretrain.errors import UserError
from titans_pretrain.scaling import fit as fits
from titans_pretrain.scaling.collect import Point
from titans_pretrain.scaling.fit import Fit, HeldOut
from titans_pretrain.scaling.isoflop import Valley, valleys
from titans_pretrain.scaling.law import CONSTANTS, CostCurve, Law
from titans_pretrain.scaling.study import Study

FILE = "fit.json"


@dataclass(frozen=True)
class SeriesFit:
    """One series."""

    series: str
    count: str
    points: tuple[Point, ...]
    fit: Fit
    held_out: HeldOut | None
    valleys: tuple[Valley, ...]
    remarks: tuple[str, ...]
    """Checks that could not be made, and why."""

    @property
    def cost(self) -> CostCurve:
        """FLOP per token over N."""
        return CostCurve([p.parameters[self.count] for p in self.points], [p.flops_per_token for p in self.points])

    @property
    def warnings(self) -> list[str]:
        return [*self.fit.warnings, *(valley.verdict for valley in self.valleys if valley.verdict)]


def analyse(study: Study, points: Sequence[Point], series: str, count: str, samples: int, seed: int = 0) -> SeriesFit:
    """Fit one series, draw the bootstrap, hold out the largest budget, and lay parabolas.

    Args:
        count: which N, one of study.COUNTS.
        samples: sets of runs drawn; 0: no intervals.

    Raises:
        UserError: its points cannot hold a law.
    """
    mine = tuple(point for point in points if point.series == series)
    n, d, y = _columns(mine, count)
    fit = fits.fit(n, d, y, series)
    if samples:
        fit = fits.bootstrap(fit, n, d, y, samples, seed, series)
    remarks = []
    held_out = None
    largest = mine[int(np.argmax([_budget_rank(study, point) for point in mine]))].budget
    try:
        held = [point.budget == largest for point in mine]
        held_out = fits.hold_out(n, d, y, [point.run for point in mine], held, largest)
    except UserError as error:
        remarks.append(f"no test on the largest budget: {error}")
    cost = CostCurve(n, [point.flops_per_token for point in mine])
    found = valleys(mine, fit.law, cost, count, study.budget_kind == "flops")
    if not found:
        remarks.append("no isoFLOP check: no compute is spanned by the runs of three sizes")
    return SeriesFit(series, count, mine, fit, held_out, tuple(found), tuple(remarks))


def _columns(points: Sequence[Point], count: str) -> tuple[list[float], list[float], list[float]]:
    return [p.parameters[count] for p in points], [p.tokens for p in points], [p.loss for p in points]


def _budget_rank(study: Study, point: Point) -> float:
    """Larger for a larger budget, whatever its kind."""
    if study.budget_kind == "tokens":
        return point.tokens
    return point.flops if study.budget_kind == "flops" else point.tokens / point.parameters[study.count]


def write(study: Study, fitted: Sequence[SeriesFit]) -> Path:
    """Write STUDY/fit.json."""
    tree = {
        "study": study.name,
        "series": {
            each.series: {
                "count": each.count,
                "law": each.fit.law.constants(),
                "intervals_95": {name: each.fit.interval(name) for name in CONSTANTS} if each.fit.samples else {},
                "huber": each.fit.huber,
                "rms": each.fit.rms,
                "residuals": dict(zip([p.run for p in each.points], each.fit.residuals.tolist(), strict=True)),
                "held_out": _held_out_tree(each.held_out),
                "isoflop": [{**dataclasses.asdict(v), "verdict": v.verdict} for v in each.valleys],
                "warnings": each.warnings,
                "remarks": list(each.remarks),
                "samples": [list(law.constants().values()) for law in each.fit.samples],
            }
            for each in fitted
        },
    }
    path = study.folder / FILE
    path.write_text(json.dumps(tree, indent=1) + "\n")
    return path


def _held_out_tree(held_out: HeldOut | None) -> dict[str, Any] | None:
    if held_out is None:
        return None
    return {**dataclasses.asdict(held_out), "law": held_out.law.constants(), "error": held_out.error}


def read(study: Study, points: Sequence[Point]) -> list[SeriesFit]:
    """What `write` wrote, with the points it was made from.

    Raises:
        UserError: it is not there, damaged, or the points have changed since.
    """
    path = study.folder / FILE
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        found = []
        for series, content in tree["series"].items():
            mine = tuple(point for point in points if point.series == series)
            if list(content["residuals"]) != [point.run for point in mine]:
                raise UserError(
                    f"{path} was fitted to other runs than are collected now: run `tools/scaling_law.py fit` again"
                )
            samples = tuple(Law(*values) for values in content["samples"])
            fit = Fit(Law(**content["law"]), content["huber"], np.array(list(content["residuals"].values())), samples)
            held = content["held_out"]
            held_out = None
            if held:
                names, predicted, measured = (tuple(held[key]) for key in ("names", "predicted", "measured"))
                held_out = HeldOut(held["budget"], Law(**held["law"]), names, predicted, measured)
            levels = tuple(_valley(each) for each in content["isoflop"])
            found.append(SeriesFit(series, content["count"], mine, fit, held_out, levels, tuple(content["remarks"])))
        return found
    except OSError:
        raise UserError(f"there is no {path}: run `tools/scaling_law.py fit` first") from None
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is not what `fit` writes: run it again ({error})") from None


def _valley(tree: dict[str, Any]) -> Valley:
    values: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in tree.items() if key != "verdict"
    }
    return Valley(**values)
