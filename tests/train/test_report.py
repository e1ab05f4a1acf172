"""What the logs say, read back with the programs that read them."""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.distributed import run_distributed
from tests.train.jobs import train_job
from tests.train.tiny import SEQ_LEN, read_metrics, tiny_config, tiny_tree
from titans_pretrain.model.cost import flops_per_token
from titans_pretrain.train.report import _board_name, code_text, cut_metrics, duration, perplexity


def test_metrics_tensorboard_and_console_of_a_resumed_run(dataset: Path, tmp_path: Path) -> None:
    tree = tiny_tree(
        dataset,
        tmp_path,
        schedule__tokens=6 * 8 * SEQ_LEN,
        log__tensorboard=True,
        log__interval=2,
        eval__interval=3,
        eval__tokens=SEQ_LEN,
    )
    lives = [{**tree, "run": {**tree["run"], "stop_after": 4}}, tree]
    assert run_distributed(train_job, 2, *lives) == [None, None]
    run_dir = tmp_path / "run"

    rows = read_metrics(run_dir)
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows if "valid_loss" in row] == [0, 3, 6]
    config = tiny_config(dataset, tmp_path, model__vocab_size=61)
    flops = flops_per_token(config.model, SEQ_LEN)
    for row in steps:
        assert row["tokens"] == row["step"] * 8 * SEQ_LEN
        assert row["perplexity"] == pytest.approx(math.exp(row["loss"]))
        assert row["tokens_per_second"] * row["seconds"] == pytest.approx(8 * SEQ_LEN)
        assert row["tflops"] == pytest.approx(row["tokens_per_second"] * flops / 1e12)
        # log.peak_tflops is 0.01 for each of two ranks
        assert row["mfu"] == pytest.approx(row["tflops"] / 0.02)
        assert 50e6 < row["memory_bytes"] < 50e9
        has_signals = {name for name in row if name.startswith("block_")}
        assert bool(has_signals) == (row["step"] % 2 == 0)
    wanted = {
        f"block_{i}/{name}"
        for i in (0, 1)
        for name in ("surprise", "alpha_mean", "eta_mean", "theta_mean", "state_norm")
    }
    assert wanted <= set(steps[1])
    assert 0 < steps[1]["block_0/alpha_mean"] < 0.01, "alpha starts at its bias of -6"
    assert steps[1]["block_0/state_norm"] > 0

    board = EventAccumulator(str(run_dir / "tensorboard"))
    board.Reload()
    for tag, name in (
        ("train/loss", "loss"),
        ("train/perplexity", "perplexity"),
        ("train/grad_norm", "grad_norm"),
        ("train/lr", "lr"),
        ("train/memory_bytes", "memory_bytes"),
        ("speed/tokens_per_second", "tokens_per_second"),
        ("speed/mfu", "mfu"),
        ("valid/valid_loss", "valid_loss"),
        ("memory/block_1/surprise", "block_1/surprise"),
    ):
        written = [(event.step, event.value) for event in board.Scalars(tag)]
        expected = [(row["step"], pytest.approx(row[name], rel=1e-5)) for row in rows if name in row]
        assert written == expected, tag

    log = (run_dir / "log" / "rank_0.txt").read_text()
    lines = [line for line in log.splitlines() if "tok/s" in line]
    assert [line.split("step ")[1].split("/")[0] for line in lines] == ["1", "2", "4", "6"]
    for text in ("loss", "lr", "grad norm", "TFLOP/s", "MFU", "GiB", "ETA"):
        assert text in lines[-1]
    assert "unigram entropy of the data 4.1" in log
    assert "tensorboard --logdir" in log
    assert "rank 1 of 2" in (run_dir / "log" / "rank_1.txt").read_text()
    assert "revision" in (run_dir / "code.txt").read_text()
    assert "vocab_size: 61" in (run_dir / "config.yaml").read_text()


def test_cut_metrics(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    cut_metrics(path, 3)
    assert not path.exists()
    lines = [json.dumps({"step": step, "loss": 1.0}) + "\n" for step in range(6)]
    path.write_text("".join(lines) + '{"step": 2, "lo')
    cut_metrics(path, 3)
    assert path.read_text() == "".join(lines[:4])
    cut_metrics(path, 0)
    assert path.read_text() == "", "a run that starts anew owes nothing to an earlier life"


def test_small_things() -> None:
    assert [duration(s) for s in (0, 42.9, 200, 3900, 180000)] == ["0s", "42s", "3m20s", "1h05m", "2d02h"]
    assert perplexity(1.0) == pytest.approx(math.e)
    assert perplexity(1e4) == math.inf


def test_code_text_with_and_without_git(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    assert code_text(outside).startswith("no revision")
    tree = tmp_path / "tree"
    tree.mkdir()

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        done = subprocess.run(
            ["git", "-C", str(tree), *identity, *arguments], check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    git("init", "-q")
    (tree / "code.py").write_text("x = 1\n")
    assert code_text(tree).startswith("no revision")
    git("add", "code.py")
    git("commit", "-qm", "first")
    (tree / "code.py").write_text("x = 2\n")
    text = code_text(tree)
    assert git("rev-parse", "HEAD") in text
    assert "+x = 2" in text


def test_tensorboard_groups_what_each_source_tells() -> None:
    names = {
        "tokens/web": "data/tokens_of_web",
        "epochs/loss": "data/epochs_of_loss",
        "valid_loss": "valid/valid_loss",
        "valid_perplexity_x4/web": "valid/valid_perplexity_x4_of_web",
        "block_0/surprise": "memory/block_0/surprise",
        "mfu": "speed/mfu",
        "loss": "train/loss",
    }
    assert {name: _board_name(name) for name in names} == names


def test_a_window_of_steps_is_profiled_on_every_rank(dataset: Path, tmp_path: Path) -> None:
    tree = tiny_tree(dataset, tmp_path, model__variant="transformer", schedule__tokens=5 * 8 * SEQ_LEN)
    tree["log"].update(profile_start=2, profile_steps=2)
    assert run_distributed(train_job, 2, tree) == [None, None]
    for rank in (0, 1):
        trace = json.loads((tmp_path / "run" / "profile" / f"rank_{rank:05d}.json").read_text())
        assert any("aten::" in event.get("name", "") for event in trace["traceEvents"])
        assert "Self CPU time total" in (tmp_path / "run" / "profile" / f"rank_{rank:05d}.txt").read_text()
    assert "profiled steps 2 to 3" in (tmp_path / "run" / "log" / "rank_0.txt").read_text()
