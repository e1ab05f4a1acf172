"""How much memory does a call of the memory operator take while it runs, on a device that need not be here?

For plans made with fake tensors: `parallel/trace.py` asks at every call of the operator it sees.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from titans_pretrain.memory import closed_form, triton
from titans_pretrain.memory.operator import parse, with_path
from titans_pretrain.memory.path import ResultGradients, ScanInputs
from titans_pretrain.memory.scan import SHORTEST
from titans_pretrain.memory.triton.shapes import Shapes


class Allocations(TorchDispatchMode):
    """Counts the bytes of storages that are made while it is active, real or fake, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def reach(self, more: int) -> None:
        """For a moment `more` bytes are alive."""
        self.peak = max(self.peak, self.live + more)

    def note(self, tensor: Tensor, counts: bool = True) -> None:
        """From now on the memory of `tensor` is known; what was there before counts as nothing."""
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._known:
            return
        size = storage.nbytes() if counts else 0

        def freed(_: Any) -> None:
            del self._known[key]
            self.live -= size

        self._known[key] = weakref.ref(storage, freed)
        self.live += size
        self.reach(0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.note(leaf)
        return out


def for_device(arguments: tuple[Any, ...], device: str) -> tuple[Any, ...]:
    """The operator's arguments with the path that "auto" takes on `device`, as far as shapes decide."""
    inputs, _, options, _ = parse(arguments)
    width, hidden = inputs.initial_weights[0].shape[-2:]
    fit = device == "cuda" and inputs.q.dtype == torch.bfloat16 and inputs.q.shape[1] >= SHORTEST
    kernels = fit and triton.why_not_shapes(len(inputs.initial_weights), width, hidden, options) is None
    return with_path(arguments, "triton" if kernels else "closed_form")


def scratch_bytes(func: Any, arguments: tuple[Any, ...]) -> int:
    """Peak of a call of the operator, or of its backward, above its inputs.

    Args:
        func: torch.ops.titans_pretrain.memory_scan.default or memory_scan_backward.default.
        arguments: its arguments, fake tensors; of the path "triton" only what its largest arrays take is known.
    """
    inputs, offset, options, path = parse(arguments)
    backward = func is torch.ops.titans_pretrain.memory_scan_backward.default
    shapes = tuple(_shape(x) for x in inputs)
    return _scratch_bytes(shapes, offset, options, path, backward or arguments[-1], backward)


@functools.lru_cache(maxsize=64)  # the calls of all layers are alike
def _scratch_bytes(shapes: Any, offset: int, options: Any, path: str, save: bool, backward: bool) -> int:
    with FakeTensorMode():
        inputs = ScanInputs._make(_tensor(x) for x in shapes)
        if path == "triton":
            return Shapes.of(inputs, options).scratch_bytes(backward)
        if not backward:
            with Allocations() as counter:
                closed_form.forward(inputs, offset, options, False, save)
            return counter.peak
        saved = closed_form.saved_like(inputs, offset, options)
        grads = ResultGradients(torch.empty_like(inputs.q), inputs.weights, inputs.momentum, ())
        with Allocations() as counter:
            closed_form.backward(inputs, offset, options, saved, grads)
        return counter.peak


def _shape(x: Any) -> Any:
    if isinstance(x, tuple):
        return ("tuple", *(_shape(y) for y in x))
    return None if x is None else (x.shape, x.dtype)


def _tensor(shape: Any) -> Any:
    if shape is not None and shape[0] == "tuple":
        return tuple(_tensor(y) for y in shape[1:])
    return None if shape is None else torch.empty(shape[0], dtype=shape[1])
