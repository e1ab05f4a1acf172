"""The watch under which test_triton.py runs the kernels sees the faults it is there for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.memory.test_triton import calm_problem, results
from titans_pretrain.memory import MemoryOptions

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from tests.memory.sanitizer import Hazard, watch_kernels  # noqa: E402


@triton.jit
def past_the_end(x, out):
    i = tl.arange(0, 16)
    tl.store(out + i, tl.load(x + i + 1))


@triton.jit
def all_write_one(x, out):
    tl.store(out, tl.load(x))


@triton.jit
def neighbours_talk(x, out):
    n = tl.program_id(0)
    tl.store(x + n, 1.0)
    tl.store(out + n, tl.load(x + 1 - n))


@triton.jit
def neighbours_answer(x, out):
    n = tl.program_id(0)
    tl.store(out + n, tl.load(x + 1 - n))
    tl.store(x + n, 1.0)


@triton.jit
def turned_round(x, out):
    i = tl.arange(0, 16)
    n = tl.program_id(0)
    tl.store(x + n * 16 + i, 1.0)
    tl.store(out + n * 16 + i, tl.load(x + n * 16 + 15 - i))


@triton.jit
def turned_round_behind_a_barrier(x, out):
    i = tl.arange(0, 16)
    n = tl.program_id(0)
    tl.store(x + n * 16 + i, 1.0)
    tl.debug_barrier()
    tl.store(out + n * 16 + i, tl.load(x + n * 16 + 15 - i))


@triton.jit
def written_after_reading_elsewhere(x, out):
    i = tl.arange(0, 16)
    n = tl.program_id(0)
    tl.store(out + n * 16 + i, tl.load(x + n * 16 + 15 - i))
    tl.store(x + n * 16 + i, 1.0)


@triton.jit
def two_lanes_one_element(x, out):
    i = tl.arange(0, 16)
    tl.store(out + i // 2, tl.load(x + i))


@triton.jit
def in_place(x, out):
    at = x + tl.program_id(0) * 16 + tl.arange(0, 16)
    tl.store(at, 2 * tl.load(at))


@pytest.mark.parametrize(
    ("kernel", "words"),
    [
        (past_the_end, "touches bytes 4 to 68 of 64"),
        (all_write_one, "writes what another program writes"),
        (neighbours_talk, "reads what another program writes|writes what another program reads"),
        (neighbours_answer, "reads what another program writes"),
        (turned_round, "reads what it has just written"),
        (written_after_reading_elsewhere, "writes what it has just read otherwise"),
        (two_lanes_one_element, "writes an element twice"),
    ],
)
def test_faults_are_seen(kernel: Any, words: str) -> None:
    size = 16 if kernel is past_the_end else 32
    with watch_kernels(), pytest.raises(Hazard, match=f"{kernel.fn.__name__}, program .*({words})"):
        kernel[(2,)](torch.zeros(size), torch.zeros(size))


@pytest.mark.parametrize("kernel", [turned_round_behind_a_barrier, in_place])
def test_what_is_right_passes(kernel: Any) -> None:
    x, out = torch.ones(32), torch.zeros(32)
    with watch_kernels():
        kernel[(2,)](x, out)
    assert (out if kernel is turned_round_behind_a_barrier else x / 2).tolist() == [1.0] * 32


@pytest.mark.parametrize("kernel", ["state_forward", "read_backward_2", "state_backward"])
def test_the_barriers_are_needed(kernel: str) -> None:
    problem = calm_problem(53, hidden=128)
    with watch_kernels(without_barriers=kernel), pytest.raises(Hazard, match=f"{kernel}, .* no barrier between"):
        results(problem, None, MemoryOptions(16), "triton")
