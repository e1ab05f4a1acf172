"""Training from elsewhere and over damage: the same losses as from local files, and damage never goes by untold."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.data.servers import serve, serve_s3
from tests.data.test_shards import block_table, cut
from tests.data.tiny import flip_byte
from tests.distributed import run_distributed
from tests.train.jobs import train_job
from tests.train.tiny import SEQ_LEN, losses, make_dataset, read_metrics, tiny_tree
from titans_pretrain.data import transfer
from titans_pretrain.data.manifest import read_manifest

STEPS = 5


def tree(data: Path | str, runs: Path, name: str, **overrides: Any) -> dict[str, Any]:
    given = {
        "model__num_layers": 1,
        "schedule__tokens": STEPS * 8 * SEQ_LEN,
        "run__name": name,
        "checkpoint__interval": 0,
        **overrides,
    }
    result = tiny_tree(Path(), runs, **given)
    result["data"]["path"] = str(data)
    return result


def remote_job(environment: dict[str, str], *trees: dict[str, dict[str, Any]]) -> str | None:
    """`train_job` with variables that name a server: the process that ranks are forked from may be older than it."""
    os.environ.update(environment)
    transfer.FIRST_PAUSE = 0.01
    return train_job(*trees)


def test_http_s3_and_pipe_train_to_the_losses_of_local_files(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "set", doc_tokens=500, shard_tokens=1000)
    assert len(list(dataset.glob("train-*.tar"))) > 3
    settings = {"data__cache_dir": str(tmp_path / "cache"), "eval__tokens": 2 * SEQ_LEN}
    with serve(dataset) as server, serve_s3() as upload:
        bucket = upload(dataset)
        aws = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
        server.faults["train-00001.tar"] = [("cut", 500), ("status", 503)]
        server.faults["train-00002.tar"] = [("flip", 600)]
        places = {"local": dataset, "http": server.url, "s3": bucket, "pipe": f"pipe:cat {dataset}/{{name}}"}
        trees = [tree(place, tmp_path, name, **settings) for name, place in places.items()]
        assert run_distributed(remote_job, 2, aws, *trees) == [None, None]
        assert server.count("train-00000.tar") == 1  # two ranks, one download
    expected = losses(tmp_path / "local")
    assert len(expected) == STEPS
    for name in places:
        assert losses(tmp_path / name) == expected, name
        assert read_metrics(tmp_path / name)[-1]["valid_loss"] == read_metrics(tmp_path / "local")[-1]["valid_loss"]
    assert not list((tmp_path / "cache").glob("*.tmp.*"))


# ------------------------------------------------------------------------------------------------------------- skipping


def broken_copy(dataset: Path, target: Path, rows: int) -> Path:
    """A copy whose second block of 64 tokens (two sequences) of each 4 is damaged, `rows` sequences or a little more in all."""
    shutil.copytree(dataset, target)
    shard = target / "train-00000.tar"
    table = block_table(target, 0)
    for number in range(rows // 2):
        flip_byte(shard, table[4 * number + 1]["offset"] + 30)
    return target


def test_masked_rows_are_counted_and_the_same_in_every_layout(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "set", block_tokens=64)
    broken = broken_copy(dataset, tmp_path / "broken", 40)
    skip = {"data__on_bad": "skip", "parallel__memory": "hand_off"}
    layouts: dict[str, tuple[int, dict[str, Any]]] = {
        "one": (1, {}),
        "data": (2, {}),
        "sequence": (2, {"parallel__sequence": 2}),
        "tensor": (2, {"parallel__tensor": 2}),
    }
    for name, (world, overrides) in layouts.items():
        assert run_distributed(train_job, world, tree(broken, tmp_path, name, **skip, **overrides)) == [None] * world
    told = {name: [row["masked_rows"] for row in read_metrics(tmp_path / name) if "loss" in row] for name in layouts}
    assert told == dict.fromkeys(layouts, told["one"])
    total = int(sum(told["one"]))
    assert 5 <= total < STEPS * 8
    for name in layouts:
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "one"), rel=2e-4), name
        log = (tmp_path / name / "log" / "rank_0.txt").read_text()
        assert f"masked for {broken}/train-00000.tar" in log
        assert f"{total} rows were masked since this start: {total} of {broken}/train-00000.tar" in log
        assert "block" in log
    # On sound data the setting changes nothing but the metric.
    trees = [tree(dataset, tmp_path, "skip", **skip), tree(dataset, tmp_path, "raise")]
    assert run_distributed(train_job, 1, *trees) == [None]
    assert losses(tmp_path / "skip") == losses(tmp_path / "raise")
    assert {row["masked_rows"] for row in read_metrics(tmp_path / "skip") if "loss" in row} == {0}
    assert losses(tmp_path / "skip") != pytest.approx(losses(tmp_path / "one"), rel=1e-5)


def one_bad_copy_job(trees: list[dict[str, Any]]) -> str | None:
    """Each rank with the dataset that its own machine holds."""
    return train_job(trees[int(os.environ["RANK"])])


@pytest.mark.parametrize(("axis", "bad_rank"), [("sequence", 1), ("tensor", 0)])
def test_a_copy_bad_on_one_rank_masks_the_row_on_its_peers(axis: str, bad_rank: int, tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "set", block_tokens=64)
    broken = broken_copy(dataset, tmp_path / "broken", 40)

    def of(data: Path, name: str) -> dict[str, Any]:
        return tree(
            data,
            tmp_path,
            name,
            data__on_bad="skip",
            schedule__tokens=2 * 8 * SEQ_LEN,
            **{f"parallel__{axis}": 2},
        )

    one = [of(broken if rank == bad_rank else dataset, "one") for rank in range(2)]
    assert run_distributed(one_bad_copy_job, 2, one) == [None, None]
    assert run_distributed(train_job, 2, of(broken, "both")) == [None, None]
    masked = {n: [row["masked_rows"] for row in read_metrics(tmp_path / n) if "loss" in row] for n in ("one", "both")}
    assert sum(masked["one"]) > 0
    # The second slice of every row that touches a bad block touches it too, so bad copies on both ranks mask no more.
    assert masked["one"] == masked["both"]
    assert losses(tmp_path / "one") == losses(tmp_path / "both")


def test_too_many_bad_rows_or_a_step_of_nothing_else_stop_the_run(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "set", block_tokens=64)
    broken = broken_copy(dataset, tmp_path / "broken", 40)
    found = run_distributed(train_job, 2, tree(broken, tmp_path, "limit", data__on_bad="skip", data__max_bad=3))
    assert found[0] == found[1]
    for part in (
        "rows cannot be read by step",
        "above data.max_bad (3)",
        "train-00000.tar",
        "block",
        "raise data.max_bad",
    ):
        assert part in str(found[0])

    gone = tmp_path / "gone"
    shutil.copytree(dataset, gone)
    (gone / "train-00000.tar").unlink()
    found = run_distributed(train_job, 2, tree(gone, tmp_path, "gone", data__on_bad="skip"))
    blamed = f"8 of {gone}/train-00000.tar"
    sentence = f"every row of step 1 is masked, so there is nothing to train on ({blamed}): restore the data"
    assert found == [sentence] * 2


@pytest.mark.parametrize(
    ("harm", "sentence"),
    [
        (
            lambda d: flip_byte(d / "train-00000.tar", block_table(d, 0)[0]["offset"]),
            "train-00000.tar is damaged: block 0",
        ),
        (
            lambda d: flip_byte(d / "valid-00000.tar", block_table(d, 0)[0]["offset"]),
            "valid-00000.tar is damaged: block 0",
        ),
        (lambda d: cut(d / "train-00000.tar", 3000), "train-00000.tar has 3000 bytes, but the manifest says"),
    ],
)
def test_by_default_damage_stops_every_rank_with_one_sentence(
    tmp_path: Path, harm: Callable[[Path], object], sentence: str
) -> None:
    dataset = make_dataset(tmp_path / "set")
    harm(dataset)
    found = run_distributed(train_job, 2, tree(dataset, tmp_path, "run"))
    assert all(sentence in str(text) for text in found), found


def test_damaged_validation_data_stops_every_rank_even_where_bad_rows_are_skipped(tmp_path: Path) -> None:
    """Found in the middle of an evaluation, by one rank alone."""
    dataset = make_dataset(tmp_path / "set", block_tokens=64)
    entry = read_manifest(dataset).splits["valid"].shards[0]
    assert entry.tokens > 10 * SEQ_LEN
    from titans_pretrain.data.shard_file import BlockIndex, ShardFile

    table = BlockIndex(entry, ShardFile(dataset / entry.name)).table
    flip_byte(dataset / entry.name, table[3]["offset"] + 64)  # sequences 6 and 7
    found = run_distributed(train_job, 2, tree(dataset, tmp_path, "run", data__on_bad="skip"))
    assert all("valid-00000.tar is damaged: block 3" in str(text) for text in found), found
