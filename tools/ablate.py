"""Which of the memory's parts does training need? Named settings x seeds in one YAML -> runs, a table, a plot.

    python tools/ablate.py run ABLATION.yaml [--parallel 2]      again: only what is not finished
    python tools/ablate.py table ABLATION.yaml [--strict]
    python tools/ablate.py plot ABLATION.yaml

    name: demo                    # the runs are RUN.DIR/NAME/SETTING-seedN
    config: configs/demo.yaml
    seeds: 3                      # 0, 1, 2
    parallel: 2                   # at a time
    overrides: [data.path=.demo/data]
    stable: {after_step: 50, gradient_norm: 5}
    settings:                     # the first is what the others are compared with
      default: {}
      forget toward zero: {model.memory_forget_toward: zero}

A run that diverges is a result: it is counted and named, and not tried again. A run that fails for another reason is an
error. `table` prints markdown and writes NAME.md beside the runs, `plot` NAME.png and NAME.svg. `--strict`: exit code 1
unless every run ended, stayed finite and, after `after_step`, below `gradient_norm`.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launch.submit import with_absolute_paths
from launch.sweep import Run, run_local
from titans_pretrain.config import config_to_yaml, load_config
from titans_pretrain.errors import UserError, exit_on_user_error
from tools.ablation_results import State, markdown, outcome, plot

KEYS = {"name", "config", "seeds", "parallel", "overrides", "stable", "settings"}


class Ablation(NamedTuple):
    """What the YAML says."""

    name: str
    folder: Path
    """Of the runs."""
    parallel: int
    after_step: int
    """Steps up to here do not count for the gradient norm: warm-up."""
    gradient_norm: float
    """A run whose norm goes above it is unstable."""
    settings: Mapping[str, Mapping[str, Any]]
    runs: Mapping[str, Sequence[Run]]
    """By setting, in the order of the seeds."""


def read(path: Path) -> Ablation:
    """Read an ablation; every run's config is checked.

    Raises:
        UserError: a key is unknown, missing or of the wrong kind, two settings have one folder, or a config is refused.
    """
    try:
        said = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read ablation {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"ablation {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(said, dict) or not {"name", "config", "settings"} <= set(said) or set(said) - KEYS:
        raise UserError(
            f"ablation {path} must have the keys name, config and settings, and may have "
            f"{', '.join(sorted(KEYS - {'name', 'config', 'settings'}))}"
        )
    settings = said["settings"]
    if not isinstance(settings, dict) or not all(isinstance(s, dict) for s in settings.values()) or not settings:
        raise UserError(
            f"ablation {path}: settings must be a mapping of key: value for each name; default: {{}} is none"
        )
    numbers = {"seeds": said.get("seeds", 3), "parallel": said.get("parallel", 1)}
    for key, number in numbers.items():
        if not isinstance(number, int) or number < 1:
            raise UserError(f"ablation {path}: {key} must be a whole number of 1 or more, not {number!r}")
    stable = said.get("stable", {})
    limits = {"after_step": 0, "gradient_norm": float("inf"), **(stable if isinstance(stable, dict) else {"": stable})}
    if len(limits) > 2 or not all(isinstance(x, (int, float)) for x in limits.values()):
        raise UserError(
            f"ablation {path}: stable must be {{after_step: a step, gradient_norm: a number}}, not {stable!r}"
        )

    names = [folder_name(str(name)) for name in settings]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"ablation {path}: two settings would both be in folders {twice}-seedN; rename one")
    runs: dict[str, list[Run]] = {}
    for name, changes in settings.items():
        runs[str(name)] = []
        for seed in range(numbers["seeds"]):
            words = [*said.get("overrides", []), *(f"{key}={value}" for key, value in changes.items())]
            folder = f"{load_config(said['config'], words).run.dir}/{said['name']}"
            own = [f"run.dir={folder}", f"run.name={folder_name(str(name))}-seed{seed}", f"run.seed={seed}"]
            config = with_absolute_paths(load_config(said["config"], [*words, *own]))
            index = sum(map(len, runs.values()))
            runs[str(name)].append(Run(index, {"setting": name, "seed": seed}, config))
    first = next(iter(runs.values()))[0].config
    return Ablation(
        said["name"],
        first.run_dir.parent,
        numbers["parallel"],
        int(limits["after_step"]),
        float(limits["gradient_norm"]),
        {str(name): changes for name, changes in settings.items()},
        runs,
    )


def folder_name(setting: str) -> str:
    """`setting` as part of a folder's name."""
    return re.sub(r"[^a-z0-9.+-]+", "_", setting.lower()).strip("_")


def check_unchanged(runs: Sequence[Run]) -> None:
    """A run that has begun must be of the config that is asked for, or its numbers would be told of another.

    Raises:
        UserError: it is of another.
    """
    for run in runs:
        written = run.config.run_dir / "launch" / "config.yaml"
        if written.exists() and written.read_text() != config_to_yaml(run.config):
            raise UserError(
                f"{run.config.run_dir} was run with other settings than the ablation now asks for; remove it, or give the "
                "setting or the ablation another name"
            )


def train(ablation: Ablation, parallel: int) -> None:
    """Run what is not finished. Where nothing has begun, one run goes first, and says how long the rest will take."""
    runs = [run for of_setting in ablation.runs.values() for run in of_setting]
    check_unchanged(runs)
    if len(runs) > parallel and not any(run.config.run_dir.exists() for run in runs):
        started = time.monotonic()
        run_local(runs[:1], 1)
        seconds = time.monotonic() - started
        print(
            f"one run took {seconds:.0f} s; the other {len(runs) - 1} take about "
            f"{seconds * (len(runs) - 1) / parallel / 60:.1f} minutes, {parallel} at a time where each has a core of its own",
            flush=True,
        )
    run_local(runs, parallel)


@exit_on_user_error
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="ablate.py", description=(__doc__ or "").split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    run_parser = commands.add_parser("run", help="train what is not finished, then print the table")
    table_parser = commands.add_parser("table", help="the table so far, in markdown")
    plot_parser = commands.add_parser("plot", help="the same as PNG and SVG")
    for each in (run_parser, table_parser, plot_parser):
        each.add_argument("ablation", type=Path, metavar="ABLATION.yaml")
    run_parser.add_argument("--parallel", type=int, default=0, help="runs at a time (default: what the YAML says)")
    for each in (run_parser, table_parser):
        each.add_argument("--strict", action="store_true", help="exit code 1 unless every run is stable")
    args = parser.parse_args(arguments)
    ablation = read(args.ablation)
    if args.command == "run":
        if args.parallel < 0:
            raise UserError(f"--parallel must be 1 or more (0: what the YAML says), not {args.parallel}")
        train(ablation, args.parallel or ablation.parallel)

    outcomes = {
        name: [outcome(run, ablation.after_step, ablation.gradient_norm) for run in runs]
        for name, runs in ablation.runs.items()
    }
    every = [o for of_setting in outcomes.values() for o in of_setting]
    if all(o.state is State.MISSING for o in every):
        raise UserError(
            f"no run of {ablation.folder} has ended yet; start them with: tools/ablate.py run {args.ablation}"
        )
    if args.command == "plot":
        for path in plot(outcomes, ablation.folder / ablation.name, ablation.name):
            print(path)
        return
    text = markdown(outcomes, ablation.settings, ablation.after_step, ablation.gradient_norm)
    (ablation.folder / f"{ablation.name}.md").write_text(text, encoding="utf-8")
    print(text, end="")
    broken = [o for o in every if o.state is State.FAILED]
    unstable = [o for o in every if o.state is not State.STABLE]
    if broken or (args.strict and unstable):
        raise UserError(
            f"{len(broken)} of {len(every)} runs failed, and not by diverging; see RUN/log/local.txt"
            if broken
            else f"{len(unstable)} of {len(every)} runs are not stable"
        )


if __name__ == "__main__":
    main()
