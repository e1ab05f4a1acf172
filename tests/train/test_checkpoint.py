"""Checkpoints hold what they say, fit the disk or leave no trace, and give back the model that wrote them."""

from __future__ import annotations

import contextlib
import json
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from tests.distributed import run_distributed
from tests.train.jobs import train_job
from tests.train.test_zero import sharded
from tests.train.tiny import SEQ_LEN, losses, tiny_tree
from titans_pretrain.config import config_from_dict
from titans_pretrain.errors import UserError
from titans_pretrain.model import Titans
from titans_pretrain.train.checkpoint import (
    Progress,
    find_checkpoints,
    find_damage,
    full_fp32_weights,
    prune,
    read_manifest,
)


def tree_of(data: Path, runs: Path, **overrides: Any) -> dict[str, Any]:
    few = {"model__variant": "transformer", "schedule__tokens": 4 * 8 * SEQ_LEN, "eval__tokens": SEQ_LEN}
    return tiny_tree(data, runs, **{**few, **overrides})


def logits_of(model: Titans, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(model.hidden(tokens)[0])


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_full_weights_give_the_trainers_logits(stage: int, tied: bool, dataset: Path, tmp_path: Path) -> None:
    trees = [
        tree_of(
            dataset,
            tmp_path,
            model__variant="lmm" if tied else "transformer",
            model__num_layers=1 if tied else 2,
            model__memory_depth=1,
            model__tie_embeddings=tied,
            schedule__tokens=2 * 8 * SEQ_LEN,
            engine__zero_stage=stage,
            engine__deepspeed=sharded(100) if stage == 3 else {},
            engine__precision=precision,
            run__name=precision,
        )
        for precision in (("fp32", "bf16") if stage else ("fp32",))
    ]
    assert run_distributed(train_job, 2, *trees) == [None, None]
    for tree in trees:
        (checkpoint,) = find_checkpoints(tmp_path / tree["run"]["name"])
        manifest = read_manifest(checkpoint)
        model = Titans(config_from_dict(manifest["config"]).model)
        weights = full_fp32_weights(checkpoint)
        assert all(tensor.dtype == torch.float32 for tensor in weights.values())
        model.load_state_dict(weights)
        stored = safetensors.torch.load_file(checkpoint / "logits.safetensors")
        assert stored["tokens"].shape == (1, SEQ_LEN)
        assert stored["logits"].dtype == torch.float32
        bf16 = tree["engine"]["precision"] == "bf16"
        if bf16:
            model.bfloat16()
        logits = logits_of(model, stored["tokens"])
        assert logits.std() > 0.3, "two steps of training are visible in the logits"
        # The same bf16 weights, but ZeRO-3 gathers them to other addresses and the CPU's kernels then round differently.
        torch.testing.assert_close(logits, stored["logits"], atol=0.06 if bf16 else 1e-5, rtol=0)


def test_manifest_names_every_file(dataset: Path, tmp_path: Path) -> None:
    assert run_distributed(train_job, 2, tree_of(dataset, tmp_path)) == [None, None]
    (checkpoint,) = find_checkpoints(tmp_path / "run")
    manifest = read_manifest(checkpoint)
    on_disk = {str(p.relative_to(checkpoint)) for p in checkpoint.rglob("*") if p.is_file()}
    assert on_disk == {*manifest["files"], "manifest.json"}
    assert {"rank_0.pt", "rank_1.pt", "tokenizer.model", "logits.safetensors"} < on_disk
    assert manifest["step"] == 4
    assert manifest["position"] == 32
    assert manifest["tokens"] == 4 * 8 * SEQ_LEN
    assert manifest["config"]["model"]["vocab_size"] == 61
    assert manifest["layout"] == {"world_size": 2, "zero_stage": 1, "precision": "fp32", "tensor": 1}
    assert (checkpoint / "tokenizer.model").read_bytes() == (dataset / "tokenizer.model").read_bytes()
    for name in manifest["files"]:
        broken = tmp_path / "broken"
        shutil.copytree(checkpoint, broken)
        (broken / name).unlink()
        assert find_damage(broken) == f"{name} is missing"
        shutil.rmtree(broken)
    assert find_damage(checkpoint) is None


def test_prune_keeps_the_newest_and_what_is_not_a_checkpoint(tmp_path: Path) -> None:
    for name in ("step_00000001", "step_00000002", "step_00000010", "step_00000009.damaged", "notes"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    prune(tmp_path, 0)
    assert len(list((tmp_path / "checkpoints").iterdir())) == 5
    prune(tmp_path, 2)
    left = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert left == ["notes", "step_00000002", "step_00000009.damaged", "step_00000010"]


def test_manifest_of_another_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(UserError, match="format 99"):
        read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        read_manifest(tmp_path)
    with pytest.raises(UserError, match="missing"):
        read_manifest(tmp_path / "nothing")


# -------------------------------------------------------------------------------------------------------------- full disks


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk of its own with 2.5 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2500k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    with contextlib.suppress(OSError):
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_is_too_small_is_refused_before_the_first_byte(dataset: Path, small_disk: Path) -> None:
    tree = tree_of(dataset, small_disk, checkpoint__interval=1)
    assert run_distributed(train_job, 2, {**tree, "run": {**tree["run"], "stop_after": 1}}) == [None, None]
    (small_disk / "filler").write_bytes(bytes(shutil.disk_usage(small_disk).free - 300_000))
    sentences = run_distributed(train_job, 2, tree)
    assert sentences[0] == sentences[1]
    for text in ("cannot save checkpoint", "step_00000002", "MB left", "1 earlier checkpoint is untouched", "run.dir"):
        assert text in sentences[0], sentences[0]
    assert [p.name for p in (small_disk / "run" / "checkpoints").iterdir()] == ["step_00000001"]
    (small_disk / "filler").unlink()
    # After making room the run goes on from the checkpoint that was kept.
    assert run_distributed(train_job, 2, {**tree, "checkpoint": {"interval": 0, "keep_last": 1}}) == [None, None]
    assert len(losses(small_disk / "run")) == 4


def train_with_file_limit(tree: dict[str, Any], rank: int, limit: int) -> str | None:
    """Train, `rank` not being able to write files beyond `limit` bytes: the disk fails in the middle of a file."""
    import os

    if int(os.environ["RANK"]) == rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    return train_job(tree)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_disk_that_fails_in_the_middle_ends_all_ranks(rank: int, dataset: Path, tmp_path: Path) -> None:
    first = tree_of(dataset, tmp_path, run__stop_after=1)
    assert run_distributed(train_job, 2, first) == [None, None]
    (whole,) = find_checkpoints(tmp_path / "run")
    before = {p: p.read_bytes() for p in whole.rglob("*") if p.is_file()}
    sentences = run_distributed(train_with_file_limit, 2, tree_of(dataset, tmp_path), rank, 50_000, timeout=60)
    assert sentences[0] == sentences[1]
    for text in ("cannot save checkpoint", "step_00000004", "File too large", "1 earlier checkpoint is untouched"):
        assert text in sentences[0], sentences[0]
    assert ("rank 1: " in sentences[0]) == (rank == 1)
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == [whole.name]
    assert {p: p.read_bytes() for p in whole.rglob("*") if p.is_file()} == before
    assert Progress(1, 8, 8 * SEQ_LEN).step == read_manifest(whole)["step"]
