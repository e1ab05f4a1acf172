"""Watches what kernels do to memory while Triton's interpreter runs them, for what only a GPU would punish.

The interpreter runs the programs of a launch one after the other and each of them as if it were one thread, so a race between
programs, or between the threads of one program, gives the right numbers there. `watch_kernels` keeps for every element of a
launch's arrays who wrote and who read it, and raises `Hazard` where the result would depend on who comes first:

- an access outside the launch's arrays;
- an element that one program writes and another writes or reads;
- an element that a program writes and, with no `tl.debug_barrier()` between, reads or writes through another block of pointers:
  the two need not be in the same thread. Writing where the same block of pointers was read is allowed: the compiler moves a
  value from one thread to another through shared memory, behind a barrier of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from triton.runtime import interpreter

NOBODY, SEVERAL = -1, -2


class Hazard(Exception):
    """What a kernel did that it must not do."""


class Shadow:
    """Per element of one array: which program last wrote and read it, in which of its stretches between barriers, and through
    which block of pointers."""

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self.begin, self.end = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
        self.itemsize = 0

    def elements(self, pointers: np.ndarray, itemsize: int) -> np.ndarray:
        if not self.itemsize:
            count = (self.end - self.begin) // itemsize
            self.itemsize = itemsize
            self.writer, self.reader = (np.full(count, NOBODY, np.int32) for _ in range(2))
            self.written, self.read = (np.zeros((2, count), np.int64) for _ in range(2))  # stretch, block of pointers
        assert self.itemsize == itemsize, "an array read as two types"
        return (pointers - self.begin) // itemsize


class Watch:
    """The launch that runs now."""

    def launch(self, kernel: str, tensors: list[torch.Tensor]) -> None:
        self.kernel = kernel
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage() for x in tensors}
        self.shadows = [Shadow(x) for x in storages.values()]
        self.program, self.stretch = -1, 0

    def next_program(self) -> None:
        self.program, self.stretch = self.program + 1, 0

    def find(self, pointers: np.ndarray, mask: np.ndarray, itemsize: int) -> tuple[Shadow, np.ndarray, int] | None:
        touched = np.broadcast_to(pointers, mask.shape)[mask].astype(np.int64)
        if not touched.size:
            return None
        low, high = touched.min(), touched.max() + itemsize
        for shadow in self.shadows:
            if shadow.begin <= low and high <= shadow.end:
                return shadow, shadow.elements(touched, itemsize), hash(touched.tobytes())
        near = min(self.shadows, key=lambda s: min(abs(s.begin - low), abs(s.end - high)))
        raise self.hazard(f"touches bytes {low - near.begin} to {high - near.begin} of {near.end - near.begin}")

    def load(self, pointers: np.ndarray, mask: np.ndarray, itemsize: int) -> None:
        found = self.find(pointers, mask, itemsize)
        if found is None:
            return
        shadow, at, block = found
        writer = shadow.writer[at]
        if ((writer != NOBODY) & (writer != self.program)).any():
            raise self.hazard("reads what another program writes")
        if ((writer == self.program) & (shadow.written[0, at] == self.stretch)).any():
            raise self.hazard("reads what it has just written, with no barrier between")
        reader = shadow.reader[at]
        shadow.reader[at] = np.where((reader == NOBODY) | (reader == self.program), self.program, SEVERAL)
        shadow.read[0, at], shadow.read[1, at] = self.stretch, block

    def store(self, pointers: np.ndarray, mask: np.ndarray, itemsize: int) -> None:
        found = self.find(pointers, mask, itemsize)
        if found is None:
            return
        shadow, at, block = found
        if np.unique(at).size < at.size:
            raise self.hazard("writes an element twice at once")
        for user, doing in ((shadow.writer[at], "writes"), (shadow.reader[at], "reads")):
            if ((user != NOBODY) & (user != self.program)).any():
                raise self.hazard(f"writes what another program {doing}")
        for user, when, doing in ((shadow.writer, shadow.written, "written"), (shadow.reader, shadow.read, "read")):
            now = (user[at] == self.program) & (when[0, at] == self.stretch)
            if (now & (when[1, at] != block)).any():
                raise self.hazard(f"writes what it has just {doing} otherwise, with no barrier between")
        shadow.writer[at] = self.program
        shadow.written[0, at], shadow.written[1, at] = self.stretch, block

    def hazard(self, what: str) -> Hazard:
        return Hazard(f"{self.kernel}, program {self.program}: {what}")


@contextmanager
def watch_kernels(*, without_barriers: str = "") -> Iterator[None]:
    """Watch every launch within; raise a hazard where it happens. Barriers of the kernel `without_barriers` are not seen."""
    watch = Watch()
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, run = builder.create_masked_load, builder.create_masked_store, executor.__call__
    begin_program = builder.set_grid_idx

    def itemsize(pointers: Any) -> int:
        return pointers.get_element_ty().primitive_bitwidth // 8

    def watched_load(self: Any, pointers: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        watch.load(pointers.data, mask.data, itemsize(pointers))
        return load(self, pointers, mask, *rest, **named)

    def watched_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        watch.store(pointers.data, mask.data, itemsize(pointers))
        return store(self, pointers, value, mask, *rest, **named)

    def watched_barrier(self: Any) -> None:
        watch.stretch += watch.kernel != without_barriers

    def watched_program(self: Any, *index: int) -> None:
        watch.next_program()
        begin_program(self, *index)

    def watched_run(self: Any, *arguments: Any, **named: Any) -> Any:
        given = [*arguments, *named.values()]
        watch.launch(self.fn.__name__, [x for x in given if isinstance(x, torch.Tensor)])
        try:
            return run(self, *arguments, **named)
        except interpreter.InterpreterError as error:
            # One more is around it for every function of the kernel it was in.
            cause: BaseException | None = error
            while cause and not isinstance(cause, Hazard):
                cause = cause.__cause__
            raise cause or error from None

    with (
        patch.object(builder, "create_masked_load", watched_load),
        patch.object(builder, "create_masked_store", watched_store),
        patch.object(builder, "create_barrier", watched_barrier),
        patch.object(builder, "set_grid_idx", watched_program),
        patch.object(executor, "__call__", watched_run),
    ):
        yield
