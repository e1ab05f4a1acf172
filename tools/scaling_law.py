"""Scaling laws: from one YAML to a grid of runs, their points, a law through them, and the best run for a budget.

    python tools/scaling_law.py grid STUDY.yaml      the runs and what they cost; writes nothing without --write
    python tools/scaling_law.py launch STUDY.yaml    what is not finished, on this machine; --slurm: as one array job
    python tools/scaling_law.py collect STUDY.yaml   STUDY/points.json and points.csv from the runs' metrics
    python tools/scaling_law.py fit STUDY.yaml       STUDY/fit.json: constants, intervals, checks
    python tools/scaling_law.py predict STUDY.yaml --flops 1e20 | --gpu-hours 100
    python tools/scaling_law.py plot STUDY.yaml      STUDY/plots/*.png, *.svg
    python tools/scaling_law.py all STUDY.yaml       launch, collect, fit, plot; again: goes on where it stopped

docs/scaling.md has the keys of STUDY.yaml and what is fitted.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from titans_pretrain.config import config_to_yaml, load_config
from titans_pretrain.errors import UserError, exit_on_user_error
from titans_pretrain.scaling.study import COUNTS, Study, read_study
from tools import scaling_text as text

if TYPE_CHECKING:  # loads torch, which --help must not wait for
    from titans_pretrain.scaling.grid import Grid, PlannedRun

NEEDED = {
    "fit": ("scipy",),
    "predict": ("scipy",),
    "plot": ("scipy", "matplotlib"),
    "all": ("scipy", "matplotlib"),
}
"""What the commands need of the extra `scaling`."""


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scaling_law.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, text: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text)
        made.add_argument("study", type=Path, metavar="STUDY.yaml")
        return made

    grid = command("grid", "print the runs and what they cost")
    grid.add_argument("--write", action="store_true", help="write every run's config to STUDY/configs")
    grid.add_argument(
        "--tflops", type=float, metavar="X", help="TFLOP/s that one process keeps up, for the time it takes"
    )
    grid.add_argument(
        "--startup", type=float, default=0.0, metavar="SECONDS", help="of every run before its first step"
    )
    launch = command("launch", "train what is not finished")
    launch.add_argument("--slurm", action="store_true", help="submit as one array job instead of running here")
    launch.add_argument("--dry-run", action="store_true", help="with --slurm: print the job only")
    command("collect", "read the runs' metrics")
    fit = command("fit", "fit a law for each series")
    predict = command("predict", "the best run for a budget")
    budget = predict.add_mutually_exclusive_group(required=True)
    budget.add_argument("--flops", type=float, metavar="C", help="the budget in FLOP")
    budget.add_argument("--gpu-hours", type=float, metavar="H", help="the budget in hours of one device")
    predict.add_argument("--series", metavar="NAME", help="only this one (default: all that are fitted)")
    predict.add_argument("--mfu", type=float, help="instead of the one measured, 0 to 1")
    predict.add_argument(
        "--peak-tflops", type=float, metavar="X", help="of the device, instead of the one in the metrics"
    )
    predict.add_argument("--out", type=Path, metavar="FILE.yaml", help="where (default: STUDY/predictions/RUN.yaml)")
    command("plot", "draw points and laws")
    everything = command("all", "launch, collect, fit and plot")
    everything.set_defaults(slurm=False, dry_run=False)
    for each in (fit, everything):
        each.add_argument("--count", choices=COUNTS, help="which N (default: the study's)")
        each.add_argument(
            "--samples", type=int, metavar="N", help="bootstrap samples (default: the study's; 0: no intervals)"
        )
        each.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    for each in (launch, everything):
        each.add_argument("--retry-failed", action="store_true", help="try once more what failed before")
    return parser


@exit_on_user_error
def main(arguments: Sequence[str] | None = None) -> None:
    args = _build_parser().parse_args(arguments)
    study = read_study(args.study)
    _check_extra(NEEDED.get(args.command, ()))
    if args.command == "grid":
        run_grid(study, args)
    if args.command in ("launch", "all"):
        run_launch(study, args)
    if args.command in ("collect", "all"):
        run_collect(study)
    if args.command in ("fit", "all"):
        run_fit(study, args)
    if args.command == "predict":
        run_predict(study, args)
    if args.command in ("plot", "all"):
        run_plot(study)


def _check_extra(needed: Sequence[str]) -> None:
    """Say before hours of training what would be missing after them."""
    for name in needed:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"{name} is not installed: pip install 'titans_pretrain[scaling]'")


def vocab_size(study: Study) -> int:
    """What the study's config says, or its data.

    Raises:
        UserError: neither does.
    """
    from titans_pretrain.data.fetch import manifest_at
    from titans_pretrain.data.mixture import paths

    config = load_config(study.config, study.overrides)
    return config.model.vocab_size or max((manifest_at(path).vocab_size for path in paths(config.data)), default=0)


def _grid(study: Study) -> Grid:
    from titans_pretrain.scaling.collect import read_rates
    from titans_pretrain.scaling.grid import make_grid

    return make_grid(study, vocab_size(study), _bases(read_rates(study)))


def _bases(rates: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    return {series: settled["base"] for series, settled in rates.items()}


def run_grid(study: Study, args: argparse.Namespace) -> None:
    """Print the table, and write the configs if asked."""
    grid = _grid(study)
    print(text.grid_table(study, grid, args.tflops, args.startup))
    if args.write:
        folder = study.folder / "configs"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for run in grid.runs:
                (folder / f"{run.name}.yaml").write_text(config_to_yaml(run.config))
        except OSError as error:
            raise UserError(f"cannot write to {folder}: {error.strerror}; change dir or name of the study") from error
        print(f"wrote {len(grid.runs)} configs to {folder}")


def run_launch(study: Study, args: argparse.Namespace) -> None:
    """Train what is left: first what tries learning rates, then, once that is settled, the rest."""
    from titans_pretrain.scaling import collect as collecting

    for _ in range(2):  # a sweep's runs, then the others
        grid = _grid(study)
        decided = [run for run in grid.points if run.series not in grid.undecided and not run.swept]
        _launch(study, [*grid.sweep, *decided], args)
        if not grid.undecided:
            return
        if args.slurm:
            print("these try learning rates; when they are done, `collect` and `launch` again for the rest")
            return
        collected = collecting.collect(study, grid)
        collecting.write(study, collected)
        print(text.rates(collected.rates))
        waiting = [series for series in grid.undecided if series not in collected.rates]
        if waiting:
            raise UserError(
                f"the sweep of learning rates is not complete for {', '.join(waiting)}: see `collect` for why"
            )


def _launch(study: Study, planned: Sequence[PlannedRun], args: argparse.Namespace) -> None:
    from launch.submit import with_absolute_paths
    from launch.sweep import Run, run_local, submit
    from titans_pretrain.scaling.collect import differences

    runs = []
    for index, each in enumerate(planned):
        run = Run(index, {"run": each.name}, with_absolute_paths(each.config))
        resolved = run.config.run_dir / "config.yaml"
        differs = differences(each.config, load_config(resolved)) if resolved.exists() else []
        if differs:
            raise UserError(
                f"{each.name} was trained with other settings: {'; '.join(differs)}; move {run.config.run_dir} away, or give "
                "the study another name"
            )
        runs.append(run)
    if args.slurm:
        submit({"name": study.name, "parallel": study.parallel}, runs, args.dry_run)
        return
    if args.dry_run:
        raise UserError("--dry-run is for --slurm; `grid` prints what would run here")
    failed = run_local(runs, study.parallel, args.retry_failed)
    if failed:
        print(f"{len(failed)} runs failed; `collect` leaves them out by name, --retry-failed tries them once more")


def run_collect(study: Study) -> None:
    """Read the metrics, write points.json, points.csv and what a sweep settled."""
    from titans_pretrain.scaling import collect as collecting

    collected = collecting.collect(study, _grid(study))
    files = collecting.write(study, collected)
    print(text.collected(collected))
    print(f"wrote {files[0]} and {files[1].name}")


def run_fit(study: Study, args: argparse.Namespace) -> None:
    """Fit each series; one that cannot be fitted is told and does not stop the others."""
    from titans_pretrain.scaling import analysis
    from titans_pretrain.scaling.collect import POINTS, read_points

    points = read_points(study.folder / POINTS).points
    samples = study.bootstrap if args.samples is None else args.samples
    fitted = []
    refused = []
    for series in dict.fromkeys(point.series for point in points):
        try:
            each = analysis.analyse(study, points, series, args.count or study.count, samples, args.seed)
        except UserError as error:
            refused.append(str(error))
            continue
        fitted.append(each)
        print(text.fitted(each))
    for sentence in refused:
        print(f"not fitted: {sentence}")
    if not fitted:
        raise UserError("no series could be fitted" if refused else f"there are no points in {study.folder / POINTS}")
    print(text.ranking(fitted))
    print(f"wrote {analysis.write(study, fitted)}")


def run_predict(study: Study, args: argparse.Namespace) -> None:
    """Print the best run of each series, and write its config."""
    from titans_pretrain.scaling import analysis
    from titans_pretrain.scaling import predict as predicting
    from titans_pretrain.scaling.collect import POINTS, read_points

    collected = read_points(study.folder / POINTS)
    found = analysis.read(study, collected.points)
    if args.series:
        found = [each for each in found if each.series == args.series]
        if not found:
            known = ", ".join(each.series for each in analysis.read(study, collected.points))
            raise UserError(f"there is no law of --series {args.series}; fitted are {known}")
    if args.out and len(found) > 1:
        raise UserError(f"--out names one file, but {len(found)} series are fitted: choose one with --series")
    for name, most in (("flops", None), ("gpu_hours", None), ("mfu", 1.0), ("peak_tflops", None)):
        value = getattr(args, name)
        if value is not None and not (value > 0 and (most is None or value <= most)):
            limit = f"and at most {most:g}" if most else ""
            raise UserError(f"--{name.replace('_', '-')} must be above 0 {limit}, not {value:g}".replace(" ,", ","))
    vocabulary = vocab_size(study)
    for each in found:
        speed = predicting.measured_speed(each.points, each.count, args.mfu, args.peak_tflops)
        if args.gpu_hours and speed is None:
            raise UserError(
                "the runs have no MFU in their metrics: give --mfu and --peak-tflops to turn hours into FLOP"
            )
        flops = args.flops or speed.flops(args.gpu_hours)  # type: ignore[union-attr]
        base = _bases(collected.rates).get(each.series)
        prediction = predicting.predict(study, each, flops, vocabulary, base, args.out.stem if args.out else "")
        path = args.out or study.folder / "predictions" / f"{prediction.config.run.name}.yaml"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(config_to_yaml(prediction.config))
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}; choose another --out") from error
        load_config(path)  # what is promised
        print(text.predicted(prediction, speed, each.count))
        print(f"  wrote {path}\n")


def run_plot(study: Study) -> None:
    """Draw."""
    from titans_pretrain.scaling import analysis
    from titans_pretrain.scaling.collect import POINTS, read_points
    from titans_pretrain.scaling.plot import plot

    found = analysis.read(study, read_points(study.folder / POINTS).points)
    for path in plot(study, found):
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
