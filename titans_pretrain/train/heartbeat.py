"""Where is every rank, and since when? A small file per rank, rewritten as it goes; a thread that sees when nothing moves.

RUN/heartbeat/rank_00000.json has rank, host, pid, step, phase, since (when the phase began), time (when it was written). The
thread keeps writing while the main thread waits, so a file that is old means that the process is gone or stopped; one that is
fresh with an old `since` means that the rank waits or hangs. That difference is what names the culprit.
"""

from __future__ import annotations

import faulthandler
import json
import os
import re
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from titans_pretrain.errors import UserError
from titans_pretrain.train.lifecycle import attempt, life, record_fault

FOLDER = "heartbeat"
STACKS = "stacks"
BEAT_SECONDS = 1.0
"""Between two writings of a file; a file older than a few of these is that of a process that does not run."""
LONG_PHASES = ("start", "evaluate", "save")
"""Phases that may take long and have a limit of their own: in "start" models are built and programs compiled."""
HUNG = 75
"""Exit code of a rank that ended itself because nothing moved (EX_TEMPFAIL)."""


FAILED = "failed"
"""How a rank ends that met an error of its own."""
OVER = ("ended", "refused", "lost a peer", FAILED)
"""How the phase of a rank that is not there any more begins."""
BUSY_SECONDS = 30.0
"""From a file alone: a rank whose heartbeat is older does not run. Long, since two hosts' clocks may differ."""
_OF_A_COLLECTIVE = r"gloo|nccl|connection|peer|socket|store|rendezvous|broken pipe|timed out|aborted"


class LostRank(UserError):
    """Another rank is gone, and this one can only end.

    Attributes:
        speaks: whether this rank is the one to say so, of those that are left.
    """

    def __init__(self, sentence: str, speaks: bool) -> None:
        super().__init__(sentence)
        self.speaks = speaks


class Heartbeat:
    """This rank's file and its watchdog.

    Args:
        run_dir: of the run; shared by all ranks.
        rank, world_size: of this process.
        stall_seconds: longest time in one phase of a step before the rank dumps its stacks and ends. 0: no watchdog.
        long_seconds: the same for LONG_PHASES and for the first step.
        on_stall: called in the watchdog's thread with the sentence; ends the process. For tests.
    """

    def __init__(
        self,
        run_dir: Path,
        rank: int,
        world_size: int,
        stall_seconds: float,
        long_seconds: float,
        on_stall: Callable[[str], Any] | None = None,
    ) -> None:
        self._run_dir, self._rank, self._world_size = run_dir, rank, world_size
        self._stall, self._long = stall_seconds, long_seconds
        self._on_stall = on_stall or _end
        self._place = (0, "start", time.time())
        self._first_step: int | None = None
        self._step_seconds = 0.0
        self._path = path_of(run_dir, rank)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to beat. The run folder must be there.

        Raises:
            OSError: its folder cannot be made.
        """
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._place = (0, "start", time.time())
        self._write()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def phase(self, name: str, step: int) -> None:
        """This rank begins `name` of optimizer step `step`. Costs nothing: the thread writes."""
        before, _, since = self._place
        now = time.time()
        if before != step:
            if self._first_step is None:
                self._first_step = step
            self._step_seconds = now - since
        self._place = (step, name, now)

    def close(self, ending: str) -> None:
        """Write a last time, saying how the rank ended. May be called again, and without a start."""
        if self._thread is None:
            return
        self._stop.set()
        self._thread.join()
        self._thread = None
        step, name, _ = self._place
        self._place = (step, f"{ending} in {name}" if ending == FAILED else ending, time.time())
        self._write()

    def lost(self, error: Exception) -> LostRank | None:
        """Whether `error` is what a dead peer leaves behind in a collective: then who that was, else None. May take seconds,
        until a peer that is gone shows by its silence."""
        if self._thread is None or not re.search(_OF_A_COLLECTIVE, str(error), re.IGNORECASE):
            return None
        deadline = time.monotonic() + 6 * BEAT_SECONDS
        while True:
            beats = read_beats(self._run_dir, self._world_size)
            gone = [rank for rank in gone_ranks(beats) if rank != self._rank]
            if gone:
                break
            if time.monotonic() > deadline:
                return None
            time.sleep(BEAT_SECONDS / 4)
        step, name, _ = self._place
        sentence = f"{describe(beats, gone)}; rank {self._rank} was in {name} of step {step}"
        speaks = self._rank == min(set(beats) - set(gone))
        if speaks:
            for rank in gone:
                beat = beats[rank] or {}
                where = {key: beat.get(key) for key in ("host", "step", "phase")}
                record_fault(self._run_dir, "rank_lost", rank=rank, **where, text=sentence)
        return LostRank(sentence, speaks)

    def _run(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            self._write()
            step, name, since = self._place
            slow = name in LONG_PHASES or step == self._first_step
            limit = self._long if slow else self._stall
            if limit and time.time() - since > limit:
                self._stalled(step, name, time.time() - since, limit, slow)

    def _write(self) -> None:
        step, name, since = self._place
        row = {
            "rank": self._rank,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "step": step,
            "phase": name,
            "since": since,
            "time": time.time(),
            "life": life(),
            "attempt": attempt(),
        }
        fresh = self._path.with_suffix(".tmp")
        try:
            fresh.write_text(json.dumps(row))
            fresh.replace(self._path)
        except OSError:  # a full disk must not end a run that could go on
            fresh.unlink(missing_ok=True)

    def _stalled(self, step: int, name: str, seconds: float, limit: float, slow: bool) -> None:
        stacks = self._run_dir / STACKS / f"rank_{self._rank:05d}.txt"
        stacks.parent.mkdir(exist_ok=True)
        with open(stacks, "a") as file:
            file.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} rank {self._rank} in {name} of step {step}\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        beats = read_beats(self._run_dir, self._world_size)
        behind = culprits(beats)
        key = "faults.long_seconds" if slow else "faults.stall_seconds"
        sentence = (
            f"nothing moved for {seconds:.0f} s ({key} is {limit:g}): {describe(beats, behind)}; rank {self._rank} waits in "
            f"{name} of step {step}, its stacks are in {stacks}"
        )
        # One rank speaks: the first of those that can.
        speakers = [rank for rank, beat in beats.items() if beat is not None and is_fresh(beat)]
        if not speakers or min(speakers) == self._rank:
            for rank in behind:
                beat = beats[rank] or {}
                record_fault(
                    self._run_dir,
                    "hang",
                    rank=rank,
                    host=beat.get("host"),
                    step=beat.get("step"),
                    phase=beat.get("phase"),
                    text=sentence,
                )
            print(f"error: {sentence}\n{table(beats)}", file=sys.stderr, flush=True)
        else:
            time.sleep(2 * BEAT_SECONDS)  # a launcher ends all ranks at the first exit
        self._on_stall(sentence)


def _end(sentence: str) -> None:
    os._exit(HUNG)


# ----------------------------------------------------------------------------------------------------------------- reading


def path_of(run_dir: Path, rank: int) -> Path:
    """The file of `rank`."""
    return run_dir / FOLDER / f"rank_{rank:05d}.json"


def read_beats(run_dir: Path, world_size: int) -> dict[int, dict[str, Any] | None]:
    """Every rank's last heartbeat of this life and attempt; None for a rank that has none."""
    beats: dict[int, dict[str, Any] | None] = {}
    for rank in range(world_size):
        try:
            beat = json.loads(path_of(run_dir, rank).read_text())
        except (OSError, ValueError):
            beat = None
        mine = beat is not None and (beat["life"], beat["attempt"]) == (life(), attempt())
        beats[rank] = beat if mine else None
    return beats


def busy_rank(run_dir: Path) -> dict[str, Any] | None:
    """The heartbeat of a rank that trains in `run_dir` now, of any life; None: nobody does."""
    for file in (run_dir / FOLDER).glob("rank_*.json"):
        try:
            beat = json.loads(file.read_text())
        except (OSError, ValueError):
            continue
        here = beat["host"] != socket.gethostname() or _is_running(beat["pid"])
        if here and time.time() - beat["time"] < BUSY_SECONDS and not beat["phase"].startswith(OVER):
            return beat
    return None


def is_fresh(beat: Mapping[str, Any]) -> bool:
    """Whether the process that wrote it runs: it wrote lately, and, on this host, is there."""
    if time.time() - beat["time"] > 4 * BEAT_SECONDS:
        return False
    return beat["host"] != socket.gethostname() or _is_running(beat["pid"])


def _is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (OSError, IndexError):
        return not Path("/proc/self").exists()
    return state not in "ZXT"


def gone_ranks(beats: Mapping[int, Mapping[str, Any] | None]) -> list[int]:
    """The ranks that do not run or have failed: first those that failed by an error of their own, if there are any."""
    failed = [rank for rank, beat in beats.items() if beat is not None and beat["phase"].startswith(FAILED)]
    return failed or [rank for rank, beat in beats.items() if beat is None or not is_fresh(beat)]


def culprits(beats: Mapping[int, Mapping[str, Any] | None]) -> list[int]:
    """The ranks the others wait for: those that do not run; else those behind in steps; else those in the rarest phase."""
    gone = gone_ranks(beats)
    if gone:
        return gone
    there = {rank: beat for rank, beat in beats.items() if beat is not None}
    least = min(beat["step"] for beat in there.values())
    if any(beat["step"] != least for beat in there.values()):
        return [rank for rank, beat in there.items() if beat["step"] == least]
    phases = Counter(beat["phase"] for beat in there.values())
    if len(phases) == 1:
        return []
    rarest = min(phases, key=lambda phase: phases[phase])
    return [rank for rank, beat in there.items() if beat["phase"] == rarest]


def describe(beats: Mapping[int, Mapping[str, Any] | None], ranks: list[int]) -> str:
    """`ranks` and where they were last, in words."""
    if not ranks:
        phases = sorted({str(beat["phase"]) for beat in beats.values() if beat})
        return f"all ranks are in {', '.join(phases)}, and none of them is behind"
    parts = []
    for rank in ranks[:8]:
        beat = beats[rank]
        if beat is None:
            parts.append(f"rank {rank} never began")
            continue
        what = "is behind" if is_fresh(beat) else "does not run"
        if beat["phase"].startswith(FAILED):
            parts.append(f"rank {rank} on {beat['host']} {beat['phase']} of step {beat['step']}")
            continue
        parts.append(
            f"rank {rank} on {beat['host']} {what}, last seen {time.time() - beat['time']:.0f} s ago in {beat['phase']} of "
            f"step {beat['step']}"
        )
    return "; ".join(parts) + (f"; and {len(ranks) - 8} more" if len(ranks) > 8 else "")


def table(beats: Mapping[int, Mapping[str, Any] | None]) -> str:
    """Where every rank is, a line each."""
    now = time.time()
    lines = ["  rank host             pid      step phase             for   seen"]
    for rank, beat in beats.items():
        if beat is None:
            lines.append(f"  {rank:>4} no heartbeat")
            continue
        lines.append(
            f"  {rank:>4} {beat['host'][:16]:<16} {beat['pid']:<8} {beat['step']:>4} {beat['phase']:<16} "
            f"{now - beat['since']:>4.0f} s {now - beat['time']:>4.0f} s ago"
        )
    return "\n".join(lines)
