"""What does the user see of a run: console lines, metrics.jsonl, TensorBoard files, and what code it was.

metrics.jsonl holds one object per optimizer step (step, tokens, loss, perplexity, grad_norm, lr, tokens_per_second,
tflops, mfu, memory_bytes, seconds; at log intervals the memory's signals and, of a mixture, tokens/NAME and epochs/NAME
that each source has served since its stream began; slowest_rank, its slowest_rank_seconds of forward passes and
slowest_rank_ratio to the median rank's) and one per evaluation (step, tokens, valid_loss, valid_perplexity, and
of a mixture valid_loss/NAME, ...; with eval.needle_lengths needle_accuracy/LENGTH, the share of an answer's tokens that are the
likeliest, and needle_nll/LENGTH). Losses are nats per token, over all ranks; memory is the largest rank's.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import torch
from tqdm import tqdm

from titans_pretrain.config import Config
from titans_pretrain.errors import UserError
from titans_pretrain.parallel.grid import Grid
from titans_pretrain.train.checkpoint import Progress

# Dense bf16 TFLOP/s from NVIDIA's and AMD's data sheets, by part of the device's name; the first match counts.
PEAK_TFLOPS = {
    "GB200": 2500.0,
    "B200": 2250.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "H800": 989.0,
    "GH200": 989.0,
    "A100": 312.0,
    "A800": 312.0,
    "MI300X": 1307.0,
    "MI250": 383.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "A40": 150.0,
    "A30": 165.0,
    "A10": 125.0,
    "4090": 165.0,
    "3090": 71.0,
}


class Reporter:
    """Writes a run's logs. Every rank has its own log file; rank 0 also has console, metrics and TensorBoard."""

    def __init__(self, config: Config, run_dir: Path, grid: Grid) -> None:
        self.config = config
        self.run_dir = run_dir
        self.grid = grid
        (run_dir / "log").mkdir(parents=True, exist_ok=True)
        self._log: TextIO = open(run_dir / "log" / f"rank_{grid.rank}.txt", "a", buffering=1)  # noqa: SIM115
        self._metrics: TextIO | None = None
        self._board: Any = None
        self._bar: tqdm | None = None
        self.flops_per_token = 0.0
        self.peak_flops = 0.0
        self.num_steps = config.num_steps

    def say(self, text: str) -> None:
        """A line in this rank's log, and on the console for rank 0."""
        self.note(text)
        if self.grid.is_first:
            if self._bar is not None:
                self._bar.write(text, file=sys.stdout)
            else:
                print(text)
            sys.stdout.flush()

    def note(self, text: str) -> None:
        """A line in this rank's log only."""
        stamp = time.strftime("%Y-%m-%d %H:%M:%S ")
        with contextlib.suppress(OSError):  # a full disk shows where it costs more: in metrics, in a save
            for line in text.splitlines():
                self._log.write(stamp + line + "\n")

    def start(self, progress: Progress, flops_per_token: float, num_steps: int) -> None:
        """Open the metrics where the run starts or continues, cutting off what an earlier life wrote after that; look up
        or measure the peak. Collective."""
        self.flops_per_token = flops_per_token
        self.num_steps = num_steps
        self._step = progress.step
        self.peak_flops = peak_flops(self.config, self.grid)
        self._window = (time.perf_counter(), progress.tokens)
        self._first_step, self._started = progress.step, time.perf_counter()
        if not self.grid.is_first:
            return
        path = self.run_dir / "metrics.jsonl"
        cut_metrics(path, progress.step)
        self._metrics = open(path, "a", buffering=1)  # noqa: SIM115
        if self.config.log.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(self.run_dir / "tensorboard"), purge_step=progress.step + 1, max_queue=100)
        if sys.stdout.isatty():
            self._bar = tqdm(total=self.num_steps, initial=progress.step, unit="step", dynamic_ncols=True)

    def step(
        self,
        progress: Progress,
        *,
        batch_tokens: int,
        loss: float,
        grad_norm: float,
        learning_rate: float,
        seconds: float,
        memory_bytes: float,
        signals: Mapping[str, float],
    ) -> None:
        """One optimizer step. Only rank 0 writes."""
        self._step = progress.step
        if self._metrics is None:
            return
        rate = batch_tokens / seconds
        flops = rate * self.flops_per_token
        row = {
            "step": progress.step,
            "tokens": progress.tokens,
            "loss": loss,
            "perplexity": perplexity(loss),
            "grad_norm": grad_norm,
            "lr": learning_rate,
            "tokens_per_second": rate,
            "tflops": flops / 1e12,
            "mfu": flops / self.peak_flops,
            "memory_bytes": memory_bytes,
            "seconds": seconds,
        }
        self._write({**row, **signals})
        if self._bar is not None:
            self._bar.update(1)
            self._bar.set_postfix_str(f"loss {loss:.4f}")
        if progress.step % self.config.log.interval == 0 or progress.step in (1, self.num_steps):
            self._line(row)

    def skipped(self, progress: Progress, loss: float, text: str) -> None:
        """A step without an update; its loss is in the metrics if it is a number. Only rank 0 writes."""
        self._step = progress.step
        self.say(f"step {progress.step} | {text}")
        if self._metrics is not None:
            # Under a name of its own: whoever reads "loss" wants steps that were made.
            numbers = {"bad_loss": loss} if math.isfinite(loss) else {}
            self._write({"step": progress.step, "tokens": progress.tokens, **numbers, "skipped": 1})

    def _line(self, row: Mapping[str, Any]) -> None:
        now = time.perf_counter()
        total = self.num_steps
        per_step = (now - self._started) / (row["step"] - self._first_step)
        # Over the steps since the last line, evaluation and saving included: what the user will wait for.
        rate = (row["tokens"] - self._window[1]) / (now - self._window[0])
        self._window = (now, row["tokens"])
        flops = rate * self.flops_per_token
        self.say(
            f"step {row['step']:>{len(str(total))}}/{total} | {row['tokens'] / 1e6:.2f}M tokens | loss {row['loss']:.4f} | "
            f"lr {row['lr']:.2e} | grad norm {row['grad_norm']:.3f} | {rate:,.0f} tok/s | {flops / 1e12:.3g} TFLOP/s | "
            f"MFU {100 * flops / self.peak_flops:.1f} % | {row['memory_bytes'] / 2**30:.2f} GiB | "
            f"ETA {duration(per_step * (total - row['step']))}"
        )

    def evaluation(
        self, progress: Progress, losses: Mapping[str, float], needles: Mapping[str, float] | None = None
    ) -> None:
        """Validation losses and needle scores, named as evaluate.py and needles.py name them. Only rank 0 writes."""
        needles = needles or {}
        perplexities = {name.replace("loss", "perplexity", 1): perplexity(loss) for name, loss in losses.items()}
        if self._metrics is not None:
            self._write({"step": progress.step, "tokens": progress.tokens, **losses, **perplexities, **needles})
        parts = [f"{name} {loss:.4f} (perplexity {perplexity(loss):,.2f})" for name, loss in losses.items()]
        parts += [f"{name} {value:.4f}" for name, value in needles.items()]
        self.say(f"step {progress.step} | {' | '.join(parts)}")

    def record(self, row: Mapping[str, float]) -> None:
        """Numbers about the run itself, under the step it is at. Only rank 0 writes."""
        if self._metrics is not None:
            self._write({"step": self._step, **row})

    def summary(self, progress: Progress, unigram_entropy: float, checkpoint: Path | None) -> None:
        """The last lines of a run."""
        if self._metrics is None:
            return
        total = self.num_steps
        lines = [f"{'finished' if progress.step >= total else 'stopped as asked'} at step {progress.step} of {total}"]
        rows = [json.loads(line) for line in (self.run_dir / "metrics.jsonl").read_text().splitlines()]
        evaluations = [row for row in rows if any(name.startswith("valid_loss") for name in row)]
        steps = [row for row in rows if "loss" in row]
        if evaluations:
            first, last = evaluations[0], evaluations[-1]
            for name in (n for n in last if n.startswith("valid_loss")):
                fall = (
                    f", from {first[name]:.4f} at step {first['step']}" if last is not first and name in first else ""
                )
                yardstick = "" if "/" in name else f"; unigram entropy of the data {unigram_entropy:.4f}"
                lines.append(
                    f"{name} {last[name]:.4f} nats per token at step {last['step']}{fall}; "
                    f"perplexity {perplexity(last[name]):,.2f}{yardstick}"
                )
        if steps:
            seconds = sum(row["seconds"] for row in steps)
            lines.append(
                f"{sum(row['tokens_per_second'] * row['seconds'] for row in steps) / seconds:,.0f} tokens/s in training steps, "
                f"MFU {100 * sum(row['mfu'] * row['seconds'] for row in steps) / seconds:.1f} %"
            )
        lines.append(f"metrics: {self.run_dir / 'metrics.jsonl'}")
        if self._board is not None:
            lines.append(f"TensorBoard: tensorboard --logdir {self.run_dir / 'tensorboard'}")
        if checkpoint is not None:
            lines.append(f"checkpoint: {checkpoint}")
        self.say("\n".join(lines))

    def _write(self, row: Mapping[str, Any]) -> None:
        assert self._metrics is not None
        try:
            self._metrics.write(json.dumps(row) + "\n")
        except OSError as error:
            raise UserError(
                f"cannot write {self._metrics.name}: {error.strerror}; free space there, or move the run with run.dir, and "
                "start it again: it goes on from its last checkpoint"
            ) from error
        if self._board is not None:
            for name, value in row.items():
                if name not in ("step", "tokens"):
                    self._board.add_scalar(_board_name(name), value, row["step"])

    def close(self) -> None:
        """Flush and close everything; safe to call twice."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        if self._board is not None:
            self._board.close()
            self._board = None
        if self._metrics is not None:
            with contextlib.suppress(OSError):  # what could not be written was told when it was
                self._metrics.close()
            self._metrics = None
        self._log.flush()


def _board_name(name: str) -> str:
    if name.startswith(("tokens/", "epochs/")):
        return f"data/{name.replace('/', '_of_', 1)}"
    if name.startswith("valid"):
        return "valid/" + name.replace("/", "_of_", 1)
    if name.startswith("needle_"):
        return "needle/" + name.removeprefix("needle_").replace("/", "_at_")
    if "/" in name:
        return "memory/" + name
    if name.startswith("checkpoint_"):
        return name.replace("_", "/", 1)
    group = "speed" if name in ("tokens_per_second", "tflops", "mfu", "seconds") else "train"
    return f"{group}/{name}"


def perplexity(loss: float) -> float:
    """exp(loss), infinite instead of an error where fp64 ends."""
    return math.exp(loss) if loss < 700 else math.inf


def duration(seconds: float) -> str:
    """`2d03h`, `1h05m`, `3m20s` or `42s`."""
    whole = int(seconds)
    for size, unit, part, part_unit in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= size:
            return f"{whole // size}{unit}{whole % size // part:02d}{part_unit}"
    return f"{whole}s"


def cut_metrics(path: Path, step: int) -> None:
    """Drop from metrics.jsonl what lies after `step`, and a last line that a kill cut short."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(ValueError):
            if json.loads(line)["step"] <= step and step > 0:
                kept.append(line + "\n")
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept))
    os.replace(temporary, path)


def memory_in_use(device: torch.device) -> int:
    """Bytes this process holds: the allocator's peak since the last call on CUDA, resident memory on CPU."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # not Linux: the peak is what there is, on macOS in bytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def peak_flops(config: Config, grid: Grid) -> float:
    """FLOP/s of all devices together that MFU divides by (`log.peak_tflops`). Collective."""
    if config.log.peak_tflops:
        return config.log.peak_tflops * 1e12 * grid.world_size
    if grid.device.type == "cuda" and config.engine.precision == "bf16":
        name = torch.cuda.get_device_name(grid.device)
        for part, tflops in PEAK_TFLOPS.items():
            if part.lower() in name.lower():
                return tflops * 1e12 * grid.world_size
    # At the same time on all ranks: processes that share a CPU share its peak.
    grid.barrier()
    return float(grid.gather_numbers([_measured_flops(config.engine.precision, grid.device)]).sum())


def _measured_flops(precision: str, device: torch.device, seconds: float = 0.3) -> float:
    """FLOP/s of a square matrix product in the run's dtype."""
    size = 4096 if device.type == "cuda" else 512
    generator = torch.Generator(device).manual_seed(0)  # its own: measuring must not move the run's random state
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a = torch.randn(size, size, device=device, dtype=dtype, generator=generator)

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    a @ a
    synchronize()
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        for _ in range(4):
            a @ a
        synchronize()
        count += 4
    return count * 2 * size**3 / (time.perf_counter() - start)


def code_text(folder: Path) -> str:
    """The git revision of the source tree at `folder` and its uncommitted changes, or a line that says there is none."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
            errors="replace",
        ).stdout

    try:
        top = git("rev-parse", "--show-toplevel").strip()
        if git("ls-files", "--", str(folder)).strip() == "":
            return f"no revision: {folder} is not tracked by the git repository around it\n"
        return f"revision {git('rev-parse', 'HEAD').strip()} of {top}\n\n{git('diff', 'HEAD')}"
    except FileNotFoundError:
        return "no revision: git is not installed\n"
    except subprocess.SubprocessError:
        return f"no revision: {folder} is not in a git repository with a commit\n"
