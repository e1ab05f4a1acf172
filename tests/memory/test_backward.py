"""The closed form's own backward, called as the operator calls it, against autograd through the token loop in float64."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.memory.problem import error, make_fresh, make_problem, make_state
from titans_pretrain.memory import MemoryOptions, MemoryState, closed_form, initial_state, memory_scan, pieces
from titans_pretrain.memory import closed_form_backward as way_back
from titans_pretrain.memory.path import ResultGradients, ScanGradients, ScanInputs

FORGET = [None, "init", "zero"]


def make_inputs(
    length: int,
    depth: int = 2,
    offset: int = 0,
    starts: list[list[int]] | None = None,
    fresh: bool = False,
    **changes: Any,
) -> ScanInputs:
    """A problem of problem.py with a state that has moved; `starts`: for each row, which chunks begin a document; `fresh`:
    they begin with a state of their own."""
    problem = make_problem(length, depth, **changes)
    state = make_state(problem, offset)
    document_starts = None
    if starts is not None:
        document_starts = torch.zeros(len(starts), 40, dtype=torch.bool)
        for row, chunks in enumerate(starts):
            document_starts[row, chunks] = True
    fresh_weights, fresh_momentum = (
        tuple(x[0] for x in field) for field in (make_fresh(problem)[:2] if fresh else ((), ()))
    )
    anchor = state.anchor if offset else ()
    return ScanInputs(*problem, *state[:2], anchor, fresh_weights, fresh_momentum, document_starts)


def named(values: ScanInputs | ScanGradients | ResultGradients) -> dict[str, Tensor]:
    """Every differentiable tensor under its field's name."""
    fields = {k: v for k, v in values._asdict().items() if v is not None and k != "document_starts"}
    return {
        f"{field}.{i}": x
        for field, value in fields.items()
        for i, x in enumerate(value if isinstance(value, tuple) else (value,))
    }


def make_cotangents(result: Any, seed: int = 5) -> ResultGradients:
    generator = torch.Generator().manual_seed(seed)

    def normal(x: Tensor) -> Tensor:
        return torch.randn(x.shape, dtype=torch.float64, generator=generator).to(x.dtype)

    states = (tuple(normal(x) for x in xs) for xs in (result.weights, result.momentum, result.anchor))
    return ResultGradients(normal(result.out), *states)


def token_loop(inputs: ScanInputs, offset: int, options: MemoryOptions) -> ResultGradients:
    """out, weights, momentum and anchor by the token loop, for every row and document by itself."""
    rows = []
    for row in range(inputs.q.shape[0]):
        cuts = [0]
        if inputs.document_starts is not None:
            first = -offset % options.chunk_size
            begins = range(first, inputs.q.shape[1], options.chunk_size)
            fresh = {t for c, t in enumerate(begins) if inputs.document_starts[row, c]}
            cuts = sorted({0} | fresh)
        fields = (tuple(x[row : row + 1] for x in xs) for xs in inputs[9:12])
        weights, momentum, anchor = fields
        state = MemoryState(weights, momentum, anchor or weights, offset)
        outs = []
        for start, stop in itertools.pairwise([*cuts, inputs.q.shape[1]]):
            if inputs.document_starts is not None and start in fresh:
                state = initial_state(inputs.fresh_weights or inputs.initial_weights, 1)
                if inputs.fresh_momentum:
                    state = state._replace(momentum=tuple(s[None] for s in inputs.fresh_momentum))
            tokens = (None if x is None else x[row : row + 1, start:stop] for x in inputs[:6])
            out, state = memory_scan(*tokens, *inputs[6:9], state, options, path="reference")  # type: ignore[arg-type]
            outs.append(out)
        opened = 0 < state.offset <= inputs.q.shape[1]
        rows.append((torch.cat(outs, 1), state.weights, state.momentum, state.anchor if opened else ()))
    out, weights, momentum, anchor = zip(*rows, strict=True)
    states = (tuple(torch.cat(x) for x in zip(*xs, strict=True)) for xs in (weights, momentum, anchor))
    return ResultGradients(torch.cat(out), *states)


def check(inputs: ScanInputs, offset: int, options: MemoryOptions, tolerance: float = 1e-9) -> None:
    """Random cotangents on everything that comes out; the gradient of everything that goes in."""
    result = closed_form.forward(inputs, offset, options, want_surprise=False, save=True)
    cotangents = make_cotangents(result)
    found = closed_form.backward(inputs, offset, options, result.saved, cotangents)

    leaves = {name: x.clone().requires_grad_() for name, x in named(inputs).items()}
    values = {
        field: value
        if value is None or field == "document_starts"
        else tuple(leaves[f"{field}.{i}"] for i in range(len(value)))
        if isinstance(value, tuple)
        else leaves[f"{field}.0"]
        for field, value in inputs._asdict().items()
    }
    expected_result = token_loop(ScanInputs(**values), offset, options)
    expected_outputs, weighed = named(expected_result), named(cotangents)
    outputs = named(ResultGradients(result.out, result.weights, result.momentum, result.anchor))
    assert outputs.keys() == expected_outputs.keys()
    for name, x in outputs.items():
        assert error(x, expected_outputs[name].detach()) < tolerance, name
    total = sum((x * weighed[name]).sum() for name, x in expected_outputs.items())
    assert isinstance(total, Tensor)
    gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    found_by_name = named(found)
    assert found_by_name.keys() == leaves.keys()
    for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        x = found_by_name[name]
        assert x.shape == leaf.shape
        assert x.dtype == leaf.dtype
        assert x.isfinite().all(), name
        assert error(x, torch.zeros_like(leaf) if gradient is None else gradient) < tolerance, name


@pytest.mark.parametrize("forget", FORGET)
@pytest.mark.parametrize("momentum", [True, False])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_equals_the_token_loop(
    depth: int, norm: bool, momentum: bool, forget: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """33 tokens that begin and end within a chunk, in several segments, each rebuilt in two parts."""
    monkeypatch.setattr(way_back, "PART", 1)
    inputs = make_inputs(33, depth, offset=3, norm=norm, momentum=momentum, forgetting=forget is not None)
    options = MemoryOptions(7, forget_toward=forget or "init")
    assert len(pieces.cut_segments(inputs, 3, 7)) == 3
    check(inputs, 3, options)


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("forget", FORGET)
@pytest.mark.parametrize("momentum", [True, False])
def test_documents_start_anew(forget: str | None, momentum: bool, fresh: bool) -> None:
    """At different chunks in each row: none, the first and the last, two next to each other."""
    starts = [[], [0, 4], [1, 2]]
    for offset, depth in ((0, 2), (4, 1), (4, 2)):
        options = dict(batch=3, momentum=momentum, forgetting=forget is not None)
        inputs = make_inputs(31, depth, offset, starts, fresh, **options)
        check(inputs, offset, MemoryOptions(7, forget_toward=forget or "init"))


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize(
    ("length", "chunk", "offset", "depth"),
    [(1, 7, 0, 2), (9, 1, 0, 2), (3, 7, 2, 2), (14, 7, 0, 3), (8, 7, 6, 4), (100, 64, 60, 1), (70, 160, 100, 2)],
)
def test_fresh_states_at_other_lengths(length: int, chunk: int, offset: int, depth: int, norm: bool) -> None:
    """Also where no document begins and a fresh state is given for nothing: its gradient is then zero."""
    for starts in ([[0], [0, 1]], [[], []]):
        inputs = make_inputs(length, depth, offset, starts, True, batch=2, norm=norm)
        check(inputs, offset, MemoryOptions(chunk, norm_eps=1e-2))


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("documents", [None, [[0, 2]]])
@pytest.mark.parametrize("forget", FORGET)
def test_chunks_longer_than_a_segment(
    forget: str | None, documents: list[list[int]] | None, fresh: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles of 4 tokens and segments of 12 in chunks of 30: segments that begin within a chunk need its anchor."""
    monkeypatch.setattr(pieces, "TILE", 4)
    options = MemoryOptions(30, forget_toward=forget or "init")
    for offset in (0, 13):
        inputs = make_inputs(70, 2, offset, documents, fresh, forgetting=forget is not None)
        assert sum(segment[0].chunk is None for segment in pieces.cut_segments(inputs, offset, 30)) > 3
        check(inputs, offset, options)


@pytest.mark.parametrize("activation", ["gelu", "silu"])
@pytest.mark.parametrize(
    ("length", "chunk", "offset"), [(1, 7, 0), (1, 7, 6), (3, 7, 2), (9, 1, 0), (14, 7, 0), (100, 64, 60), (5, 160, 90)]
)
def test_other_lengths(length: int, chunk: int, offset: int, activation: str) -> None:
    check(make_inputs(length, 2, offset), offset, MemoryOptions(chunk, activation=activation, norm_eps=1e-2))


@pytest.mark.parametrize("changes", [dict(batch=3, heads=1), dict(hidden=3, width=5), dict(hidden=4), dict(heads=3)])
def test_other_shapes(changes: dict[str, int]) -> None:
    check(make_inputs(17, 3, 2, **changes), 2, MemoryOptions(5))


@pytest.mark.parametrize("chunk", [7, 64])
@pytest.mark.parametrize("gamma", [1e-6, 1 - 1e-6])
@pytest.mark.parametrize("eta", [1e-6, 1 - 1e-6])
def test_extreme_gates(eta: float, gamma: float, chunk: int) -> None:
    """Everywhere, and at every third token; and a step of zero."""
    for every, theta in itertools.product((1, 3), (0.02, 0.0)):
        inputs = make_inputs(24)
        assert inputs.log_gamma is not None
        assert inputs.log_eta is not None
        inputs.log_gamma[:, ::every] = math.log(gamma)
        inputs.log_eta[:, 1::every] = math.log(eta)
        inputs.theta.mul_(0.1)[:, ::2] = theta
        check(inputs, 0, MemoryOptions(chunk))


@torch.no_grad()
def test_gates_that_are_cut_off_have_no_gradient() -> None:
    inputs = make_inputs(20)
    assert inputs.log_gamma is not None
    assert inputs.log_eta is not None
    inputs.log_gamma[:, 5] = inputs.log_eta[:, 9] = -1e30
    result = closed_form.forward(inputs, 0, MemoryOptions(16), want_surprise=False, save=True)
    found = closed_form.backward(inputs, 0, MemoryOptions(16), result.saved, make_cotangents(result))
    assert all(x.isfinite().all() for x in named(found).values())
    assert found.log_gamma is not None
    assert found.log_eta is not None
    assert not found.log_gamma[:, 5].any()
    assert not found.log_eta[:, 9].any()
    assert found.log_gamma[:, 4].any()


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("same", [True, False])
def test_keys_that_are_zero_or_all_the_same(same: bool, norm: bool) -> None:
    inputs = make_inputs(24, norm=norm)
    inputs.theta.mul_(0.1)
    inputs.k.copy_(inputs.k[:, :1].clone() if same else torch.zeros_like(inputs.k))
    for chunk in (8, 64):
        check(inputs, 0, MemoryOptions(chunk))


@pytest.mark.parametrize("forget", FORGET)
@pytest.mark.parametrize("cut", [9, 14])
def test_two_halves_equal_the_whole(cut: int, forget: str | None) -> None:
    """The gradients too, through the state that is carried, the anchor of an open chunk among it."""
    options = MemoryOptions(7, forget_toward=forget or "init")
    whole = make_inputs(30, 2, batch=2, forgetting=forget is not None)
    whole_result = closed_form.forward(whole, 0, options, want_surprise=True, save=True)
    cotangents = make_cotangents(whole_result)
    expected = closed_form.backward(whole, 0, options, whole_result.saved, cotangents)

    head, tail = ([None if x is None else x[:, part] for x in whole[:6]] for part in (slice(cut), slice(cut, None)))
    first = ScanInputs(*head, *whole[6:])  # type: ignore[arg-type]
    first_result = closed_form.forward(first, 0, options, want_surprise=True, save=True)
    carried = first_result.weights, first_result.momentum, first_result.anchor
    second = ScanInputs(*tail, *whole[6:9], *carried)  # type: ignore[arg-type]
    second_result = closed_form.forward(second, cut % 7, options, want_surprise=True, save=True)
    assert error(first_result.surprise + second_result.surprise, whole_result.surprise) < 1e-12
    out_grads = cotangents.out[:, :cut], cotangents.out[:, cut:]
    second_grads = closed_form.backward(
        second, cut % 7, options, second_result.saved, cotangents._replace(out=out_grads[1])
    )
    carried_grads = second_grads.weights, second_grads.momentum, second_grads.anchor
    first_grads = closed_form.backward(
        first, 0, options, first_result.saved, ResultGradients(out_grads[0], *carried_grads)
    )

    halves = named(first_grads)
    for name, x in named(second_grads).items():
        if name.startswith(("initial_weights", "norm")):
            halves[name] = halves[name] + x
        elif x.shape[1] == 30 - cut:
            halves[name] = torch.cat([halves[name], x], 1)
    for name, x in named(expected).items():
        assert error(halves[name], x) < 1e-10, name


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_views_and_missing_cotangents(chunk: int) -> None:
    """Strided tokens, a state shared by the rows, and nothing said about the state after the call."""
    options = MemoryOptions(chunk)
    plain = make_inputs(20, batch=2)
    shared = tuple(x[:1].expand(2, -1, -1, -1) for x in plain.weights)
    plain = plain._replace(weights=tuple(x.contiguous() for x in shared))
    strided = [
        None if x is None else torch.stack([x, x], -1).transpose(0, 2)[..., 0].transpose(0, 2) for x in plain[:6]
    ]
    views = ScanInputs(*strided, *plain[6:])._replace(weights=shared)  # type: ignore[arg-type]
    results = [closed_form.forward(x, 0, options, want_surprise=False, save=True) for x in (plain, views)]
    assert torch.equal(results[0].out, results[1].out)
    cotangents = ResultGradients(make_cotangents(results[0]).out, (), (), ())
    grads = [
        named(closed_form.backward(x, 0, options, r.saved, cotangents))
        for x, r in zip((plain, views), results, strict=True)
    ]
    zeros = [torch.zeros_like(x) for x in results[0].weights]
    said = cotangents._replace(weights=tuple(zeros), momentum=tuple(zeros))
    told = named(closed_form.backward(plain, 0, options, results[0].saved, said))
    for name, x in grads[0].items():
        assert error(grads[1][name], x) < 1e-14, name
        assert torch.equal(told[name], x), name


@pytest.mark.parametrize("momentum", [True, False])
@pytest.mark.parametrize("forget", FORGET)
@pytest.mark.parametrize(("length", "chunk", "offset"), [(4, 7, 0), (4, 7, 2), (7, 7, 0), (8, 7, 5), (1, 1, 0)])
def test_results_share_no_memory(length: int, chunk: int, offset: int, forget: str | None, momentum: bool) -> None:
    inputs = make_inputs(length, 2, offset, momentum=momentum, forgetting=forget is not None)
    options = MemoryOptions(chunk, forget_toward=forget or "init")
    result = closed_form.forward(inputs, offset, options, want_surprise=True, save=True)
    found = named(ResultGradients(*result[:4]))
    storages = [x.untyped_storage().data_ptr() for x in (*named(inputs).values(), *found.values(), result.surprise)]
    assert len(set(storages)) == len(storages)
    assert bool(result.anchor) == ((offset, length) in ((0, 4), (5, 8)))


def test_bf16_tokens_are_computed_in_the_gates_precision() -> None:
    wide = make_inputs(40, batch=2)
    wide = ScanInputs(*(
        x if x is None else tuple(y.float() for y in x) if isinstance(x, tuple) else x.float() for x in wide
    ))  # fmt: skip
    narrow = wide._replace(**{name: getattr(wide, name).bfloat16() for name in "qkv"})
    wide = narrow._replace(**{name: getattr(narrow, name).float() for name in "qkv"})
    options = MemoryOptions(16)
    found = closed_form.forward(narrow, 0, options, want_surprise=False, save=True)
    expected = closed_form.forward(wide, 0, options, want_surprise=False, save=True)
    assert torch.equal(found.out, expected.out.bfloat16())
    assert all(torch.equal(a, b) for a, b in zip(found.weights, expected.weights, strict=True))
    cotangents = make_cotangents(found)
    grads = named(closed_form.backward(narrow, 0, options, found.saved, cotangents))
    cotangents = cotangents._replace(out=cotangents.out.float())
    for name, x in named(closed_form.backward(wide, 0, options, expected.saved, cotangents)).items():
        assert grads[name].dtype == named(narrow)[name].dtype
        assert torch.equal(grads[name], x.to(grads[name].dtype)), name


@pytest.mark.parametrize("momentum", [True, False])
def test_only_the_states_between_segments_are_saved(momentum: bool) -> None:
    """Hidden 6: segments of 12 tokens or more; chunks of 5 make them 15 long, and 40 tokens three of them."""
    inputs = make_inputs(40, batch=2, momentum=momentum)
    saved = closed_form.forward(inputs, 0, MemoryOptions(5), want_surprise=False, save=True).saved
    assert [tuple(x.shape) for x in saved] == [(2, 4, 4, 6), (2, 4, 6, 4)] * (1 + momentum)
    assert closed_form.forward(inputs, 0, MemoryOptions(5), want_surprise=False, save=False).saved == ()
    with FakeTensorMode(allow_non_fake_inputs=True):
        like = closed_form.saved_like(inputs, 0, MemoryOptions(5))
    assert [(x.shape, x.dtype) for x in like] == [(x.shape, x.dtype) for x in saved]


def test_segments_hold_whole_chunks_where_they_fit() -> None:
    inputs = make_inputs(100)

    def lengths(offset: int, chunk: int) -> list[int]:
        return [segment[-1].stop - segment[0].start for segment in pieces.cut_segments(inputs, offset, chunk)]

    assert lengths(0, 1) == [12] * 8 + [4]
    assert lengths(0, 5) == [15] * 6 + [10]
    assert lengths(3, 5) == [12] * 1 + [15] * 5 + [13]
    assert lengths(0, 64) == [64, 36]
    assert lengths(0, 80) == [64, 16, 20]
