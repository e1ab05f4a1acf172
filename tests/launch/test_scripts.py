"""The launchers that need no cluster, and what submit.py says before it submits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from launch.submit import main, with_absolute_paths
from launch.sweep import main as sweep
from tests.distributed import free_port
from tests.launch.slurm import ROOT, write_config
from tests.train.tiny import SEQ_LEN, read_metrics, tiny_tree
from titans_pretrain.config import config_from_dict


def config_of(dataset: Path, folder: Path, **overrides: Any) -> Path:
    settings = {"model__variant": "transformer", "schedule__tokens": 3 * 8 * SEQ_LEN, "cluster__gpus_per_node": 0}
    return write_config(folder, tiny_tree(dataset, folder, **{**settings, **overrides}))


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "TITANS_PYTHON": sys.executable, **more}


def test_local(dataset: Path, tmp_path: Path) -> None:
    command = ["bash", str(ROOT / "launch" / "local.sh"), str(config_of(dataset, tmp_path))]
    done = subprocess.run(command, env=environment(NPROC="2"), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "torchrun: rank 0 of 2" in done.stdout
    assert [row["step"] for row in read_metrics(tmp_path / "run") if "loss" in row] == [1, 2, 3]


def test_two_machines_by_hand(dataset: Path, tmp_path: Path) -> None:
    port = free_port()
    command = ["bash", str(ROOT / "launch" / "torchrun.sh"), str(config_of(dataset, tmp_path))]
    settings = environment(NNODES="2", HEAD=f"127.0.0.1:{port}", NPROC="1")
    machines = [
        subprocess.Popen(
            command, env=settings, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for _ in range(2)
    ]
    said = [machine.communicate(timeout=120)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], said
    assert "rank 0 of 2" in "".join(said)
    missing = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert missing.returncode != 0
    assert "NNODES" in missing.stderr


@pytest.mark.parametrize("version", ["1.28", "1.33"])
def test_the_kubernetes_manifest_fits_the_schema(version: str) -> None:
    service, job = yaml.safe_load_all((ROOT / "launch" / "kubernetes.yaml").read_text())
    for document in (service, job):
        kubernetes_validate.validate(document, version, strict=True)
    spec, (container,) = job["spec"], job["spec"]["template"]["spec"]["containers"]
    variables = {entry["name"]: entry["value"] for entry in container["env"]}
    assert spec["completions"] == spec["parallelism"] == int(variables["NNODES"])
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(variables["NPROC"])
    assert variables["HEAD"].split(":")[0] == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert (ROOT / container["args"][0]).exists()


def test_a_dry_run_prints_the_plan_and_writes_nothing(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = dict(
        cluster__nodes=2, cluster__processes_per_node=2, cluster__partition="long", cluster__sbatch="--qos=low"
    )
    path = config_of(dataset, tmp_path, **settings)
    main([str(path), "--dry-run", "--tokens-per-second", "24", "schedule.tokens=7680"])
    said = capsys.readouterr().out
    assert "2 x 2 processes, 4 data ranks" in said
    assert "256 tokens, 30 steps, 7,680 tokens in all" in said
    assert "0:05:20 at 24 tokens/s (--tokens-per-second)" in said
    assert "GiB per rank at the peak of a step" in said
    command = said.split("would run: ")[1]
    for flag in (
        "--nodes=2",
        "--cpus-per-task=16",
        "--partition=long",
        "--qos=low",
        "--signal=B:USR2@120",
        "--requeue",
    ):
        assert flag in command
    assert not (tmp_path / "run").exists()
    main([str(path), "--dry-run"])
    assert "finish    unknown" in capsys.readouterr().out


def test_what_cannot_be_submitted(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(config_of(dataset, tmp_path))

    def refused(*words: str) -> str:
        with pytest.raises(SystemExit):
            main([path, *words])
        return capsys.readouterr().err

    assert "cluster.gpus_per_node and cluster.processes_per_node are both 0" in refused()
    assert "must be a time as SLURM writes it" in refused(
        "--dry-run", "cluster.processes_per_node=1", "cluster.time=soon"
    )
    assert "a multiple of" in refused("cluster.processes_per_node=3")
    sweep_file = tmp_path / "sweep.yaml"
    for text, says in [
        ("name: a", "must have the keys name, config and axes"),
        (f"name: a\nconfig: {path}\naxes: {{model.dim: 3}}", "axes must be a list of values"),
        (f"name: a\nconfig: {path}\naxes: {{model.dmi: [32]}}", "did you mean model.dim"),
    ]:
        sweep_file.write_text(text)
        with pytest.raises(SystemExit):
            sweep(["status", str(sweep_file)])
        assert says in capsys.readouterr().err


def test_a_sweep_on_this_machine_repeats_nothing(dataset: Path, tmp_path: Path) -> None:
    path = config_of(dataset, tmp_path, checkpoint__interval=1, run__dir=str(tmp_path / "runs"))
    sweep_file = tmp_path / "sweep.yaml"
    axes = {"optimizer.learning_rate": [1e-3, 2e-3, 1e30]}
    sweep_file.write_text(yaml.safe_dump({"name": "grid", "config": str(path), "parallel": 2, "axes": axes}))
    runs = [tmp_path / "runs" / "grid" / f"{i:03d}" for i in range(3)]

    def call(*words: str) -> subprocess.Popen[str]:
        command = [sys.executable, str(ROOT / "launch" / "sweep.py"), *words, str(sweep_file)]
        streams = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        return subprocess.Popen(command, env=environment(), cwd=tmp_path, **streams)

    killed = call("local")
    metrics = runs[0] / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    killed.kill()
    killed.communicate()
    done_before = [run for run in runs if (run / "DONE").exists()]

    second = call("local")
    said = second.communicate(timeout=120)[0]
    assert second.returncode == 1, said  # one run diverges
    assert f"3 runs, {3 - len(done_before)} to do, 2 at a time" in said
    assert "the gradient norm is" in said.splitlines()[-1]
    assert (runs[2] / "FAILED").exists()
    for run in runs[:2]:
        assert [row["step"] for row in read_metrics(run) if "loss" in row] == [1, 2, 3], said

    again = call("local")
    assert "3 runs, 0 to do" in again.communicate(timeout=60)[0]
    found = json.loads(call("status", "--json").communicate(timeout=60)[0])
    assert [row["status"] for row in found] == ["done", "done", "failed"]


def test_local_paths_become_absolute_and_others_stay(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tree = tiny_tree(Path("data"), Path("runs"), run__init_from="start")
    config = with_absolute_paths(config_from_dict(tree))
    assert config.data.path == str(tmp_path / "data")
    assert config.run_dir == tmp_path / "runs" / "run"
    assert config.run.init_from == str(tmp_path / "start")
    assert config.run.resume == "auto"
    tree["data"]["path"] = "s3://bucket/data"
    assert with_absolute_paths(config_from_dict(tree)).data.path == "s3://bucket/data"
