"""One differentiable operator over all paths (memory/path.py), opaque to torch.compile.

`scan` is `titans_pretrain::memory_scan`, a torch.library operator whose gradient is a second one,
`titans_pretrain::memory_scan_backward`. Both know the shapes of their results without running, so a compiled block has the
memory in its graph as one node: no graph break, and nothing of a path is traced.

They are defined by schema, not by `torch.library.custom_op`: that decorator loads the compiler in every process at the
first call, and checks the results for aliases at every call.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor

from titans_pretrain.memory import closed_form, triton
from titans_pretrain.memory.path import ResultGradients, ScanInputs, ScanPath, ScanResult
from titans_pretrain.memory.state import MemoryOptions

# A copy of this file in an export may be loaded beside it (inference/huggingface), and an operator's name is one for all.
NAMESPACE = "titans_pretrain" if __name__ == "titans_pretrain.memory.operator" else re.sub(r"\W", "_", __name__)
_operators = getattr(torch.ops, NAMESPACE)

PATHS = {"closed_form": cast(ScanPath, closed_form), "triton": cast(ScanPath, triton)}

_NUM_INPUTS = len(ScanInputs._fields)
_NUM_SETTINGS = 6
_SCHEMA_OF_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? log_gamma, Tensor? log_eta, Tensor theta, Tensor[] initial_weights, "
    "Tensor? norm_weight, Tensor? norm_bias, Tensor[] weights, Tensor[] momentum, Tensor[] anchor, "
    "Tensor[] fresh_weights, Tensor[] fresh_momentum, Tensor? document_starts, "
    "int offset, int chunk_size, str activation, str forget_toward, float norm_eps, str path"
)


def scan(path: str, inputs: ScanInputs, offset: int, options: MemoryOptions, want_surprise: bool = False) -> ScanResult:
    """The scan by PATHS[path], `offset` tokens into a chunk; differentiable once, in everything but `document_starts`.

    Autocast has no effect inside. `saved` of the result is empty.
    """
    if torch.is_grad_enabled() and any(x.requires_grad for x in _tensors(inputs)):
        save = True
    elif torch.compiler.is_compiling():
        save = False
    else:
        # Decoding, a token at a time: nothing here needs the dispatcher.
        with _without_autocast(inputs.q):
            return PATHS[path].forward(inputs, offset, options, want_surprise, False)
    arguments = (*(list(x) if isinstance(x, tuple) else x for x in inputs), offset, *_settings(options), path)
    flat = _operators.memory_scan.default(*arguments, want_surprise, save)
    return _unflatten_result(flat, inputs, offset, options)._replace(saved=())


def ends_in_own_chunk(length: int, offset: int, chunk_size: int) -> bool:
    """Whether a chunk is open after `length` tokens that begin `offset` tokens into one, and began among them: then, and
    only then, a path returns its anchor."""
    return 0 < (offset + length) % chunk_size <= length


# ------------------------------------------------------------------------------------------------------------- operators


def _forward(*arguments: Any) -> list[Tensor]:
    inputs, offset, options, path = parse(arguments)
    want_surprise, save = arguments[_NUM_INPUTS + _NUM_SETTINGS :]
    with _without_autocast(inputs.q):
        result = PATHS[path].forward(inputs, offset, options, want_surprise, save)
    assert bool(result.anchor) == ends_in_own_chunk(inputs.q.shape[1], offset, options.chunk_size)
    return _own(_tensors(result), arguments)


def _forward_like(*arguments: Any) -> list[Tensor]:
    inputs, offset, options, path = parse(arguments)
    save = arguments[-1]
    q, theta = inputs.q, inputs.theta
    sets = 3 if ends_in_own_chunk(q.shape[1], offset, options.chunk_size) else 2
    states = [theta.new_empty(w.shape) for _ in range(sets) for w in inputs.weights]
    saved = PATHS[path].saved_like(inputs, offset, options) if save else ()
    return [q.new_empty(q.shape), *states, theta.new_empty(()), *saved]


def _backward(*arguments: Any) -> list[Tensor]:
    inputs, offset, options, path = parse(arguments)
    saved, out, weights, momentum, anchor = arguments[_NUM_INPUTS + _NUM_SETTINGS :]
    if out is None:
        out = inputs.q.new_zeros(inputs.q.shape)
    grads = ResultGradients(out, tuple(weights), tuple(momentum), tuple(anchor))
    with _without_autocast(inputs.q):
        found = PATHS[path].backward(inputs, offset, options, tuple(saved), grads)
    return _own(_tensors(found), arguments)


def _backward_like(*arguments: Any) -> list[Tensor]:
    inputs, *_ = parse(arguments)
    return [x.new_empty(x.shape) for x in _tensors(inputs[:-1])]


def _own(results: Iterator[Tensor], arguments: Sequence[Any]) -> list[Tensor]:
    """Results in one piece of memory each and none in another's or an argument's, as torch.library demands: a gradient that
    passes through unchanged is copied."""
    given = _tensors([tuple(x) if isinstance(x, list) else x for x in arguments if isinstance(x, (Tensor, list))])
    taken = {x.untyped_storage().data_ptr() for x in given}
    owned = []
    for result in results:
        x = result.contiguous()
        if x.untyped_storage().data_ptr() in taken and x.numel():
            x = x.clone()
        taken.add(x.untyped_storage().data_ptr())
        owned.append(x)
    return owned


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.set_materialize_grads(False)
    scanned, offset, options, _ = parse(inputs)
    result = _unflatten_result(output, scanned, offset, options)
    ctx.mark_non_differentiable(result.surprise, *result.saved)
    ctx.arguments = tuple(None if isinstance(x, (Tensor, list)) else x for x in inputs[: _NUM_INPUTS + _NUM_SETTINGS])
    ctx.counts = tuple(len(x) if isinstance(x, list) else int(x is not None) for x in inputs[:_NUM_INPUTS])
    ctx.save_for_backward(*_tensors(scanned), *result.saved)


def _run_backward(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    tensors = iter(ctx.saved_tensors)
    fields = _fill(ctx.counts, tensors)
    arguments = (*fields, *ctx.arguments[_NUM_INPUTS:])
    inputs, offset, options, _ = parse(arguments)
    given = _unflatten_result(list(grads), inputs, offset, options)
    flat = _operators.memory_scan_backward.default(
        *arguments,
        list(tensors),
        given.out,
        _all_or_none(given.weights, inputs.weights),
        _all_or_none(given.momentum, inputs.momentum),
        _all_or_none(given.anchor, inputs.weights),
    )
    # Nothing for document_starts, the settings, want_surprise and save.
    return (*_fill(ctx.counts[:-1], iter(flat)), *[None] * (_NUM_SETTINGS + 3))


def _refuse_second_gradient(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    raise RuntimeError(
        "the memory scan is differentiable once: its gradient has no gradient; for second derivatives use the path 'reference'"
    )


_library = torch.library.Library(NAMESPACE, "DEF")
for _name, _rest, _kernel, _like in (
    ("memory_scan", "bool want_surprise, bool save", _forward, _forward_like),
    (
        "memory_scan_backward",
        "Tensor[] saved, Tensor? out_grad, Tensor[] weights_grad, Tensor[] momentum_grad, Tensor[] anchor_grad",
        _backward,
        _backward_like,
    ),
):
    _library.define(f"{_name}({_SCHEMA_OF_INPUTS}, {_rest}) -> Tensor[]", tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(_name, _kernel, "CPU")
    _library.impl(_name, _kernel, "CUDA")
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _like, lib=_library)
torch.library.register_autograd(f"{NAMESPACE}::memory_scan", _run_backward, setup_context=_setup_context, lib=_library)
torch.library.register_autograd(f"{NAMESPACE}::memory_scan_backward", _refuse_second_gradient, lib=_library)


# ------------------------------------------------------------------------------------------------- flat and back again


def _settings(options: MemoryOptions) -> tuple[int, str, str, float]:
    return options.chunk_size, options.activation, options.forget_toward, options.norm_eps


def parse(arguments: Sequence[Any]) -> tuple[ScanInputs, int, MemoryOptions, str]:
    """The arguments that both operators begin with, lists as tuples."""
    inputs = ScanInputs._make(tuple(x) if isinstance(x, list) else x for x in arguments[:_NUM_INPUTS])
    offset, *settings, path = arguments[_NUM_INPUTS : _NUM_INPUTS + _NUM_SETTINGS]
    return inputs, offset, MemoryOptions(*settings), path


def with_path(arguments: Sequence[Any], path: str) -> tuple[Any, ...]:
    """The same arguments for another path."""
    place = _NUM_INPUTS + _NUM_SETTINGS - 1
    return (*arguments[:place], path, *arguments[place + 1 :])


def _tensors(fields: Sequence[Any]) -> Iterator[Tensor]:
    """The tensors of a NamedTuple of tensors, tuples of tensors and Nones, in order."""
    for field in fields:
        if isinstance(field, tuple):
            yield from field
        elif field is not None:
            yield field


def _fill(counts: Sequence[int], tensors: Iterator[Tensor]) -> list[Any]:
    """The inverse of `_tensors` for the first `counts` fields of ScanInputs: tensors, lists of tensors and Nones."""
    lists = {"initial_weights", "weights", "momentum", "anchor", "fresh_weights", "fresh_momentum"}
    fields: list[Any] = []
    for name, count in zip(ScanInputs._fields, counts, strict=False):
        taken = [next(tensors) for _ in range(count)]
        fields.append(taken if name in lists else taken[0] if taken else None)
    return fields


def _unflatten_result(flat: list[Any], inputs: ScanInputs, offset: int, options: MemoryOptions) -> ScanResult:
    depth = len(inputs.weights)
    after = 1 + 2 * depth
    end = after + (depth if ends_in_own_chunk(inputs.q.shape[1], offset, options.chunk_size) else 0)
    states = (tuple(flat[1 : 1 + depth]), tuple(flat[1 + depth : after]), tuple(flat[after:end]))
    return ScanResult(flat[0], *states, flat[end], tuple(flat[end + 1 :]))


def _all_or_none(grads: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
    """Gradients where at least one is given, the missing ones as zeros; else an empty list."""
    if all(grad is None for grad in grads):
        return []
    return [x.new_zeros(x.shape) if grad is None else grad for grad, x in zip(grads, like, strict=True)]


def _without_autocast(x: Tensor) -> Any:
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()
