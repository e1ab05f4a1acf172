"""When Python collects garbage: on all ranks at the same step.

Left to itself, Python walks its objects whenever a process has made enough of them, which is at another moment on every rank;
the others then wait for it in their next collective. At a thousand ranks somebody collects in nearly every step.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from titans_pretrain.train.schedule import every


class Garbage:
    """Python's collector, from here to `close` in this one's hands: a collection every `interval` steps, none between.

    What is alive now (modules, the model, the engine) is put aside and not walked again: a walk over what the imports alone
    leave takes 0.2 s. `interval` 0 leaves the collector to itself.
    """

    def __init__(self, interval: int) -> None:
        self._interval = interval
        if interval:
            gc.collect()
            gc.freeze()
            gc.disable()

    def step(self, step: int) -> None:
        """After optimizer step `step`."""
        if every(self._interval, step):
            gc.collect()

    def close(self) -> None:
        """Hand the collector back."""
        if self._interval:
            gc.unfreeze()
            gc.enable()


@contextmanager
def no_collections() -> Iterator[None]:
    """For imports: a quarter of their time would go into walking objects of which none is garbage."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
