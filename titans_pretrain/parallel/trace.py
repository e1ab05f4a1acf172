"""What does one rank allocate, and what does it send, in one forward and backward pass? Found by running the model itself.

The model of one rank runs on fake tensors, which have shapes and no content, in a process group that sends nothing. A
dispatch mode sees every tensor made and freed and every collective, so no formula here can disagree with the model's
code. It needs no GPU and little time: two short models are run, and what grows with the number of blocks is continued to
the model's own number.

What a kernel allocates inside itself is not seen, but for the memory's and the cross entropy's, which are large.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._pytree import tree_leaves

from titans_pretrain.config import Config
from titans_pretrain.layout import Layout
from titans_pretrain.memory.scratch import Allocations, for_device, scratch_bytes
from titans_pretrain.model import Titans
from titans_pretrain.parallel.build import build_model
from titans_pretrain.parallel.grid import Grid

FORWARD, LAST, FIRST = "forward", "backward of the head and the last block", "backward of the first block"
WINDOWS = (FORWARD, LAST, FIRST)


@dataclass(frozen=True)
class Traffic:
    """What one rank sends."""

    bytes: float = 0.0
    messages: float = 0.0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.bytes + other.bytes, self.messages + other.messages)

    def __sub__(self, other: Traffic) -> Traffic:
        return self + other * -1

    def __mul__(self, factor: float) -> Traffic:
        return Traffic(self.bytes * factor, self.messages * factor)


@dataclass(frozen=True)
class Trace:
    """One pass of one rank. Bytes are above what was there before it; parameters are not included, gradients of parameters
    only where they are kept."""

    peaks: dict[str, float]
    """Most bytes alive at one time in each of WINDOWS."""
    kept: float
    """Bytes alive at the end of the forward pass: what the backward pass needs."""
    memory_states: float
    """Of those, states (W, S) of the memory."""
    traffic: dict[str, Traffic]
    """By axis, "tensor" or "sequence"."""


def trace(config: Config, layout: Layout, rows: int, device: str, keep_gradients: bool) -> Trace:
    """The pass of one rank of `layout` over `rows` sequences.

    Args:
        config: resolved (model.vocab_size set).
        device: "cpu" or "cuda": what will run it, and so by which path the memory is scanned. Attention is taken to be
            one fused kernel on both.
        keep_gradients: whether gradients of parameters stay in .grad, or are taken away as soon as they are made.
    """
    model_config = dataclasses.replace(config.model, num_layers=min(2, config.model.num_layers))
    short = dataclasses.replace(config, model=model_config)
    with _nowhere(layout) as grid, FakeTensorMode():
        model = local_model(short, grid)
        counter = _Counter(device, grid)
        for parameter in model.parameters():
            counter.note(parameter, counts=False)
            if not keep_gradients:
                parameter.register_post_accumulate_grad_hook(_drop_gradient)
        after_blocks: list[_Snapshot] = []
        before_backwards: list[_Snapshot] = []
        for block in model.blocks:
            block.register_forward_hook(_note_passage(counter, after_blocks, before_backwards))
        tokens = torch.zeros(rows, config.data.seq_len // layout.sequence, dtype=torch.int64)
        with counter:
            loss = model(tokens, tokens)
            kept = counter.snapshot()
            counter.window = LAST
            loss.backward()
        peaks: dict[str, float] = dict(counter.peaks)
        states, traffic = kept.states, counter.traffic
        block_gradients = sum(p.nbytes for p in model.blocks[-1].parameters()) if keep_gradients else 0
    live = kept.live
    more = config.model.num_layers - len(model.blocks)
    if more:
        # What the second block adds, every further one adds. Backward passes come in the opposite order. The blocks of rmt
        # run once for every segment.
        for first, second in _pairs(after_blocks):
            live += more * (second.live - first.live)
            states += more * (second.states - first.states)
            for window in (FORWARD, LAST):
                peaks[window] += more * (second.live - first.live)
            traffic = {
                axis: sent + (second.traffic[axis] - first.traffic[axis]) * more for axis, sent in traffic.items()
            }
        for second, first in _pairs(before_backwards):
            traffic = {
                axis: sent + (first.traffic[axis] - second.traffic[axis]) * more for axis, sent in traffic.items()
            }
        peaks[FIRST] += more * block_gradients
    return Trace(peaks, live, states, traffic)


def _pairs(snapshots: list[_Snapshot]) -> Iterator[tuple[_Snapshot, _Snapshot]]:
    """Those of the two blocks, pass by pass."""
    return zip(snapshots[::2], snapshots[1::2], strict=True)


def _note_passage(
    counter: _Counter, after: list[_Snapshot], before_backward: list[_Snapshot]
) -> Callable[[Any, Any, Any], None]:
    """A hook after a block's forward: what is there now, and again when the gradient arrives and its backward begins."""

    def hook(module: Any, arguments: Any, output: Any) -> None:
        if counter.window == FORWARD:  # not when a checkpointed block runs again
            after.append(counter.snapshot())
            is_first = len(after) == 1

            def arrived(gradient: Tensor) -> None:
                before_backward.append(counter.snapshot())
                if is_first:
                    counter.window = FIRST
                    counter.reach(0)

            output[0].register_hook(arrived)

    return hook


def local_model(config: Config, grid: Grid) -> Titans:
    """The model of a rank of `grid`, its parameters empty and in the dtype of engine.precision."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if config.engine.precision == "bf16" else torch.float32)
    try:
        return build_model(config, grid, seed=None)
    finally:
        torch.set_default_dtype(before)


def local_shapes(config: Config, layout: Layout) -> dict[str, torch.Size]:
    """Shape of every parameter of one rank, by name."""
    with _nowhere(layout) as grid, FakeTensorMode():
        return {name: p.shape for name, p in local_model(config, grid).named_parameters()}


@contextmanager
def _nowhere(layout: Layout) -> Iterator[Grid]:
    """A grid for one replica of `layout` whose process groups send nothing, as seen by the second rank of the sequence."""
    if dist.is_initialized():
        raise RuntimeError("a rank of a real job cannot be traced: it has a process group already")
    one = Layout(1, layout.sequence, layout.tensor)
    rank = one.tensor if one.sequence > 1 else 0
    if one.world_size == 1:
        yield Grid(0, 1, torch.device("cpu")).lay_out(one)
        return
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=one.world_size)
    try:
        yield Grid(rank, one.world_size, torch.device("cpu")).lay_out(one)
    finally:
        dist.destroy_process_group()


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


class _Snapshot(NamedTuple):
    live: int
    states: int
    traffic: dict[str, Traffic]


class _Counter(Allocations):
    """Allocations by window, the memory's states apart, and what collectives send."""

    def __init__(self, device: str, grid: Grid) -> None:
        super().__init__()
        self.device = device
        self.peaks = dict.fromkeys(WINDOWS, 0)
        self.window = FORWARD
        self._states: list[weakref.ref[Any]] = []
        axes = {"sequence": grid.sequence, "tensor": grid.tensor}
        self._axis_of = {
            axis.group.group_name: (name, axis.size) for name, axis in axes.items() if axis.group is not None
        }
        self.traffic = {name: Traffic() for name, _ in self._axis_of.values()}

    def snapshot(self) -> _Snapshot:
        return _Snapshot(self.live, self.state_bytes(), dict(self.traffic))

    def reach(self, more: int) -> None:
        self.peaks[self.window] = max(self.peaks[self.window], self.live + more)

    def state_bytes(self) -> int:
        """Of what is alive, the states that calls of the memory operator returned or saved."""
        states = (state() for state in self._states)
        return sum(state.nbytes() for state in states if state is not None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "titans_pretrain":
            args = for_device(args, self.device)
            self.reach(scratch_bytes(func, args))
        elif func.namespace == "c10d":
            self._send(func, args)
        elif func is torch.ops.aten.logsumexp.default:
            self.reach(args[0].nbytes)  # exp(x - max)
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if func is torch.ops.titans_pretrain.memory_scan.default:
            self._states += [weakref.ref(x.untyped_storage()) for x in out[1:]]
        return out

    def _send(self, func: Any, args: Any) -> None:
        name = func._schema.name.removeprefix("c10d::")
        group = next(dist.ProcessGroup.unbox(x) for x in args if isinstance(x, torch.ScriptObject) and _is_group(x))
        axis, size = self._axis_of[group.group_name]
        share = (size - 1) / size
        if name == "allreduce_":
            sent = 2 * share * _bytes(args[0])  # a ring's reduce-scatter and gather
        elif name == "alltoall_base_":
            sent = share * _bytes(args[1])
        elif name == "allgather_":
            sent = (size - 1) * _bytes(args[1])
        elif name == "send":
            sent = _bytes(args[0])
        elif name == "recv_":
            return
        else:
            raise NotImplementedError(f"what a rank sends in {name} is not known here")
        self.traffic[axis] += Traffic(sent, 1)


def _is_group(x: Any) -> bool:
    return x._type().qualified_name().endswith("ProcessGroup")


def _bytes(tensors: Any) -> int:
    return sum(x.nbytes for x in tree_leaves(tensors) if isinstance(x, Tensor))
