"""The operator around the paths: what torch.library and torch.compile ask of it, and which gradients it passes on."""

from __future__ import annotations

import itertools
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from tests.memory.problem import Problem, error, make_fresh, make_problem, make_state, state_tensors
from titans_pretrain.memory import MemoryOptions, MemoryState, closed_form, memory_scan, operator
from titans_pretrain.memory.path import ResultGradients, ScanInputs

SCAN = torch.ops.titans_pretrain.memory_scan.default
SCAN_BACKWARD = torch.ops.titans_pretrain.memory_scan_backward.default


def scan_inputs(
    problem: Problem, offset: int, documents: bool = False, chunk: int = 8, fresh: bool = False
) -> ScanInputs:
    state = make_state(problem, offset)
    begun = len(range((-offset) % chunk, problem.q.shape[1], chunk))
    starts = torch.arange(problem.q.shape[0] * begun).reshape(problem.q.shape[0], begun) % 2 == 1 if documents else None
    anew = make_fresh(problem)[:2] if fresh else ((), ())
    anew = (tuple(x[0] for x in field) for field in anew)
    return ScanInputs(*problem, *state[:2], state.anchor if offset else (), *anew, starts)


def flat_arguments(inputs: ScanInputs, offset: int, options: MemoryOptions) -> list[Any]:
    settings = (options.chunk_size, options.activation, options.forget_toward, options.norm_eps)
    return [*(list(x) if isinstance(x, tuple) else x for x in inputs), offset, *settings, "closed_form"]


def tensors(inputs: ScanInputs) -> list[Tensor]:
    """What can be differentiated."""
    return [x for field in inputs[:-1] if field is not None for x in (field if isinstance(field, tuple) else (field,))]


@pytest.mark.parametrize(
    ("length", "offset", "changes", "documents", "fresh"),
    [
        (13, 3, {}, True, True),
        (3, 0, dict(depth=1, norm=False, momentum=False), False, False),
        (8, 0, dict(depth=3, forgetting=False), True, False),
        (8, 0, dict(momentum=False), True, True),
        (1, 7, {}, False, False),
    ],
)
def test_torch_finds_nothing_wrong_with_the_operators(
    length: int, offset: int, changes: dict[str, Any], documents: bool, fresh: bool
) -> None:
    """Schema (no mutation, no aliases), autograd registration, fake kernels, and gradients traced equal gradients run.
    Only with fixed shapes: the scan's loop over chunks is part of the trace."""
    inputs = scan_inputs(make_problem(length, **changes), offset, documents, fresh=fresh)
    for x in tensors(inputs):
        x.requires_grad_()
    arguments = flat_arguments(inputs, offset, MemoryOptions(8))
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(SCAN, (*arguments, True, True), test_utils=checks)

    result = SCAN(*arguments, False, True)
    saved = [x.detach() for x in operator._unflatten_result(result, inputs, offset, MemoryOptions(8)).saved]
    plain = flat_arguments(
        ScanInputs._make(tuple(y.detach() for y in x) if isinstance(x, tuple) else x for x in inputs),
        offset,
        MemoryOptions(8),
    )
    plain = [x.detach() if isinstance(x, Tensor) else x for x in plain]
    grads = [torch.ones_like(x) for x in inputs.weights]
    for given in ((None, grads, [], []), (torch.ones_like(inputs.q), [], grads, [])):
        torch.library.opcheck(SCAN_BACKWARD, (*plain, saved, *given), test_utils=checks[:3])


def test_results_have_the_shapes_that_were_promised() -> None:
    for length, offset, depth, save, double in itertools.product((1, 7, 8, 9, 24), (0, 1, 7), (1, 2), (0, 1), (0, 1)):
        problem = make_problem(
            length, depth, batch=2, norm=bool(length % 2), momentum=bool(offset), forgetting=save == 0
        )
        if not double:
            problem = problem.to(torch.float32)
            problem = problem._replace(q=problem.q.bfloat16(), k=problem.k.bfloat16(), v=problem.v.bfloat16())
        inputs = scan_inputs(problem, offset, documents=True)
        inputs = inputs._replace(
            **{
                n: tuple(x.to(problem.theta.dtype) for x in getattr(inputs, n))
                for n in ("weights", "momentum", "anchor")
            }
        )
        arguments = (*flat_arguments(inputs, offset, MemoryOptions(8)), True, bool(save))
        real = SCAN(*arguments)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake_arguments = [
                [mode.from_tensor(y) for y in x]
                if isinstance(x, list)
                else mode.from_tensor(x)
                if isinstance(x, Tensor)
                else x
                for x in arguments
            ]
            fake = SCAN(*fake_arguments)
        described = [[(x.shape, x.stride(), x.dtype) for x in xs] for xs in (real, fake)]
        assert described[0] == described[1], (length, offset, depth, save)


@pytest.mark.parametrize("part", ["out", "weights", "momentum", "anchor"])
def test_gradients_of_one_result_equal_the_token_loops(part: str) -> None:
    """The other results then have no gradient at all."""
    found: list[list[Tensor]] = []
    for path in ("closed_form", "reference"):
        problem = make_problem(17, 2, batch=2).require_grad()
        state = make_state(problem, 3)
        fields = [tuple(x.detach().requires_grad_() for x in field) for field in state[:3]]
        starts = torch.tensor([[True, False], [False, True]])
        anew = [tuple(x.detach().requires_grad_() for x in field) for field in make_fresh(problem)[:2]]
        out, after = memory_scan(
            *problem,
            MemoryState(*fields, 3),
            MemoryOptions(8),
            path=path,
            document_starts=starts,
            fresh=MemoryState(*anew, anew[0], 0),
        )
        result = (out,) if part == "out" else getattr(after, part)
        total = sum((x * torch.linspace(-1, 1, x.numel()).reshape(x.shape)).sum() for x in result)
        leaves = [*problem.tensors(), *(x for field in (*fields, *anew) for x in field)]
        grads = torch.autograd.grad(total, leaves, allow_unused=True)  # type: ignore[arg-type]
        found.append([torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True)])
    for index, (a, b) in enumerate(zip(*found, strict=True)):
        assert error(a, b) < 1e-9, f"input {index}"


class Recorder:
    """The closed form, remembering what it was asked."""

    why_not = staticmethod(closed_form.why_not)
    saved_like = staticmethod(closed_form.saved_like)

    def __init__(self) -> None:
        self.forwards: list[tuple[ScanInputs, int, bool]] = []
        self.grads: list[ResultGradients] = []

    def forward(self, inputs: ScanInputs, offset: int, options: MemoryOptions, want_surprise: bool, save: bool) -> Any:
        self.forwards.append((inputs, offset, save))
        return closed_form.forward(inputs, offset, options, want_surprise, save)

    def backward(self, *arguments: Any) -> Any:
        self.grads.append(arguments[-1])
        return closed_form.backward(*arguments)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    made = Recorder()
    monkeypatch.setitem(operator.PATHS, "closed_form", made)  # type: ignore[arg-type]
    return made


def test_results_without_a_gradient_cost_no_zeros(recorder: Recorder) -> None:
    out, after = memory_scan(*make_problem(13, 2).require_grad(), options=MemoryOptions(8))
    out.sum().backward(retain_graph=True)
    (out.sum() + after.momentum[1].sum()).backward()
    first, second = recorder.grads
    assert [len(x) for x in first[1:]] == [0, 0, 0]
    assert [len(x) for x in second[1:]] == [0, 2, 0]
    assert not second.momentum[0].any()


def test_only_what_will_be_differentiated_is_saved(recorder: Recorder) -> None:
    problem = make_problem(13, 2).to(torch.float32)
    problem = problem._replace(q=problem.q.bfloat16(), k=problem.k.bfloat16(), v=problem.v.bfloat16())
    memory_scan(*problem)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        memory_scan(*problem.require_grad())
        with torch.no_grad():
            memory_scan(*problem)
    assert [save for *_, save in recorder.forwards] == [False, True, False]
    places = {x.data_ptr() for x in kept}
    assert {problem.q.data_ptr(), problem.k.data_ptr(), problem.v.data_ptr()} <= places  # bf16 as it came, no copy


def test_a_gradient_that_passes_through_is_copied() -> None:
    """An operator of torch.library must not hand out memory of its arguments, or the same memory twice."""
    given, twice = torch.ones(3), torch.ones(2, 3)
    found = operator._own(iter((given, twice, twice[1], twice.mT, torch.empty(0))), [None, [given], 1.0])
    assert len({x.untyped_storage().data_ptr() for x in (given, *found[:4])}) == 5
    assert all(x.is_contiguous() for x in found)


def test_autocast_does_not_reach_either_pass(recorder: Recorder) -> None:
    seen = []
    for name in ("forward", "backward"):
        method = getattr(recorder, name)
        setattr(recorder, name, lambda *a, f=method: (seen.append(torch.is_autocast_enabled("cpu")), f(*a))[1])
    problem = make_problem(9, 2).to(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        memory_scan(*problem)
        out, _ = memory_scan(*problem.require_grad())
        out.sum().backward()
    assert seen == [False, False, False]


def test_a_second_derivative_is_refused() -> None:
    problem = make_problem(9, 2).require_grad()
    out, _ = memory_scan(*problem)
    (grad,) = torch.autograd.grad(out.square().sum(), problem.q, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.sum().backward()


def test_recomputed_activations_give_the_same_gradients() -> None:
    problem = make_problem(13, 2).require_grad()

    def run(*arguments: Any) -> Tensor:
        out, after = memory_scan(*arguments, None, MemoryOptions(8))
        return out.sum() + sum(x.square().sum() for x in state_tensors(after))

    plain = torch.autograd.grad(run(*problem), problem.tensors())
    again = torch.autograd.grad(checkpoint(run, *problem, use_reentrant=False), problem.tensors())
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_a_compiled_scan_is_one_graph_with_the_same_gradients() -> None:
    torch._dynamo.reset()
    problem = make_problem(21, 2).require_grad()
    starts = torch.tensor([[True, False, True]])
    fresh = make_fresh(problem)

    def run(*arguments: Any) -> tuple[Tensor, ...]:
        out, state, _ = memory_scan(*arguments, None, MemoryOptions(8), return_signals=True)
        # 5 tokens into a chunk
        more, state = memory_scan(*arguments, state, MemoryOptions(8), document_starts=starts, fresh=fresh)
        return out + more, *state_tensors(state)

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    found = []
    for function in (run, compiled):
        results = function(*problem)
        with torch.no_grad():
            assert error(function(*problem)[0], results[0]) == 0
        found.append([*results, *torch.autograd.grad(sum(x.square().sum() for x in results), problem.tensors())])  # type: ignore[arg-type]
    assert all(error(a, b) < 1e-14 for a, b in zip(*found, strict=True))


def test_a_compiled_scan_by_the_kernels_is_one_graph_too() -> None:
    """Down to the choice of the path, which asks the kernels what they take."""
    torch._dynamo.reset()
    problem = make_problem(20, 2, width=16, hidden=16).to(torch.float32).require_grad()

    def run(*arguments: Any) -> tuple[Tensor, ...]:
        out, state = memory_scan(*arguments, None, MemoryOptions(16), path="triton")
        return out, *state_tensors(state)

    found = []
    for function in (run, torch.compile(run, backend="aot_eager", fullgraph=True)):
        results = function(*problem)
        found.append([*results, *torch.autograd.grad(sum(x.square().sum() for x in results), problem.tensors())])  # type: ignore[arg-type]
    assert all(error(a, b) < 1e-6 for a, b in zip(*found, strict=True))
    inputs = scan_inputs(problem, 0)
    inputs = inputs._replace(
        **{name: tuple(x.float() for x in getattr(inputs, name)) for name in ("weights", "momentum")}
    )
    arguments = [*flat_arguments(inputs, 0, MemoryOptions(16))[:-1], "triton", False, True]
    torch.library.opcheck(SCAN, tuple(arguments), test_utils=("test_schema", "test_faketensor"))


def test_a_step_through_the_compilers_own_code() -> None:
    """Inductor's C++ around the operator, with as few kernels as there can be: each is seconds of g++."""
    torch._dynamo.reset()
    problem = make_problem(9, 1, norm=False, momentum=False, forgetting=False).to(torch.float32)
    weight = problem.initial_weights[0].requires_grad_()

    def loss(weight: Tensor) -> Tensor:
        out, _ = memory_scan(*problem._replace(initial_weights=(weight * 2,)), options=MemoryOptions(4))
        return out.square().sum()

    expected = loss(weight)
    (expected_grad,) = torch.autograd.grad(expected, weight)
    found = torch.compile(loss, fullgraph=True)(weight)
    (found_grad,) = torch.autograd.grad(found, weight)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    assert error(found_grad, expected_grad) < 1e-6


def test_training_without_compile_does_not_load_the_compiler() -> None:
    """It takes seconds, in every process."""
    code = (
        "import sys\nfrom tests.memory.problem import make_problem\nfrom titans_pretrain.memory import memory_scan\n"
        "memory_scan(*make_problem(9, 2).require_grad())[0].sum().backward()\nassert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
