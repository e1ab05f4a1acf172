"""What a rank gets from the ranks before it on the sequence axis, and hands on to those after it.

Messages of the forward pass go to later ranks only, and their gradients back to earlier ones only. Sends do not wait. So
rank r works on a layer while rank r + 1 works on the one below: P ranks and N layers take N + P - 1 layer times, not N * P.

Both ends of a pair meet their messages in the same order: the program's in the forward pass, and in the backward pass its
reverse, for autograd runs nodes from the last made to the first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from titans_pretrain.memory import MemoryState, memory_scan
from titans_pretrain.model.neural_memory import MemoryLayerState
from titans_pretrain.parallel.grid import Axis
from titans_pretrain.parallel.packing import Form, form_of, pack, packed_width, unpack
from titans_pretrain.parallel.scan_call import ScanCall, ScanReturn


class Neighbours:
    """Messages between this rank and others of an axis, by their places on it."""

    def __init__(self, axis: Axis) -> None:
        self.axis = axis
        self._sending: dict[int, list[tuple[Any, Tensor]]] = {}
        self._record: list[list[Tensor]] | None = None
        self._replay: Iterator[list[Tensor]] | None = None

    def send(self, tensors: Sequence[Tensor], to: int) -> None:
        """Start to send; returns at once. The tensors may be changed afterwards: what is sent is a copy."""
        if self._replay is not None:
            return
        message = pack([x[None] for x in tensors])[0]
        work = dist.isend(message, self.axis.ranks[to], group=self.axis.group)
        self._sending.setdefault(to, []).append((work, message))

    def receive(self, forms: Sequence[Form], source: int, device: torch.device) -> list[Tensor]:
        """Wait for the next message of `source`: tensors of these forms."""
        if self._replay is not None:
            return [x.detach() for x in next(self._replay)]
        rows = [Form(torch.Size((1, *form.shape)), form.dtype) for form in forms]
        message = torch.empty(packed_width(rows), dtype=torch.uint8, device=device)
        dist.recv(message, self.axis.ranks[source], group=self.axis.group)
        # A pair's messages go one way in the forward pass and the other way in the backward pass. So a message from
        # `source` says that it has turned round, and has all that was sent to it before: this does not wait. (Asking
        # whether a send is done would be simpler, but gloo's answer is always no.)
        for work, _ in self._sending.pop(source, ()):
            work.wait()
        tensors = [x[0] for x in unpack(message[None], rows)]
        if self._record is not None:
            self._record.append([x.detach() for x in tensors])  # detached: autograd will hang its graph on the others
        return tensors


class Recording:
    """Inside it, what `neighbours` receive goes to `messages` as well."""

    def __init__(self, neighbours: Neighbours, messages: list[list[Tensor]]) -> None:
        self._neighbours, self._messages = neighbours, messages

    def __enter__(self) -> None:
        self._neighbours._record = self._messages

    def __exit__(self, *_: object) -> None:
        self._neighbours._record = None


class Replaying(Recording):
    """Inside it, `neighbours` receive `messages` again, and nothing is sent: the second run of a checkpointed function.

    It runs in the backward pass, when the ranks before this one are long done with that layer's forward."""

    def __enter__(self) -> None:
        self._neighbours._replay = iter(self._messages)

    def __exit__(self, *_: object) -> None:
        self._neighbours._replay = None


# ------------------------------------------------------------------------------------------------------------------ halos


def halo(neighbours: Neighbours, tensors: Sequence[Tensor], length: int) -> tuple[Tensor, ...]:
    """The tokens before this rank's, as many as there are up to `length`, of tensors [b, t, ...]; equal t on all ranks.

    Returns: for each tensor [b, min(length, rank * t), ...]. More than t of them lie on several ranks.
    """
    t = tensors[0].shape[1]
    return _Halo.apply(neighbours, length, t, *(x[:, max(0, t - length) :] for x in tensors))


class _Halo(torch.autograd.Function):
    """Takes the ends of this rank's tensors, which others need, and gives what this rank needs of theirs."""

    @staticmethod
    def forward(ctx: Any, neighbours: Neighbours, length: int, t: int, *tails: Tensor) -> tuple[Tensor, ...]:
        ctx.settings = neighbours, length, t
        ctx.forms = [form_of(x) for x in tails]
        axis = neighbours.axis
        hops = _hops(length, t)
        for hop, count in hops:
            if axis.rank + hop < axis.size:
                neighbours.send([x[:, x.shape[1] - count :] for x in tails], axis.rank + hop)
        parts = []
        for hop, count in hops:
            if hop <= axis.rank:
                forms = [_with_tokens(form, count) for form in ctx.forms]
                parts.append(neighbours.receive(forms, axis.rank - hop, tails[0].device))
        if not parts:
            return tuple(x[:, :0] for x in tails)
        return tuple(torch.cat(pieces[::-1], dim=1) for pieces in zip(*parts, strict=True))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        neighbours, length, t = ctx.settings
        axis = neighbours.axis
        hops = _hops(length, t)
        stop = grads[0].shape[1]
        for hop, count in hops:
            if hop <= axis.rank:
                neighbours.send([x[:, stop - count : stop] for x in grads], axis.rank - hop)
                stop -= count
        found = [torch.zeros(form.shape, dtype=form.dtype, device=grads[0].device) for form in ctx.forms]
        for hop, count in hops:
            if axis.rank + hop < axis.size:
                forms = [_with_tokens(form, count) for form in ctx.forms]
                for total, part in zip(found, neighbours.receive(forms, axis.rank + hop, grads[0].device), strict=True):
                    total[:, total.shape[1] - count :] += part
        return None, None, None, *found


def _hops(length: int, t: int) -> list[tuple[int, int]]:
    """(how many ranks away, how many tokens from there) for a halo of `length` tokens over shards of t."""
    return [(1 + i, min(t, length - i * t)) for i in range(-(-length // t))]


def _with_tokens(form: Form, count: int) -> Form:
    return Form(torch.Size((form.shape[0], count, *form.shape[2:])), form.dtype)


# ------------------------------------------------------------------------------------------------------------------ states


def receive(neighbours: Neighbours, source: int, like: Sequence[Tensor], unused: Sequence[Tensor] = ()) -> list[Tensor]:
    """Tensors of the shapes and dtypes of `like` from `source`, which sends them by `send_along`; differentiable there.

    `like` and `unused` are not read, but get gradients of zero, not none: they come from parameters that other ranks use.
    """
    return list(_Receive.apply(neighbours, source, len(like), _switch(like[0].device), *like, *unused))


def send_along(
    neighbours: Neighbours, to: Sequence[int], tensors: Sequence[Tensor], through: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Send `tensors` to each rank of `to`. Returns `through`, and the loss must depend on what is returned: by the way of
    its gradient the gradients of `tensors` are fetched, at the latest when it gets there."""
    if not to:
        return tuple(through)
    device = through[0].device
    return _Send.apply(neighbours, tuple(to), len(through), _switch(device), *through, *tensors)


def _switch(device: torch.device) -> Tensor:
    """Makes autograd call the backward of a message whatever else needs a gradient, since the other end waits for it."""
    return torch.zeros((), device=device, requires_grad=torch.is_grad_enabled())


class _Receive(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, neighbours: Neighbours, source: int, count: int, switch: Tensor, *given: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.settings = neighbours, source
        ctx.forms = [form_of(x) for x in given]
        return tuple(neighbours.receive(ctx.forms[:count], source, switch.device))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        neighbours, source = ctx.settings
        neighbours.send(grads, source)
        zeros = (grads[0].new_zeros((), dtype=form.dtype).expand(form.shape) for form in ctx.forms)
        return None, None, None, None, *zeros


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, neighbours: Neighbours, to: tuple[int, ...], count: int, switch: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.settings = neighbours, to
        ctx.forms = [form_of(x) for x in tensors[count:]]
        for rank in to:
            neighbours.send(tensors[count:], rank)
        return tuple(x.view_as(x) for x in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        neighbours, to = ctx.settings
        messages = [neighbours.receive(ctx.forms, rank, grads[0].device) for rank in to]
        found = [torch.stack(parts).sum(0) if len(parts) > 1 else parts[0] for parts in zip(*messages, strict=True)]
        return None, None, None, None, *grads, *found


def scan_and_hand_on(neighbours: Neighbours, call: ScanCall, return_signals: bool) -> ScanReturn:
    """The memory's scan of this rank's tokens from where the rank before ends ("hand_off"); exact wherever the cut is.

    What is sent is W, S where there is momentum, and the weights at the start of the chunk where one is open at the cut.
    """
    axis, momentum, chunk = neighbours.axis, call.log_eta is not None, call.options.chunk_size
    t, state = call.q.shape[1], call.start()
    depth = len(state.weights)
    offset = (state.offset + axis.rank * t) % chunk
    if axis.rank > 0:
        fields = _handed(state._replace(offset=offset), momentum)
        found = receive(neighbours, axis.rank - 1, fields, () if offset else state.anchor)
        weights, *others = (tuple(found[i : i + depth]) for i in range(0, len(found), depth))
        state = MemoryState(
            weights, others[0] if momentum else state.momentum, others[-1] if offset else weights, offset
        )
    out, after, *signals = memory_scan(*call._replace(state=state), return_signals=return_signals)  # type: ignore[call-overload]
    if axis.rank + 1 < axis.size:
        (out,) = send_along(neighbours, [axis.rank + 1], _handed(after, momentum), [out])
    return out, after, *signals


def recurrence_handed_on(
    neighbours: Neighbours, scan: Callable[..., tuple[Tensor, Tensor]], per_token: Sequence[Tensor], state: Tensor
) -> tuple[Tensor, Tensor]:
    """`scan` of this rank's tokens from where the rank before ends; see LocalSequence.recurrence."""
    axis = neighbours.axis
    if axis.rank > 0:
        (state,) = receive(neighbours, axis.rank - 1, [state])
    out, after = scan(*per_token, state, None)
    if axis.rank + 1 < axis.size:
        (out,) = send_along(neighbours, [axis.rank + 1], [after], [out])
    return out, after


def _handed(state: MemoryState, momentum: bool) -> list[Tensor]:
    return [*state.weights, *(state.momentum if momentum else ()), *(state.anchor if state.offset else ())]


def receive_layer_state(neighbours: Neighbours, given: MemoryLayerState) -> MemoryLayerState:
    """The state of a memory layer, at the start of a chunk, from the rank before; rank 0 gets `given` itself."""
    if neighbours.axis.rank == 0:
        return given
    found = receive(neighbours, neighbours.axis.rank - 1, _of_layer(given))
    depth = len(given.memory.weights)
    weights, momentum = tuple(found[:depth]), tuple(found[depth : 2 * depth])
    query, key, value = found[2 * depth :]
    return MemoryLayerState((query, key, value), MemoryState(weights, momentum, weights, 0))


def send_layer_state_along(neighbours: Neighbours, state: MemoryLayerState, through: Tensor) -> Tensor:
    """Send `state` to the next rank, if there is one; `through` as in `send_along`."""
    axis = neighbours.axis
    to = [axis.rank + 1] if axis.rank + 1 < axis.size else []
    return send_along(neighbours, to, _of_layer(state), [through])[0]


def _of_layer(state: MemoryLayerState) -> list[Tensor]:
    assert state.memory.offset == 0, "between chunks the anchor is the weights, and is not sent"
    return [*state.memory.weights, *state.memory.momentum, *state.tails]
