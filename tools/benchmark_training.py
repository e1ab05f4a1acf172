"""How fast do these layouts train, and how much of the time do ranks spend talking? Weak and strong scaling.

python tools/benchmark_training.py CONFIG.yaml [section.key=value ...] \\
    --layouts "data=1" "data=2" "tensor=2" "sequence=2 memory=hand_off"

Every layout is a job of its own, started by torchrun with as many processes as its numbers multiply to: real steps of the
training engine on random tokens, so no data is read and nothing is saved. Strong scaling keeps data.batch_tokens; with
--weak every rank keeps its tokens: the batch grows with data and sequence ranks, and rows grow longer with sequence ranks.

Communication is the share of a profiled step in which the rank waits for, or takes part in, a collective or a message to
it: gloo's on CPU, NCCL's kernels on a GPU. Waiting for a slower rank counts. (The GPU's side has not been run on a GPU yet.)
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

if not __package__:  # started as a file, also by torchrun: the packages lie beside its folder
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from titans_pretrain.config import Config, load_config
from titans_pretrain.errors import UserError, exit_on_user_error
from titans_pretrain.layout import Layout, choose_layout, describe, micro_batch_rows
from titans_pretrain.model.cost import flops_per_token

SIZES = ("data", "sequence", "tensor")


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmark_training.py", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("config", type=Path, help="YAML file of a run; model.vocab_size must be set")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument(
        "--layouts", nargs="+", metavar="LAYOUT", help='such as "data=2" or "sequence=2 memory=hand_off"'
    )
    parser.add_argument("--weak", action="store_true", help="weak scaling (default: strong)")
    parser.add_argument("--steps", type=int, default=5, help="timed optimizer steps (default: 5)")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them (default: 2)")
    parser.add_argument(
        "--timeout", type=float, default=1800.0, metavar="SECONDS", help="of one layout (default: 1800)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures too")
    parser.add_argument("--rank-of", type=Path, metavar="FILE", help=argparse.SUPPRESS)  # this process is a rank
    return parser


@exit_on_user_error
def main(arguments: Sequence[str] | None = None) -> None:
    args = _build_parser().parse_args(arguments)
    if args.rank_of:
        run_rank(load_config(args.config, args.overrides), args.steps, args.warmup, args.rank_of)
    if not args.layouts:
        raise UserError('say which layouts: --layouts "data=1" "data=2" ...')
    if args.steps < 1 or args.warmup < 0:
        raise UserError(f"--steps must be above 0 and --warmup not below, not {args.steps} and {args.warmup}")
    load_config(args.config, args.overrides)
    print(f"{args.config}, {'weak' if args.weak else 'strong'} scaling, {args.steps} steps after {args.warmup}")
    print(f"{'layout':<60}{'ranks':>6}{'tokens/s':>11}{'a rank':>10}{'efficiency':>12}{'communication':>15}")
    results: list[dict[str, Any]] = []
    for words in args.layouts:
        try:
            found = _measure(args, words)
        except UserError as error:
            print(f"{words}: {error}")
            results.append({"asked": words, "refused": str(error)})
            continue
        first = next((result for result in results if "refused" not in result), found)
        found["efficiency"] = found["tokens_per_second_per_rank"] / first["tokens_per_second_per_rank"]
        results.append(found)
        print(
            f"{found['layout']:<60}{found['ranks']:>6}{found['tokens_per_second']:>11,.0f}"
            f"{found['tokens_per_second_per_rank']:>10,.0f}{found['efficiency']:>12.1%}{found['communication']:>15.1%}",
            flush=True,
        )
    if args.json:
        try:
            args.json.write_text(json.dumps(results, indent=1) + "\n")
        except OSError as error:
            raise UserError(f"cannot write --json {args.json}: {error.strerror}") from error


def _measure(args: argparse.Namespace, words: str) -> dict[str, Any]:
    """Run one layout in processes of its own.

    Raises:
        UserError: it is no layout, is refused, or its job failed.
    """
    overrides, ranks = _overrides_of(words)
    config = load_config(args.config, [*args.overrides, *overrides])
    if not config.model.vocab_size:
        raise UserError("model.vocab_size is 0, and no data is read here that could tell it: set model.vocab_size")
    if args.weak:
        data, sequence = (next((int(w.split("=")[1]) for w in words.split() if w.startswith(k)), 1) for k in SIZES[:2])
        overrides += [
            f"data.batch_tokens={config.data.batch_tokens * data * sequence}",
            f"data.seq_len={config.data.seq_len * sequence}",
        ]
        config = load_config(args.config, [*args.overrides, *overrides])
    layout = choose_layout(config, ranks)
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command += [str(Path(__file__).resolve()), str(args.config), *args.overrides, *overrides]
        command += ["--rank-of", str(answer), "--steps", str(args.steps), "--warmup", str(args.warmup)]
        environment = {"OMP_NUM_THREADS": "1", **os.environ}
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=args.timeout)
        except subprocess.TimeoutExpired:
            raise UserError(f"the job took more than --timeout {args.timeout:g} s and was stopped") from None
        if done.returncode or not answer.exists():
            raise UserError(f"the job failed: {_reason(done.stderr)}")
        return {"asked": words, "layout": describe(config, layout), "ranks": ranks, **json.loads(answer.read_text())}


def _reason(output: str) -> str:
    """The line that tells most of what a job under torchrun wrote before it failed."""
    ours, exceptions, signals = (
        re.findall(pattern, output, re.MULTILINE)
        for pattern in (
            r"^(?:\[rank\d+\]:\s*)?error: (.*)$",
            r"^(?:\[rank\d+\]:\s*)?([\w.]*(?:Error|Exception)\b.*)$",
            r"^\s*traceback\s*: (Signal .*)$",
        )
    )
    said = [line for line in output.splitlines() if line.strip(" =-")]
    return str(
        [*ours, *[e for e in exceptions if "ChildFailedError" not in e], *signals, *said[-1:], "it said nothing"][0]
    )


def _overrides_of(words: str) -> tuple[list[str], int]:
    """ "sequence=2 memory=hand_off" -> overrides of the config, number of processes."""
    ranks = 1
    for word in words.split():
        if not re.fullmatch(r"(data|sequence|tensor)=[1-9]\d*|memory=[a-z_]+", word):
            raise UserError(f"a layout is words like data=2, sequence=2, tensor=2 and memory=hand_off, not {word!r}")
        if not word.startswith("memory"):
            ranks *= int(word.split("=")[1])
    return [f"parallel.{word}" for word in words.split()], ranks


# -------------------------------------------------------------------------------------------------------------- one rank


def run_rank(config: Config, steps: int, warmup: int, answer: Path) -> NoReturn:
    """Train on random tokens; the first rank writes what all found to `answer`."""
    import torch
    import torch.distributed as dist

    from titans_pretrain.parallel.build import build_model
    from titans_pretrain.train.engine import Engine
    from titans_pretrain.train.environment import find_environment, join, leave

    grid = join(find_environment(), config.run.device)
    layout = choose_layout(config, grid.world_size)
    grid = grid.lay_out(layout)
    engine = Engine(config, build_model(config, grid, config.run.seed), grid)
    step = _step_function(config, layout, engine, torch.Generator().manual_seed(grid.replica.rank))
    for _ in range(max(1, warmup)):
        step()

    def wait_for_all() -> None:
        if grid.world_size > 1:
            dist.barrier()
        if grid.device.type == "cuda":
            torch.cuda.synchronize()

    wait_for_all()
    started = time.perf_counter()
    for _ in range(steps):
        step()
    wait_for_all()
    seconds = (time.perf_counter() - started) / steps
    shares = grid.gather_numbers([_communication_share(step, grid.device)])
    if grid.is_first:
        tokens = config.data.batch_tokens / seconds
        flops = flops_per_token(config.model, config.data.seq_len)
        found = {
            "tokens_per_second": tokens,
            "tokens_per_second_per_rank": tokens / grid.world_size,
            "seconds_per_step": seconds,
            "tflops_per_rank": tokens * flops / grid.world_size / 1e12,
            "communication": float(shares.mean()),
            "device": str(grid.device),
        }
        answer.write_text(json.dumps(found))
    leave()


def _step_function(config: Config, layout: Layout, engine: Any, generator: Any) -> Any:
    import torch

    rows = micro_batch_rows(config, layout.data)
    accumulation = config.batch_size // layout.data // rows
    shape = (rows, config.data.seq_len // layout.sequence)
    scale = layout.replicas / config.data.batch_tokens

    def step() -> None:
        for index in range(accumulation):
            if index:
                engine.end_micro_batch()
            tokens, labels = (torch.randint(config.model.vocab_size, shape, generator=generator) for _ in range(2))
            engine.forward_backward(tokens, labels, scale)
        engine.step(config.optimizer.learning_rate)

    return step


def _communication_share(step: Any, device: Any) -> float:
    """Share of one step's time in which a collective, or a receive, is under way on this rank."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as profiler:
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
    events = [(event.name, event.time_range.start, event.time_range.end) for event in profiler.events() or ()]
    whole = max(end for _, _, end in events) - min(start for _, start, _ in events)
    # A send is under way until the other end has taken it, but nobody waits for it.
    talking = [
        (start, end)
        for name, start, end in events
        if (name.startswith("gloo:") and name != "gloo:send") or name.startswith("ncclDevKernel")
    ]
    return _covered(talking) / whole


def _covered(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


if __name__ == "__main__":
    main()
