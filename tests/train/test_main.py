"""The command itself, as a user starts it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.distributed import free_port, run_distributed
from tests.train.jobs import train_job
from tests.train.tiny import SEQ_LEN, losses, make_dataset, tiny_tree
from titans_pretrain.config import iterate_reference
from titans_pretrain.train.__main__ import parse
from titans_pretrain.train.checkpoint import find_checkpoints

COMMAND = [sys.executable, "-m", "titans_pretrain.train"]
ROOT = Path(__file__).resolve().parents[2]


def start(command: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "RANK", "WORLD_SIZE"))
    }
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)


def test_help_lists_every_setting() -> None:
    shown = start([*COMMAND, "--help"])
    assert shown.returncode == 0
    for _, _, fields in iterate_reference():
        for field in fields:
            assert field.name in shown.stdout


def test_command_line() -> None:
    assert parse(["a.yaml", "run.seed=1", "run.name=x"]) == ("a.yaml", ["run.seed=1", "run.name=x"])
    assert parse(["run.seed=1"]) == (None, ["run.seed=1"])
    assert parse([]) == (None, [])


@pytest.mark.slow
def test_torchrun_trains_and_refuses(dataset: Path, tmp_path: Path) -> None:
    """Real processes from end to end: a run, then a refusal that both ranks meet and one says, without a traceback."""
    tree = tiny_tree(
        dataset, tmp_path, model__variant="transformer", schedule__tokens=5 * 8 * SEQ_LEN, eval__tokens=SEQ_LEN
    )
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    torchrun = [*launcher, f"--master-port={free_port()}", "-m"]
    command = [*torchrun, "titans_pretrain.train", str(tmp_path / "config.yaml")]
    ended = start(command)
    assert ended.returncode == 0, ended.stderr
    assert "torchrun: rank 0 of 2" in ended.stdout
    assert "finished at step 5 of 5" in ended.stdout
    assert "Traceback" not in ended.stderr
    assert len(losses(tmp_path / "run")) == 5
    assert find_checkpoints(tmp_path / "run")[0].name == "step_00000005"

    ended = start([*command, "data.batch_tokens=96"])
    assert ended.returncode == 1
    assert ended.stderr.count("error: ") == 1, ended.stderr
    assert "make data.batch_tokens a multiple of 64" in ended.stderr
    assert "titans_pretrain/train/__main__.py" not in ended.stderr, "no traceback of ours"


def test_misspelt_key_ends_with_one_sentence(tmp_path: Path) -> None:
    ended = start([*COMMAND, "run.sed=3"])
    assert ended.returncode == 1
    assert ended.stdout == ""
    assert ended.stderr == "error: unknown key in section run: run.sed; did you mean run.seed?\n"


def test_bad_data_and_sizes_are_refused_on_all_ranks(dataset: Path, tmp_path: Path) -> None:
    damaged = make_dataset(tmp_path / "damaged")
    shard = next(damaged.glob("train-*.tar"))
    content = bytearray(shard.read_bytes())
    for place in range(2000, len(content) - 4000, 500):
        content[place] ^= 1
    shard.write_bytes(content)
    cases = [
        ({"data__path": ""}, ["data.path is empty"]),
        ({"data__path": str(tmp_path / "nowhere")}, ["nowhere", "data.path"]),
        ({"model__vocab_size": 60}, ["model.vocab_size (60)", "61", "model.vocab_size=0"]),
        ({"data__batch_tokens": 3 * SEQ_LEN}, ["data.batch_tokens", "2 data-parallel ranks"]),
        ({"data__seq_len": 8000, "data__batch_tokens": 16000}, ["too short", "data.seq_len"]),
        ({"data__path": str(damaged)}, [str(shard.name), "CRC"]),
        ({"run__dir": "/proc/nothing"}, ["cannot create run folder", "run.dir"]),
    ]
    for overrides, says in cases:
        overrides = {"model__variant": "transformer", "eval__tokens": SEQ_LEN, **overrides}
        sentences = run_distributed(train_job, 2, tiny_tree(dataset, tmp_path / "runs", **overrides))
        assert sentences[0] == sentences[1], overrides
        for text in says:
            assert text in sentences[0], sentences[0]
