"""How benchmark_memory.py measures a row: in a process of its own, so that its peak memory is its own and a crash costs one
row.

Times are medians after warm-up, of the forward pass (with gradients on) and of forward and backward together. The peak holds
inputs, parameters, gradients and whatever is kept or needed in between: on a GPU what torch allocated, on a CPU how far the
process's peak resident memory grew from before the inputs were made.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import resource
import signal
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from tools.benchmark_operators import BUILDERS, Operator, Row, missing_package

GIB = 2**30


@dataclass(frozen=True)
class Settings:
    """How rows are measured."""

    device: str
    threads: int
    repeats: int
    warm_up: int
    memory_limit: float
    """GiB that a row may allocate on a CPU before it is told to be out of memory; 0: no limit."""
    timeout: float
    """Seconds a row may take."""


def measure(row: Row, settings: Settings) -> dict[str, Any]:
    """Measure a row in a fresh process -> forward_ms, total_ms, mtok_s, peak_gib, tflops (None where not counted) and every
    repeat's milliseconds; or only `words`: why there are no figures."""
    package = missing_package(row)
    if package is not None:
        return {"words": f"not installed (pip install {package})"}
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(row, settings, sender))
    process.start()
    sender.close()
    try:
        if not receiver.poll(settings.timeout):
            return {"words": f"not done after {settings.timeout:g} s (--timeout)"}
        result: dict[str, Any] = receiver.recv()
        process.join()
        return result
    except EOFError:
        process.join()
        return {"words": f"its process died ({_how(process.exitcode)})"}
    finally:
        receiver.close()
        if process.is_alive():
            process.kill()
            process.join()


def _how(code: int | None) -> str:
    if code is None or code >= 0:
        return f"exit code {code}"
    return f"signal {signal.Signals(-code).name}" + (", most likely out of memory" if code == -signal.SIGKILL else "")


def _child(row: Row, settings: Settings, sender: Connection) -> None:
    try:
        result = measure_here(row, settings)
    except Exception as error:  # a row never ends the table, whatever a peer raises
        result = {"words": explain(error)}
    sender.send(result)


def explain(error: Exception) -> str:
    """The words of a row that could not run."""
    text = str(error).strip().splitlines()[0] if str(error).strip() else "no reason given"
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return "out of memory"
    if isinstance(error, ValueError):  # ours: UserError is one, and the text is a sentence
        return text
    if isinstance(error, ImportError):
        return f"installed, but cannot be imported: {text}"
    return f"cannot run: {type(error).__name__}: {text}"


def measure_here(row: Row, settings: Settings) -> dict[str, Any]:
    """`measure` in this process; raises what the operator raises."""
    device = torch.device(settings.device)
    torch.set_num_threads(settings.threads)
    build = BUILDERS[row.operator]
    if device.type == "cuda":
        operator = build(row, device)
        times = _times(operator, settings.warm_up, settings.repeats, _gpu_stopwatch)
        peak = torch.cuda.max_memory_allocated(device)
    else:
        if settings.memory_limit:
            # The data limit, not the address space: what libraries map and never touch does not count.
            limit = int(settings.memory_limit * GIB)
            resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.getrlimit(resource.RLIMIT_DATA)[1]))
        # Code that torch or a peer loads at the first call is not the operator's memory: load it with a tiny one.
        tiny = dict(batch=1, tokens=8, heads=2, head_dim=8, hidden=8 * bool(row.hidden))
        short = replace(row, **tiny, chunk=min(row.chunk, 8), anchor=min(row.anchor, 8))  # type: ignore[arg-type]
        _times(build(short, device), 0, 1, _cpu_stopwatch)
        before = _peak_resident(reset=True)
        operator = build(row, device)
        times = _times(operator, settings.warm_up, settings.repeats, _cpu_stopwatch)
        peak = _peak_resident() - before
    forward, total = (statistics.median(column) for column in zip(*times, strict=True))
    return {
        "forward_ms": forward,
        "total_ms": total,
        "best_total_ms": min(t for _, t in times),
        "mtok_s": None if row.operator == "matmul" else row.batch * row.tokens / total / 1e3,
        "peak_gib": peak / GIB,
        "tflops": None if operator.flops is None else operator.flops / total / 1e9,
        "forward_all_ms": [f for f, _ in times],
        "total_all_ms": [t for _, t in times],
    }


Stopwatch = Callable[[], Callable[[], Callable[[], float]]]
"""Called, it starts; called again, that marks a lap; called once more, the lap gives its milliseconds since the start."""


def _times(operator: Operator, warm_up: int, repeats: int, start: Stopwatch) -> list[tuple[float, float]]:
    """Milliseconds of (forward, forward and backward), one pair a repeat."""
    with torch.no_grad():
        grad = torch.randn_like(operator.forward()) if operator.leaves else None
    times = []
    for repeat in range(warm_up + repeats):
        if repeat == warm_up and torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()  # without what autotuning needed
        lap = start()
        out = operator.forward()
        forward = lap()
        if grad is not None:
            out.backward(grad)
        total = lap()
        if repeat >= warm_up:
            times.append((forward(), total()))
        del out
        for leaf in operator.leaves:
            leaf.grad = None
    return times


def _cpu_stopwatch() -> Callable[[], Callable[[], float]]:
    begin = time.perf_counter()

    def lap() -> Callable[[], float]:
        milliseconds = 1e3 * (time.perf_counter() - begin)
        return lambda: milliseconds

    return lap


def _gpu_stopwatch() -> Callable[[], Callable[[], float]]:
    """By events on the stream: the CPU may run ahead."""
    torch.cuda.synchronize()
    begin = torch.cuda.Event(enable_timing=True)
    begin.record()

    def lap() -> Callable[[], float]:
        end = torch.cuda.Event(enable_timing=True)
        end.record()

        def milliseconds() -> float:
            end.synchronize()
            return float(begin.elapsed_time(end))

        return milliseconds

    return lap


def _peak_resident(reset: bool = False) -> int:
    """Bytes of the largest resident memory this program has had (since the last reset, where the system can).

    Linux counts it a program: getrusage would count what the parent had when it started this process.
    """
    if reset:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
