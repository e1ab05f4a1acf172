"""The runner of multi-process tests tells the truth about its ranks."""

from __future__ import annotations

import os
import time

import pytest
import torch

from tests.distributed import RankFailed, run_distributed


def add_ranks(start: float) -> float:
    from titans_pretrain.train.environment import find_environment, join

    grid = join(find_environment(), "cpu")
    total = torch.tensor([start + grid.rank])
    torch.distributed.all_reduce(total)
    return float(total)


def fail_on_rank_1() -> None:
    if os.environ["RANK"] == "1":
        print("before the end")
        raise KeyError("on purpose")
    time.sleep(60)


def die_on_rank_0() -> None:
    if os.environ["RANK"] == "0":
        os._exit(3)


def sleep() -> None:
    time.sleep(60)


def test_ranks_talk_and_answer() -> None:
    assert run_distributed(add_ranks, 3, 10.0) == [33.0, 33.0, 33.0]


def test_a_failing_rank_is_shown_and_does_not_hang_the_others() -> None:
    start = time.monotonic()
    with pytest.raises(RankFailed, match=r"(?s)rank 1 failed.*fail_on_rank_1.*KeyError: 'on purpose'.*before the end"):
        run_distributed(fail_on_rank_1, 2)
    with pytest.raises(RankFailed, match="rank 0 failed:\nthe process died"):
        run_distributed(die_on_rank_0, 2)
    with pytest.raises(RankFailed, match="rank 0 had not ended after 1 s"):
        run_distributed(sleep, 1, timeout=1)
    assert time.monotonic() - start < 40
    assert run_distributed(add_ranks, 1, 1.0) == [1.0], "the server is fit for the next run"
