"""What ranks run in the tests of whole models: a sharded model beside the same model in one process."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from tests.memory.problem import error
from tests.model.tiny import random_tokens, tiny_config
from tests.parallel.scans import join_axis
from titans_pretrain.layout import Layout
from titans_pretrain.model import Titans, initialize
from titans_pretrain.parallel.grid import Axis, Grid
from titans_pretrain.parallel.sequence import ShardedSequence


class ModelCase(NamedTuple):
    variant: str
    strategy: str
    t: int
    changes: dict[str, Any] = {}  # noqa: RUF012
    """To `tiny_config`."""
    checkpointing: bool = False
    batches: int = 1
    """Forwards, each with its backward, whose gradients add up."""


def compare_models(cases: list[ModelCase], apart: bool = False) -> list[dict[str, float]]:
    """Per case, on the first rank of each sequence axis, the errors of the loss and of every parameter's gradient.

    apart: the ranks of an axis are not next to each other: half of the ranks make one axis, half another."""
    axis = join_axis()
    if apart:
        grid = Grid(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
        axis = grid.lay_out(Layout(1, dist.get_world_size() // 2, 2)).sequence
    return [_compare(axis, case) for case in cases]


def build(case: ModelCase, sequence: ShardedSequence | None) -> Titans:
    config = tiny_config(case.variant, **{"num_heads": 4, **case.changes})
    model = Titans(config, loss_chunk=7, sequence=sequence)
    initialize(model, 0)
    model.double()
    model.activation_checkpointing = case.checkpointing
    return model


def _compare(axis: Axis, case: ModelCase) -> dict[str, float]:
    model = build(case, ShardedSequence(axis, case.strategy))
    own = slice(axis.rank * case.t, (axis.rank + 1) * case.t)
    batches = [random_tokens(2, axis.size * case.t + 1, seed) for seed in range(case.batches)]
    losses = []
    for tokens in batches:
        loss = model(tokens[:, :-1][:, own], tokens[:, 1:][:, own])
        loss.backward()
        losses.append(loss.detach())
    total = torch.stack(losses)
    dist.all_reduce(total, group=axis.group)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient on rank {axis.rank}"
        dist.all_reduce(parameter.grad, group=axis.group)
    if axis.rank > 0:
        return {}

    plain = build(case, None)
    expected = []
    for tokens in batches:
        loss = plain(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        expected.append(loss.detach())
    errors = {"loss": error(total, torch.stack(expected))}
    gradients = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        gradient = gradients[name].grad
        assert parameter.grad is not None
        assert gradient is not None
        errors[name] = error(parameter.grad, gradient)
    # The same model sees whole sequences where it is asked to.
    with torch.no_grad():
        hidden, _ = model.hidden(batches[0])
        errors["hidden"] = error(hidden, plain.hidden(batches[0])[0])
    return errors


def assert_equal(cases: list[ModelCase], results: list[list[dict[str, float]]], tolerance: float = 1e-9) -> None:
    for rank, errors in enumerate(results):
        for case, found in zip(cases, errors, strict=True):
            wrong = {name: value for name, value in found.items() if not value < tolerance}
            assert not wrong, f"rank {rank}, {case}: {wrong}"
