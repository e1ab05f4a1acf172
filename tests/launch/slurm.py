"""A real SLURM of several nodes inside this machine (cluster.sh), as tests use it: submit, wait, signal, look."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("cluster.sh")


class Cluster:
    """A cluster that is up.

    Args:
        root: its folder.
        settings: environment of cluster.sh (NODES, CPUS, CRED, CGROUP, ...).
    """

    def __init__(self, root: Path, **settings: str) -> None:
        self.root = root
        self.nodes = int(settings.get("NODES", "2"))
        self.small = root / "small"
        """A file system of 24 MB that all nodes see."""
        self._environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "TITANS"))},
            **settings,
            "ROOT": str(root),
            "SLURM_CONF": str(root / "slurm.conf"),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }

    def up(self) -> None:
        self.small.mkdir(parents=True, exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(self.small)], check=True)
        self.run("bash", str(SCRIPT), "up")

    def down(self) -> None:
        self.run("bash", str(SCRIPT), "down", check=False)
        subprocess.run(["umount", "-l", str(self.small)], check=False)

    def run(self, *command: str, cwd: Path = ROOT, timeout: float = 60.0, check: bool = True) -> str:
        """Run a command with the cluster's environment -> its output."""
        done = subprocess.run(
            command, cwd=cwd, env=self._environment, timeout=timeout, capture_output=True, text=True, errors="replace"
        )
        assert not check or done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    def submit(self, config: Path, *overrides: str) -> Job:
        said = self.run(sys.executable, "launch/submit.py", str(config), *overrides)
        number = said.split("submitted job ")[1].split(";")[0].strip()
        tree = yaml.safe_load(config.read_text())
        names = dict(o.split("=", 1) for o in overrides)
        run = Path(tree["run"]["dir"]) / names.get("run.name", tree["run"].get("name", "run"))
        return Job(self, int(number), run)

    def processes(self, run: Path) -> list[str]:
        """Command lines on any node that name `run`: its ranks, agents and wrappers."""
        found = subprocess.run(["pgrep", "-af", str(run)], capture_output=True, text=True).stdout
        return [line for line in found.splitlines() if "pytest" not in line and "pgrep" not in line]


class Job:
    """A submitted job."""

    def __init__(self, cluster: Cluster, number: int, run: Path) -> None:
        self.cluster, self.number, self.run = cluster, number, run

    def facts(self) -> dict[str, str]:
        text = self.cluster.run("scontrol", "-o", "show", "job", str(self.number))
        return dict(part.split("=", 1) for part in text.split() if "=" in part)

    @property
    def state(self) -> str:
        return self.facts()["JobState"]

    @property
    def lives(self) -> int:
        return int(self.facts()["Restarts"])

    def log(self) -> str:
        return "".join(path.read_text(errors="replace") for path in sorted(self.run.glob("slurm-*.log")))

    def rows(self) -> list[dict[str, Any]]:
        """Metrics of optimizer steps."""
        try:
            lines = (self.run / "metrics.jsonl").read_text().splitlines()
        except OSError:
            return []
        rows = []
        for line in lines:
            try:
                rows.append(json.loads(line))
            except ValueError:
                continue  # just being written
        return [row for row in rows if "loss" in row]

    def wait(self, what: str, until: Callable[[], Any], seconds: float = 90.0) -> Any:
        """Poll until `until()` is true -> its value."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            value = until()
            if value:
                return value
            time.sleep(0.2)
        raise AssertionError(f"not within {seconds:.0f} s: {what}; {self.facts()}\n{self.log()[-6000:]}")

    def wait_for_step(self, step: int) -> None:
        """Until `step` is in the metrics of this life."""
        self.wait(f"step {step}", lambda: (rows := self.rows()) and rows[-1]["step"] >= step)

    def wait_for_end(self, seconds: float = 120.0) -> str:
        """-> the last state."""
        ends = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        return str(self.wait("the end", lambda: (state := self.state) in ends and state, seconds))


def has_what_it_needs() -> str | None:
    """Why no cluster can be brought up here; None if one can."""
    if os.geteuid() != 0:
        return "needs root, for network namespaces and munge"
    for program in ("slurmctld", "slurmd", "munged", "ip", "unshare"):
        if subprocess.run(["which", program], capture_output=True).returncode:
            return f"{program} is not installed (Debian: apt-get install slurmctld slurmd slurm-client munge iproute2)"
    probe = f"""
        set -e
        unshare --uts --ipc --mount --pid --fork --mount-proc --net bash -c 'hostname probe; mount -t tmpfs tmpfs /mnt'
        ip netns add probe{os.getpid()}; ip netns del probe{os.getpid()}
        ip link add pb{os.getpid() % 99999} type bridge; ip link del pb{os.getpid() % 99999}
        folder=$(mktemp -d); mknod $folder/gpu c 1 3; rm -r $folder
    """
    done = subprocess.run(["bash", "-c", probe], capture_output=True, text=True)
    return f"namespaces and devices cannot be made: {' '.join(done.stderr.split())}" if done.returncode else None


def write_config(folder: Path, tree: Mapping[str, Any]) -> Path:
    """`tree` as a YAML file in a folder of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(dict(tree)))
    return path
