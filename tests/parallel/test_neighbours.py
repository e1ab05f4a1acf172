"""Do halos and the hand-off bring what the ranks before hold, take the gradients back, and let the ranks overlap?"""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.distributed import run_distributed
from tests.parallel.models import ModelCase, build
from tests.parallel.scans import Case, assert_equal, compare_scans, join_axis
from titans_pretrain.memory import memory_scan
from titans_pretrain.parallel import neighbours
from titans_pretrain.parallel.sequence import ShardedSequence

CASES = [
    Case("hand_off", 5, 8),
    Case("hand_off", 7, 4, start=3),
    Case("hand_off", 8, 4, start=0, problem=dict(depth=1)),
    Case("hand_off", 3, 64, start=5, problem=dict(momentum=False)),
    Case("hand_off", 6, 8, toward="zero", problem=dict(depth=3, norm=False)),
    Case("hand_off", 9, 6, start=2, problem=dict(forgetting=False, shared_gates=True)),
    Case("hand_off", 1, 3, hard_gates=True),
]


def test_hand_off_equals_one_process_on_2_ranks() -> None:
    assert_equal(CASES, run_distributed(compare_scans, 2, CASES))


def test_hand_off_equals_one_process_on_4_ranks() -> None:
    assert_equal(CASES, run_distributed(compare_scans, 4, CASES))


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_halo_is_the_tokens_before_from_as_many_ranks_as_it_takes(ranks: int) -> None:
    """Lengths shorter than a shard, just one, several, and longer than all that is there."""
    lengths = [1, 3, 4, 7, 9, 40]
    for rank, found in enumerate(run_distributed(extend_numbers, ranks, lengths)):
        assert found == [(True, True, True)] * len(lengths), f"rank {rank}"


def extend_numbers(lengths: list[int]) -> list[tuple[bool, bool, bool]]:
    """Against one process: the extended tokens, their gradient, the gradient of the tokens before the first."""
    axis = join_axis()
    t, found = 3, []
    sequence = ShardedSequence(axis, "hand_off")
    for length in lengths:
        torch.manual_seed(length)
        earlier = torch.randn(2, length, 5).requires_grad_()
        whole = torch.randn(2, axis.size * t, 5).requires_grad_()
        own = slice(axis.rank * t, (axis.rank + 1) * t)
        all_tokens = torch.cat((earlier, whole), dim=1)
        weight = torch.randn(axis.size, 2, length + t, 5)
        windows = [all_tokens[:, r * t : length + (r + 1) * t] for r in range(axis.size)]
        torch.stack([(x * w).sum() for x, w in zip(windows, weight, strict=True)]).sum().backward()
        before, x = earlier.detach().clone().requires_grad_(), whole.detach()[:, own].clone().requires_grad_()
        extended = sequence.extend(x, before, length)
        (extended * weight[axis.rank]).sum().backward()
        assert before.grad is not None
        assert x.grad is not None
        dist.all_reduce(before.grad)
        assert whole.grad is not None
        assert earlier.grad is not None
        zeros = sequence.extend(x.detach(), None, length)
        outside = max(0, length - axis.rank * t)
        same = torch.equal(extended, windows[axis.rank]) and torch.equal(zeros[:, outside:], extended[:, outside:])
        found.append(
            (
                same and not zeros[:, :outside].any(),
                torch.allclose(x.grad, whole.grad[:, own]),
                torch.allclose(before.grad, earlier.grad),
            )
        )
    dist.barrier()  # a rank that ends takes what it is still sending with it
    return found


# ------------------------------------------------------------------------------------------------------------- wavefront

LAYERS = 4
SCAN_TIME = 0.1
"""Seconds that a rank's scan of its tokens is made to take, forward and again backward: far more than the rest."""
SERIAL = 2 * LAYERS * SCAN_TIME


def test_ranks_are_on_different_layers_at_the_same_time() -> None:
    spent: dict[str, float] = {}
    for _ in range(3):  # on a busy machine one trial in many takes long for other reasons; the order must hold in all
        first, last = run_distributed(trace_of_scans, 2)
        for way, early, late in (("forward", first, last), ("backward", last, first)):
            assert len(early[way]) == len(late[way]) == LAYERS
            for layer in range(LAYERS - 1):
                assert early[way][layer + 1][0] < late[way][layer][1], f"{way}: no overlap at layer {layer}"
            for layer in range(LAYERS):
                assert early[way][layer][1] <= late[way][layer][0], (
                    f"{way}: layer {layer} ran before its state was there"
                )
            trial = late[way][-1][1] - early[way][0][0]
            spent[way] = min(trial, spent.get(way, trial))
        if max(spent.values()) < 0.85 * SERIAL:
            return
    raise AssertionError(f"{spent} s at best, one rank after the other would be {SERIAL:.2f} s")


class _SlowBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, spans: list[tuple[float, float]]) -> Tensor:
        ctx.spans = spans
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        start = time.monotonic()
        time.sleep(SCAN_TIME)
        ctx.spans.append((start, time.monotonic()))
        return grads[0], None


def trace_of_scans() -> dict[str, list[tuple[float, float]]]:
    """(begin, end) on the machine's clock of every scan of one training step, forward and backward."""
    axis = join_axis()
    spans: dict[str, list[tuple[float, float]]] = {"forward": [], "backward": []}

    def slow_scan(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
        start = time.monotonic()
        out, *rest = memory_scan(*args, **kwargs)
        time.sleep(SCAN_TIME)
        spans["forward"].append((start, time.monotonic()))
        return _SlowBackward.apply(out, spans["backward"]), *rest

    case = ModelCase("lmm", "hand_off", 8, dict(num_layers=LAYERS))
    model = build(case, ShardedSequence(axis, "hand_off"))
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    model(tokens, tokens).backward()  # first calls load things
    neighbours.memory_scan = slow_scan  # type: ignore[assignment]
    dist.barrier()
    loss = model(tokens, tokens)
    dist.barrier()
    loss.backward()
    dist.barrier()
    return spans
