"""What a real training process allocates, byte by byte: torch's profiler hears of every allocation and free on the CPU."""

from __future__ import annotations

import bisect
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, record_function

from titans_pretrain.config import config_from_dict
from titans_pretrain.layout import choose_layout


def measure_job(tree: dict[str, dict[str, Any]], steps: int = 2) -> dict[str, tuple[int, int]]:
    """Train `steps` steps on random tokens as the loop does; every rank calls it.

    Returns:
        phase of the last step -> (bytes allocated when it began, its peak).
    """
    from titans_pretrain.layout import micro_batch_rows
    from titans_pretrain.parallel.build import build_model
    from titans_pretrain.train.engine import Engine
    from titans_pretrain.train.environment import find_environment, join

    config = config_from_dict(tree)
    grid = join(find_environment(), "cpu")
    layout = choose_layout(config, grid.world_size)
    grid = grid.lay_out(layout)
    _outlive_the_workers()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model = build_model(config, grid, config.run.seed)
        engine = Engine(config, model, grid)
        rows = micro_batch_rows(config, layout.data)
        accumulation = config.batch_size // layout.data // rows
        shape = (rows, config.data.seq_len // layout.sequence)
        for step in range(steps):
            for index in range(accumulation):
                if index:
                    engine.end_micro_batch()
                tokens, labels = (torch.randint(config.model.vocab_size, shape) for _ in range(2))
                with record_function(f"phase {step} pass {index}"):
                    engine.forward_backward(tokens, labels, 1e-3)
            with record_function(f"phase {step} update"):
                engine.step(1e-4)
            with record_function(f"phase {step} end"):
                pass
    return _phases(profiler, f"phase {steps - 1} ")


def _outlive_the_workers() -> None:
    """The profiler does not hear of what another thread frees, and gloo's workers may be the last to hold a collective's
    tensors: return from a collective only after they have let go."""
    for name in ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "all_gather", "reduce_scatter"):
        setattr(dist, name, _then_wait(getattr(dist, name)))


def _then_wait(collective: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        work = collective(*args, **kwargs)
        if work is not None:
            work.wait()
        time.sleep(0.002)
        return work

    return call


def _phases(profiler: profile, prefix: str) -> dict[str, tuple[int, int]]:
    from torch._C._profiler import _EventType

    marks, allocations = [], []
    stack = list(profiler.profiler.kineto_results.experimental_event_tree())
    while stack:
        event = stack.pop()
        stack.extend(event.children)
        if event.tag == _EventType.Allocation:
            allocations.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
        elif event.name.startswith("phase "):
            marks.append((event.start_time_ns, event.name))
    allocations.sort()
    marks.sort()
    phases: dict[str, tuple[int, int]] = {}
    blocks = _Blocks()
    index, name = 0, ""
    for moment, address, size in allocations:
        while index < len(marks) and marks[index][0] <= moment:
            name = marks[index][1]
            phases[name] = (blocks.total, blocks.total)
            index += 1
        blocks.change(address, size)
        if name:
            phases[name] = (phases[name][0], max(phases[name][1], blocks.total))
    return {key.removeprefix(prefix): value for key, value in phases.items() if key.startswith(prefix)}


class _Blocks:
    """Live blocks by address. What another thread frees (gloo's, after a collective) the profiler does not hear of: a block
    is gone as soon as another begins inside it."""

    def __init__(self) -> None:
        self.total = 0
        self._starts: list[int] = []
        self._sizes: dict[int, int] = {}

    def change(self, address: int, size: int) -> None:
        """`size` bytes allocated at `address`, or, below zero, freed."""
        if size < 0:
            if address in self._sizes:
                self._remove(address)
            return
        place = bisect.bisect_right(self._starts, address)
        while place and address < (start := self._starts[place - 1]) + self._sizes[start]:
            self._remove(start)
            place -= 1
        while place < len(self._starts) and self._starts[place] < address + size:
            self._remove(self._starts[place])
        self._starts.insert(place, address)
        self._sizes[address] = size
        self.total += size

    def _remove(self, start: int) -> None:
        self.total -= self._sizes.pop(start)
        del self._starts[bisect.bisect_left(self._starts, start)]
