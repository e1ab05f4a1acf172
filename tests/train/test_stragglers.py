"""A rank that is slow is named in the metrics, though all ranks show the same step time."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from tests.distributed import run_distributed
from tests.train.tiny import SEQ_LEN, read_metrics, tiny_tree
from titans_pretrain.train.stragglers import Stopwatch, slowest


def slow_job(tree: dict[str, dict[str, Any]], slow_rank: int) -> None:
    from titans_pretrain.config import config_from_dict
    from titans_pretrain.model import Titans
    from titans_pretrain.train.environment import find_environment, join
    from titans_pretrain.train.loop import train

    grid = join(find_environment(), "cpu")
    forward = Titans.forward

    def slow(model: Titans, *arguments: Any) -> Any:
        if grid.rank == slow_rank:
            time.sleep(0.5)
        return forward(model, *arguments)

    Titans.forward = slow  # type: ignore[method-assign]
    train(config_from_dict(tree), grid)


def test_the_slow_rank_is_named(dataset: Path, tmp_path: Path) -> None:
    settings = dict(schedule__tokens=3 * 9 * SEQ_LEN, data__batch_tokens=9 * SEQ_LEN, model__variant="transformer")
    run_distributed(slow_job, 3, tiny_tree(dataset, tmp_path, **settings), 2)
    rows = [row for row in read_metrics(tmp_path / "run") if "loss" in row]
    assert [row["slowest_rank"] for row in rows] == [2, 2, 2]
    assert all(row["slowest_rank_seconds"] > 0.5 for row in rows)
    assert all(row["slowest_rank_ratio"] > 1.2 for row in rows[1:])


def test_seconds_add_up_until_a_restart() -> None:
    watch = Stopwatch(torch.device("cpu"))
    for _ in range(2):
        with watch.running():
            time.sleep(0.02)
    assert 0.04 <= watch.seconds() < 1.0
    watch.restart()
    assert watch.seconds() == 0.0
    assert slowest([1.0, 1.0, 3.0]) == {"slowest_rank": 2, "slowest_rank_seconds": 3.0, "slowest_rank_ratio": 3.0}
