"""Signals, STOP and DONE: a run that is stopped and started again is the run that was not."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import run_distributed
from tests.train.jobs import train_job
from tests.train.tiny import SEQ_LEN, read_metrics, tiny_tree
from titans_pretrain.train.lifecycle import finished, life, read_marker

STEPS = 9


def preempted_job(*lives: tuple[dict[str, dict[str, Any]], int, int, int]) -> list[str]:
    """Train by each (config, rank, step, signal) in turn: the signal goes to that rank in the middle of that step."""
    from titans_pretrain.config import config_from_dict
    from titans_pretrain.train.engine import Engine
    from titans_pretrain.train.environment import find_environment, join
    from titans_pretrain.train.lifecycle import Interruption
    from titans_pretrain.train.loop import train

    grid = join(find_environment(), "cpu")
    made = Engine.forward_backward
    found = []
    for number, (tree, rank, step, which) in enumerate(lives):
        os.environ["TITANS_LIFE"] = str(number)
        count = 0

        def forward_backward(
            engine: Engine, *args: Any, mine: bool = grid.rank == rank, at: int = step, which: int = which
        ) -> Any:
            nonlocal count
            count += 1
            if mine and count == at:
                os.kill(os.getpid(), which)
                os.kill(os.getpid(), which)  # SLURM and torchrun both send it: it is one signal
            return made(engine, *args)

        Engine.forward_backward = forward_backward  # type: ignore[method-assign]
        interruption = Interruption().listen()
        progress = train(config_from_dict(tree), grid, interruption)
        grid.barrier()
        marker = read_marker(config_from_dict(tree).run_dir, "PREEMPTED") or {}
        found.append(f"{progress.step} {marker.get('signal')} {marker.get('life')} {marker.get('step')}")
        grid.barrier()
    return found


@pytest.mark.parametrize("stage", [1, 3])
def test_preempted_lives_are_the_unbroken_run(stage: int, dataset: Path, tmp_path: Path) -> None:
    def tree(name: str) -> dict[str, dict[str, Any]]:
        return tiny_tree(
            dataset,
            tmp_path,
            run__name=name,
            schedule__tokens=STEPS * 8 * SEQ_LEN,
            engine__zero_stage=stage,
            model__variant="mag",
            model__num_layers=1,
            eval__interval=2,
            checkpoint__interval=4,
        )

    broken = tree("broken")
    lives = [(broken, 1, 2, signal.SIGUSR2), (broken, 0, 3, signal.SIGTERM), (broken, 1, 1, signal.SIGUSR2)]
    found = run_distributed(preempted_job, 2, *lives, (broken, 0, 99, signal.SIGTERM))
    assert found == [["2 SIGUSR2 0 2", "5 SIGTERM 1 5", "6 SIGUSR2 2 6", f"{STEPS} None None None"]] * 2
    assert run_distributed(train_job, 2, tree("whole")) == [None, None]
    rows = {name: [row for row in read_metrics(tmp_path / name) if "loss" in row] for name in ("broken", "whole")}
    assert [row["step"] for row in rows["broken"]] == list(range(1, STEPS + 1))
    for own, again in zip(rows["whole"], rows["broken"], strict=True):
        for key in ("loss", "grad_norm", "tokens"):
            assert own[key] == again[key], (own["step"], key)
    faults = [json.loads(line) for line in (tmp_path / "broken" / "faults.jsonl").read_text().splitlines()]
    assert [(row["kind"], row["life"], row["step"]) for row in faults] == [
        ("preempted", n, s) for n, s in enumerate((2, 5, 6))
    ]
    log = (tmp_path / "broken" / "log" / "rank_0.txt").read_text()
    assert [line for line in range(4) if f"life {line}, attempt 0" in log] == [0, 1, 2, 3]
    assert read_marker(tmp_path / "broken", "DONE") == {
        **(read_marker(tmp_path / "broken", "DONE") or {}),
        "step": STEPS,
    }


def test_stop_and_done(dataset: Path, tmp_path: Path) -> None:
    def tree(**overrides: Any) -> dict[str, dict[str, Any]]:
        settings = {"schedule__tokens": 3 * 8 * SEQ_LEN, "model__variant": "transformer", "model__num_layers": 1}
        return tiny_tree(dataset, tmp_path, **{**settings, **overrides})

    run = tmp_path / "run"
    run.mkdir()
    (run / "STOP").touch()
    assert run_distributed(train_job, 2, tree()) == [None, None]
    assert not (run / "metrics.jsonl").exists()
    (run / "STOP").unlink()
    assert run_distributed(train_job, 2, tree(run__stop_after=2)) == [None, None]
    assert finished(run, 1) is None
    assert run_distributed(train_job, 2, tree()) == [None, None]
    tokens = 3 * 8 * SEQ_LEN
    assert f"is finished: step 3, {tokens:,} tokens" in str(finished(run, tokens))
    assert finished(run, tokens + 1) is None
    assert run_distributed(train_job, 2, tree(schedule__tokens=2 * tokens, run__stop_after=1)) == [None, None]
    assert finished(run, tokens) is None, "it goes on: not done"


def test_lives_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TITANS_LIFE", raising=False)
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    assert life() == 0
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    assert life() == 3
    monkeypatch.setenv("TITANS_LIFE", "4")
    assert life() == 4
