"""The cluster that the tests marked `slurm` share."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.launch.slurm import Cluster, has_what_it_needs
from tests.train.conftest import dataset  # noqa: F401


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three nodes of 8 cores that SLURM believes in; two run a job, the third is there when one of them dies."""
    reason = has_what_it_needs()
    if reason:
        pytest.skip(reason)
    tracked = os.environ.get("TITANS_CGROUP", "0")  # 1: as real clusters track processes; needs cgroup v1
    cluster = Cluster(tmp_path_factory.mktemp("slurm"), NODES="3", CPUS="8", GPUS="2", CGROUP=tracked)
    try:
        cluster.up()
        yield cluster
    finally:
        cluster.down()
