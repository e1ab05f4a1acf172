"""How do many requests share one model? One thread runs it; whatever is being written goes through it together.

Between two tokens of a batch, requests join and leave it (continuous batching), and a long prompt is read a piece at a time
so that the others do not wait for all of it. A session keeps what a model has read and written under a name, for a later
request to go on from.
"""

from __future__ import annotations

import sys
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from titans_pretrain.data.tokenizer import Tokenizer
from titans_pretrain.errors import UserError
from titans_pretrain.inference.generate import Decoding, Reading, Row, read
from titans_pretrain.inference.text import TextWriter, prompt_ids
from titans_pretrain.model.titans import Titans

FORGOTTEN = 10_000
"""Ids of dropped sessions that are remembered, to tell a client that its session is gone rather than begin it anew."""


class Busy(Exception):
    """More requests are waiting than allowed."""


class SessionError(Exception):
    """A session that cannot be used: dropped, or in use by another request."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code


class Text(NamedTuple):
    """Part of a job's text, sure to be shown."""

    text: str


class End(NamedTuple):
    """A job's last event."""

    reason: str
    """"stop" (end of text, or a stop string) or "length"."""
    prompt_tokens: int
    written: int
    session_tokens: int
    """Tokens that its session has read and written in all; 0 without one."""


class Failure(NamedTuple):
    """A job's last event where it went wrong."""

    message: str


@dataclass(eq=False)
class Job:
    """A text to be continued.

    Args:
        prompt: text, or token ids that are taken as they are (behind a session's, or else behind nothing).
        stop: texts at whose first appearance writing ends.
        session: id of the session to go on from and to keep; "": none.
        emit: called in the model's thread with `Text`, and at last with `End` or `Failure`; never after `cancel`.
    """

    prompt: str | Sequence[int]
    row: Row
    emit: Callable[[Text | End | Failure], None]
    stop: tuple[str, ...] = ()
    session: str = ""
    cancelled: threading.Event = field(default_factory=threading.Event)
    reading: Reading | None = None
    ids: list[int] = field(default_factory=list)
    done: int = 0
    """How many of `ids`, the prompt's tokens, have been read."""
    writer: TextWriter | None = None

    def cancel(self) -> None:
        """Nobody waits for it any more. Its session stays as it was."""
        self.cancelled.set()


class Sessions:
    """What was read, by session id; the one used longest ago is dropped where there are more than `bound`."""

    def __init__(self, bound: int) -> None:
        self.bound = bound
        self._kept: OrderedDict[str, Reading] = OrderedDict()
        self._used: set[str] = set()
        self._dropped: OrderedDict[str, None] = OrderedDict()
        self._lock = threading.Lock()

    def take(self, name: str) -> Reading | None:
        """What the session has read, None for a new one; it is in use until `give_back`.

        Raises:
            SessionError: it is in use, was dropped, or there are to be none.
        """
        with self._lock:
            if self.bound == 0:
                raise SessionError("this server keeps no sessions: it was started with --max-sessions 0", "no_sessions")
            if name in self._used:
                raise SessionError(f"session {name!r} is in use by another request; wait for its end", "session_in_use")
            if name in self._dropped:
                raise SessionError(
                    f"session {name!r} was dropped: the server keeps {self.bound}, and others were used after it; begin "
                    "with a new id, or delete this one first",
                    "session_dropped",
                )
            self._used.add(name)
            return self._kept.get(name)

    def give_back(self, name: str, reading: Reading | None) -> None:
        """The request is over. None: the session stays as it was."""
        with self._lock:
            self._used.discard(name)
            if reading is not None:
                self._kept[name] = reading
                self._kept.move_to_end(name)
            idle = [kept for kept in self._kept if kept not in self._used]
            for old in idle[: max(0, len(self._kept) - self.bound)]:
                del self._kept[old]
                self._dropped[old] = None
                print(f"session {old!r} dropped: --max-sessions is {self.bound}", file=sys.stderr, flush=True)
            while len(self._dropped) > FORGOTTEN:
                self._dropped.popitem(last=False)

    def delete(self, name: str) -> bool:
        """Forget a session -> whether there was one.

        Raises:
            SessionError: it is in use.
        """
        with self._lock:
            if name in self._used:
                raise SessionError(f"session {name!r} is in use by another request; wait for its end", "session_in_use")
            known = name in self._kept or name in self._dropped
            self._kept.pop(name, None)
            self._dropped.pop(name, None)
            return known

    def __len__(self) -> int:
        return len(self._kept)


class Worker:
    """The thread that has the model.

    Args:
        batch: texts written together; others wait for their turn.
        waiting: jobs that may wait; `submit` refuses more.
        piece: tokens of a prompt that are read between two tokens of the others.
        sessions: states kept between requests.
    """

    def __init__(
        self, model: Titans, tokenizer: Tokenizer, *, batch: int, waiting: int, piece: int, sessions: Sessions
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.sessions = sessions
        self._batch = batch
        self._waiting_bound = waiting
        self._piece = piece
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._stop = False
        self._reading: deque[Job] = deque()
        self._writing: dict[int, Job] = {}
        self._decoding = Decoding(model)
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Let these be written.

        Raises:
            Busy: too many are waiting.
            SessionError: a job's session cannot be used.
            UserError: a prompt is not valid Unicode, or empty ids at the beginning.
        """
        taken: list[Job] = []
        try:
            for job in jobs:
                if job.session:
                    job.reading = self.sessions.take(job.session)
                    taken.append(job)
                start = job.reading
                ids = prompt_ids(self.tokenizer, job.prompt, start) if isinstance(job.prompt, str) else list(job.prompt)
                if start is None and not ids:
                    raise UserError("a prompt needs at least one token")
                job.ids = ids
                context = (*(() if start is None else start.recent[0]), *ids)
                job.writer = TextWriter(self.tokenizer, context, job.stop)
            with self._changed:
                if len(self._waiting) + len(jobs) > self._waiting_bound:
                    raise Busy(f"{len(self._waiting)} requests are waiting; try again later")
                self._waiting += jobs
                self._changed.notify()
        except BaseException:
            for job in taken:
                self.sessions.give_back(job.session, None)
            raise

    def close(self) -> None:
        """End the thread; what is being written is left."""
        with self._changed:
            self._stop = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._stop or self._waiting or self._reading or self._writing):
                    self._changed.wait()
                if self._stop:
                    return
                while self._waiting and len(self._reading) + len(self._writing) < self._batch:
                    self._reading.append(self._waiting.popleft())
            try:
                self._read_some()
                self._write_some()
            except Exception as error:  # a model that gives NaN, or no memory left: the server goes on
                self._fail(error)

    def _read_some(self) -> None:
        if not self._reading:
            return
        job = self._reading[0]
        if job.cancelled.is_set():
            self._reading.popleft()
            self._release(job, None)
            return
        if job.ids:
            job.reading = read(self.model, [job.ids[job.done : job.done + self._piece]], job.reading)
            job.done += self._piece
        if job.done >= len(job.ids):
            assert job.reading is not None
            self._decoding.add([job.row], job.reading)
            job.reading = None
            self._reading.popleft()
            self._writing[id(job.row)] = job

    def _write_some(self) -> None:
        self._leave()
        if not self._writing:
            return
        for row, token in self._decoding.step():
            job = self._writing[id(row)]
            assert job.writer is not None
            if token is not None:
                text = job.writer.push(token)
                if text:
                    job.emit(Text(text))
            if job.writer.stopped:
                row.ended = "stop"
        self._leave()

    def _leave(self) -> None:
        """Jobs that have ended, or that nobody waits for, go."""
        gone = [job for job in self._writing.values() if job.row.ended or job.cancelled.is_set()]
        for job in gone:
            assert job.writer is not None
            reading = None
            if job.session and not job.cancelled.is_set():
                reading = self._decoding.reading_of(job.row)
            self._release(job, reading)
            if not job.cancelled.is_set():
                text = job.writer.finish()
                if text:
                    job.emit(Text(text))
                reason = "length" if job.row.ended == "length" and not job.writer.stopped else "stop"
                tokens = 0 if reading is None else reading.state.position
                job.emit(End(reason, len(job.ids), job.row.written, tokens))
            del self._writing[id(job.row)]
        if gone:
            self._decoding.take_out([job.row for job in gone])

    def _release(self, job: Job, reading: Reading | None) -> None:
        if job.session:
            self.sessions.give_back(job.session, reading)

    def _fail(self, error: Exception) -> None:
        """All that was under way ends with `error`: what the model holds of it cannot be trusted."""
        print(f"error while writing: {error!r}", file=sys.stderr, flush=True)
        message = str(error) if isinstance(error, UserError) else f"the model could not go on: {type(error).__name__}"
        for job in (*self._reading, *self._writing.values()):
            self._release(job, None)
            job.emit(Failure(message))
        self._reading.clear()
        self._writing.clear()
        self._decoding = Decoding(self.model)
