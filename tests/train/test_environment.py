"""Which rank am I: torchrun, srun, one process, and the traps between them."""

from __future__ import annotations

import pytest

from titans_pretrain.errors import UserError
from titans_pretrain.train.environment import Environment, find_environment

TORCHRUN = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "node0", "MASTER_PORT": "2900"}
SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_NTASKS": "8",
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "gpu[03-05,9]",
}


def test_torchrun_wins_over_srun() -> None:
    assert find_environment({**SRUN, **TORCHRUN}) == Environment(3, 1, 4, "node0", 2900, "torchrun")


def test_srun() -> None:
    found = find_environment(SRUN)
    assert (found.rank, found.local_rank, found.world_size, found.address, found.found) == (5, 1, 8, "gpu03", "srun")
    assert 20000 <= found.port < 40000
    assert find_environment({**SRUN, "SLURM_JOB_ID": "78"}).port != found.port
    assert find_environment({**SRUN, "SLURM_PROCID": "0"}).port == found.port
    assert find_environment({**SRUN, "SLURM_STEP_NODELIST": "a1,b2"}).address == "a1"
    assert find_environment({**SRUN, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "123"}).address == "10.0.0.1"
    assert "srun: rank 5 of 8" in str(found)


def test_one_process_also_inside_a_batch_script() -> None:
    # sbatch sets these for the script itself, before any srun
    batch = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "77", "SLURM_LOCALID": "0"}
    for variables in ({}, batch, {**SRUN, "SLURM_STEP_NUM_TASKS": "1"}):
        found = find_environment(variables)
        assert (found.rank, found.local_rank, found.world_size, found.found) == (0, 0, 1, "one process")


def test_half_an_environment_is_refused() -> None:
    with pytest.raises(
        UserError, match="RANK and WORLD_SIZE are set but LOCAL_RANK and MASTER_ADDR and MASTER_PORT are not"
    ):
        find_environment({"RANK": "0", "WORLD_SIZE": "2"})
    with pytest.raises(UserError, match="WORLD_SIZE must be a whole number"):
        find_environment({**TORCHRUN, "WORLD_SIZE": "two"})
    with pytest.raises(UserError, match="MASTER_ADDR"):
        find_environment({**SRUN, "SLURM_STEP_NODELIST": ""})
