"""When the loss or the gradient norm is no longer a number: which layer went first?

Watching costs nothing per step: the loop already has both numbers. Only after one went bad is the batch run again, with
hooks, to name the layer: the first whose output is not finite, or, when the forward pass is clean, the first in the
backward pass whose gradient is not.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from titans_pretrain.data.stream import MicroBatch
from titans_pretrain.model import Titans
from titans_pretrain.parallel.grid import Grid
from titans_pretrain.train.engine import Engine

Place = tuple[int, int, str]
"""Micro-batch, position in execution order, sentence about the layer."""


def describe_failure(engine: Engine, batch: Sequence[MicroBatch], scale: float, grid: Grid) -> str:
    """Run the step's micro-batches again and name the first layer that goes bad on any rank. Collective.

    Leaves parameters alone, but adds to the gradients: the run must end after it.

    Args:
        batch, scale: as the failed step had them (engine.Engine.forward_backward).

    Returns:
        part of a sentence, such as "the output of blocks.1.attention.query is the first that is not finite".
    """
    engine.model.run_as_written()  # hooks on modules are not called inside a compiled block
    for first_bad in (_forward, _backward):
        found = _earliest(grid.gather_objects(first_bad(engine, batch, scale)))
        if found is not None:
            return found
    return "running the batch again gives finite outputs and gradients in every layer, so the fault does not repeat"


def _earliest(places: Sequence[Place | None]) -> str | None:
    ranked = sorted((place[:2], rank, place[2]) for rank, place in enumerate(places) if place is not None)
    if not ranked:
        return None
    (micro_batch, _), rank, text = ranked[0]
    where = [f"rank {rank}"] * (len(places) > 1) + [f"micro-batch {micro_batch}"] * (micro_batch > 0)
    return text + (f" (on {', '.join(where)})" if where else "")


def _forward(engine: Engine, batch: Sequence[MicroBatch], scale: float) -> Place | None:
    found: Place | None = None
    for index, micro_batch in enumerate(batch):
        bad: list[str] = []
        order = [0]

        def look(name: str, inputs: Any, output: Any, bad: list[str] = bad, order: list[int] = order) -> None:
            order[0] += not bad
            # A module finishes before the one that holds it, so the first is the innermost.
            if not bad and not all(_finite(t) for t in _tensors(output)):
                bad.append(name)

        with _hooks(engine.model, look):
            # Under ZeRO-3 every rank must run every micro-batch, also after it has found its layer.
            engine.evaluate(_loss, *engine.at_hand(*micro_batch))
        if bad and found is None:
            found = (index, order[0], f"the output of {bad[0]} is the first that is not finite")
    return found


def _backward(engine: Engine, batch: Sequence[MicroBatch], scale: float) -> Place | None:
    found: Place | None = None
    for index, (tokens, labels, document_starts) in enumerate(batch):
        probe = _GradientProbe()
        with _hooks(engine.model, probe.watch_output, probe.watch_inputs), probe.watch_parameters(engine.model):
            engine.forward_backward(tokens, labels, scale, document_starts)
        if probe.first_bad is not None and found is None:
            found = (
                index,
                probe.order,
                f"the outputs are finite, but in the backward pass {probe.first_bad} is the first that is not",
            )
        if index < len(batch) - 1 and not engine.at_last_micro_batch:
            engine.end_micro_batch()
    return found


class _GradientProbe:
    """Tensor hooks that remember the first gradient, in the order of the backward pass, that is not finite."""

    def __init__(self) -> None:
        self.order = 0
        self.first_bad: str | None = None
        self._names: dict[int, str] = {}
        self._kept: list[Tensor] = []  # ids stay unique while the tensors live

    def watch_inputs(self, name: str, inputs: Any) -> None:
        # The gradient of an input is made by the module that used it; the innermost user comes last and wins.
        self._watch(inputs, f"the gradient that {name} passes back")

    def watch_output(self, name: str, inputs: Any, output: Any) -> None:
        # Made by whatever used the output; if that is another module, its own hook renames this.
        self._watch(output, f"the gradient that reaches {name}")

    def _watch(self, values: Any, what: str) -> None:
        for tensor in _tensors(values):
            if tensor.requires_grad:
                key = id(tensor)
                if key not in self._names:
                    tensor.register_hook(lambda gradient, key=key: self._look(gradient, self._names[key]))
                    self._kept.append(tensor)
                self._names[key] = what

    @contextlib.contextmanager
    def watch_parameters(self, model: nn.Module) -> Iterator[None]:
        handles = [
            parameter.register_hook(lambda gradient, name=name: self._look(gradient, f"the gradient of {name}"))
            for name, parameter in model.named_parameters()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _look(self, gradient: Tensor | None, what: str) -> None:
        if gradient is None:  # of a custom function's output that nothing used
            return
        self.order += self.first_bad is None
        if self.first_bad is None and not _finite(gradient):
            self.first_bad = what


@contextlib.contextmanager
def _hooks(model: nn.Module, after: Any, before: Any = None) -> Iterator[None]:
    """Call after(name, inputs, output) and before(name, inputs) around the forward of every module below `model`."""
    handles = []
    for name, module in model.named_modules():
        if not name:
            continue
        handles.append(module.register_forward_hook(lambda _, i, o, name=name: after(name, i, o)))
        if before is not None:
            handles.append(module.register_forward_pre_hook(lambda _, i, name=name: before(name, i)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _loss(model: Titans, *batch: Tensor | None) -> Tensor:
    return model(*batch)


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def _tensors(value: Any) -> Iterable[Tensor]:
    """Tensors in nested tuples, lists and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
