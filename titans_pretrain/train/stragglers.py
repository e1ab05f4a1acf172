"""Which rank is slow? The time of a rank's own forward passes, before it waits for others.

A step takes as long as its slowest rank, and all ranks show the same step time, since gradients are summed in the backward
pass. Forward passes wait for nobody where parameters are whole (ZeRO 0 to 2) and tokens are not shared; ranks that share
tokens or gather parameters (tensor, sequence, ZeRO 3) wait for each other there too, and the slowest group shows instead.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch


class Stopwatch:
    """Seconds of the passes measured since `restart`; on CUDA by events on the stream, which cost no synchronisation."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def restart(self) -> None:
        """Forget what was measured."""
        self._seconds, self._events = 0.0, []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Measure what is done, or put on the stream, inside."""
        if self._cuda:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            yield
            end.record()
            self._events.append((begin, end))
        else:
            began = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - began

    def seconds(self) -> float:
        """In all. On CUDA what is measured must be done: after the loss was read."""
        return self._seconds + sum(begin.elapsed_time(end) for begin, end in self._events) / 1e3


def slowest(seconds: Sequence[float]) -> dict[str, float]:
    """Of every rank's seconds: the slowest rank, its seconds, and how many times the median rank's they are."""
    rank = max(range(len(seconds)), key=lambda rank: seconds[rank])
    middle = statistics.median(seconds)
    return {
        "slowest_rank": rank,
        "slowest_rank_seconds": seconds[rank],
        "slowest_rank_ratio": seconds[rank] / middle if middle else 1.0,
    }
