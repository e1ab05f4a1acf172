"""When does a run stop before its end, and how does the next life know? Signals, and marker files in the run folder.

    DONE        the run has reached its last step and saved: a start finds nothing to do
    PREEMPTED   a signal led to a save: whoever launched it should start it again
    FAILED      a launcher gave the run up: in words, when and why
    STOP        put there by a person (`touch RUN/STOP`): the run saves and ends, and does not start while it is there

The files are the way to tell a launcher, because torchrun does not hand on exit codes. Nothing here needs torch.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

DONE, STOP, PREEMPTED, FAILED, FAULTS = "DONE", "STOP", "PREEMPTED", "FAILED", "faults.jsonl"
SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)
SAME_SECONDS = 3.0
"""Signals this close together are one: SLURM signals a step and its batch shell, and torchrun hands on what it gets."""
STOP_FILE = 1000
"""As a reason to stop, beside signal numbers."""


class Interruption:
    """Has someone asked this process to stop? The first signal sets a flag; SIGTERM or SIGINT again, later, ends at once."""

    def __init__(self) -> None:
        self.signal = 0
        """Number of the first signal; 0: none."""
        self._since = 0.0

    def listen(self) -> Interruption:
        """Install the handlers. Only the main thread can."""
        for number in SIGNALS:
            signal.signal(number, self._hear)
        return self

    def _hear(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.signal:
            self.signal, self._since = number, now
        elif now - self._since > SAME_SECONDS and number != signal.SIGUSR2:
            os._exit(128 + number)

    def reason(self, run_dir: Path, first: bool) -> int:
        """What this rank knows: a signal's number, STOP_FILE (asked of the first rank only), or 0."""
        if self.signal:
            return self.signal
        return STOP_FILE if first and (run_dir / STOP).exists() else 0


def reason_text(reason: int) -> str:
    """`reason` in words."""
    return f"the file {STOP}" if reason == STOP_FILE else signal.Signals(reason).name


def life() -> int:
    """How many times the job was requeued before; 0 in its first life."""
    return _number(os.environ.get("TITANS_LIFE") or os.environ.get("SLURM_RESTART_COUNT"))


def attempt() -> int:
    """How many times the launcher started the ranks anew in this life."""
    return _number(os.environ.get("TITANS_ATTEMPT"))


def _number(text: str | None) -> int:
    return int(text) if text and text.isdigit() else 0


# ----------------------------------------------------------------------------------------------------------------- markers


def finished(run_dir: Path, tokens: int) -> str | None:
    """The sentence for a run that has nothing left to do: it is done with at least `tokens` (schedule.tokens)."""
    done = read_marker(run_dir, DONE)
    if done is None or done.get("schedule_tokens", 0) < tokens:
        return None
    return (
        f"{run_dir} is finished: step {done.get('step')}, {done.get('tokens', 0):,} tokens; raise schedule.tokens to go on, or "
        "choose another run.name"
    )


def read_marker(run_dir: Path, name: str) -> dict[str, Any] | None:
    """What a marker file says, {} if it says nothing that can be read, None if it is not there."""
    try:
        content = json.loads((run_dir / name).read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def write_marker(run_dir: Path, name: str, **facts: Any) -> None:
    """Write a marker file whole and durably."""
    path = run_dir / (name + ".tmp")
    with open(path, "w") as file:
        json.dump({**facts, "life": life(), "attempt": attempt(), "time": time.time()}, file)
        file.flush()
        os.fsync(file.fileno())
    path.rename(run_dir / name)


def clear_markers(run_dir: Path) -> None:
    """A run that starts is neither done nor preempted."""
    for name in (DONE, PREEMPTED):
        (run_dir / name).unlink(missing_ok=True)


def record_fault(run_dir: Path, kind: str, **facts: Any) -> None:
    """Append one line to faults.jsonl: what happened, for people and tools/status.py. Never raises: it must not be the reason
    that a run ends."""
    row: Mapping[str, Any] = {"time": time.time(), "life": life(), "attempt": attempt(), "kind": kind, **facts}
    try:
        with open(run_dir / FAULTS, "a") as file:
            file.write(json.dumps(row) + "\n")
    except OSError as error:
        print(f"warning: cannot write {run_dir / FAULTS}: {error}", file=sys.stderr)


# ----------------------------------------------------------------------------------------------------------------- parents


def die_with_parent() -> None:
    """Let the kernel kill this process when the one that started it dies. Linux only; elsewhere nothing happens.

    A rank whose torchrun agent was killed would train on alone, beside the next life.
    """
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # it died before we asked
        os._exit(1)
