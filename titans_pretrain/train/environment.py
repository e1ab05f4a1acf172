"""Who am I among how many: torchrun's, srun's or a lone process's environment, as rank, world size and meeting point."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn

import torch
import torch.distributed as dist

from titans_pretrain.errors import UserError
from titans_pretrain.parallel.grid import Grid

TORCHRUN_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Environment:
    """One process's place in the job."""

    rank: int
    local_rank: int
    world_size: int
    address: str
    """Host of rank 0."""
    port: int
    """Port rank 0 listens on; 0 for one process, which nobody looks for: whichever is free."""
    found: str
    """What started us: "torchrun", "srun" or "one process"."""

    def __str__(self) -> str:
        return f"{self.found}: rank {self.rank} of {self.world_size}, local rank {self.local_rank}, {self.address}:{self.port}"


def find_environment(variables: Mapping[str, str] | None = None) -> Environment:
    """Read the place of this process from `variables` (default: the process environment).

    torchrun's variables win, so torchrun under srun works. A SLURM batch script that starts Python without srun is one
    process, although SLURM_PROCID is set there too: only a job step has SLURM_STEP_NUM_TASKS.

    Raises:
        UserError: some but not all of torchrun's variables are set, or one is not a number.
    """
    variables = os.environ if variables is None else variables
    present = [name for name in TORCHRUN_VARIABLES if name in variables]
    if "RANK" in present or "WORLD_SIZE" in present:
        missing = [name for name in TORCHRUN_VARIABLES if name not in present]
        if missing:
            raise UserError(
                f"{' and '.join(present)} are set but {' and '.join(missing)} are not; start with torchrun, or unset them"
            )
        return Environment(
            rank=_number(variables, "RANK"),
            local_rank=_number(variables, "LOCAL_RANK"),
            world_size=_number(variables, "WORLD_SIZE"),
            address=variables["MASTER_ADDR"],
            port=_number(variables, "MASTER_PORT"),
            found="torchrun",
        )
    if "SLURM_STEP_NUM_TASKS" in variables and _number(variables, "SLURM_STEP_NUM_TASKS") > 1:
        nodes = variables.get("SLURM_STEP_NODELIST") or variables.get("SLURM_JOB_NODELIST", "")
        return Environment(
            rank=_number(variables, "SLURM_PROCID"),
            local_rank=_number(variables, "SLURM_LOCALID"),
            world_size=_number(variables, "SLURM_STEP_NUM_TASKS"),
            address=variables.get("MASTER_ADDR") or _first_host(nodes),
            # Ports from the job and step id: jobs that share a node do not meet.
            port=_number(variables, "MASTER_PORT")
            if "MASTER_PORT" in variables
            else 20000 + (7 * _number(variables, "SLURM_JOB_ID") + _number(variables, "SLURM_STEP_ID")) % 20000,
            found="srun",
        )
    return Environment(rank=0, local_rank=0, world_size=1, address="127.0.0.1", port=0, found="one process")


def join(environment: Environment, device_kind: str) -> Grid:
    """Start the process group (gloo on CPU, NCCL on CUDA), choose this rank's device and return the grid.

    Args:
        device_kind: config.run.device: "auto", "cpu" or "cuda".

    Raises:
        UserError: CUDA is wanted and missing, or there are more local ranks than GPUs.
    """
    if device_kind == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "run.device is cuda but torch sees no CUDA device; set run.device=cpu or install a CUDA build of torch"
        )
    if device_kind == "cpu" or not torch.cuda.is_available():
        # DeepSpeed chooses its own accelerator; without this it would take a GPU that the config declines.
        os.environ["DS_ACCELERATOR"] = "cpu"
        device = torch.device("cpu")
    else:
        if environment.local_rank >= torch.cuda.device_count():
            raise UserError(
                f"local rank {environment.local_rank} has no GPU: {torch.cuda.device_count()} are visible; "
                "start one process per GPU or set run.device=cpu"
            )
        # NCCL's flight recorder: the last collectives of a rank, written out when one of them times out.
        for name, value in (("TORCH_FR_BUFFER_SIZE", "2000"), ("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")):
            os.environ.setdefault(name, value)
        device = torch.device("cuda", environment.local_rank)
        torch.cuda.set_device(device)
    # DeepSpeed reads these, whatever started us.
    os.environ.update(
        RANK=str(environment.rank),
        LOCAL_RANK=str(environment.local_rank),
        WORLD_SIZE=str(environment.world_size),
        MASTER_ADDR=environment.address,
        MASTER_PORT=str(environment.port),
    )
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        rank=environment.rank,
        world_size=environment.world_size,
        device_id=device if device.type == "cuda" else None,
    )
    return Grid(environment.rank, environment.world_size, device, str(environment))


def leave() -> NoReturn:
    """End this process, whose work is done, with exit code 0 and without taking Python down.

    A worker thread of gloo may hold the tensors of the last collective a little longer than we do. If it lets go of them
    while the interpreter is being taken down, the process aborts (exit code -6): seen in 2 of 50 runs of two processes.
    """
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _number(variables: Mapping[str, str], name: str) -> int:
    try:
        return int(variables[name])
    except (KeyError, ValueError):
        raise UserError(f"{name} must be a whole number in the environment, not {variables.get(name)!r}") from None


def _first_host(nodes: str) -> str:
    """First host of a SLURM node list such as `gpu[03-05,9],login1`."""
    try:
        listed = subprocess.run(
            ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, timeout=30, check=True
        )
        return listed.stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        match = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\]([^,]*))?", nodes)
        if match is None:
            raise UserError("SLURM_JOB_NODELIST is empty, so rank 0's host is unknown; set MASTER_ADDR") from None
        return match[1] + (match[2] or "") + (match[3] or "")
