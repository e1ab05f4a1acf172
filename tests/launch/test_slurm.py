"""Runs on a real SLURM: several nodes, preemption, dead nodes, stuck ranks, full disks."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.distributed import run_distributed
from tests.launch.slurm import ROOT, Cluster, Job, write_config
from tests.train.jobs import train_job
from tests.train.tiny import SEQ_LEN, read_metrics, tiny_tree

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]
# Two clusters, each with its tests one after another on a worker of pytest-xdist: most of their time is waiting.
on_the_first = pytest.mark.xdist_group("slurm-1")
on_the_second = pytest.mark.xdist_group("slurm-2")

WHOLE = bool(os.environ.get("TITANS_CLUSTER"))
"""All ten preemptions, rather than one of two kinds, and the tests that are left out otherwise."""
left_out = pytest.mark.skipif(not WHOLE, reason="a minute or so; TITANS_CLUSTER=1 runs it")


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
        "cluster__preflight": False,
        "faults__grace_seconds": 20,
    }
    return tiny_tree(dataset, folder, **{**settings, **overrides})


def assert_equals_unbroken(job: Job, config: dict[str, dict[str, Any]], folder: Path, ranks: int = 2) -> None:
    """The losses are those of one machine that was never disturbed, and every step is there once."""
    whole = {**config, "run": {**config["run"], "name": "unbroken", "dir": str(folder)}}
    assert run_distributed(train_job, ranks, whole, timeout=300) == [None] * ranks  # others may use the cores
    own, expected = job.rows(), [row for row in read_metrics(folder / "unbroken") if "loss" in row]
    assert [row["step"] for row in own] == [row["step"] for row in expected]
    for mine, other in zip(own, expected, strict=True):
        for key in ("loss", "grad_norm", "tokens"):
            assert mine[key] == other[key], (mine["step"], key)


@on_the_second
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


@on_the_first
def test_preempted_again_and_again_it_is_the_unbroken_run(cluster: Cluster, dataset: Path, tmp_path: Path) -> None:
    ways = [signal_batch, requeue, outrank, term_ranks]
    ways = [ways[n % 4] for n in range(10)] if WHOLE else [signal_batch, outrank]
    # Saving after every step: whatever comes, comes during a save.
    config = tree(dataset, tmp_path, 40 + 30 * len(ways), checkpoint__interval=1)
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


@on_the_first
@left_out
def test_the_time_limit_is_one_more_preemption(cluster: Cluster, dataset: Path, tmp_path: Path) -> None:
    """SLURM sends the signal that announces the limit, some time before it is due."""
    config = tree(dataset, tmp_path, 1000, cluster__time="2", faults__grace_seconds=90)
    job = cluster.submit(write_config(tmp_path, config))
    job.wait("a second life", lambda: job.lives >= 1, 150)
    assert job.wait_for_end(400) == "COMPLETED", job.log()[-4000:]
    assert "SIGUSR2: the ranks are told to save" in job.log()
    assert_equals_unbroken(job, config, tmp_path / "one")


@on_the_first
@left_out
def test_a_drained_node_is_left_and_a_cancelled_job_can_be_submitted_again(
    cluster: Cluster, dataset: Path, tmp_path: Path
) -> None:
    config = tree(dataset, tmp_path, 500)
    job = cluster.submit(write_config(tmp_path, config))
    job.wait_for_step(5)
    cluster.run("scontrol", "update", "nodename=node1", "state=drain", "reason=test")
    try:
        signal_batch(job)  # a drained node keeps its jobs until they leave
        job.wait("a life elsewhere", lambda: job.lives == 1 and job.state == "RUNNING", 60)
    finally:
        cluster.run("scontrol", "update", "nodename=node1", "state=resume")
    assert job.facts()["NodeList"] == "node[0,2]"
    done = job.rows()[-1]["step"]
    job.wait_for_step(done + 5)
    cluster.run("scancel", str(job.number))
    assert job.wait_for_end() == "CANCELLED"
    assert cluster.processes(job.run) == []
    again = cluster.submit(write_config(tmp_path, config))
    assert again.wait_for_end() == "COMPLETED", again.log()[-4000:]
    assert_equals_unbroken(again, config, tmp_path / "one")


@on_the_first
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


@on_the_second
@left_out  # tests/train/test_faults.py stops a rank where there is no SLURM
def test_a_stuck_rank_is_named_and_the_job_goes_on(cluster: Cluster, dataset: Path, tmp_path: Path) -> None:
    stall = 15  # a crowded machine may take seconds over a step
    config = tree(dataset, tmp_path, 120, faults__stall_seconds=stall, cluster__attempts=4)
    job = cluster.submit(write_config(tmp_path, config))
    job.wait_for_step(25)
    beat = json.loads((job.run / "heartbeat" / "rank_00001.json").read_text())
    stuck = [p for p in pids_of(job.run) if "RANK=1" in environment_of(p)]
    assert len(stuck) == 1
    os.kill(stuck[0], signal.SIGSTOP)
    began = time.time()
    fault = job.wait(
        "the report",
        lambda: (file := job.run / "faults.jsonl").exists() and json.loads(file.read_text().splitlines()[0]),
    )
    assert (fault["kind"], fault["rank"], fault["host"]) == ("hang", 1, beat["host"])
    assert stall < fault["time"] - began < stall + 10
    assert "loop.py" in (job.run / "stacks" / "rank_00000.txt").read_text()
    assert job.wait_for_end(180) == "COMPLETED", job.log()[-4000:]
    assert re.search(rf"error: nothing moved for \d+ s .*: rank 1 on {beat['host']} does not run", job.log())
    assert "attempt 1" in job.log()
    assert job.lives == 0
    assert_equals_unbroken(job, config, tmp_path / "one")
    assert cluster.processes(job.run) == []


@on_the_second
@left_out
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
    """The processes that train in this run folder: other tests' jobs are on this machine, too."""
    return [
        int(path.name)
        for path in Path("/proc").iterdir()
        if path.name.isdigit()
        and "titans_pretrain.train" in command_of(path)
        and f"TITANS_RUN={run}" in environment_of(int(path.name))
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


SITE = """
import os, sys, time
fault = open(os.path.dirname(__file__) + "/fault").read()
if "clock" in fault:
    now = time.time
    time.time = lambda: now() + 300
elif fault == "sum" and any("preflight" in word for word in sys.orig_argv):
    import torch.distributed as dist
    honest = dist.all_reduce
    def wrong(x, *args, **kwargs):
        answer = honest(x, *args, **kwargs)
        x.view(-1)[7] += 1
        return answer
    dist.all_reduce = wrong
"""
FAULTS = {
    "package and clock": [
        r"versions: psutil is 0\.0\.1 on {host}, \S+ elsewhere",
        r"clock: {host}'s clock is off by \+\d+\.\d s",
    ],
    "sum": [r"all-reduce: all ranks: rank 1 on {host} got a wrong sum"],
}


@on_the_second
@pytest.mark.parametrize(
    "fault", ["package and clock", pytest.param("sum", marks=left_out), pytest.param("run folder", marks=left_out)]
)
def test_preflight_finds_a_bad_node_and_the_job_goes_on_without_it(
    fault: str, cluster: Cluster, dataset: Path, tmp_path: Path
) -> None:
    """The fault is in one node's own /scratch, or, for a missing folder, in its own mounts."""
    host = "node1"
    scratch = cluster.root / "local" / host / "scratch"
    if fault == "run folder":
        (tmp_path / "run").mkdir()
        init = cluster.run("bash", "-c", f"pgrep -P $(cat {cluster.root}/run/{host}.pid)").split()[0]
        in_node = ["nsenter", f"--target={init}", "--mount"]
        cluster.run(*in_node, "mount", "-t", "tmpfs", "tmpfs", str(tmp_path / "run"))
    else:
        (scratch / "psutil-0.0.1.dist-info").mkdir(exist_ok=True)
        version = "0.0.1" if "package" in fault else __import__("importlib.metadata").metadata.version("psutil")
        (scratch / "psutil-0.0.1.dist-info" / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: psutil\nVersion: {version}\n"
        )
        (scratch / "fault").write_text(fault)
        (scratch / "sitecustomize.py").write_text(SITE)
    try:
        overrides = {"cluster__setup": "export PYTHONPATH=/scratch", "cluster__preflight": True}
        config = tree(dataset, tmp_path, 5, **overrides)
        job = cluster.submit(write_config(tmp_path, config))
        job.wait("the first job's end", lambda: job.state in ("COMPLETED", "FAILED"), 120)
        assert "submitting again without node1" in job.log(), job.log()[-5000:]
        if fault == "run folder":
            assert f"BAD {host} run folder {job.run} is not there" in job.log()
        else:
            for line in FAULTS[fault]:
                assert re.search("error: " + line.format(host=host), job.log()), job.log()[-5000:]
            assert json.loads((job.run / "preflight.json").read_text())["bad_hosts"] in ([host], [])
        job.wait("DONE", lambda: (job.run / "DONE").exists(), 120)
        hosts = {json.loads(path.read_text())["host"] for path in (job.run / "heartbeat").iterdir()}
        assert hosts == {"node0", "node2"}
        assert [row["step"] for row in job.rows()] == [1, 2, 3, 4, 5]
    finally:
        if fault == "run folder":
            cluster.run(*in_node, "umount", str(tmp_path / "run"))
        for name in ("fault", "sitecustomize.py"):
            (scratch / name).unlink(missing_ok=True)
        for path in scratch.glob("*.dist-info/METADATA"):
            path.unlink()
            path.parent.rmdir()


@on_the_second
def test_a_sweep_of_four_two_at_a_time(cluster: Cluster, dataset: Path, tmp_path: Path) -> None:
    """One loses a rank and is tried again, one can never start; submitted again, only that one runs."""
    config = tree(dataset, tmp_path, 60, cluster__nodes=1, cluster__attempts=2, model__variant="transformer")
    sweep = {
        "name": "grid",
        "config": str(write_config(tmp_path, config)),
        "parallel": 2,
        "axes": {"optimizer.learning_rate": [0.01, 0.003], "run.seed": [0, 1]},
    }
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(sweep))
    folder = tmp_path / "grid"

    def status() -> list[str]:
        found = cluster.run(sys.executable, "launch/sweep.py", "status", str(path), "--json")
        return [row["status"] for row in json.loads(found)]

    # Run 2 finds a file where its checkpoints should go.
    (folder / "002").mkdir(parents=True)
    (folder / "002" / "checkpoints").write_text("not a folder")
    assert status() == ["waiting"] * 4
    said = cluster.run(sys.executable, "launch/sweep.py", "submit", str(path))
    number = said.split("submitted job ")[1].split()[0]
    killed, most = False, 0
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        states = cluster.run("squeue", "-h", "-r", "-j", number, "-o", "%T", check=False).split()
        most = max(most, states.count("RUNNING"))
        if not killed and (pids := pids_of(folder / "001")) and (folder / "001" / "metrics.jsonl").exists():
            ranks = [pid for pid in pids if "RANK=0" in environment_of(pid)]
            for pid in ranks:
                os.kill(pid, signal.SIGKILL)
            killed = bool(ranks)
        if not [state for state in states if state in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED")]:
            break
        time.sleep(0.3)
    assert killed
    assert most == 2
    assert status() == ["done", "done", "failed", "done"]
    assert json.loads((folder / "001" / "DONE").read_text())["attempt"] == 1
    before = {index: (folder / f"{index:03d}" / "metrics.jsonl").stat().st_mtime for index in (0, 1, 3)}

    (folder / "002" / "checkpoints").unlink()
    assert "with 1 runs" in cluster.run(sys.executable, "launch/sweep.py", "submit", str(path))
    deadline = time.monotonic() + 60
    while status()[2] != "done" and time.monotonic() < deadline:
        time.sleep(0.5)
    assert status() == ["done"] * 4
    assert before == {index: (folder / f"{index:03d}" / "metrics.jsonl").stat().st_mtime for index in before}
    assert "nothing is left to do" in cluster.run(sys.executable, "launch/sweep.py", "submit", str(path))
