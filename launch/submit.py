"""How does a run get onto a SLURM cluster? Print the plan, keep the code in the run folder, call sbatch.

    python launch/submit.py CONFIG.yaml [section.key=value ...] [--dry-run]

What is asked for is the config's section `cluster`. The job runs from RUN/code/N, a copy of the code as it is now, in every
life, with RUN/launch/config.yaml; later changes of the working tree reach it only by another submit.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from titans_pretrain.config import Config, config_to_yaml, load_config  # noqa: E402
from titans_pretrain.data.location import scheme_of  # noqa: E402
from titans_pretrain.errors import UserError, exit_on_user_error  # noqa: E402
from titans_pretrain.layout import choose_layout, describe  # noqa: E402
from titans_pretrain.train.heartbeat import busy_rank  # noqa: E402
from titans_pretrain.train.lifecycle import STOP, finished  # noqa: E402

FROZEN_SECONDS = 120
"""Silence of all ranks after which the batch script ends them."""
COPIED = ("titans_pretrain", "launch", "tools", "setup.cfg", "pyproject.toml")
"""What a job needs of this tree."""


@exit_on_user_error
def main(arguments: Sequence[str] | None = None) -> None:
    args = _parse(arguments)
    overrides = list(args.overrides)
    if args.nodes:
        overrides.append(f"cluster.nodes={args.nodes}")
    config = with_absolute_paths(load_config(args.config, overrides))
    run = config.run_dir
    if args.keep_code and (run / "launch" / "env.sh").exists():
        print(run)
        return
    check_free(run)
    print("\n".join(plan(config, args.tokens_per_second)))
    done = finished(run, config.schedule.tokens)
    if done and not args.prepare_only:
        raise UserError(done)
    if args.dry_run:
        print(f"would run: {shlex.join(sbatch_command(config))}")
        return
    prepare(config)
    if args.prepare_only:
        print(run)
        return
    try:
        answer = subprocess.run(sbatch_command(config), capture_output=True, text=True, check=True).stdout.strip()
    except FileNotFoundError:
        raise UserError(
            "there is no sbatch on this machine; log in where jobs are submitted, or use launch/local.sh"
        ) from None
    except subprocess.CalledProcessError as error:
        raise UserError(f"sbatch refused the job: {' '.join(error.stderr.split())}") from error
    print(f"submitted job {answer}; watch with: python tools/status.py {run}")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="submit.py", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("config", help="YAML file of a run")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and the sbatch command only")
    parser.add_argument(
        "--tokens-per-second", type=float, metavar="N", help="of the whole job, for the estimated finish"
    )
    parser.add_argument("--nodes", type=int, help="instead of cluster.nodes")
    parser.add_argument(
        "--prepare-only", action="store_true", help="write the run folder, print its name (slurm.sbatch)"
    )
    parser.add_argument(
        "--keep-code", action="store_true", help="leave a run folder that is prepared as it is (slurm.sbatch)"
    )
    return parser.parse_intermixed_args(arguments)


def processes(config: Config) -> int:
    """Ranks on a node.

    Raises:
        UserError: neither GPUs nor processes are asked for.
    """
    count = config.cluster.processes_per_node or config.cluster.gpus_per_node
    if not count:
        raise UserError(
            "cluster.gpus_per_node and cluster.processes_per_node are both 0: how many ranks shall a node have?"
        )
    return count


def with_absolute_paths(config: Config) -> Config:
    """The config with its local paths from the root, since the job runs in another folder."""

    def absolute(path: str) -> str:
        return path if not path or scheme_of(path) else str(Path(path).resolve())

    data = dataclasses.replace(
        config.data,
        path=absolute(config.data.path),
        sources=tuple(dataclasses.replace(source, path=absolute(source.path)) for source in config.data.sources),
        cache_dir=absolute(config.data.cache_dir),
    )
    resume = config.run.resume if config.run.resume in ("auto", "never") else absolute(config.run.resume)
    run = dataclasses.replace(
        config.run, dir=str(Path(config.run.dir).resolve()), resume=resume, init_from=absolute(config.run.init_from)
    )
    return dataclasses.replace(config, data=data, run=run)


def check_free(run: Path) -> None:
    """Refuse a run folder in which another job is training: two would write over each other.

    Raises:
        UserError: naming the host.
    """
    beat = busy_rank(run)
    if beat is not None:
        raise UserError(
            f"{run} is being trained: rank {beat['rank']} on {beat['host']} was there {time.time() - beat['time']:.0f} s ago; "
            f"wait for it, end it with `touch {run / STOP}`, or choose another run.name"
        )


def plan(config: Config, tokens_per_second: float | None) -> list[str]:
    """What the job will be, a line each."""
    from titans_pretrain.data.mixture import paths
    from titans_pretrain.data.shards import ShardSet
    from titans_pretrain.model.cost import flops_per_token, parameter_counts
    from titans_pretrain.parallel.plan import make_plan

    cluster, ranks = config.cluster, processes(config)
    layout = choose_layout(config, cluster.nodes * ranks)
    vocab_size = config.model.vocab_size or max(ShardSet.open(path).vocab_size for path in paths(config.data))
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=vocab_size))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        held = make_plan(config, layout, "cuda" if cluster.gpus_per_node else "cpu").total_bytes
    what = f"{cluster.gpus_per_node} GPUs" if cluster.gpus_per_node else f"{ranks} processes"
    flops = flops_per_token(config.model, config.data.seq_len)
    lines = [
        f"run       {config.run_dir}",
        f"machines  {cluster.nodes} x {what}, {describe(config, layout)}",
        f"model     {config.model.variant}, {parameter_counts(config.model)['total'] / 1e6:,.2f} M parameters",
        f"step      {config.data.batch_tokens:,} tokens, {config.num_steps:,} steps, {config.schedule.tokens:,} tokens in all",
        f"memory    {held / 2**30:.2f} GiB per rank at the peak of a step, as tools/plan.py finds it",
        f"work      {flops * config.schedule.tokens:.3g} FLOP",
    ]
    measured = tokens_per_second or measured_speed(config.run_dir)
    if measured is None:
        return [*lines, "finish    unknown: no speed is measured yet (--tokens-per-second says one)"]
    seconds = config.schedule.tokens / measured
    source = "--tokens-per-second" if tokens_per_second else "metrics of an earlier life"
    end = datetime.datetime.now() + datetime.timedelta(seconds=seconds)
    return [
        *lines,
        f"finish    {end:%Y-%m-%d %H:%M} if it began now: {datetime.timedelta(seconds=round(seconds))} at {measured:,.0f} "
        f"tokens/s ({source})",
    ]


def measured_speed(run: Path) -> float | None:
    """Median tokens/s of the last steps in a run's metrics; None where there are none."""
    try:
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()[-200:]]
    except (OSError, ValueError):
        return None
    rates = [row["tokens_per_second"] for row in rows if "tokens_per_second" in row]
    return statistics.median(rates) if rates else None


def prepare(config: Config) -> None:
    """Write RUN/code/N and RUN/launch.

    Raises:
        UserError: the folder cannot be written.
    """
    run = config.run_dir
    try:
        (run / "launch").mkdir(parents=True, exist_ok=True)
        code = run / "code" / f"{len(list((run / 'code').glob('*'))):03d}"
        copy_code(code)
        (run / "launch" / "config.yaml").write_text(config_to_yaml(config))
        for name in ("slurm.sbatch", "node.sh", "node_check.sh"):
            shutil.copyfile(ROOT / "launch" / name, run / "launch" / name)
        cluster = config.cluster
        values = {
            "TITANS_CODE": code,
            "TITANS_PYTHON": sys.executable,
            "TITANS_PROCESSES": processes(config),
            "TITANS_MAX_LIVES": cluster.max_lives,
            "TITANS_ATTEMPTS": cluster.attempts,
            "TITANS_FROZEN": FROZEN_SECONDS,
            "TITANS_GPUS": cluster.gpus_per_node,
            "TITANS_PREFLIGHT": "1" if cluster.preflight else "",
            "TITANS_SBATCH": shlex.join(sbatch_command(config)[:-2]),
            "TITANS_SRUN": cluster.srun,
            "TITANS_SETUP": cluster.setup,
        }
        text = "".join(f"{name}={shlex.quote(str(value))}\n" for name, value in values.items())
        fresh = run / "launch" / "env.sh.tmp"
        fresh.write_text(text)
        fresh.rename(run / "launch" / "env.sh")
    except OSError as error:
        raise UserError(f"cannot prepare run folder {run}: {error.strerror}; change run.dir or run.name") from error


def copy_code(target: Path) -> None:
    """Copy this tree: the files git knows, as they are now; without git the packages."""
    try:
        listed = subprocess.run(
            ["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True, check=True
        ).stdout
        files = [Path(name) for name in listed.split("\0") if name]
    except (OSError, subprocess.CalledProcessError):
        files = []
    if Path("titans_pretrain/config.py") not in files:
        files = [p.relative_to(ROOT) for top in COPIED for p in (ROOT / top, *(ROOT / top).rglob("*"))]
    for file in files:
        if (ROOT / file).is_file() and "__pycache__" not in file.parts:
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / file, target / file)


def sbatch_command(config: Config) -> list[str]:
    """The call of sbatch."""
    cluster, run = config.cluster, config.run_dir
    if not re.fullmatch(r"(\d+-)?\d+(:\d\d){0,2}", cluster.time):
        raise UserError(
            f"cluster.time must be a time as SLURM writes it, such as 24:00:00 or 2-00, not {cluster.time!r}"
        )
    command = [
        "sbatch",
        "--parsable",
        f"--job-name={config.run.name}",
        f"--nodes={cluster.nodes}",
        "--ntasks-per-node=1",
    ]
    command += [f"--cpus-per-task={cluster.cpus_per_process * processes(config)}", f"--time={cluster.time}"]
    command += [f"--signal=B:USR2@{max(1, round(config.faults.grace_seconds))}", "--requeue", "--open-mode=append"]
    command += [f"--output={run}/slurm-%j.log"]
    if cluster.gpus_per_node:
        command.append(f"--gpus-per-node={cluster.gpus_per_node}")
    command += [
        f"--{key}={value}" for key, value in (("partition", cluster.partition), ("account", cluster.account)) if value
    ]
    return [*command, *shlex.split(cluster.sbatch), str(run / "launch" / "slurm.sbatch"), str(run)]


if __name__ == "__main__":
    main()
