"""Real runs over a mixture: on another number of processes and back, with batches that grow, and in new phases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed import run_distributed
from tests.train.jobs import train_job
from tests.train.tiny import SEQ_LEN, losses, make_dataset, read_metrics, tiny_tree

BATCH = 8 * SEQ_LEN
TOLERANCE = 1e-5
"""Of losses in nats where another number of ranks adds fp32 numbers in another order; measured: 4e-7."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("sources")
    return [make_dataset(folder / name, seed=seed) for seed, name in enumerate(("web", "code", "books"))]


def tree_of(folders: list[Path], runs: Path, name: str, **overrides: Any) -> dict[str, Any]:
    sources = [{"path": str(path), "weight": weight} for path, weight in zip(folders, (5, 3, 2), strict=True)]
    settings = {
        "model__variant": "transformer",
        "model__num_layers": 1,
        "data__path": "",
        "data__sources": sources,
        "data__micro_batch": 2,
        "schedule__tokens": 14 * BATCH,
        "eval__tokens": 6 * SEQ_LEN,
        "log__interval": 1,
        "run__name": name,
    }
    return tiny_tree(Path(), runs, **{**settings, **overrides})


def test_other_numbers_of_processes_and_back_equal_the_uninterrupted_run(folders: list[Path], tmp_path: Path) -> None:
    def tree(name: str, **overrides: Any) -> dict[str, Any]:
        return tree_of(
            folders,
            tmp_path,
            name,
            engine__zero_stage=0,
            data__phases=[{"tokens": 5 * BATCH, "weights": [0, 1, 4]}],
            data__batch_ramp=[{"tokens": 6 * BATCH, "batch_tokens": 2 * BATCH}],
            eval__interval=2,
            **overrides,
        )

    assert run_distributed(train_job, 2, tree("whole")) == [None] * 2
    for processes, sequence, steps in ((2, 1, 3), (1, 1, 2), (4, 2, 3), (2, 1, 0)):
        piece = tree("pieces", run__stop_after=steps, parallel__sequence=sequence)
        assert run_distributed(train_job, processes, piece) == [None] * processes
    whole, pieces = read_metrics(tmp_path / "whole"), read_metrics(tmp_path / "pieces")
    assert [row["step"] for row in pieces] == [row["step"] for row in whole]
    assert whole[-1]["step"] == 10
    furthest = 0.0
    for row, wanted in zip(pieces, whole, strict=True):
        for name in ("tokens", "lr", "tokens/web", "tokens/code", "tokens/books", "epochs/web"):
            assert row.get(name) == wanted.get(name), (row["step"], name)
        for name in ("loss", "valid_loss", "valid_loss/web", "valid_loss/books"):
            assert (name in row) == (name in wanted)
            furthest = max(furthest, abs(row.get(name, 0.0) - wanted.get(name, 0.0)))
    print(f"losses differ by at most {furthest:.1e}")
    assert furthest < TOLERANCE
    assert losses(tmp_path / "pieces")[:3] == losses(tmp_path / "whole")[:3]
    last = [row for row in whole if "loss" in row][-1]
    assert last["tokens/web"] == 20 * SEQ_LEN, "half of 40 before the phase, none after"
    assert sum(last[f"tokens/{name}"] for name in ("web", "code", "books")) == last["tokens"] == 14 * BATCH
    shares = {"web": 0.5, "code": 0.3, "books": 0.2}
    for row in whole:
        if "valid_loss" in row:
            assert row["valid_loss"] == pytest.approx(sum(w * row[f"valid_loss/{n}"] for n, w in shares.items()))
    log = (tmp_path / "pieces" / "log" / "rank_0.txt").read_text()
    assert "source books: weight 2, 200 sequences an epoch" in log
    assert "256 tokens = 2 x 2 micro-batches x 2 sequences x 32, of 512 tokens after 1,536" in log
    (sentence, *_) = run_distributed(train_job, 3, tree("pieces"))
    assert "does not divide over 3 data-parallel ranks" in sentence


@pytest.mark.parametrize(("stage", "micro_batch"), [(1, 1), (2, 2), (3, 1), (1, 0)])
def test_a_ramp_equals_runs_of_either_batch_size(
    stage: int, micro_batch: int, folders: list[Path], tmp_path: Path
) -> None:
    """2, 8 and 4 micro-batches a step (half so many of two sequences) under every way of accumulating them, and a share that
    is one micro-batch."""

    def tree(name: str, **overrides: Any) -> dict[str, Any]:
        few = {"schedule__tokens": 8 * BATCH, "eval__tokens": SEQ_LEN, "data__micro_batch": micro_batch}
        return tree_of(folders, tmp_path, name, engine__zero_stage=stage, **few, **overrides)

    half, twice = {"data__batch_tokens": BATCH // 2}, {"data__batch_tokens": 2 * BATCH}
    ramp = [{"tokens": BATCH + 1, "batch_tokens": 2 * BATCH}, {"tokens": 5 * BATCH, "batch_tokens": BATCH}]
    trees = [
        tree("ramp", data__batch_ramp=ramp, **half),
        tree("pieces", run__stop_after=3, **half),
        tree("pieces", run__stop_after=2, run__new_phase=True, **twice),
        tree("pieces", run__new_phase=True),
    ]
    assert run_distributed(train_job, 2, *trees) == [None] * 2
    assert len(losses(tmp_path / "ramp")) == 3 + 2 + 3
    assert losses(tmp_path / "ramp") == losses(tmp_path / "pieces")
    rows = [row["tokens"] for row in read_metrics(tmp_path / "pieces") if "loss" in row]
    assert rows == [BATCH * n // 2 for n in (1, 2, 3, 7, 11, 13, 15, 17)]
    log = (tmp_path / "pieces" / "log" / "rank_0.txt").read_text()
    assert "a new phase begins at step 3: data.batch_tokens: 128 -> 512" in log


def test_a_new_phase_reads_new_data_from_its_beginning_and_goes_on_in_it(folders: list[Path], tmp_path: Path) -> None:
    def tree(name: str, used: list[Path], **overrides: Any) -> dict[str, Any]:
        sources = [{"path": str(path)} for path in used]
        few = {"schedule__tokens": 8 * BATCH, "eval__tokens": SEQ_LEN, "checkpoint__keep_last": 0}
        return tree_of(folders, tmp_path, name, data__sources=sources, **few, **overrides)

    first, second = folders[:2], folders[1:]
    assert run_distributed(train_job, 1, tree("a", first, run__stop_after=3)) == [None]
    (sentence,) = run_distributed(train_job, 1, tree("a", second))
    assert "data.sources[0].path" in sentence
    assert "run.new_phase=true" in sentence
    begin = str(tmp_path / "a" / "checkpoints" / "step_00000003")
    trees = [
        tree("a", second, run__new_phase=True, run__stop_after=2),
        tree("a", second, run__new_phase=True),  # by itself: it finds the new stream, and no new phase
        tree("b", second, run__new_phase=True, run__resume=begin),
    ]
    assert run_distributed(train_job, 1, *trees) == [None]
    a, b = losses(tmp_path / "a"), losses(tmp_path / "b")
    assert len(a) == 8
    assert a[3:] == b
    last = read_metrics(tmp_path / "a")[-2]
    assert last["tokens"] == 8 * BATCH
    assert last["tokens/code"] + last["tokens/books"] == 5 * BATCH
