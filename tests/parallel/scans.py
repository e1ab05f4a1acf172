"""What ranks run in the tests of the memory strategies: a scan over several ranks beside the same scan in one process."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from tests.memory.problem import error, make_problem, make_state
from titans_pretrain.memory import MemoryOptions, MemoryState, initial_state, memory_scan
from titans_pretrain.parallel.grid import Axis
from titans_pretrain.parallel.sequence import ShardedSequence


def join_axis() -> Axis:
    """All ranks on one axis."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    return Axis(dist.get_rank(), tuple(range(dist.get_world_size())), dist.group.WORLD)


class Case(NamedTuple):
    """A scan of `ranks * t` tokens."""

    strategy: str
    t: int
    chunk: int
    start: int | None = None
    """Offset of a start state; None: from the initial weights."""
    toward: str = "init"
    problem: dict[str, Any] = {}  # noqa: RUF012
    """Changes to `make_problem`."""
    hard_gates: bool = False
    """A token forgets, and one drops, more than fp32 can tell from all."""


def compare_scans(cases: list[Case]) -> list[dict[str, float]]:
    """Per case the errors of the outputs, of the state at the end and of every gradient on this rank, by name."""
    axis = join_axis()
    return [_compare(axis, case) for case in cases]


def _compare(axis: Axis, case: Case) -> dict[str, float]:
    t = case.t
    problem = make_problem(axis.size * t, **{"batch": 2, "heads": 4, **case.problem})
    if case.hard_gates:
        for gate in (problem.log_gamma, problem.log_eta):
            if gate is not None:
                gate[:, 2::7] = -1e4
    options = MemoryOptions(case.chunk, forget_toward=case.toward)
    state = None if case.start is None else make_state(problem, case.start)
    shared = {f"initial {i}": w for i, w in enumerate(problem.initial_weights)}
    if problem.norm_weight is not None and problem.norm_bias is not None:
        shared.update(norm_weight=problem.norm_weight, norm_bias=problem.norm_bias)
    if state is not None:
        shared.update({f"start {i}": x for i, x in enumerate((*state.weights, *state.momentum))})
        if state.offset:
            shared.update({f"anchor {i}": x for i, x in enumerate(state.anchor)})
    own = slice(axis.rank * t, (axis.rank + 1) * t)
    names = ("q", "k", "v", "log_gamma", "log_eta", "theta")
    whole = {name: x for name, x in zip(names, problem, strict=False) if x is not None}
    local = {name: x[:, own].clone() for name, x in whole.items()}
    for x in (*shared.values(), *whole.values(), *local.values()):
        x.requires_grad_()
    weight_of_out = torch.randn_like(problem.q, generator=None)
    torch.manual_seed(5)
    weight_of_out = torch.randn_like(problem.q)
    weights_of_state = [
        torch.randn_like(w) for _ in range(2) for w in initial_state(problem.initial_weights, 2).weights
    ]

    def loss_of_end(end: MemoryState, weights: list[Tensor]) -> Tensor:
        return torch.stack([(x * w).sum() for x, w in zip((*end.weights, *end.momentum), weights, strict=True)]).sum()

    out, end = memory_scan(*problem, state, options)
    ((out * weight_of_out).sum() + loss_of_end(end, weights_of_state)).backward()
    expected = {name: x.grad for name, x in {**shared, **whole}.items()}
    for x in shared.values():
        x.grad = None

    given = [local.get(name) for name in names]
    sequence = ShardedSequence(axis, case.strategy)
    found_out, found_end = sequence.memory_scan(*given, *problem[6:], state, options)
    loss = (found_out * weight_of_out[:, own]).sum()
    errors = {"out": error(found_out, out[:, own])}
    by_heads = case.strategy == "head_exchange"
    if by_heads or axis.rank == axis.size - 1:  # the others have the state before the end, and hand it on

        def part(x: Tensor) -> Tensor:
            return x.chunk(axis.size, 1)[axis.rank] if by_heads else x

        loss = loss + loss_of_end(found_end, [part(w) for w in weights_of_state])
        pairs = zip((*found_end.weights, *found_end.momentum), (*end.weights, *end.momentum), strict=True)
        errors["end"] = max(error(x, part(y)) for x, y in pairs)
        assert found_end.offset == end.offset
    loss.backward()
    for name, x in local.items():
        grad = expected[name]
        assert x.grad is not None, name
        assert grad is not None
        errors[name] = (x.grad - grad[:, own]).abs().max().item() / grad.abs().max().item()
    for name, x in shared.items():
        grad = expected[name]
        assert x.grad is not None, f"{name} has no gradient on rank {axis.rank}"
        dist.all_reduce(x.grad)
        errors[name] = 0.0 if grad is None and not x.grad.any() else error(x.grad, grad)  # type: ignore[arg-type]
    return errors


def assert_equal(cases: list[Case], results: list[list[dict[str, float]]], tolerance: float = 1e-10) -> None:
    """`results` by rank, as run_distributed gives them."""
    for rank, errors in enumerate(results):
        for case, found in zip(cases, errors, strict=True):
            wrong = {name: value for name, value in found.items() if not value < tolerance}
            assert not wrong, f"rank {rank}, {case}: {wrong}"
