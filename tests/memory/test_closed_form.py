"""The closed form against the token loop: values, states and gradients, in float64."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from tests.memory.problem import (
    assert_same,
    error,
    make_problem,
    make_state,
    scan_in_parts,
    state_tensors,
)
from titans_pretrain.memory import MemoryOptions, MemoryState, memory_scan, pieces, tile_length
from titans_pretrain.memory.pieces import cut_pieces

FORGET = [None, "init", "zero"]


@pytest.mark.parametrize("forget", FORGET)
@pytest.mark.parametrize("momentum", [True, False])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@torch.no_grad()
def test_equals_the_token_loop(depth: int, norm: bool, momentum: bool, forget: str | None) -> None:
    for chunk, length in ((1, 19), (7, 37), (16, 37), (64, 100)):
        problem = make_problem(length, depth, norm=norm, momentum=momentum, forgetting=forget is not None)
        options = MemoryOptions(chunk, forget_toward=forget or "init")
        expected = memory_scan(*problem, options=options, path="reference")
        assert_same(memory_scan(*problem, options=options, path="closed_form"), expected)
        cuts = sorted(random.Random(chunk * 10 + depth).sample(range(1, length), 3))
        assert_same(scan_in_parts(problem, cuts, options), expected)


@pytest.mark.parametrize("changes", [{}, dict(shared_gates=True), dict(batch=3, heads=1), dict(hidden=3, width=5)])
@pytest.mark.parametrize("activation", ["gelu", "silu"])
@torch.no_grad()
def test_equals_the_token_loop_at_other_shapes(activation: str, changes: dict) -> None:
    problem = make_problem(23, 3, **changes)
    options = MemoryOptions(8, activation=activation, norm_eps=1e-2)
    expected = memory_scan(*problem, options=options, path="reference")
    assert_same(memory_scan(*problem, options=options), expected)


@pytest.mark.parametrize(("momentum", "forget"), [(True, "init"), (True, None), (False, "zero")])
@torch.no_grad()
def test_long_chunks_equal_the_token_loop(momentum: bool, forget: str | None) -> None:
    """C = 160 is worked off in tiles of 64, 64 and 32 that keep the chunk's anchor."""
    problem = make_problem(230, 2, momentum=momentum, forgetting=forget is not None)
    options = MemoryOptions(160, forget_toward=forget or "init")
    expected = memory_scan(*problem, options=options, path="reference")
    assert_same(memory_scan(*problem, options=options), expected)
    assert_same(scan_in_parts(problem, [13, 100, 101, 190], options), expected)


def test_pieces_cover_the_sequence_and_stop_at_chunk_ends() -> None:
    assert tile_length(16) == 16
    assert tile_length(160) == 64
    assert cut_pieces(40, 0, 16) == [(0, 16, 0), (16, 16, 1), (32, 8, 2)]
    assert cut_pieces(40, 10, 16) == [(0, 6, None), (6, 16, 0), (22, 16, 1), (38, 2, 2)]
    assert cut_pieces(200, 0, 160) == [(0, 64, 0), (64, 64, None), (128, 32, None), (160, 40, 1)]
    assert cut_pieces(5, 150, 160) == [(0, 5, None)]


def check_gradients(
    depth: int, norm: bool, momentum: bool, forget: str | None, chunk: int, offset: int, activation: str = "gelu"
) -> None:
    """Random cotangents on outputs and final state; gradients of every input and of the incoming state."""
    found, expected = [], []
    for path, gradients in (("closed_form", found), ("reference", expected)):
        problem = make_problem(17, depth, norm=norm, momentum=momentum, forgetting=forget is not None).require_grad()
        state = make_state(problem, offset)
        fields = [tuple(x.detach().requires_grad_() for x in field) for field in state[:3]]
        if offset == 0:
            fields[2] = fields[0]
        state = MemoryState(*fields, offset)
        options = MemoryOptions(chunk, activation=activation, forget_toward=forget or "init")
        out, after = memory_scan(*problem, state, options, path=path)
        generator = torch.Generator().manual_seed(5)
        total = sum(
            (x * torch.randn(x.shape, dtype=x.dtype, generator=generator)).sum() for x in (out, *state_tensors(after))
        )
        leaves = [*problem.tensors(), *(x for field in fields[: 3 if offset else 2] for x in field)]
        assert isinstance(total, torch.Tensor)
        gradients += torch.autograd.grad(total, leaves, allow_unused=True)
    for index, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert (a is None or not a.any()) if b is None else a is not None and error(a, b) < 1e-9, f"input {index}"


@pytest.mark.parametrize("forget", FORGET)
@pytest.mark.parametrize("momentum", [True, False])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_gradients_equal_the_token_loops(depth: int, norm: bool, momentum: bool, forget: str | None) -> None:
    check_gradients(depth, norm, momentum, forget, chunk=7, offset=3)


@pytest.mark.parametrize(("chunk", "offset"), [(1, 0), (5, 0), (6, 5), (64, 0), (64, 60)])
def test_gradients_equal_the_token_loops_at_other_chunks(chunk: int, offset: int) -> None:
    check_gradients(2, True, True, "init", chunk, offset)


@pytest.mark.parametrize("depth", [2, 3])
def test_gradients_equal_the_token_loops_with_silu(depth: int) -> None:
    check_gradients(depth, True, True, "init", chunk=7, offset=3, activation="silu")


def test_gradients_equal_the_token_loops_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "TILE", 4)
    for forget, depth in itertools.product(FORGET, (1, 2)):
        check_gradients(depth, True, True, forget, chunk=11, offset=3)


@torch.no_grad()
def test_one_token_at_a_time_equals_the_whole() -> None:
    problem = make_problem(40, 2)
    for chunk in (1, 7, 16, 64):
        options = MemoryOptions(chunk)
        assert_same(scan_in_parts(problem, range(1, 40), options), memory_scan(*problem, options=options), 1e-13)


@torch.no_grad()
def test_single_precision_stays_near_double() -> None:
    problem = make_problem(200, 2, width=8, hidden=16)
    problem = problem._replace(theta=0.1 * problem.theta)  # so that the recurrence itself does not amplify rounding
    options = MemoryOptions(16)
    narrow = memory_scan(*problem.to(torch.float32), options=options)
    assert all(x.dtype == torch.float32 for x in (narrow[0], *state_tensors(narrow[1])))
    assert_same(narrow, memory_scan(*problem, options=options), 1e-5)
