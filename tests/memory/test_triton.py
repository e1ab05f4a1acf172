"""The Triton kernels against the closed form, run by Triton's interpreter on the CPU; and do they compile for a GPU?

tests/conftest.py chooses the interpreter. It runs every program of every launch in NumPy, so shapes are small. It shows that
the arithmetic is right; what it would let pass and a GPU would not (races, accesses outside an array, memory used before it is
set) is watched by tests/memory/sanitizer.py. In bf16 operands are rounded as a GPU rounds them (memory/triton/parts.py).
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from tests.memory.problem import Problem, error, make_fresh, make_problem, make_state, state_tensors
from titans_pretrain.errors import UserError
from titans_pretrain.memory import MemoryOptions, MemoryState, expected_path, initial_state, memory_scan
from titans_pretrain.memory.triton import shapes as triton_shapes
from tools.compile_kernels import record

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def watched() -> Iterator[None]:
    """Every launch. And torch.empty gives NaN, so that what is used before it is set shows in the results."""
    from tests.memory.sanitizer import watch_kernels  # needs the package triton

    torch.use_deterministic_algorithms(True)
    try:
        with watch_kernels():
            yield
    finally:
        torch.use_deterministic_algorithms(False)


def calm_problem(
    length: int, *, batch: int = 1, heads: int = 1, width: int = 16, hidden: int = 16, **kw: object
) -> Problem:
    """Gates and weights as a model has them at the start, so that the recurrence does not amplify rounding."""
    problem = make_problem(length, batch=batch, heads=heads, width=width, hidden=hidden, **kw).to(torch.float32)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    gate = (batch, length, heads, 2)
    eta = normal(*gate)
    return problem._replace(
        log_gamma=None if problem.log_gamma is None else F.logsigmoid(6.0 - normal(*gate)),
        log_eta=None if problem.log_eta is None else F.logsigmoid(eta),
        theta=torch.sigmoid(normal(*gate)) * torch.sigmoid(-eta) / width,
        initial_weights=(normal(heads, width, hidden), normal(heads, hidden, width) / hidden**0.5),
    )


def results(
    problem: Problem, state: MemoryState | None, options: MemoryOptions, path: str, starts: Tensor | None = None
) -> dict[str, Tensor]:
    """Outputs, final state, surprise, and gradients of everything for random cotangents of outputs and final state."""
    problem = Problem(*(detached(x) for x in problem)).require_grad()
    if state is not None:
        weights, momentum = (tuple(x.clone().requires_grad_() for x in field) for field in state[:2])
        state = MemoryState(weights, momentum, weights, 0)
    out, after, signals = memory_scan(*problem, state, options, document_starts=starts, path=path, return_signals=True)
    generator = torch.Generator().manual_seed(5)
    found = {"out": out} | {f"state {i}": x for i, x in enumerate(state_tensors(after))}
    total = torch.stack([(x.float() * torch.randn(x.shape, generator=generator)).sum() for x in found.values()]).sum()
    names = [name for name, x in zip(Problem._fields, problem, strict=True) if isinstance(x, Tensor)]
    names += [f"initial weight {i}" for i in range(2)]
    leaves = problem.tensors()
    if state is not None:
        names += [f"incoming {i}" for i in range(4)]
        leaves += [*state.weights, *state.momentum]
    grads = torch.autograd.grad(total, leaves, allow_unused=True)
    found |= {
        f"d {name}": torch.zeros_like(leaf) if x is None else x
        for name, x, leaf in zip(names, grads, leaves, strict=True)
    }
    return {name: x.detach().float() for name, x in found.items()} | signals


def detached(x: Tensor | tuple[Tensor, ...] | None) -> Tensor | tuple[Tensor, ...] | None:
    if isinstance(x, tuple):
        return tuple(w.detach().clone() for w in x)
    return None if x is None else x.detach().clone()


def assert_equal_to_closed_form(
    problem: Problem, state: MemoryState | None, options: MemoryOptions, starts: Tensor | None = None
) -> None:
    expected = results(problem, state, options, "closed_form", starts)
    for name, x in results(problem, state, options, "triton", starts).items():
        assert error(x, expected[name]) < 2e-5, name


@pytest.mark.parametrize(
    ("length", "chunk", "changes"),
    [
        (20, 16, dict(batch=2, heads=2)),
        (37, 32, dict(norm=False, heads=2, hidden=32)),
        (63, 64, {}),
        (130, 64, {}),
        (150, 128, {}),
        (520, 256, {}),
        (320, 256, dict(hidden=128)),
        (7, 16, dict(momentum=False)),
        (20, 16, dict(forgetting=False)),
        (20, 16, dict(forgetting=False, momentum=False, norm=False)),
        (20, 16, dict(hidden=128)),
        (20, 16, dict(width=12)),
        (20, 16, dict(width=24, hidden=128)),
        (20, 16, dict(width=80, hidden=64)),
    ],
)
def test_equals_the_closed_form(length: int, chunk: int, changes: dict) -> None:
    problem = calm_problem(length, **changes)
    state = make_state(problem.to(torch.float64), 0)
    state = MemoryState(*(tuple(x.float() for x in field) for field in state[:3]), 0)
    assert_equal_to_closed_form(problem, state, MemoryOptions(chunk))


@pytest.mark.parametrize("changes", [dict(forget_toward="zero"), dict(activation="silu", norm_eps=1e-2)])
def test_equals_the_closed_form_with_other_options(changes: dict) -> None:
    assert_equal_to_closed_form(calm_problem(20), None, MemoryOptions(16, **changes))


@pytest.mark.parametrize("chunk", [16, 128, 256])
def test_ranges_and_checkpoints_change_nothing(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_shapes, "SCRATCH_BYTES", 1)
    problem = calm_problem({16: 84, 128: 300, 256: 600}[chunk])
    shapes = triton_shapes.Shapes(1, problem.q.shape[1], 1, 16, 16, chunk, 4)
    assert len(list(shapes.ranges(backward=True))) > 2
    assert shapes.checkpoints > 1
    assert_equal_to_closed_form(problem, None, MemoryOptions(chunk))


@pytest.mark.parametrize(
    ("chunk", "length", "changes"),
    [(16, 36, {}), (16, 36, dict(hidden=128)), (16, 36, dict(momentum=False)), (128, 260, {}), (256, 600, {})],
)
def test_documents_begin_anew(chunk: int, length: int, changes: dict) -> None:
    problem = calm_problem(length, batch=2, **changes)
    starts = torch.tensor([[True, False, True], [False, True, False]])
    state = make_state(problem.to(torch.float64), 0)
    state = MemoryState(*(tuple(x.float() for x in field) for field in state[:3]), 0)
    assert_equal_to_closed_form(problem, state, MemoryOptions(chunk), starts)


def test_two_halves_equal_the_whole() -> None:
    """Cut at a chunk's end, and in the middle of one, where the closed form ends the chunk first."""
    problem, options = calm_problem(40), MemoryOptions(16)
    with torch.no_grad():
        whole, after = memory_scan(*problem, options=options, path="triton")
        for cut in (32, 21):
            first, state = memory_scan(*problem.tokens(0, cut), None, options, path="triton")
            second, state = memory_scan(*problem.tokens(cut, 40), state, options, path="triton")
            assert error(torch.cat((first, second), 1), whole) < 2e-6
            assert state.offset == after.offset == 8
            for a, b in zip(state_tensors(state), state_tensors(after), strict=True):
                assert error(a, b) < 2e-6


def test_extreme_gates() -> None:
    """Every mixture of gates at 1e-6 and 1 - 1e-6, and steps of 0, token by token and at the ends of the tile."""
    problem = calm_problem(40)
    generator = torch.Generator().manual_seed(9)

    def extreme() -> Tensor:
        return torch.where(torch.rand(1, 40, 1, 2, generator=generator) < 0.5, 1e-6, 1 - 1e-6).log()

    theta = problem.theta * (torch.rand(problem.theta.shape, generator=generator) < 0.7)
    mixed = problem._replace(log_gamma=extreme(), log_eta=extreme(), theta=theta)
    assert_equal_to_closed_form(mixed, None, MemoryOptions(16))


def test_zero_keys_and_a_chunk_of_identical_keys() -> None:
    problem = calm_problem(40)
    keys = problem.k.clone()
    keys[:, :16] = 0
    keys[:, 16:32] = keys[:, 16:17]
    assert_equal_to_closed_form(problem._replace(k=keys), None, MemoryOptions(16))


@pytest.mark.parametrize(
    ("length", "chunk", "hidden"), [(63, 64, 64), (64, 64, 128), (100, 16, 64), (300, 64, 64), (300, 256, 64)]
)
def test_bfloat16_stays_near_single_precision(length: int, chunk: int, hidden: int) -> None:
    """The bar of docs/memory-kernel.md for RMS(x - exact) / RMS(exact): outputs 0.006, gradients 0.01."""
    problem = calm_problem(length, batch=1, heads=1, width=64, hidden=hidden)
    rounded = problem._replace(q=problem.q.bfloat16(), k=problem.k.bfloat16(), v=problem.v.bfloat16())
    exact = problem._replace(q=rounded.q.float(), k=rounded.k.float(), v=rounded.v.float())
    options = MemoryOptions(chunk)
    # One set of initial weights for all: what a model has; their gradient is that of both ways they enter.
    expected = results(exact, None, options, "closed_form")
    for name, x in results(rounded, None, options, "triton").items():
        ratio = ((x - expected[name]).square().mean() / expected[name].square().mean()).sqrt()
        assert ratio < (0.01 if name.startswith("d ") else 0.006), f"{name}: {ratio:.4f}"


@pytest.mark.parametrize(
    ("changes", "options", "words"),
    [
        (dict(width=160, hidden=64), MemoryOptions(16), "head_dim up to 128, not 160"),
        (dict(hidden=48), MemoryOptions(16), "multiple of 64 channels, not 48"),
        ({}, MemoryOptions(24), "chunks of 16, 32, 64 or a multiple of 64 to 4096, not 24"),
    ],
)
def test_says_why_it_cannot(changes: dict, options: MemoryOptions, words: str) -> None:
    with pytest.raises(UserError, match=words):
        memory_scan(*calm_problem(20, **changes), options=options, path="triton")


def test_a_run_is_told_which_path_it_will_take() -> None:
    cuda, bf16 = torch.device("cuda"), torch.bfloat16
    assert expected_path(cuda, bf16, 2, 64, 256, MemoryOptions(64)) == "triton"
    assert expected_path(cuda, bf16, 2, 48, 192, MemoryOptions(64)) == "triton"
    assert "closed_form, many times slower" in expected_path(cuda, bf16, 2, 256, 1024, MemoryOptions(64))
    assert "takes head_dim up to 128, not 256" in expected_path(cuda, bf16, 2, 256, 1024, MemoryOptions(64))
    for resets in (None, (False, True)):
        assert expected_path(cuda, bf16, 2, 64, 256, MemoryOptions(64), resets) == "triton"
    told = expected_path(cuda, bf16, 2, 64, 256, MemoryOptions(64), (True, True))
    assert "because triton resets the memory at document starts only to its initial weights" in told
    assert expected_path(torch.device("cpu"), torch.float32, 2, 64, 256, MemoryOptions(64)) == "closed_form"


def test_says_why_it_cannot_with_other_arguments() -> None:
    with pytest.raises(UserError, match="2 layers, not 3"):
        memory_scan(*make_problem(20, 3).to(torch.float32), options=MemoryOptions(16), path="triton")
    with pytest.raises(UserError, match="bfloat16, but q is float64"):
        memory_scan(*make_problem(20, 2), options=MemoryOptions(16), path="triton")
    problem = calm_problem(20)
    starts = torch.zeros(1, 2, dtype=torch.bool)
    with pytest.raises(UserError, match="forget_toward 'init'"):
        memory_scan(*problem, options=MemoryOptions(16, forget_toward="zero"), document_starts=starts, path="triton")
    fresh = make_fresh(problem)
    with pytest.raises(UserError, match="only to its initial weights"):
        memory_scan(*problem, options=MemoryOptions(16), document_starts=starts, fresh=fresh, path="triton")


def test_saved_tensors_are_what_was_promised() -> None:
    from titans_pretrain.memory import triton as path
    from titans_pretrain.memory.path import ScanInputs

    problem, options = calm_problem(70, batch=2), MemoryOptions(16)
    state = initial_state(problem.initial_weights, 2)
    inputs = ScanInputs(*problem, state.weights, state.momentum, ())
    for save in (True, False):
        saved = path.forward(inputs, 0, options, False, save).saved
        promised = path.saved_like(inputs, 0, options) if save else ()
        assert [(x.shape, x.dtype) for x in saved] == [(x.shape, x.dtype) for x in promised]


class PeakMemory(TorchDispatchMode):
    """The most bytes of tensors made within that were alive at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.alive = {key: kept for key, kept in self.alive.items() if not kept[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return result


@pytest.mark.parametrize("hidden", [64, 256])
def test_long_sequences_fit(hidden: int) -> None:
    """131,072 tokens at dim 1024, forward and backward, in 20 GiB, and growing linearly: by the arrays the launches work on,
    which are made on torch's meta device. (What a GPU adds: its context, and the allocator's rounding.)"""
    peaks = []
    for length in (65536, 131072, 262144):  # below, the scratch arrays are not at their limit yet
        with PeakMemory() as memory:
            record(64, hidden, 64, length=length, heads=16, device="meta", keep=False)
        peaks.append(memory.peak / 2**30)
    assert peaks[1] < 20
    assert peaks[2] - peaks[1] == pytest.approx(2 * (peaks[1] - peaks[0]), rel=0.05)
    assert peaks[2] < 4 * peaks[0], "more than linear"


def without_the_interpreter(*command: str) -> str:
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


VARIANTS = """
from tools.compile_kernels import record, variant_of
for chunk in (16, 64, 256):
    variants = set()
    for length, heads in ((1, 1), (64, 1), (1000, 3), (1024, 16), (4096, 2)):
        variants |= {variant_of(launch, 90) for launch in record(64, 256, chunk, length=length, heads=heads)}
    names = {variant.split()[0] for variant in variants}
    assert len(variants) == len(names) > 6, sorted(variants)
"""


def test_one_compiled_kernel_does_for_every_length_and_number_of_heads() -> None:
    without_the_interpreter("-c", VARIANTS)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("shape", [("64", "128", "64")])
def test_kernels_compile_for_a_gpu(shape: tuple[str, str, str]) -> None:
    """In a process of its own, without the interpreter. Most of a register's worth of care went into not spilling."""
    head_dim, hidden, chunk = shape
    sizes = ("--head-dim", head_dim, "--hidden", hidden, "--chunk", chunk)
    printed = without_the_interpreter("tools/compile_kernels.py", *sizes)
    rows = [line.split() for line in printed.splitlines()[2:]]
    assert {"output_forward", "state_rebuild", "read_backward_2", "read_backward_1", "state_backward"} <= {
        r[0] for r in rows
    }
    assert max(int(row[3]) for row in rows) < 1024, printed
