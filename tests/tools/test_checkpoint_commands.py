"""reshape, inspect and verify, on checkpoints of real runs."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import run_distributed
from tests.train.jobs import train_job
from tests.train.test_zero import sharded
from tests.train.tiny import SEQ_LEN, losses, make_dataset, tiny_tree
from titans_pretrain.train.checkpoint import full_fp32_weights
from tools.convert_checkpoint import main

# On one worker of pytest-xdist, so that what they share is trained once.
pytestmark = pytest.mark.xdist_group("checkpoint_commands")

TOKENS = 6 * 4 * SEQ_LEN


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data") / "tiny")


def tree_of(data: Path, runs: Path, name: str, stage: int, **overrides: Any) -> dict[str, Any]:
    settings = {
        "model__variant": "lmm",
        "model__num_layers": 1,
        "model__tie_embeddings": stage == 2,
        "data__batch_tokens": 4 * SEQ_LEN,
        "schedule__tokens": TOKENS,
        "eval__tokens": SEQ_LEN,
        "engine__zero_stage": stage,
        "engine__deepspeed": sharded(300) if stage == 3 else {},
        "parallel__tensor": 2,
        "run__name": name,
    }
    return tiny_tree(data, runs, **{**settings, **overrides})


@pytest.mark.parametrize(("stage", "precision"), [(1, "bf16"), (3, "bf16"), (0, "fp32")])
def test_reshaped_and_in_the_same_layout_again_is_bit_equal(
    stage: int, precision: str, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The hand-made way in, and the one over DeepSpeed's own loading, against the run that never stopped."""
    kept = {"engine__precision": precision, "checkpoint__interval": 3, "checkpoint__keep_last": 0}
    assert run_distributed(train_job, 4, tree_of(dataset, tmp_path, "unbroken", stage, **kept)) == [None] * 4
    checkpoint = tmp_path / "unbroken" / "checkpoints" / "step_00000003"
    main(["reshape", str(tmp_path / "unbroken"), str(tmp_path / "whole"), "--checkpoint", "3"])
    main(["verify", str(tmp_path / "whole")])
    assert "is whole" in capsys.readouterr().out
    before, after = full_fp32_weights(checkpoint), full_fp32_weights(tmp_path / "whole")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)

    trees = [
        tree_of(dataset, tmp_path, name, stage, run__resume=str(path), **kept)
        for name, path in (("from_whole", tmp_path / "whole"), ("from_native", checkpoint))
    ]
    assert run_distributed(train_job, 4, *trees) == [None] * 4
    for name, how in (("from_whole", "resharded: saved as whole parameters"), ("from_native", "resumed from")):
        assert losses(tmp_path / name) == losses(tmp_path / "unbroken")[3:]
        ends = [full_fp32_weights(tmp_path / run / "checkpoints" / "step_00000006") for run in ("unbroken", name)]
        assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])
        assert how in (tmp_path / name / "log" / "rank_0.txt").read_text()


@pytest.fixture(scope="module")
def run(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 2.4 M parameters in 9 layers, none much larger than the others."""
    folder = tmp_path_factory.mktemp("runs")
    wide = {"model__dim": 128, "model__hidden_dim": 512, "model__num_layers": 9, "model__variant": "transformer"}
    tree = tree_of(dataset, folder, "run", 1, run__stop_after=1, **wide)
    assert run_distributed(train_job, 2, tree) == [None, None]
    return folder / "run"


MEASURE = """
import sys, threading, time
from pathlib import Path
import torch
from titans_pretrain.train import engine
from titans_pretrain.train.whole import reshape

def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) * 1024

folder = Path(sys.argv[1])
reshape(folder, folder.parent / "first")  # loads what is loaded once
peak = before = anonymous()
def watch():
    global peak
    while running:
        peak = max(peak, anonymous())
        time.sleep(0.0005)
running = True
thread = threading.Thread(target=watch)
thread.start()
reshape(folder, folder.parent / "second")
running = False
thread.join()
print(peak - before)
"""


def test_reshape_needs_memory_for_parameters_not_for_the_model(run: Path) -> None:
    (checkpoint,) = (run / "checkpoints").iterdir()
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(checkpoint)], capture_output=True, text=True, check=True
    )
    for name in ("first", "second"):
        shutil.rmtree(run / "checkpoints" / name)
    peak, largest = int(result.stdout), 4 * 128 * 512
    total = sum(4 * w.numel() for w in full_fp32_weights(checkpoint).values())
    print(f"peak {peak / 1e6:.2f} MB, state {3 * total / 1e6:.1f} MB, largest tensor {largest / 1e6:.2f} MB")
    assert total > 30 * largest
    assert peak < 10 * largest + 1e6


def test_inspect_tells_what_is_in_it(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["inspect", str(run)])
    text = capsys.readouterr().out
    for expected in (
        "saved by             2 processes, parallel.tensor=2, engine.zero_stage=1, engine.precision=fp32",
        "next sequence        4\n",
        "num_layers: 9",
        "dimension 1",
    ):
        assert expected in text, text
    main(["inspect", str(run), "--json"])
    facts = json.loads(capsys.readouterr().out)
    (checkpoint,) = (run / "checkpoints").iterdir()
    weights = full_fp32_weights(checkpoint)
    assert {row["name"]: row["shape"] for row in facts["parameters"]} == {n: list(w.shape) for n, w in weights.items()}
    assert facts["tokens"] == 4 * SEQ_LEN
    assert facts["data"]["stream"]["seq_len"] == SEQ_LEN


def test_verify_names_the_damage(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (checkpoint,) = (run / "checkpoints").iterdir()
    whole = tmp_path / "whole"
    main(["reshape", str(checkpoint), str(whole)])
    victim = whole / "parameters" / "blocks.3.feed_forward.up.weight.safetensors"
    content = bytearray(victim.read_bytes())
    content[-5] ^= 4
    victim.write_bytes(content)
    with pytest.raises(SystemExit):
        main(["verify", str(whole)])
    assert "blocks.3.feed_forward.up.weight.safetensors" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["reshape", str(checkpoint), str(whole)])
    assert "exists" in capsys.readouterr().err


def test_a_reshape_that_does_not_fit_the_disk_leaves_nothing(run: Path, tmp_path: Path) -> None:
    command = [sys.executable, "tools/convert_checkpoint.py", "reshape", str(run), str(tmp_path / "whole")]
    result = subprocess.run(
        command,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )
    assert result.returncode == 1, result
    assert result.stderr.startswith("error: cannot write"), result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
