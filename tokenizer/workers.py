"""Who encodes the units? Processes that each write what they encoded, so that nothing large comes back."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Collection, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from pathlib import Path

from titans_pretrain.errors import UserError
from tokenizer.encode import EncodeOptions, Encoder
from tokenizer.units import Unit, save_unit


class StoppedError(UserError):
    """A build that ended for a reason that lies outside of its input; the units that are done stay."""


def encode_units(
    units: Iterable[Unit],
    directory: Path,
    done: Collection[int],
    *,
    workers: int,
    tokenizer: Path,
    options: EncodeOptions,
) -> Generator[int, None, None]:
    """Encode `units` into `directory`, but for those numbered in `done`; yields each unit's number, in order, once its
    file is there. With one worker it is this process, else others, which are at most two units each ahead.

    Raises:
        StoppedError: a worker was killed.
        OSError: a unit cannot be written.
    """
    if workers == 1:
        encoder = Encoder(tokenizer, options)
        for unit in units:
            if unit.number not in done:
                save_unit(directory, unit, encoder.encode_batch(unit.records))
            yield unit.number
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_start, initargs=(directory, tokenizer, options)) as pool:
        waiting: deque[tuple[int, Future[None] | None]] = deque()

        def oldest() -> int:
            number, future = waiting.popleft()
            if future is not None:
                future.result()
            return number

        try:
            for unit in units:
                waiting.append((unit.number, None if unit.number in done else pool.submit(_encode, unit)))
                if len(waiting) > 2 * workers:
                    yield oldest()
            while waiting:
                yield oldest()
        except BrokenProcessPool:
            raise StoppedError(
                "a tokenising process was killed, most likely for lack of memory: lower --workers and start the command "
                "again; it goes on where it was"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_encoder: Encoder | None = None
_directory = Path()


def _start(directory: Path, tokenizer: Path, options: EncodeOptions) -> None:
    """Give this process its encoder; run once in every worker."""
    global _encoder, _directory
    _encoder, _directory = Encoder(tokenizer, options), directory
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # A worker holds both ends of the pipe that it gets work from, so it would wait for ever if its parent were killed.
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _encode(unit: Unit) -> None:
    assert _encoder is not None
    save_unit(_directory, unit, _encoder.encode_batch(unit.records))
