"""Do the readers of the benchmark read the same tokens, and does it tell what it measured?"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from titans_pretrain.data.shards import ShardSet
from titans_pretrain.data.stream import TokenStream
from titans_pretrain.errors import UserError
from tools import benchmark_data as tool

SEQ_LEN, ROWS = 64, 4


def test_readers_in_sequence_hand_over_the_same_tokens(tmp_path: Path) -> None:
    data = tool.make_dataset(tmp_path / "data", 10 * SEQ_LEN * ROWS + 1, 1)
    shards = ShardSet.open(data)
    whole = shards.read("train", 0, 0, shards.num_tokens("train"))
    whole.tofile(tmp_path / "flat.bin")
    stream = TokenStream(shards, "train", SEQ_LEN, seed=0, shuffle=False)
    readers = {
        "ours": tool.ours(stream, stream.num_sequences, ROWS),
        "flat": tool.flat(tmp_path / "flat.bin", shards.dtype, SEQ_LEN, ROWS, None),
        "webdataset": tool.stock_webdataset([str(data / "train-00000.tar")], SEQ_LEN, ROWS),
    }
    for name, batches in readers.items():
        read = list(batches)
        assert len(read) == 10, name
        for inputs, labels in read:
            assert inputs.shape == labels.shape == (ROWS, SEQ_LEN)
        np.testing.assert_array_equal(np.concatenate([inputs.flatten() for inputs, _ in read]), whole[:-1], name)
        np.testing.assert_array_equal(np.concatenate([labels.flatten() for _, labels in read]), whole[1:], name)


def test_one_run_tells_of_every_reader(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--tokens", "40000", "--shards", "2", "--seq-len", "64", "--rows", "8", "--repeats", "1"]
    tool.main([*sizes, "--json", str(tmp_path / "told.json")])
    told = json.loads((tmp_path / "told.json").read_text())
    assert len(told["readers"]) == 6
    assert all(reader["mtokens_per_cpu_second"] > 0 for reader in told["readers"].values())
    assert all(reader["tokens"] > 38000 for reader in told["readers"].values())
    printed = capsys.readouterr().out
    assert all(name in printed for name in told["readers"])


def test_too_few_tokens_are_said(tmp_path: Path) -> None:
    data = tool.make_dataset(tmp_path / "data", 1000, 1)
    with pytest.raises(UserError, match="fewer tokens than one batch"):
        tool.benchmark(data, tmp_path, 64, 1000, 1)
