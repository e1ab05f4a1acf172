"""Runs on a real SLURM: several nodes, preemption, dead nodes, stuck ranks, full disks."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import run_distributed
from tests.launch.slurm import ROOT, Cluster, Job, write_config
from tests.train.jobs import train_job
from tests.train.tiny import SEQ_LEN, read_metrics, tiny_tree

pytestmark = [pytest.mark.slurm, pytest.mark.xdist_group("slurm"), pytest.mark.timeout(600)]

WHOLE = bool(os.environ.get("TITANS_CLUSTER"))
"""All ten preemptions, rather than one of each kind."""


def tree(dataset: Path, folder: Path, steps: int, **overrides: Any) -> dict[str, dict[str, Any]]:
    settings: dict[str, Any] = {
        "model__variant": "mag",
        "model__num_layers": 1,
        "schedule__tokens": steps * 8 * SEQ_LEN,
        "checkpoint__interval": 20,
        "cluster__nodes": 2,
        "cluster__gpus_per_node": 0,
        "cluster__processes_per_node": 1,
        "cluster__cpus_per_process": 1,
        "cluster__time": "10",
        "cluster__sbatch": "--mem=3000",
        "faults__grace_seconds": 20,
    }
    return tiny_tree(dataset, folder, **{**settings, **overrides})


def assert_equals_unbroken(job: Job, config: dict[str, dict[str, Any]], folder: Path, ranks: int = 2) -> None:
    """The losses are those of one machine that was never disturbed, and every step is there once."""
    whole = {**config, "run": {**config["run"], "name": "unbroken", "dir": str(folder)}}
    assert run_distributed(train_job, ranks, whole) == [None] * ranks
    own, expected = job.rows(), [row for row in read_metrics(folder / "unbroken") if "loss" in row]
    assert [row["step"] for row in own] == [row["step"] for row in expected]
    for mine, other in zip(own, expected, strict=True):
        for key in ("loss", "grad_norm", "tokens"):
            assert mine[key] == other[key], (mine["step"], key)


def test_the_demo_config_on_two_nodes_is_one_machine(cluster: Cluster, dataset: Path, tmp_path: Path) -> None:
    """By `sbatch launch/slurm.sbatch` itself, two ranks on each node."""
    words = [f"data.path={dataset}", f"run.dir={tmp_path}", "run.name=demo", "run.device=cpu", "model.num_layers=2"]
    words += ["schedule.tokens=8192", "data.seq_len=256", "data.batch_tokens=2048", "cluster.gpus_per_node=0"]
    words += ["cluster.processes_per_node=2", "eval.interval=0", "eval.tokens=256"]
    said = cluster.run(
        "sbatch",
        "--parsable",
        "-N2",
        "-c2",
        f"--output={tmp_path}/slurm-%j.log",
        "launch/slurm.sbatch",
        "configs/demo.yaml",
        *words,
    )
    job = Job(cluster, int(said), tmp_path / "demo")
    job.wait("the run folder", lambda: (job.run / "launch" / "env.sh").exists() or job.state == "FAILED", 60)
    assert job.wait_for_end() == "COMPLETED", (tmp_path / f"slurm-{job.number}.log").read_text()
    log = (job.run / "log" / "rank_0.txt").read_text()
    assert "torchrun: rank 0 of 4" in log
    hosts = {json.loads(path.read_text())["host"] for path in (job.run / "heartbeat").iterdir()}
    assert hosts == {"node0", "node1"}
    from titans_pretrain.config import config_to_dict, load_config

    assert_equals_unbroken(job, config_to_dict(load_config(ROOT / "configs" / "demo.yaml", words)), tmp_path / "one", 4)


def signal_batch(job: Job) -> None:
    """What SLURM does when the time limit or a preemption is near."""
    job.cluster.run("scancel", "--batch", "--signal=USR2", str(job.number))


def requeue(job: Job) -> None:
    """An administrator's: SIGTERM, and SIGKILL after KillWait."""
    job.cluster.run("scontrol", "requeue", str(job.number))


def term_ranks(job: Job) -> None:
    """SIGTERM to the job's step, in the middle of whatever it does."""
    job.cluster.run("scancel", "--signal=TERM", f"{job.number}.0")


def outrank(job: Job) -> None:
    """A job of a better partition takes the nodes for a second."""
    job.cluster.run("sbatch", "-p", "high", "-N3", "-c8", "-o", "/dev/null", "--wrap", "sleep 1")


def test_preempted_again_and_again_it_is_the_unbroken_run(cluster: Cluster, dataset: Path, tmp_path: Path) -> None:
    ways = [signal_batch, requeue, outrank, term_ranks]
    ways = [ways[n % 4] for n in range(10)] if WHOLE else ways
    config = tree(dataset, tmp_path, 40 + 30 * len(ways))
    job = cluster.submit(write_config(tmp_path, config))
    for life, way in enumerate(ways):
        done = job.rows()[-1]["step"] if life else 0
        job.wait_for_step(done + 5)
        way(job)
        job.wait(f"life {life + 1} after {way.__name__}", lambda life=life: job.lives > life)
    assert job.wait_for_end() == "COMPLETED", job.log()[-4000:]
    assert job.lives == len(ways)
    assert_equals_unbroken(job, config, tmp_path / "one")
    assert f"life {len(ways)}, attempt 0" in (job.run / "log" / "rank_0.txt").read_text()
    preempted = [json.loads(line) for line in (job.run / "faults.jsonl").read_text().splitlines()]
    assert {row["kind"] for row in preempted} <= {"preempted"}
    # Submitted again, a finished run ends at once; the job of a finished run, requeued, too.
    cluster.run("scontrol", "requeue", str(job.number))
    job.wait("the finished run's end", lambda: job.lives > len(ways))
    assert job.wait_for_end(60) == "COMPLETED"
    assert "is finished: nothing to do" in job.log()


@pytest.mark.skipif(not WHOLE, reason="two minutes; TITANS_CLUSTER=1 runs it")
def test_the_time_limit_is_one_more_preemption(cluster: Cluster, dataset: Path, tmp_path: Path) -> None:
    """SLURM sends the signal that announces the limit, some time before it is due."""
    config = tree(dataset, tmp_path, 1000, cluster__time="2", faults__grace_seconds=90)
    job = cluster.submit(write_config(tmp_path, config))
    job.wait("a second life", lambda: job.lives >= 1, 150)
    assert job.wait_for_end(400) == "COMPLETED", job.log()[-4000:]
    assert "SIGUSR2: the ranks are told to save" in job.log()
    assert_equals_unbroken(job, config, tmp_path / "one")


def test_a_dead_node_costs_one_life(cluster: Cluster, dataset: Path, tmp_path: Path) -> None:
    config = tree(dataset, tmp_path, 150, cluster__attempts=1)
    job = cluster.submit(write_config(tmp_path, config))
    job.wait_for_step(25)
    dead = job.facts()["NodeList"]
    host = json.loads((job.run / "heartbeat" / "rank_00001.json").read_text())["host"]
    cluster.run("bash", str(ROOT / "tests" / "launch" / "cluster.sh"), "kill-node", host.removeprefix("node"))
    try:
        job.wait("another life", lambda: job.lives == 1)
        assert job.wait_for_end() == "COMPLETED", job.log()[-4000:]
        assert job.facts()["NodeList"] != dead
        assert_equals_unbroken(job, config, tmp_path / "one")
        fault = json.loads((job.run / "faults.jsonl").read_text().splitlines()[0])
        assert (fault["kind"], fault["rank"], fault["host"]) == ("rank_lost", 1, host)
    finally:
        cluster.run("bash", str(ROOT / "tests" / "launch" / "cluster.sh"), "start-node", host.removeprefix("node"))
        cluster.run("scontrol", "update", f"nodename={host}", "state=resume", check=False)


def test_a_stuck_rank_is_named_and_the_job_goes_on(cluster: Cluster, dataset: Path, tmp_path: Path) -> None:
    stall = 5
    config = tree(dataset, tmp_path, 120, faults__stall_seconds=stall, cluster__attempts=2)
    job = cluster.submit(write_config(tmp_path, config))
    job.wait_for_step(25)
    beat = json.loads((job.run / "heartbeat" / "rank_00001.json").read_text())
    stuck = [
        p for p in pids_of(job.run) if "RANK=1" in environment_of(p) and f"TITANS_RUN={job.run}" in environment_of(p)
    ]
    assert len(stuck) == 1
    os.kill(stuck[0], signal.SIGSTOP)
    began = time.time()
    fault = job.wait(
        "the report",
        lambda: (file := job.run / "faults.jsonl").exists() and json.loads(file.read_text().splitlines()[0]),
    )
    assert (fault["kind"], fault["rank"], fault["host"]) == ("hang", 1, beat["host"])
    assert stall < fault["time"] - began < stall + 8
    assert "loop.py" in (job.run / "stacks" / "rank_00000.txt").read_text()
    assert job.wait_for_end(180) == "COMPLETED", job.log()[-4000:]
    assert re.search(rf"error: nothing moved for \d+ s .*: rank 1 on {beat['host']} does not run", job.log())
    assert "attempt 1" in job.log()
    assert job.lives == 0
    assert_equals_unbroken(job, config, tmp_path / "one")
    assert cluster.processes(job.run) == []


def test_a_full_disk_and_then_room_again(cluster: Cluster, dataset: Path, tmp_path: Path) -> None:
    config = tree(dataset, cluster.small, 100, run__name="full", cluster__attempts=1, model__num_layers=3)
    job = cluster.submit(write_config(tmp_path, config))
    job.wait("a checkpoint", lambda: list(job.run.glob("checkpoints/step_????????")))
    room = os.statvfs(cluster.small).f_bavail * os.statvfs(cluster.small).f_frsize
    (cluster.small / "ballast").write_bytes(b"\0" * (room - (1 << 18)))  # metrics and logs still have some
    assert job.wait_for_end() == "FAILED"
    assert "error: cannot save checkpoint" in job.log()
    assert "earlier checkpoint" in job.log()
    (cluster.small / "ballast").unlink()
    again = cluster.submit(write_config(tmp_path, config))
    assert again.wait_for_end() == "COMPLETED", again.log()[-4000:]
    assert_equals_unbroken(again, config, tmp_path / "one")


def pids_of(run: Path) -> list[int]:
    return [
        int(path.name)
        for path in Path("/proc").iterdir()
        if path.name.isdigit() and "titans_pretrain.train" in command_of(path)
    ]


def command_of(path: Path) -> str:
    try:
        return (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def environment_of(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []
