"""A run goes on under any layout as if it had never stopped, whatever layout saved it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import run_distributed
from tests.train.jobs import train_job
from tests.train.test_zero import sharded
from tests.train.tiny import SEQ_LEN, losses, tiny_tree

SAVED_BY = {"data 2": (2, {}), "tensor 2": (2, {"parallel__tensor": 2}), "sequence 2": (2, {"parallel__sequence": 2})}
SAVED_BY["tensor 2 x data 2"] = (4, {"parallel__tensor": 2})
RESUMED_BY = {"1": (1, {}), "data 4": (4, {}), **{k: SAVED_BY[k] for k in ("tensor 2", "sequence 2")}}
RESUMED_BY["tensor 4"] = (4, {"parallel__tensor": 4})
SAVED_STAGES, RESUMED_STAGES = (1, 2, 3), (1, 3)
STEPS_BEFORE, STEPS_AFTER = 3, 5
TOLERANCE = 1e-6
"""Of losses, relative: another layout adds fp32 numbers in another order."""

WHOLE = os.environ.get("TITANS_WHOLE_TABLE") == "1"
"""All 4 x 3 x 5 x 2 pairs (make test-checkpoints), not a choice that has each value of each axis."""
CHOICE = {
    ("data 2", 1): [("tensor 4", 3), ("data 4", 1)],
    ("tensor 2", 2): [("1", 3), ("sequence 2", 1)],
    ("sequence 2", 3): [("tensor 2", 1), ("data 4", 3)],
    ("tensor 2 x data 2", 3): [("1", 1), ("tensor 2", 3)],
}


def tree_of(data: Path, runs: Path, name: str, stage: int, **overrides: Any) -> dict[str, Any]:
    """A model with every kind of split parameter, an uneven vocabulary, a decayed and an undecayed group."""
    settings = {
        "model__variant": "mag",
        "model__num_layers": 1,
        "model__dim": 32,
        "model__num_heads": 4,
        "model__memory_heads": 4,
        "data__batch_tokens": 4 * SEQ_LEN,
        "schedule__tokens": (STEPS_BEFORE + STEPS_AFTER) * 4 * SEQ_LEN,
        "eval__tokens": SEQ_LEN,
        "log__interval": 1,
        "engine__zero_stage": stage,
        # Some parameters whole on every rank, some cut; with several sub-groups of cut ones.
        "engine__deepspeed": sharded(300) if stage == 3 else {},
        "run__name": name,
    }
    return tiny_tree(data, runs, **{**settings, **overrides})


@pytest.fixture(scope="module")
def unbroken(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    folder = tmp_path_factory.mktemp("unbroken")
    assert run_distributed(train_job, 1, tree_of(dataset, folder, "run", 1)) == [None]
    return losses(folder / "run")


@pytest.mark.parametrize("stage", SAVED_STAGES)
@pytest.mark.parametrize("layout", SAVED_BY)
def test_any_layout_resumes_any_other(
    layout: str, stage: int, dataset: Path, unbroken: list[float], tmp_path: Path
) -> None:
    pairs = [(r, s) for r in RESUMED_BY for s in RESUMED_STAGES] if WHOLE else CHOICE.get((layout, stage), [])
    if not pairs:
        pytest.skip("part of the whole table: make test-checkpoints")
    world, parallel = SAVED_BY[layout]
    begin = tree_of(dataset, tmp_path, "saved", stage, run__stop_after=STEPS_BEFORE, **parallel)
    assert run_distributed(train_job, world, begin) == [None] * world
    worst = 0.0
    for resumed, resumed_stage in pairs:
        name = f"{resumed} stage {resumed_stage}"
        shutil.copytree(tmp_path / "saved", tmp_path / name)
        world, parallel = RESUMED_BY[resumed]
        go_on = tree_of(dataset, tmp_path, name, resumed_stage, **parallel)
        assert run_distributed(train_job, world, go_on) == [None] * world
        got = losses(tmp_path / name)
        assert len(got) == STEPS_BEFORE + STEPS_AFTER
        worst = max(worst, *(abs(a - b) / b for a, b in zip(got[STEPS_BEFORE:], unbroken[STEPS_BEFORE:], strict=True)))
        assert worst < TOLERANCE, (name, got, unbroken)
        log = (tmp_path / name / "log" / "rank_0.txt").read_text()
        # Which of the replicas share a row does not show in what each holds.
        kinds = [
            (key[0], key[1].get("parallel__tensor", 1), s)
            for key, s in ((SAVED_BY[layout], stage), (RESUMED_BY[resumed], resumed_stage))
        ]
        assert ("resharded: saved as" in log) == (kinds[0] != kinds[1])
    print(f"{layout}, stage {stage}: losses differ by at most {worst:.1e}")
