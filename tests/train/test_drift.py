"""Copies of a parameter that part ways stop the run, which then names the parameter and the ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import run_distributed
from tests.train.jobs import train_job
from tests.train.tiny import tiny_tree
from titans_pretrain.parallel.grid import Axis, Grid
from titans_pretrain.train.drift import checksum, odd_ones, same_as


def drifting_job(name: str, bad_rank: int, bad_step: int, *trees: dict[str, dict[str, Any]]) -> list[str | None]:
    """`train_job` by each config, in which one bit of one rank's copy flips after a step."""
    from titans_pretrain.train.engine import Engine

    step = Engine.step

    def step_and_flip(engine: Engine, rate: float) -> float:
        norm = step(engine, rate)
        engine.steps_made = getattr(engine, "steps_made", 0) + 1  # type: ignore[attr-defined]
        if torch.distributed.get_rank() == bad_rank and engine.steps_made == bad_step:  # type: ignore[attr-defined]
            held = next(held for own, held, *_ in engine.copies() if own == name)
            held.view(-1)[:1].view(torch.int32).bitwise_xor_(1)
        return norm

    Engine.step = step_and_flip  # type: ignore[method-assign]
    outcomes = []
    for tree in trees:
        outcomes.append(train_job(tree))
        torch.distributed.destroy_process_group()
    return outcomes


# From stage 1 on every update sends whole copies anew, so that a difference lives for one step.
@pytest.mark.parametrize(("stage", "bad_step"), [(0, 3), (1, 4), (3, 4)])
def test_a_flipped_bit_stops_the_run(stage: int, bad_step: int, dataset: Path, tmp_path: Path) -> None:
    tree = tiny_tree(
        dataset,
        tmp_path,
        model__variant="transformer",
        model__num_layers=1,
        engine__zero_stage=stage,
        parallel__check_interval=2,
        checkpoint__interval=1,
        checkpoint__background=False,
    )
    name = "blocks.0.mixer_norm.weight"
    answers = run_distributed(drifting_job, 2, name, 1, bad_step, tree)
    for (sentence,) in answers:
        assert sentence is not None
        assert (
            f"parameter {name} is not the same at step 4 on ranks that must agree: rank 1 differs from rank 0"
            in sentence
        )
        # Step 3 may have saved the difference; at step 2 all agreed.
        assert sentence.endswith("step_00000002, which is from before they differed")


def test_tensor_ranks_must_agree_on_what_is_not_split(dataset: Path, tmp_path: Path) -> None:
    common = {"parallel__tensor": 2, "parallel__check_interval": 1, "model__num_layers": 1, "model__num_persistent": 2}
    sound = tiny_tree(dataset, tmp_path, **common, run__name="sound", run__stop_after=2)
    assert run_distributed(train_job, 2, sound) == [None, None]
    spoilt = tiny_tree(dataset, tmp_path, **common, run__name="spoilt")
    (sentence,) = run_distributed(drifting_job, 2, "blocks.0.persistent", 0, 1, spoilt)[1]
    assert sentence is not None
    assert "parameter blocks.0.persistent is not the same at step 1" in sentence


def test_a_checksum_sees_every_bit_and_every_exchange() -> None:
    x = torch.randn(1000)
    assert torch.equal(checksum(x), checksum(x.clone()))
    flipped = x.clone()
    flipped.view(torch.int32)[500] ^= 1
    assert not torch.equal(checksum(x), checksum(flipped))
    exchanged = x.clone()
    exchanged[[3, 7]] = x[[7, 3]]
    assert not torch.equal(checksum(x), checksum(exchanged))
    assert not torch.equal(checksum(x.bfloat16()), checksum(-x.bfloat16()))


def test_who_must_agree_with_whom() -> None:
    grid = Grid(0, 4, torch.device("cpu"), tensor=Axis(0, (0, 1)))  # 2 replicas x 2 tensor ranks
    sums = [[1], [2], [1], [2]]
    assert odd_ones(sums, same_as(grid, over_replicas=True, over_tensor=False)) is None
    assert odd_ones(sums, same_as(grid, over_replicas=False, over_tensor=False)) is None
    assert odd_ones(sums, same_as(grid, over_replicas=False, over_tensor=True)) == ([1], [0])
    assert odd_ones([[1], [2], [1], [3]], same_as(grid, over_replicas=True, over_tensor=False)) == ([3], [1])
    assert odd_ones([[1], [1], [2], [1]], same_as(grid, over_replicas=True, over_tensor=True)) == ([2], [0, 1, 3])
