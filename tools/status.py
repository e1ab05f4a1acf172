"""How is a run doing? From its folder alone, on any machine that sees it.

python tools/status.py RUN [--ranks] [--json] [--watch SECONDS]
"""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # started as a file: the packages lie beside its folder
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from titans_pretrain.config import load_config
from titans_pretrain.errors import UserError, exit_on_user_error
from titans_pretrain.train.heartbeat import BUSY_SECONDS, FOLDER, OVER, table
from titans_pretrain.train.lifecycle import DONE, FAILED, FAULTS, PREEMPTED, STOP, read_marker

SLOW_RATIO = 1.3
"""A rank whose forward passes take this many times the median rank's is worth a line."""


@exit_on_user_error
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="status.py", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder, such as runs/first")
    parser.add_argument("--ranks", action="store_true", help="where every rank is, too")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    parser.add_argument("--watch", type=float, metavar="SECONDS", help="print again and again until the run is over")
    args = parser.parse_args(arguments)
    if args.watch is not None and args.watch <= 0:
        raise UserError(f"--watch must be above 0 seconds, not {args.watch:g}")
    while True:
        found = status(args.run)
        print(json.dumps(found, indent=1) if args.json else as_text(found, args.ranks), flush=True)
        if args.watch is None or found["state"] in ("done", "dead", "stopped"):
            return
        time.sleep(args.watch)
        print()


def status(run: Path) -> dict[str, Any]:
    """What the files of `run` say.

    Raises:
        UserError: it is no run folder.
    """
    if not (run / "config.yaml").exists() and not (run / "launch").exists():
        raise UserError(f"{run} is no run folder: it has no config.yaml")
    settings = run / "config.yaml" if (run / "config.yaml").exists() else run / "launch" / "config.yaml"
    config = load_config(settings)
    rows = _lines(run / "metrics.jsonl")
    steps = [row for row in rows if "loss" in row]
    valid = [row for row in rows if "valid_loss" in row]
    beats = _beats(run)
    faults = _lines(run / FAULTS)
    checkpoints = sorted(p.name for p in (run / "checkpoints").glob("step_*") if p.name.removeprefix("step_").isdigit())
    rate = statistics.median([row["tokens_per_second"] for row in steps[-50:]]) if steps else None
    left = config.schedule.tokens - (steps[-1]["tokens"] if steps else 0)
    state, why = _state(run, beats)
    return {
        "run": str(run),
        "state": state,
        "why": why,
        "step": steps[-1]["step"] if steps else 0,
        "steps": config.num_steps,
        "tokens": steps[-1]["tokens"] if steps else 0,
        "loss": steps[-1]["loss"] if steps else None,
        "valid_loss": valid[-1]["valid_loss"] if valid else None,
        "tokens_per_second": rate,
        "slowest": {key: steps[-1].get(key) for key in ("slowest_rank", "slowest_rank_ratio")} if steps else None,
        "seconds_left": max(0.0, left / rate) if rate and state != "done" else None,
        "last_checkpoint": checkpoints[-1] if checkpoints else None,
        "lives": 1 + max((beat["life"] for beat in beats.values()), default=0),
        "attempt": max((beat["attempt"] for beat in beats.values()), default=0),
        "faults": dict(Counter(row["kind"] for row in faults)),
        "last_fault": faults[-1] if faults else None,
        "ranks": beats,
    }


def _state(run: Path, beats: dict[int, dict[str, Any]]) -> tuple[str, str]:
    """One of done, running, stuck, preempted, stopped, dead, waiting; and a reason in words."""
    if (done := read_marker(run, DONE)) is not None:
        return "done", f"reached step {done.get('step')}"
    now = time.time()
    alive = [r for r, b in beats.items() if now - b["time"] < BUSY_SECONDS and not b["phase"].startswith(OVER)]
    if alive and len(alive) == len(beats):
        return "running", f"{len(alive)} ranks"
    if alive:
        silent = ", ".join(str(rank) for rank in beats if rank not in alive)
        return "stuck", f"rank {silent} is silent, {len(alive)} others are there"
    if (run / STOP).exists():
        return "stopped", f"{run / STOP} is there"
    if (marker := read_marker(run, PREEMPTED)) is not None:
        return "preempted", f"saved at step {marker.get('step')} after {marker.get('signal')}, waits for its next life"
    if (run / FAILED).exists():
        return "dead", "its launcher gave up: all attempts failed"
    if not beats:
        return "waiting", "no rank has begun"
    newest = max(beats.values(), key=lambda beat: beat["time"])
    return (
        "dead",
        f"the last heartbeat is {now - newest['time']:,.0f} s old: rank {newest['rank']} in {newest['phase']}",
    )


def _beats(run: Path) -> dict[int, dict[str, Any]]:
    """The heartbeats of the newest start, by rank."""
    found = []
    for path in sorted((run / FOLDER).glob("rank_*.json")):
        try:
            found.append(json.loads(path.read_text()))
        except (OSError, ValueError):
            continue
    if not found:
        return {}
    newest = max((beat["life"], beat["attempt"]) for beat in found)
    return {beat["rank"]: beat for beat in found if (beat["life"], beat["attempt"]) == newest}


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return []
    rows = []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue  # the last line, being written
    return rows


def as_text(found: dict[str, Any], ranks: bool) -> str:
    """A few lines for people."""

    def known(value: Any, text: str) -> str:
        return "unknown" if value is None else text

    rate, left = found["tokens_per_second"], found["seconds_left"]
    lines = [
        f"{found['run']}: {found['state']}, {found['why']}",
        f"  step        {found['step']:,} of {found['steps']:,}, {found['tokens']:,} tokens",
        f"  loss        {known(found['loss'], '%.4f' % (found['loss'] or 0))}, "
        f"validation {known(found['valid_loss'], '%.4f' % (found['valid_loss'] or 0))}",
        f"  speed       {known(rate, f'{rate or 0:,.0f} tokens/s')}; left: {known(left, _duration(left or 0))}",
        f"  checkpoint  {found['last_checkpoint'] or 'none yet'}",
        f"  lives       {found['lives']}, attempt {found['attempt']} of this one",
    ]
    slowest = found["slowest"] or {}
    if (slowest.get("slowest_rank_ratio") or 1.0) > SLOW_RATIO:
        lines.append(
            f"  slow        rank {slowest['slowest_rank']}, {slowest['slowest_rank_ratio']:.1f} times the median"
        )
    if found["faults"]:
        lines.append("  faults      " + ", ".join(f"{kind} {count}" for kind, count in found["faults"].items()))
        lines.append(f"  the last    {found['last_fault'].get('text', '')}")
    if ranks and found["ranks"]:
        lines.append(table(found["ranks"]))
    if found["state"] == "stuck":
        hosts = {beat["host"] for beat in found["ranks"].values()}
        lines.append(f"  look on     {', '.join(sorted(hosts))} (this is {socket.gethostname()})")
    return "\n".join(lines)


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours} h {rest // 60} min" if hours else f"{rest // 60} min {rest % 60} s"


if __name__ == "__main__":
    main()
