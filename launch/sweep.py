"""How do many runs become one array job? A grid in YAML -> a run folder each -> sbatch --array.

    python launch/sweep.py submit SWEEP.yaml [--dry-run]     again: only what is not finished
    python launch/sweep.py status SWEEP.yaml [--json]

    name: chunk-and-rate          # the runs are runs/NAME/000, 001, ...
    config: configs/demo.yaml
    parallel: 2                   # at a time; 0: as many as the cluster gives
    overrides: [data.path=data/corpus]
    axes:                         # every combination is a run
      model.memory_chunk: [16, 64]
      optimizer.learning_rate: [1e-3, 3e-3]

Each run is what launch/submit.py would submit: requeued when preempted, tried cluster.attempts times. A run that fails for
good does not stop the others.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launch.submit import BUSY_SECONDS, plan, prepare, sbatch_command, with_absolute_paths
from titans_pretrain.config import Config, load_config
from titans_pretrain.errors import UserError, exit_on_user_error
from titans_pretrain.train.heartbeat import FOLDER
from titans_pretrain.train.lifecycle import PREEMPTED, finished

KEYS = ("name", "config", "parallel", "overrides", "axes")


@dataclass(frozen=True)
class Run:
    """One point of the grid."""

    index: int
    point: Mapping[str, Any]
    config: Config

    @property
    def status(self) -> str:
        """done, running, preempted, failed or waiting: what the run folder says."""
        folder = self.config.run_dir
        if finished(folder, self.config.schedule.tokens):
            return "done"
        if _beats(folder):
            return "running"
        if (folder / "FAILED").exists():
            return "failed"
        return "preempted" if (folder / PREEMPTED).exists() else "waiting"


@exit_on_user_error
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="sweep.py", description=(__doc__ or "").split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    submit_parser = commands.add_parser("submit", help="one array job of all runs that are not finished")
    status_parser = commands.add_parser("status", help="a line for each run")
    for each in (submit_parser, status_parser):
        each.add_argument("sweep", type=Path, metavar="SWEEP.yaml")
    submit_parser.add_argument("--dry-run", action="store_true", help="print the runs and the sbatch command only")
    status_parser.add_argument("--json", action="store_true")
    args = parser.parse_args(arguments)
    settings, runs = read(args.sweep)
    if args.command == "status":
        rows = [
            {"run": str(r.config.run_dir), "status": r.status, "step": _step(r.config.run_dir), **r.point} for r in runs
        ]
        print(json.dumps(rows, indent=1) if args.json else _table(rows))
        return
    submit(settings, runs, args.dry_run)


def read(path: Path) -> tuple[dict[str, Any], list[Run]]:
    """The settings of a sweep and its runs, in the order of the axes.

    Raises:
        UserError: a key is unknown or missing, or a run's config is refused.
    """
    try:
        settings = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"cannot read sweep {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise UserError(f"sweep {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict) or not {"name", "config", "axes"} <= set(settings) or set(settings) - set(KEYS):
        raise UserError(f"sweep {path} must have the keys name, config and axes, and may have parallel and overrides")
    axes = settings["axes"]
    if not isinstance(axes, dict) or not all(isinstance(values, list) and values for values in axes.values()):
        raise UserError(f"sweep {path}: axes must be a list of values for each key, such as model.dim: [256, 512]")
    runs = []
    for index, values in enumerate(itertools.product(*axes.values())):
        point = dict(zip(axes, values, strict=True))
        words = [*settings.get("overrides", []), *(f"{key}={value}" for key, value in point.items())]
        config = load_config(settings["config"], words)
        folder = f"{config.run.dir}/{settings['name']}"
        config = load_config(settings["config"], [*words, f"run.dir={folder}", f"run.name={index:03d}"])
        runs.append(Run(index, point, with_absolute_paths(config)))
    return settings, runs


def submit(settings: Mapping[str, Any], runs: Sequence[Run], dry_run: bool) -> None:
    """Prepare the runs that are left and submit them as one array job."""
    left = [run for run in runs if run.status not in ("done", "running")]
    for run in runs:
        print(f"{run.index:03d}  {run.status:<10} {'  '.join(f'{k}={v}' for k, v in run.point.items())}")
    if not left:
        print("nothing is left to do")
        return
    sizes = {
        (r.config.cluster.nodes, r.config.cluster.gpus_per_node, r.config.cluster.processes_per_node) for r in left
    }
    if len(sizes) > 1:
        raise UserError("the runs of a sweep must ask for the same cluster.nodes, gpus_per_node and processes_per_node")
    print("the first of them:", *plan(left[0].config, None), sep="\n  ")
    folder = left[0].config.run_dir.parent
    (*command, script, _) = sbatch_command(left[0].config)
    command = [word for word in command if not word.startswith(("--job-name", "--output"))]
    at_a_time = f"%{settings['parallel']}" if settings.get("parallel") else ""
    command += [
        f"--job-name={settings['name']}",
        f"--array=0-{len(left) - 1}{at_a_time}",
        f"--output={folder}/slurm-%A_%a.log",
    ]
    command += [script, str(folder)]
    if dry_run:
        print(f"would run: {shlex.join(command)}")
        return
    for run in left:
        prepare(run.config)
    (folder / "runs.txt").write_text("".join(f"{run.config.run_dir}\n" for run in left))
    try:
        number = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except FileNotFoundError:
        raise UserError("there is no sbatch on this machine; log in where jobs are submitted") from None
    except subprocess.CalledProcessError as error:
        raise UserError(f"sbatch refused the jobs: {' '.join(error.stderr.split())}") from error
    print(f"submitted job {number} with {len(left)} runs")


def _beats(folder: Path) -> bool:
    for file in (folder / FOLDER).glob("rank_*.json"):
        try:
            beat = json.loads(file.read_text())
        except (OSError, ValueError):
            continue
        if time.time() - beat["time"] < BUSY_SECONDS and beat["phase"] not in ("ended", "refused", "lost a peer"):
            return True
    return False


def _step(folder: Path) -> int:
    try:
        return int(json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["step"])
    except (OSError, ValueError, IndexError):
        return 0


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    return "\n".join(
        f"{Path(row['run']).name}  {row['status']:<10} step {row['step']:<7} "
        + "  ".join(f"{key}={value}" for key, value in row.items() if key not in ("run", "status", "step"))
        for row in rows
    )


if __name__ == "__main__":
    main()
