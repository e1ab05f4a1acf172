"""Who encodes the units? Processes that each write what they encoded, so that nothing large comes back."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import threading
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from pathlib import Path

from titans_pretrain.errors import UserError
from tokenizer.encode import EncodeOptions, Encoder
from tokenizer.units import Unit, save_unit


class StoppedError(UserError):
    """A build that ended for a reason that lies outside of its input; the units that are done stay."""


@contextlib.contextmanager
def encoded_units(
    units: Iterable[Unit],
    directory: Path,
    done: Collection[int],
    *,
    workers: int,
    tokenizer: Path,
    options: EncodeOptions,
) -> Iterator[Iterator[int]]:
    """Encode `units` into `directory`, but for those numbered in `done`. Gives an iterator over the units' numbers, in
    order, each when its file is there.

    With one worker that is this process, at the iterator's pace. Otherwise others begin at once and do not wait for
    whoever iterates: what they encode lies on disk, so only the text that waits for them is bounded, two units each.

    Raises:
        StoppedError: a worker was killed.
        UserError: as `units` does.
        OSError: a unit cannot be written.
    """
    if workers == 1:
        yield _encode_here(units, directory, done, Encoder(tokenizer, options))
        return
    context = multiprocessing.get_context("spawn")
    ahead: queue.SimpleQueue[tuple[int, Future[None] | None] | BaseException | None] = queue.SimpleQueue()
    room, stop = threading.Semaphore(2 * workers), threading.Event()
    pool = ProcessPoolExecutor(workers, context, initializer=_start, initargs=(directory, tokenizer, options))
    feeder = threading.Thread(target=_feed, args=(units, done, pool, room, stop, ahead), daemon=True)
    feeder.start()
    try:
        yield _finished(ahead)
    except BrokenProcessPool:
        raise StoppedError(
            "a tokenising process was killed, most likely for lack of memory: lower --workers and start the command again; "
            "it goes on where it was"
        ) from None
    finally:
        stop.set()
        room.release()
        feeder.join()
        pool.shutdown(wait=True, cancel_futures=True)


def _encode_here(units: Iterable[Unit], directory: Path, done: Collection[int], encoder: Encoder) -> Iterator[int]:
    for unit in units:
        if unit.number not in done:
            save_unit(directory, unit, encoder.encode_batch(unit.records))
        yield unit.number


def _feed(
    units: Iterable[Unit],
    done: Collection[int],
    pool: ProcessPoolExecutor,
    room: threading.Semaphore,
    stop: threading.Event,
    ahead: queue.SimpleQueue[tuple[int, Future[None] | None] | BaseException | None],
) -> None:
    try:
        for unit in units:
            future = None
            if unit.number not in done:
                room.acquire()
            if stop.is_set():
                return
            if unit.number not in done:
                future = pool.submit(_encode, unit)
                future.add_done_callback(lambda _: room.release())
            ahead.put((unit.number, future))
        ahead.put(None)
    except BaseException as error:  # whatever it is, whoever iterates must not wait for ever
        ahead.put(error)


def _finished(ahead: queue.SimpleQueue[tuple[int, Future[None] | None] | BaseException | None]) -> Iterator[int]:
    while (item := ahead.get()) is not None:
        if isinstance(item, BaseException):
            raise item
        number, future = item
        if future is not None:
            future.result()
        yield number


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
