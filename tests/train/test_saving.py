"""Saving beside the training: the same checkpoints, counted, kept as configured, and never lost to a disk or a kill."""

from __future__ import annotations

import os
import random
import resource
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
from tests.train.tiny import SEQ_LEN, all_metrics, losses, tiny_tree
from titans_pretrain.train.checkpoint import find_checkpoints, full_fp32_weights, prune, read_manifest

STEPS = 12
WHOLE = os.environ.get("TITANS_WHOLE_TABLE") == "1"
KILLS = 30 if WHOLE else 4
"""All of them with make test-checkpoints."""


def tree_of(data: Path, runs: Path, name: str, **overrides: Any) -> dict[str, Any]:
    stage = overrides.get("engine__zero_stage", 1)
    settings = {
        "model__variant": "transformer",
        "model__num_layers": 1,
        "data__batch_tokens": 2 * SEQ_LEN,
        "schedule__tokens": STEPS * 2 * SEQ_LEN,
        "checkpoint__interval": 2,
        "eval__tokens": SEQ_LEN,
        "engine__deepspeed": sharded(300) if stage == 3 else {},
        "run__name": name,
    }
    return tiny_tree(data, runs, **{**settings, **overrides})


@pytest.mark.parametrize(("stage", "precision"), [(1, "bf16"), (3, "fp32"), (0, "fp32")])
def test_background_and_foreground_save_the_same(stage: int, precision: str, dataset: Path, tmp_path: Path) -> None:
    """Also while the training goes on and changes what is being saved."""
    common = {"engine__zero_stage": stage, "engine__precision": precision, "checkpoint__keep_last": 0}
    trees = [
        tree_of(dataset, tmp_path, str(background), checkpoint__background=background, **common)
        for background in (True, False)
    ]
    assert run_distributed(train_job, 2, *trees) == [None, None]
    assert losses(tmp_path / "True") == losses(tmp_path / "False")
    pairs = list(zip(*(sorted(find_checkpoints(tmp_path / name)) for name in ("True", "False")), strict=True))
    assert len(pairs) == STEPS // 2
    for pair in pairs:
        one, other = (full_fp32_weights(folder) for folder in pair)
        assert all(torch.equal(one[name], other[name]) for name in one)
        files = [read_manifest(folder)["files"] for folder in pair]
        assert files[0].keys() == files[1].keys()
        optimizer = [name for name in files[0] if name.endswith("optim_states.pt")]
        assert [files[0][name]["bytes"] for name in optimizer] == [files[1][name]["bytes"] for name in optimizer]
    for name in ("True", "False"):
        rows = [row for row in all_metrics(tmp_path / name) if "checkpoint_step" in row]
        assert [row["checkpoint_step"] for row in rows] == list(range(2, STEPS + 1, 2))
        for row, folder in zip(rows, sorted(find_checkpoints(tmp_path / name)), strict=True):
            written = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file() and p.name != "manifest.json")
            assert row["checkpoint_bytes"] == written
            assert 0 < row["checkpoint_stall_seconds"] <= row["checkpoint_seconds"]
            assert row["step"] >= row["checkpoint_step"]


def test_keep_every_outlives_keep_last(dataset: Path, tmp_path: Path) -> None:
    tree = tree_of(dataset, tmp_path, "run", checkpoint__keep_last=1, checkpoint__keep_every=4)
    assert run_distributed(train_job, 1, tree) == [None]
    kept = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["step_00000004", "step_00000008", "step_00000012"]
    (tmp_path / "run" / "checkpoints" / "step_00000013").mkdir()
    prune(tmp_path / "run", 1, 8)
    kept = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["step_00000008", "step_00000013"]


# -------------------------------------------------------------------------------------------------------------- full disks


def train_with_a_disk_that_fails(tree: dict[str, Any], rank: int, first: int, after: int) -> str | None:
    """Train; from step `first` on `rank` cannot write files beyond 20 kB, from step `after` on it can again."""
    path = Path(tree["run"]["dir"]) / tree["run"]["name"] / "metrics.jsonl"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def watch() -> None:
        for step, limit in ((first, 20_000), (after, soft)):
            while not path.exists() or f'"step": {step},' not in path.read_text():
                time.sleep(0.001)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))

    if int(os.environ["RANK"]) == rank:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        threading.Thread(target=watch, daemon=True).start()
    return train_job(tree)


def forty_steps(dataset: Path, folder: Path, **overrides: Any) -> dict[str, Any]:
    settings = {"schedule__tokens": 40 * 2 * SEQ_LEN, "checkpoint__interval": 4, **overrides}
    return tree_of(dataset, folder, "run", **settings)


@pytest.fixture(scope="module")
def unbroken(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses where the disk is large enough."""
    folder = tmp_path_factory.mktemp("unbroken")
    tree = forty_steps(dataset, folder, checkpoint__interval=0)
    assert run_distributed(train_job, 2, tree) == [None, None]
    return losses(folder / "run")


@pytest.mark.parametrize("background", [True, False], ids=["background", "foreground"])
@pytest.mark.parametrize("on_full_disk", ["warn", "stop"])
def test_a_disk_that_fills_up_during_a_save(
    on_full_disk: str, background: bool, unbroken: list[float], dataset: Path, tmp_path: Path
) -> None:
    policy = {"checkpoint__on_full_disk": on_full_disk, "checkpoint__background": background}
    tree = forty_steps(dataset, tmp_path, **policy)
    outcome = run_distributed(train_with_a_disk_that_fails, 2, tree, 1, 9, 25)
    log = (tmp_path / "run" / "log" / "rank_0.txt").read_text()
    if on_full_disk == "stop":
        assert outcome[0] == outcome[1]
        assert "cannot save checkpoint" in outcome[0]
        assert "File too large" in outcome[0]
        assert "earlier checkpoint" in outcome[0]
        assert find_checkpoints(tmp_path / "run")
        assert not list((tmp_path / "run" / "checkpoints").glob("*.tmp"))
        assert run_distributed(train_job, 2, tree) == [None, None]
    else:
        assert outcome == [None, None]
        assert "warning: cannot save checkpoint" in log
        assert "checkpoint.on_full_disk=warn" in log
        assert find_checkpoints(tmp_path / "run")[0].name == "step_00000040"
    assert losses(tmp_path / "run") == unbroken


def test_the_last_checkpoint_is_never_only_a_warning(dataset: Path, tmp_path: Path) -> None:
    tree = tree_of(dataset, tmp_path, "run", checkpoint__interval=0, checkpoint__on_full_disk="warn")
    (sentence,) = run_distributed(train_with_a_disk_that_fails, 1, tree, 0, 1, 10_000)
    assert "cannot save checkpoint" in sentence


# ------------------------------------------------------------------------------------------------------------------- kills


def train_until_killed_while_saving(tree: dict[str, Any], ranks: list[int], saves: int, delay: float) -> None:
    """Train; `ranks` die by SIGKILL `delay` seconds after the `saves`th save of this life has made its folder."""
    checkpoints = Path(tree["run"]["dir"]) / tree["run"]["name"] / "checkpoints"

    def unfinished() -> set[int]:
        with os.scandir(checkpoints) as entries:
            return {entry.inode() for entry in entries if entry.name.endswith(".tmp")}

    def watch() -> None:
        seen = unfinished()  # of earlier lives
        saves_to_see = len(seen) + saves
        while len(seen) < saves_to_see:
            seen |= unfinished()
        time.sleep(delay)
        os.kill(os.getpid(), signal.SIGKILL)

    checkpoints.mkdir(parents=True, exist_ok=True)
    if int(os.environ["RANK"]) in ranks:
        threading.Thread(target=watch, daemon=True).start()
    train_job(tree)


@pytest.mark.parametrize("stage", [1, 3])
def test_kills_at_random_moments_of_saving_lose_nothing(stage: int, dataset: Path, tmp_path: Path) -> None:
    """One or all ranks, background or not: each life resumes from a whole checkpoint, the curve is the unbroken one's."""
    seed = int(os.environ.get("TITANS_KILL_SEED", str(random.SystemRandom().randrange(1 << 30))))
    chance = random.Random(seed)
    steps = 60

    def tree(name: str, **overrides: Any) -> dict[str, Any]:
        tokens = steps * 2 * SEQ_LEN
        return tree_of(
            dataset, tmp_path, name, engine__zero_stage=stage, schedule__tokens=tokens, log__interval=1, **overrides
        )

    assert run_distributed(train_job, 2, tree("unbroken", checkpoint__interval=0)) == [None, None]
    died = in_save = 0
    for _ in range(KILLS // 2):
        ranks = chance.choice([[0], [1], [0, 1]])
        background = {"checkpoint__background": chance.random() < 0.5, "checkpoint__interval": chance.choice([1, 2])}
        try:
            delay = chance.random() * 0.06
            run_distributed(
                train_until_killed_while_saving, 2, tree("run", **background), ranks, chance.choice([1, 2, 3]), delay
            )
        except RankFailed as failure:
            if "died" not in str(failure):
                raise
            died += 1
            in_save += bool(list((tmp_path / "run" / "checkpoints").glob("*.tmp")))
    assert run_distributed(train_job, 2, tree("run")) == [None, None], f"seed {seed}"
    print(f"stage {stage}: {died} lives killed, {in_save} with a save unfinished, seed {seed}")
    assert died >= KILLS // 2 - 1, f"seed {seed}"
    assert losses(tmp_path / "run") == losses(tmp_path / "unbroken"), f"seed {seed}"
    log = (tmp_path / "run" / "log" / "rank_0.txt").read_text()
    assert ("its save never finished" in log) >= (in_save > 0), f"seed {seed}"
    assert "skipping" not in log, f"seed {seed}: a damaged checkpoint had its final name"
    assert not list((tmp_path / "run" / "checkpoints").glob("*.tmp"))
