"""The door: causality, carried state, precision, signals, reads at fixed weights, and what it refuses."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.memory.problem import (
    Problem,
    assert_same,
    error,
    make_fresh,
    make_problem,
    make_state,
    scan_in_parts,
    state_tensors,
)
from titans_pretrain.errors import UserError
from titans_pretrain.memory import (
    MemoryOptions,
    MemoryState,
    begin_chunk,
    closed_form,
    initial_state,
    memory_read,
    memory_scan,
    operator,
)
from titans_pretrain.memory.path import ScanInputs, ScanResult
from titans_pretrain.memory.scan import choose_path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [1, 16, 64, 160])
@torch.no_grad()
def test_no_output_depends_on_a_later_token(chunk: int, dtype: torch.dtype) -> None:
    length, tokens = (40, (1, 17)) if chunk == 1 else (150, (1, 17, 63, 64, 140))
    problem = make_problem(length, 2, width=8, hidden=16).to(torch.float32)
    problem = problem._replace(q=problem.q.to(dtype), k=problem.k.to(dtype), v=problem.v.to(dtype))
    options = MemoryOptions(chunk)
    out, _ = memory_scan(*problem, options=options)
    for token in tokens:
        for index, name in enumerate(Problem._fields[:6]):
            changed = problem[index].clone()
            changed[:, token] = -changed[:, token] + (-0.3 if name.startswith("log") else 0.3)
            other, _ = memory_scan(*problem._replace(**{name: changed}), options=options)
            assert torch.equal(other[:, :token], out[:, :token]), f"{name} at {token}"
            assert not torch.equal(other[:, token], out[:, token]), f"{name} at {token}"


@pytest.mark.parametrize("chunk", [7, 64])
@torch.no_grad()
def test_two_halves_equal_the_whole(chunk: int) -> None:
    problem, options = make_problem(100, 3, batch=2), MemoryOptions(chunk)
    problem = problem._replace(theta=0.1 * problem.theta)  # so that the recurrence itself does not amplify rounding
    whole = memory_scan(*problem, options=options)
    for cut in (1, 49, 64, 99):
        assert_same(scan_in_parts(problem, [cut], options), whole, 1e-12)
    single = problem.to(torch.float32)
    assert_same(scan_in_parts(single, [49], options), memory_scan(*single, options=options), 5e-5)


@torch.no_grad()
def test_a_carried_state_reaches_either_path() -> None:
    """In mid-chunk, with weights that are not the anchor's, both paths go on in the same way."""
    problem = make_problem(40, 2)
    for offset, chunk in ((3, 7), (15, 16), (30, 64), (100, 160)):
        args = (*problem, make_state(problem, offset), MemoryOptions(chunk))
        assert_same(memory_scan(*args, path="closed_form"), memory_scan(*args, path="reference"))


@torch.no_grad()
def test_begin_chunk_moves_the_anchor() -> None:
    problem, options = make_problem(20, 2), MemoryOptions(16)
    _, open_chunk = memory_scan(*problem.tokens(0, 10), options=options)
    closed = begin_chunk(open_chunk)
    assert (open_chunk.offset, closed.offset) == (10, 0)
    assert all(torch.equal(a, b) for a, b in zip(closed.anchor, open_chunk.weights, strict=True))
    on, _ = memory_scan(*problem.tokens(10, 20), open_chunk, options)
    anew, _ = memory_scan(*problem.tokens(10, 20), closed, options)
    expected, _ = memory_scan(*problem.tokens(10, 20), closed, options, path="reference")
    assert error(on, anew) > 1e-3
    assert error(anew, expected) < 1e-12


def test_the_initial_state_is_the_initial_weights_without_momentum() -> None:
    problem = make_problem(5, 2, batch=3)
    weights = cast_weights = tuple(w.bfloat16() for w in problem.initial_weights)
    state = initial_state(weights, 3)
    assert state.offset == 0
    for field in state[:3]:
        assert [x.dtype for x in field] == [torch.float32] * 2
        assert [tuple(x.shape) for x in field] == [(3, *w.shape) for w in weights]
    assert all(torch.equal(x[2], w.float()) for x, w in zip(state.weights, cast_weights, strict=True))
    assert not any(s.any() for s in state.momentum)
    given = memory_scan(*problem, initial_state(problem.initial_weights, 3))
    assert_same(given, memory_scan(*problem), 1e-15)


def test_momentum_stays_zero_when_it_is_off() -> None:
    problem = make_problem(20, 2, momentum=False)
    for path in ("closed_form", "reference"):
        _, state = memory_scan(*problem, options=MemoryOptions(7), path=path)
        assert not any(s.any() for s in state.momentum)


@torch.no_grad()
def test_reading_the_last_weights_gives_the_last_output() -> None:
    for norm in (True, False):
        problem = make_problem(20, 3, norm=norm, batch=2)
        options = MemoryOptions(7, activation="silu")
        out, state = memory_scan(*problem, options=options)
        read = memory_read(problem.q, state.weights, problem.norm_weight, problem.norm_bias, options)
        assert read.shape == out.shape
        assert error(read[:, -1], out[:, -1]) < 1e-12
        narrow = memory_read(problem.q.bfloat16(), [w.float() for w in state.weights], None, None, options)
        assert narrow.dtype == torch.bfloat16


def test_bf16_inputs_are_computed_in_fp32() -> None:
    exact = make_problem(100, 2, width=8, hidden=16).to(torch.float32)._replace()
    exact = exact._replace(theta=0.1 * exact.theta)
    rounded = exact._replace(q=exact.q.bfloat16(), k=exact.k.bfloat16(), v=exact.v.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, state = memory_scan(*rounded.require_grad(), options=MemoryOptions(16))
    assert out.dtype == torch.bfloat16
    assert all(x.dtype == torch.float32 for x in state_tensors(state))
    widened = rounded._replace(q=rounded.q.float(), k=rounded.k.float(), v=rounded.v.float())
    assert torch.equal(out, memory_scan(*widened, options=MemoryOptions(16))[0].bfloat16())
    assert error(out.float(), memory_scan(*exact, options=MemoryOptions(16))[0]) < 0.02
    out.float().square().sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() and x.grad.dtype == x.dtype for x in rounded.tensors())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("log_gamma", [-1e-9, -30.0, -1e30])
@pytest.mark.parametrize("log_eta", [-1e-9, -80.0, -1e30])
def test_extreme_gates_stay_finite(log_gamma: float, log_eta: float, dtype: torch.dtype) -> None:
    """Everywhere, and at every third token: a vanished gate must not swallow what its neighbours keep."""
    for every in (1, 3):
        problem = make_problem(80, 2).to(dtype)
        assert problem.log_gamma is not None
        assert problem.log_eta is not None
        problem = problem._replace(theta=0.1 * problem.theta)
        problem.log_gamma[:, ::every] = log_gamma
        problem.log_eta[:, 1::every] = log_eta
        problem.require_grad()
        options = MemoryOptions(64)
        out, state = memory_scan(*problem, options=options)
        tensors = [out, *state_tensors(state)]
        assert all(x.isfinite().all() for x in tensors)
        gradients = torch.autograd.grad(sum(x.square().sum() for x in tensors), problem.tensors())  # type: ignore[arg-type]
        assert all(x.isfinite().all() for x in gradients)
        if dtype == torch.float64:
            with torch.no_grad():
                assert_same((out, state), memory_scan(*problem, options=options, path="reference"))


@torch.no_grad()
def test_forgetting_leaves_the_initial_weights_where_they_are() -> None:
    """In fp32 too, exactly: nothing but the difference from them decays."""
    problem = make_problem(100, 2).to(torch.float32)
    problem = problem._replace(theta=torch.zeros_like(problem.theta))
    _, state = memory_scan(*problem, options=MemoryOptions(16))
    assert all(torch.equal(w[0], w0) for w, w0 in zip(state.weights, problem.initial_weights, strict=True))


@pytest.mark.parametrize("path", ["closed_form", "reference"])
def test_surprise_is_the_mean_loss_at_the_anchor(path: str) -> None:
    problem = make_problem(7, 2, batch=2)
    options = MemoryOptions(7)
    plain = memory_scan(*problem, options=options, path=path)
    assert len(plain) == 2
    out, state, signals = memory_scan(*problem.require_grad(), options=options, path=path, return_signals=True)
    anchor = initial_state(problem.initial_weights, 2).weights
    told = memory_read(problem.k, anchor, problem.norm_weight, problem.norm_bias, options)
    expected = 0.5 * (told - problem.v).square().sum(-1).mean()
    assert set(signals) == {"surprise", "state_norm", "momentum_norm"}
    assert signals["surprise"].dtype == torch.float32
    assert not signals["surprise"].requires_grad
    assert signals["surprise"].item() == pytest.approx(expected.item(), rel=1e-6)
    assert_same((out, state), plain, 1e-15)
    more, _, later = memory_scan(*problem.tokens(0, 3), state, options, path=path, return_signals=True)
    assert more.shape[1] == 3
    assert later["surprise"] < signals["surprise"]


def test_signals_of_the_state_are_its_norms_as_means_over_rows_and_heads() -> None:
    problem = make_problem(7, 2, batch=2)
    _, state, signals = memory_scan(*problem, options=MemoryOptions(4), return_signals=True)
    moved = [(w - w0).flatten(2) for w, w0 in zip(state.weights, problem.initial_weights, strict=True)]
    for name, tensors in (("state_norm", moved), ("momentum_norm", [s.flatten(2) for s in state.momentum])):
        assert signals[name].dtype == torch.float32
        assert signals[name].item() == pytest.approx(torch.cat(tensors, dim=-1).norm(dim=-1).mean().item(), rel=1e-6)


def test_an_unknown_path_is_refused_with_the_choices() -> None:
    with pytest.raises(UserError, match=r"'magic'.*auto, closed_form, triton, reference"):
        memory_scan(*make_problem(3, 1), path="magic")


def test_a_path_that_cannot_run_says_why_and_what_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(UserError, match=r"'triton' (runs on a CUDA device|needs the package triton).*choose auto"):
        memory_scan(*make_problem(3, 2), path="triton")


class StandIn:
    """The closed form in the place of the Triton kernels, as picky as they are about where a scan starts."""

    reason: str | None = None
    backward = staticmethod(closed_form.backward)
    saved_like = staticmethod(closed_form.saved_like)

    def __init__(self) -> None:
        self.lengths: list[int] = []

    def why_not(self, inputs: ScanInputs, offset: int, options: MemoryOptions) -> str | None:
        return self.reason

    def forward(self, inputs: ScanInputs, offset: int, *arguments: Any) -> ScanResult:
        assert offset == 0
        self.lengths.append(inputs.q.shape[1])
        return closed_form.forward(inputs, offset, *arguments)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    made = StandIn()
    monkeypatch.setitem(operator.PATHS, "triton", made)  # type: ignore[arg-type]
    return made


def test_auto_takes_triton_where_it_can_run_half_precision_on_cuda(stand_in: StandIn) -> None:
    options = MemoryOptions(8)
    for length, device, dtype, reason, expected in (
        (16, "cuda", torch.bfloat16, None, "triton"),
        (15, "cuda", torch.bfloat16, None, "closed_form"),
        (16, "cuda", torch.float16, None, "triton"),
        (16, "cuda", torch.bfloat16, "takes something else", "closed_form"),
        (16, "cuda", torch.float32, None, "closed_form"),
        (16, "cpu", torch.bfloat16, None, "closed_form"),
    ):
        exact = make_problem(length, 2)
        with FakeTensorMode(allow_non_fake_inputs=True):
            q = torch.empty(exact.q.shape, dtype=dtype, device=device)
        inputs = ScanInputs(*exact._replace(q=q), (), (), ())
        stand_in.reason = reason
        assert choose_path("auto", inputs, 3, options) == expected
        assert choose_path("closed_form", inputs, 3, options) == "closed_form"
    stand_in.reason = "takes something else"
    with pytest.raises(UserError, match="'triton' takes something else; choose auto"):
        choose_path("triton", inputs, 0, options)


@pytest.mark.parametrize(("offset", "length", "expected"), [(0, 20, [20]), (3, 20, [15]), (3, 5, []), (7, 1, [])])
def test_the_closed_form_brings_triton_to_the_start_of_a_chunk(
    stand_in: StandIn, offset: int, length: int, expected: list[int]
) -> None:
    options = MemoryOptions(8)
    found = []
    for path in ("triton", "closed_form"):
        problem = make_problem(length, 2, batch=2).require_grad()
        begun = len(range(-offset % 8, length, 8))
        starts = torch.tensor([[1, 0, 1][:begun], [0, 1, 0][:begun]], dtype=torch.bool)
        out, state, signals = memory_scan(
            *problem,
            make_state(problem, offset),
            options,
            path=path,
            document_starts=starts,
            fresh=make_fresh(problem),
            return_signals=True,
        )
        total = sum(x.sin().sum() for x in (out, *state_tensors(state)))
        assert isinstance(total, torch.Tensor)
        found.append([out, *state_tensors(state), signals["surprise"], *torch.autograd.grad(total, problem.tensors())])
        assert state.offset == (offset + length) % 8
    assert stand_in.lengths == expected
    assert all(error(a, b) < 1e-12 for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("path", ["closed_form", "reference"])
@pytest.mark.parametrize("forget", ["init", "zero", None])
@pytest.mark.parametrize("fresh", [False, True])
@torch.no_grad()
def test_a_document_start_equals_a_scan_of_its_own(path: str, forget: str | None, fresh: bool) -> None:
    """Row 0 has documents at chunks 0 and 2 of those that begin in the call, row 1 at chunk 1; the chunk at hand is open."""
    options = MemoryOptions(8, forget_toward=forget or "init")
    problem = make_problem(27, 2, batch=2, forgetting=forget is not None)
    state = make_state(problem, 5)
    starts = torch.tensor([[True, False, True], [False, True, False]])
    anew = make_fresh(problem) if fresh else None
    out, after = memory_scan(*problem, state, options, path=path, document_starts=starts, fresh=anew)
    for row, bounds in ((0, [0, 3, 19, 27]), (1, [0, 11, 27])):
        alone = Problem(*(x if x is None or i > 5 else x[row : row + 1] for i, x in enumerate(problem)))  # type: ignore[arg-type]
        carried: MemoryState | None = MemoryState(
            *(tuple(x[row : row + 1] for x in field) for field in state[:3]), state.offset
        )
        for start, stop in itertools.pairwise(bounds):
            own, last = memory_scan(*alone.tokens(start, stop), carried, options, path="reference")
            assert error(out[row : row + 1, start:stop], own) < 1e-10
            carried = anew
        assert all(error(a[row], b[0]) < 1e-10 for a, b in zip(state_tensors(after), state_tensors(last), strict=True))


@pytest.mark.parametrize(
    ("starts", "offset"),
    [(torch.zeros(1, 3, dtype=torch.bool), 0), (torch.zeros(1, 1), 3), (torch.zeros(2, dtype=torch.bool), 0)],
)
def test_document_starts_that_do_not_fit_are_named(starts: torch.Tensor, offset: int) -> None:
    problem = make_problem(13, 2)
    with pytest.raises(ValueError, match=r"document_starts must be bool \[b, chunks\] = \[1, [12]\]"):
        memory_scan(*problem, make_state(problem, offset), MemoryOptions(8), document_starts=starts)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (dict(k=torch.zeros(1, 9, 2, 4)), r"one shape.*\[1, 9, 2, 4\]"),
        (dict(theta=torch.zeros(1, 8, 2, 1)), r"theta must be.*\[1, 8, 2, 2\].*\[1, 8, 2, 1\]"),
        (dict(log_eta=torch.zeros(1, 8, 2)), r"log_eta must be"),
        (dict(initial_weights=(torch.zeros(2, 4, 6), torch.zeros(2, 5, 4))), r"initial_weights must chain"),
        (dict(initial_weights=(torch.zeros(1, 4, 6), torch.zeros(1, 6, 4))), r"initial_weights must chain"),
        (dict(norm_bias=None), r"together"),
        (dict(norm_weight=torch.zeros(4)), r"norm_weight must be \[h, d\]"),
    ],
)
def test_shapes_that_do_not_fit_are_named(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        memory_scan(*make_problem(8, 2)._replace(**changes))


def test_states_that_do_not_fit_are_named() -> None:
    problem = make_problem(8, 2)
    starts = torch.zeros(1, 1, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"fresh.weights must be \[\(1, 2, 4, 6\).*one row.*\(2, 2, 4, 6\)"):
        memory_scan(*problem, document_starts=starts, fresh=initial_state(problem.initial_weights, 2))
    with pytest.raises(ValueError, match=r"fresh must stand at the start of a chunk, not 3"):
        memory_scan(*problem, document_starts=starts, fresh=make_state(problem, 3))
    with pytest.raises(ValueError, match=r"offset 7 is not inside a chunk of 7"):
        memory_scan(*problem, make_state(problem, 7), MemoryOptions(7))
    with pytest.raises(ValueError, match=r"state.weights must be \[\(1, 2, 4, 6\)"):
        memory_scan(*problem, initial_state(problem.initial_weights, 3))


@pytest.mark.parametrize(
    "changes", [dict(chunk_size=0), dict(activation="relu"), dict(forget_toward="one"), dict(norm_eps=0.0)]
)
def test_options_out_of_range_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        MemoryOptions(**changes)
