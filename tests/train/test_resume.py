"""A run that was stopped or killed continues as if nothing had happened, and nothing else continues it."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import RankFailed, run_distributed
from tests.train.jobs import train_job
from tests.train.test_zero import sharded
from tests.train.tiny import SEQ_LEN, losses, make_dataset, read_metrics, tiny_tree
from titans_pretrain.train.checkpoint import find_checkpoints, full_fp32_weights

STEPS = 8
TOKENS = STEPS * 8 * SEQ_LEN


@pytest.mark.parametrize(("variant", "stage"), [("transformer", 0), ("mag", 1), ("lmm", 3)])
def test_stopped_and_resumed_equals_uninterrupted_bit_for_bit(
    variant: str, stage: int, dataset: Path, tmp_path: Path
) -> None:
    def tree(name: str, **overrides: Any) -> dict[str, Any]:
        return tiny_tree(
            dataset,
            tmp_path,
            model__variant=variant,
            model__num_layers=1 if stage == 3 else 2,
            model__memory_depth=1,
            schedule__tokens=TOKENS,
            engine__zero_stage=stage,
            engine__deepspeed=sharded(300) if stage == 3 else {},
            data__micro_batch=2 if stage == 0 else 4,
            eval__interval=2,
            eval__tokens=SEQ_LEN,
            run__name=name,
            **overrides,
        )

    pieces = [tree("pieces", run__stop_after=3), tree("pieces", run__stop_after=2), tree("pieces")]
    assert run_distributed(train_job, 2, tree("whole"), *pieces) == [None, None]
    whole, resumed = read_metrics(tmp_path / "whole"), read_metrics(tmp_path / "pieces")
    assert [row["step"] for row in resumed] == [row["step"] for row in whole]
    for row, wanted in zip(resumed, whole, strict=True):
        for name in ("tokens", "loss", "grad_norm", "lr", "valid_loss", "block_0/surprise"):
            assert row.get(name) == wanted.get(name), (row["step"], name)
    ends = [full_fp32_weights(find_checkpoints(tmp_path / name)[0]) for name in ("whole", "pieces")]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def train_until_killed(tree: dict[str, Any], step: int) -> None:
    """Train, and die by SIGKILL as soon as metrics.jsonl has `step`."""
    path = Path(tree["run"]["dir"]) / tree["run"]["name"] / "metrics.jsonl"

    def watch() -> None:
        while not path.exists() or f'"step": {step},' not in path.read_text():
            time.sleep(0.002)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
    train_job(tree)


def test_killed_at_a_random_step_and_resumed_equals_uninterrupted(dataset: Path, tmp_path: Path) -> None:
    steps = 30
    kill_at = random.Random(os.getpid()).randrange(
        11, steps - 4
    )  # the first checkpoint is whole when the second begins

    def tree(name: str) -> dict[str, Any]:
        return tiny_tree(
            dataset,
            tmp_path,
            model__variant="transformer",
            schedule__tokens=steps * 8 * SEQ_LEN,
            checkpoint__interval=5,
            eval__tokens=SEQ_LEN,
            run__name=name,
        )

    assert run_distributed(train_job, 2, tree("whole")) == [None, None]
    with pytest.raises(RankFailed, match="died"):
        run_distributed(train_until_killed, 2, tree("killed"), kill_at)
    before = len(losses(tmp_path / "killed"))
    assert kill_at <= before < steps
    assert run_distributed(train_job, 2, tree("killed")) == [None, None]
    log = (tmp_path / "killed" / "log" / "rank_0.txt").read_text()
    assert (
        f"at step {before // 5 * 5}, sequence {before // 5 * 5 * 8}" in log
        or f"at step {(before // 5 - 1) * 5}," in log
    )
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole"), f"killed at step {kill_at}"


@pytest.fixture(scope="module")
def saved(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs folder with one run of two ranks, stopped at step 3 of 8."""
    runs = tmp_path_factory.mktemp("saved")
    tree = refusable(dataset, runs, run__stop_after=3)
    assert run_distributed(train_job, 2, tree) == [None, None]
    return runs


def refusable(data: Path, runs: Path, **overrides: Any) -> dict[str, Any]:
    return tiny_tree(data, runs, **{"model__variant": "transformer", "schedule__tokens": TOKENS, **overrides})


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ({"data__seq_len": 16}, ["data.seq_len=32", "16"]),
        ({"data__batch_tokens": 4 * SEQ_LEN}, ["data.batch_tokens=256", "128"]),
        ({"run__seed": 7}, ["run.seed=0", "7"]),
        ({"model__hidden_dim": 128}, ["model.hidden_dim=64", "128"]),
        ({"model__vocab_size": 64}, ["model.vocab_size=61", "64"]),
        ({"run__resume": "never"}, ["run.resume is never", "step_00000003", "run.name"]),
        ({"run__resume": "/nowhere/step_00000001"}, ["run.resume=/nowhere/step_00000001", "no such folder"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_resume_is_refused(overrides: dict[str, Any], says: list[str], dataset: Path, saved: Path) -> None:
    before = (saved / "run" / "config.yaml").read_bytes()
    sentences = run_distributed(train_job, 2, refusable(dataset, saved, **overrides))
    assert sentences[0] == sentences[1]
    for text in says:
        assert text in sentences[0], sentences[0]
    assert (saved / "run" / "config.yaml").read_bytes() == before
    assert find_checkpoints(saved / "run"), "a refusal must not cost the checkpoint"


def test_resume_is_refused_with_other_data_or_tokenizer(dataset: Path, saved: Path, tmp_path: Path) -> None:
    other_data = make_dataset(tmp_path / "other", seed=1)
    other_tokenizer = make_dataset(tmp_path / "tokenizer", tokenizer=b"another tokenizer")
    (sentence, _) = run_distributed(train_job, 2, refusable(other_data, saved))
    assert "dataset" in sentence
    assert str(dataset) in sentence
    assert str(other_data) in sentence
    (sentence, _) = run_distributed(train_job, 2, refusable(other_tokenizer, saved))
    assert "tokenizer" in sentence
    assert "data.path" in sentence


def test_moved_data_and_changed_schedule_are_accepted_and_said(dataset: Path, saved: Path, tmp_path: Path) -> None:
    shutil.copytree(dataset, tmp_path / "moved")
    runs = tmp_path / "runs"
    shutil.copytree(saved, runs)
    tree = refusable(tmp_path / "moved", runs, schedule__tokens=5 * 8 * SEQ_LEN)
    assert run_distributed(train_job, 2, tree) == [None, None]
    log = (runs / "run" / "log" / "rank_0.txt").read_text()
    assert f"changed since that checkpoint: schedule.tokens: {TOKENS} -> {5 * 8 * SEQ_LEN}" in log
    assert [row["step"] for row in read_metrics(runs / "run") if "loss" in row] == [1, 2, 3, 4, 5]


def test_newest_whole_checkpoint_wins_and_the_damaged_are_named(dataset: Path, tmp_path: Path) -> None:
    tree = refusable(dataset, tmp_path, checkpoint__interval=2, checkpoint__keep_last=0)
    assert run_distributed(train_job, 2, tree) == [None, None]
    folder = tmp_path / "run" / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == [f"step_{n:08d}" for n in (2, 4, 6, 8)]
    expected = losses(tmp_path / "run")

    (folder / "step_00000008" / "manifest.json").unlink()
    victim = next((folder / "step_00000006" / "deepspeed").glob("*optim_states.pt"))
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    shutil.copytree(folder / "step_00000006", folder / "step_00000007.tmp")

    said: list[str] = []
    assert find_checkpoints(tmp_path / "run", said.append) == [folder / "step_00000004", folder / "step_00000002"]
    assert [text.split(":")[0].split("/")[-1] for text in said] == ["step_00000008", "step_00000006"]
    assert "manifest.json is missing" in said[0]
    assert f"deepspeed/{victim.name}" in said[1]
    assert "SHA-256" in said[1]
    victim.write_bytes(content[:-1])
    said.clear()
    find_checkpoints(tmp_path / "run", said.append)
    assert f"has {len(content) - 1} bytes, the manifest says {len(content)}" in said[1]

    assert run_distributed(train_job, 2, {**tree, "checkpoint": {"interval": 0, "keep_last": 2}}) == [None, None]
    log = (tmp_path / "run" / "log" / "rank_0.txt").read_text()
    assert "step_00000007.tmp: its save never finished" in log
    assert "step_00000004 at step 4" in log
    assert losses(tmp_path / "run") == expected
    # Two are kept, and the damaged do not count among them.
    names = ["step_00000004", "step_00000006.damaged", "step_00000008", "step_00000008.damaged"]
    assert sorted(p.name for p in folder.iterdir()) == names
    assert json.loads((folder / "step_00000008" / "manifest.json").read_text())["step"] == 8


def test_going_back_behind_a_newer_checkpoint_is_refused(dataset: Path, tmp_path: Path) -> None:
    tree = refusable(dataset, tmp_path, checkpoint__interval=4, eval__tokens=SEQ_LEN)
    assert run_distributed(train_job, 1, tree) == [None]
    back = refusable(dataset, tmp_path, run__resume=str(tmp_path / "run" / "checkpoints" / "step_00000004"))
    (sentence,) = run_distributed(train_job, 1, back)
    assert "step_00000008" in sentence
    branch = refusable(
        dataset, tmp_path, run__name="branch", run__resume=str(tmp_path / "run" / "checkpoints" / "step_00000004")
    )
    assert run_distributed(train_job, 1, branch) == [None]
    assert losses(tmp_path / "branch") == losses(tmp_path / "run")[4:]


def test_a_finished_run_stays_finished(dataset: Path, tmp_path: Path) -> None:
    tree = refusable(dataset, tmp_path, eval__tokens=SEQ_LEN)
    assert run_distributed(train_job, 1, tree, tree) == [None]
    assert len(losses(tmp_path / "run")) == STEPS
    assert "finished at step 8 of 8" in (tmp_path / "run" / "log" / "rank_0.txt").read_text()
