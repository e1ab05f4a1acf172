"""Do the defaults train? Runs a config over seeds and variants with the real trainer and prints a table of how it went.

    python tools/check_stability.py configs/demo.yaml --seeds 10 --variants mac mag mal lmm --jobs 8 \\
        run.dir=runs/stability schedule.tokens=1228800 eval.length_multiples=[1,8]

A run passes when it ends, no logged number is NaN or infinite, and the outer gradient norm stays below --max-norm after
--after steps. Exit code 1 when any run does not.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from titans_pretrain.config import VARIANTS, load_config
from titans_pretrain.errors import UserError, exit_on_user_error


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="YAML config of the runs")
    parser.add_argument("overrides", nargs="*", help="section.key=value for every run")
    parser.add_argument("--seeds", type=int, default=10, help="number of seeds (default 10)")
    parser.add_argument("--first-seed", type=int, default=0, help="the first of them (default 0)")
    parser.add_argument("--variants", nargs="+", default=["mac", "mag", "mal", "lmm"], choices=VARIANTS)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each one process (default 1)")
    parser.add_argument("--max-norm", type=float, default=5.0, help="gradient norm a run must stay below (default 5)")
    parser.add_argument("--after", type=int, default=100, help="from this step on (default 100)")
    return parser.parse_intermixed_args(argv)


def train(config: str, variant: str, seed: int, overrides: list[str]) -> tuple[int, str]:
    """Run the trainer in a process of its own -> (exit code, the end of its output)."""
    command = [sys.executable, "-m", "titans_pretrain.train", config, *overrides]
    command += [
        f"model.variant={variant}",
        f"run.seed={seed}",
        f"run.name={run_name(variant, seed)}",
        "run.resume=auto",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.returncode, done.stdout[-600:]


def run_name(variant: str, seed: int) -> str:
    return f"{variant}-seed{seed}"


def read_run(run_dir: Path, after: int) -> dict[str, float]:
    """What the table shows of one run, from its metrics.jsonl."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    norms = [(row["step"], row["grad_norm"]) for row in rows if "grad_norm" in row]
    numbers = [value for row in rows for value in row.values() if isinstance(value, float)]
    last: dict[str, float] = {}
    for row in rows:
        last.update({key: value for key, value in row.items() if key.startswith("valid_loss")})
    return {
        "steps": max(step for step, _ in norms),
        "finite": all(math.isfinite(value) for value in numbers),
        "norm": max((norm for step, norm in norms if step > after), default=math.nan),
        **last,
    }


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    config = load_config(args.config, args.overrides)
    if args.seeds < 1 or args.jobs < 1:
        raise UserError(f"--seeds ({args.seeds}) and --jobs ({args.jobs}) must be 1 or more")
    grid = [
        (variant, seed) for variant in args.variants for seed in range(args.first_seed, args.first_seed + args.seeds)
    ]
    with ThreadPoolExecutor(args.jobs) as pool:
        futures = {key: pool.submit(train, args.config, *key, args.overrides) for key in grid}
        failures = 0
        for (variant, seed), future in futures.items():
            code, output = future.result()
            if code:
                failures += 1
                print(f"{run_name(variant, seed)}: FAILED with exit code {code}: {output.strip()}", flush=True)
                continue
            run = read_run(Path(config.run.dir) / run_name(variant, seed), args.after)
            good = bool(run["finite"]) and run["norm"] < args.max_norm
            failures += not good
            losses = "  ".join(f"{key} {value:.4f}" for key, value in run.items() if key.startswith("valid_loss"))
            print(
                f"{run_name(variant, seed)}: {'ok' if good else 'FAILED'}  {run['steps']} steps  "
                f"{'all finite' if run['finite'] else 'NOT FINITE'}  "
                f"largest norm after step {args.after}: {run['norm']:.3f}  {losses}",
                flush=True,
            )
    print(f"{len(grid) - failures} of {len(grid)} runs passed", flush=True)
    if failures:
        sys.exit(1)


if __name__ == "__main__":
    main()
