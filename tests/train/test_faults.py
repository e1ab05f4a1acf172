"""Real torchrun jobs whose ranks die, hang or raise: who says what, how soon, and what is left."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import yaml

from tests.distributed import free_port
from tests.train.tiny import SEQ_LEN, read_metrics, tiny_tree

ROOT = Path(__file__).resolve().parents[2]
STALL = 4


class Job:
    """`python -m titans_pretrain.train` on two ranks under torchrun, in a session of its own."""

    def __init__(
        self, dataset: Path, folder: Path, program: Sequence[str] = ("-m", "titans_pretrain.train"), **overrides: Any
    ) -> None:
        settings = {
            "model__variant": "lmm",
            "schedule__tokens": 4000 * 8 * SEQ_LEN,
            "faults__stall_seconds": STALL,
            "checkpoint__interval": 5,
        }
        tree = tiny_tree(dataset, folder, **{**settings, **overrides})
        self.run = folder / "run"
        (folder / "config.yaml").write_text(yaml.safe_dump(tree))
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
        command += [*program, str(folder / "config.yaml")]
        environment = {
            "PYTHONPATH": str(ROOT),
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            "CUDA_VISIBLE_DEVICES": "",
        }
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def beat(self, rank: int) -> dict[str, Any]:
        return dict(json.loads((self.run / "heartbeat" / f"rank_{rank:05d}.json").read_text()))

    def wait_for_step(self, step: int) -> list[int]:
        """-> the ranks' pids, once `step` has been made."""
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline and self.process.poll() is None:
            if (self.run / "metrics.jsonl").exists() and len(read_metrics(self.run)) > step:
                return [self.beat(rank)["pid"] for rank in (0, 1)]
            time.sleep(0.05)
        self.process.kill()
        raise AssertionError(f"no step {step}: {self.process.communicate()}")

    def end(self, seconds: float) -> str:
        """Wait for the job to end by itself -> what it wrote to stderr. Leaves no process behind, and says so."""
        family = psutil.Process(self.process.pid).children(recursive=True)
        try:
            _, errors = self.process.communicate(timeout=seconds)
        finally:
            left = [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
            for process in [*left, psutil.Process(self.process.pid)] if left else []:
                process.kill()
        assert not left
        return str(errors)


def test_a_stopped_rank_is_named_with_the_stack_of_the_one_that_waits(dataset: Path, tmp_path: Path) -> None:
    job = Job(dataset, tmp_path)
    pids = job.wait_for_step(3)
    os.kill(pids[1], signal.SIGSTOP)
    began = time.time()
    errors = job.end(STALL + 60)  # torchrun waits for 30 s before it kills a process that does not hear SIGTERM
    assert job.process.returncode != 0
    said = re.findall(r"^error: .*$", errors, re.MULTILINE)
    assert len(said) == 1, errors
    assert "nothing moved for" in said[0]
    assert re.search(
        rf"rank 1 on {socket.gethostname()} does not run, last seen \d+ s ago in [a-z-]+ of step \d+", said[0]
    )
    assert re.search(r"^ +1 ", errors, re.MULTILINE), "the table of all ranks"
    stacks = (job.run / "stacks" / "rank_00000.txt").read_text()
    assert "loop.py" in stacks
    fault = json.loads((job.run / "faults.jsonl").read_text().splitlines()[-1])
    assert (fault["kind"], fault["rank"], fault["host"]) == ("hang", 1, socket.gethostname())
    assert STALL < fault["time"] - began < STALL + 6


def test_a_killed_rank_is_named_in_one_line(dataset: Path, tmp_path: Path) -> None:
    job = Job(dataset, tmp_path)
    pids = job.wait_for_step(3)
    os.kill(pids[1], signal.SIGKILL)
    errors = job.end(40)
    assert job.process.returncode != 0
    said = re.findall(r"^error: .*$", errors, re.MULTILINE)
    assert len(said) == 1, errors
    assert re.search(
        rf"rank 1 on {socket.gethostname()} does not run, last seen .* of step \d+; rank 0 was in", said[0]
    )
    assert "titans_pretrain/train/loop.py" not in errors, "no traceback of ours"


def test_sigterm_to_torchrun_saves_and_the_next_life_goes_on(dataset: Path, tmp_path: Path) -> None:
    job = Job(dataset, tmp_path, checkpoint__interval=0)
    job.wait_for_step(3)
    job.process.send_signal(signal.SIGTERM)
    job.end(60)
    marker = json.loads((job.run / "PREEMPTED").read_text())
    steps = [row["step"] for row in read_metrics(job.run) if "loss" in row]
    assert marker["signal"] == "SIGTERM"
    assert steps == list(range(1, marker["step"] + 1))
    assert (job.run / "checkpoints" / f"step_{marker['step']:08d}" / "manifest.json").exists()


def test_ranks_die_with_their_agent(dataset: Path, tmp_path: Path) -> None:
    job = Job(dataset, tmp_path)
    pids = job.wait_for_step(3)
    ranks = [psutil.Process(pid) for pid in pids]
    job.process.kill()
    _, alive = psutil.wait_procs(ranks, timeout=10)
    for process in alive:
        process.kill()
    assert not alive
    job.process.communicate()


RAISING = """
import os, sys
from titans_pretrain.train.__main__ import main
from titans_pretrain.train.engine import Engine

step, steps = Engine.step, [0]

def failing(engine, rate):
    steps[0] += 1
    if os.environ["RANK"] == "1" and steps[0] == 2:
        raise ValueError("a chip is out of tune")
    return step(engine, rate)

Engine.step = failing
main(sys.argv[1:])
"""


def test_a_rank_that_raises_shows_its_traceback_and_is_named_by_the_other(dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "raising.py").write_text(RAISING)
    job = Job(dataset, tmp_path, program=[str(tmp_path / "raising.py")])
    errors = job.end(60)
    assert errors.count("ValueError: a chip is out of tune") >= 1
    said = re.findall(r"^error: .*$", errors, re.MULTILINE)
    where = f"rank 1 on {socket.gethostname()} failed in update of step 2"
    assert said == [f"error: {where}; rank 0 was in update of step 2"]
    fault = json.loads((job.run / "faults.jsonl").read_text())
    assert (fault["kind"], fault["rank"], fault["step"], fault["phase"]) == ("rank_lost", 1, 2, "failed in update")
