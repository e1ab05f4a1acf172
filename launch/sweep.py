"""How do many runs become one array job? A grid in YAML -> a run folder each -> sbatch --array.

    python launch/sweep.py submit SWEEP.yaml [--dry-run]     again: only what is not finished
    python launch/sweep.py local SWEEP.yaml                  the same on this machine, `parallel` at a time
    python launch/sweep.py status SWEEP.yaml [--json]

    name: chunk-and-rate          # the runs are runs/NAME/000, 001, ...
    config: configs/demo.yaml
    parallel: 2                   # at a time; 0: as many as the cluster gives
    overrides: [data.path=data/corpus]
    axes:                         # every combination is a run
      model.memory_chunk: [16, 64]
      optimizer.learning_rate: [1e-3, 3e-3]

Each run is what launch/submit.py would submit: requeued when preempted, tried cluster.attempts times. A run that fails for
good does not stop the others. `local` gives a run one process, or cluster.gpus_per_node GPUs, or
cluster.processes_per_node processes, and does not try again what failed, unless --retry-failed says so.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launch.submit import ROOT, plan, prepare, sbatch_command, with_absolute_paths
from titans_pretrain.config import Config, config_to_yaml, load_config
from titans_pretrain.errors import UserError, exit_on_user_error
from titans_pretrain.train.heartbeat import busy_rank
from titans_pretrain.train.lifecycle import FAILED, PREEMPTED, die_with_parent, finished

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
        if busy_rank(folder) is not None:
            return "running"
        if (folder / FAILED).exists():
            return "failed"
        return "preempted" if (folder / PREEMPTED).exists() else "waiting"


@exit_on_user_error
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="sweep.py", description=(__doc__ or "").split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    submit_parser = commands.add_parser("submit", help="one array job of all runs that are not finished")
    local_parser = commands.add_parser("local", help="run on this machine what is not finished")
    status_parser = commands.add_parser("status", help="a line for each run")
    for each in (submit_parser, local_parser, status_parser):
        each.add_argument("sweep", type=Path, metavar="SWEEP.yaml")
    submit_parser.add_argument("--dry-run", action="store_true", help="print the runs and the sbatch command only")
    local_parser.add_argument("--retry-failed", action="store_true", help="try once more what failed before")
    status_parser.add_argument("--json", action="store_true")
    args = parser.parse_args(arguments)
    settings, runs = read(args.sweep)
    if args.command == "status":
        rows = [
            {"run": str(r.config.run_dir), "status": r.status, "step": _step(r.config.run_dir), **r.point} for r in runs
        ]
        print(json.dumps(rows, indent=1) if args.json else _table(rows))
        return
    if args.command == "local":
        sys.exit(1 if run_local(runs, settings.get("parallel") or 1, args.retry_failed) else 0)
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


def run_local(runs: Sequence[Run], parallel: int, retry_failed: bool = False) -> list[Run]:
    """Train on this machine what is not finished, `parallel` runs at a time, each from its last checkpoint; a line as each
    begins and ends. SIGTERM and Ctrl-C let the runs save and end; if this process is killed, they are.

    Returns:
        those that failed, now or before. What they printed is in RUN/log/local.txt.

    Raises:
        UserError: the runs need more GPUs than there are, or a run folder cannot be written.
    """
    allowed = ("waiting", "preempted", "failed") if retry_failed else ("waiting", "preempted")
    left = [run for run in runs if run.status in allowed]
    print(f"{len(runs)} runs, {len(left)} to do, {parallel} at a time", flush=True)
    _check_gpus(left, parallel)
    places: dict[int, tuple[Run, subprocess.Popen[bytes], float]] = {}
    heard: list[int] = []
    before = {number: signal.signal(number, lambda n, _: heard.append(n)) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        while places or (left and not heard):
            while left and not heard and len(places) < parallel:
                place = min(set(range(parallel)) - set(places))
                places[place] = (left[0], _start(left[0], place, parallel), time.monotonic())
                print(f"{_title(left.pop(0))} begins", flush=True)
            if heard:
                for _, process, _ in places.values():
                    process.send_signal(signal.SIGTERM)
                for _, process, _ in places.values():
                    process.wait()
            for place, (run, process, since) in list(places.items()):
                if process.poll() is not None:
                    del places[place]
                    _end(run, process.returncode)
                    print(f"{_title(run)} {run.status} after {time.monotonic() - since:.0f} s", flush=True)
            time.sleep(0.2)
    finally:
        for _, process, _ in places.values():
            process.kill()
        for number, handler in before.items():
            signal.signal(number, handler)
    if heard:
        raise UserError("the runs were interrupted; the same command goes on with them")
    failed = [run for run in runs if run.status == "failed"]
    for run in failed:
        print(f"{_title(run)} failed: {(run.config.run_dir / FAILED).read_text().strip()}")
    return failed


def _start(run: Run, place: int, parallel: int) -> subprocess.Popen[bytes]:
    folder, cluster = run.config.run_dir, run.config.cluster
    count = cluster.processes_per_node or cluster.gpus_per_node or 1
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TITANS_PYTHON": sys.executable, "NPROC": str(count)}
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // (parallel * count))))
    if cluster.gpus_per_node:
        first = place * cluster.gpus_per_node
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(str(first + i) for i in range(cluster.gpus_per_node))
    try:
        for name in ("launch", "log"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / FAILED).unlink(missing_ok=True)
        config = folder / "launch" / "config.yaml"
        config.write_text(config_to_yaml(run.config))
        words = [sys.executable, "-m", "titans_pretrain.train"] if count == 1 else ["bash", "launch/local.sh"]
        with open(folder / "log" / "local.txt", "ab") as log:
            return subprocess.Popen(
                [*words, str(config)],
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for this process, which hands it on once
                preexec_fn=die_with_parent,
            )
    except OSError as error:
        raise UserError(f"cannot prepare run folder {folder}: {error.strerror}; change run.dir or name") from error


def _end(run: Run, code: int) -> None:
    """Leave the file FAILED where a run has ended and is neither done nor to go on."""
    folder = run.config.run_dir
    if run.status in ("done", "preempted"):
        return
    said = (folder / "log" / "local.txt").read_text(errors="replace").splitlines()
    errors = [line for line in said if line.startswith("error:")] or said[-1:] or [f"exit code {code}"]
    (folder / FAILED).write_text(f"{time.strftime('%F %T')} {errors[-1].removeprefix('error: ')}\n")


def _check_gpus(runs: Sequence[Run], parallel: int) -> None:
    most = max((run.config.cluster.gpus_per_node for run in runs), default=0)
    if not most:
        return
    import torch

    if most * min(parallel, len(runs)) > torch.cuda.device_count():
        raise UserError(
            f"{min(parallel, len(runs))} runs at a time with cluster.gpus_per_node={most} need more than the "
            f"{torch.cuda.device_count()} GPUs of this machine; lower `parallel`, or set cluster.gpus_per_node=0 for the CPU"
        )


def _title(run: Run) -> str:
    return f"{run.index:03d}  " + "  ".join(f"{key}={value}" for key, value in run.point.items())


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
