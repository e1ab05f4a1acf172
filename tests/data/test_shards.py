"""Shards: what is written is what is read, by us and by stock webdataset, and damage is named before it is served."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path

import numpy as np
import pytest
import webdataset

from tests.data.tiny import VOCAB, documents, flip_byte, write_dataset
from titans_pretrain.data.manifest import MANIFEST_NAME, TOKENIZER_NAME, read_manifest
from titans_pretrain.data.shard_file import BlockIndex, ShardFile
from titans_pretrain.data.shards import ShardSet
from titans_pretrain.data.verify import verify
from titans_pretrain.data.writer import ShardWriter, unigram_entropy
from titans_pretrain.errors import UserError


def read_all(shards: ShardSet, split: str) -> list[np.ndarray]:
    return [shards.read(split, i, 0, entry.tokens) for i, entry in enumerate(shards.split(split).shards)]


@pytest.mark.parametrize(("vocab_size", "dtype"), [(VOCAB, "uint16"), (65536, "uint16"), (65537, "uint32")])
def test_reader_gives_back_the_documents(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    train, valid = documents(200, vocab_size=vocab_size), documents(20, seed=1, vocab_size=vocab_size)
    train[0][0] = vocab_size - 1
    shards = ShardSet.open(write_dataset(tmp_path / "d", train, valid, vocab_size=vocab_size))
    np.testing.assert_array_equal(np.concatenate(read_all(shards, "train")), np.concatenate(train))
    np.testing.assert_array_equal(np.concatenate(read_all(shards, "valid")), np.concatenate(valid))
    assert read_all(shards, "train")[0].dtype == dtype
    assert shards.num_tokens("train") == sum(map(len, train))
    assert len(shards.split("train").shards) > 3


def test_stock_webdataset_reads_the_same_tokens(dataset: Path) -> None:
    shards = ShardSet.open(dataset)
    for number, entry in enumerate(shards.split("train").shards):
        samples = list(webdataset.WebDataset(str(dataset / entry.name), shardshuffle=False).decode())
        assert all(sorted(key for key in s if key[0] != "_") == ["docends.npy", "tokens.npy"] for s in samples)
        tokens = np.concatenate([sample["tokens.npy"] for sample in samples])
        np.testing.assert_array_equal(tokens, shards.read("train", number, 0, entry.tokens))
        assert tokens.dtype == np.uint16
        assert [len(sample["tokens.npy"]) for sample in samples[:-1]] == [300] * (len(samples) - 1)


def test_docends_mark_the_documents_and_shards_end_with_one(dataset: Path) -> None:
    expected, lengths = [len(d) for d in documents(280)], []
    for entry in ShardSet.open(dataset).split("train").shards:
        begin, base = 0, 0
        for sample in webdataset.WebDataset(str(dataset / entry.name), shardshuffle=False).decode():
            for end in sample["docends.npy"].tolist():
                lengths.append(base + end - begin)
                begin = base + end
            base += len(sample["tokens.npy"])
        assert begin == base == entry.tokens
        assert 2000 <= entry.tokens < 2100 or entry.name == "train-00006.tar"
    assert lengths == expected


def test_read_any_range_across_blocks(dataset: Path) -> None:
    shards = ShardSet.open(dataset)
    whole = shards.read("train", 1, 0, shards.split("train").shards[1].tokens)
    for start in (0, 1, 299, 300, 301, 599, len(whole) - 1):
        for count in (1, 2, 300, 601):
            if start + count <= len(whole):
                np.testing.assert_array_equal(shards.read("train", 1, start, count), whole[start : start + count])


def test_files_depend_on_their_content_alone(tmp_path: Path) -> None:
    first = write_dataset(tmp_path / "a", documents(100), documents(9, seed=1))
    second = write_dataset(tmp_path / "b", documents(100), documents(9, seed=1))
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in second.iterdir())
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)


def test_pieces_written_together_or_apart_are_the_same(tmp_path: Path) -> None:
    docs = documents(100)
    lengths = np.array([len(d) for d in docs])
    entries = []
    for name, groups in (("one", [slice(0, 100)]), ("many", [slice(i, i + 1) for i in range(100)])):
        with ShardWriter(tmp_path, name, VOCAB, shard_tokens=500, block_tokens=64) as writer:
            for group in groups:
                writer.write(np.concatenate(docs[group]), lengths[group])
        entries.append([shard.sha256 for shard in writer.shards])
    assert entries[0] == entries[1]


def test_fingerprint_follows_the_content(tmp_path: Path) -> None:
    paths = [write_dataset(tmp_path / str(i), documents(50, seed=i), documents(9, seed=9)) for i in (0, 1)]
    same = write_dataset(tmp_path / "same", documents(50, seed=0), documents(9, seed=9))
    prints = [ShardSet.open(path).fingerprint for path in (*paths, same)]
    assert prints[0] == prints[2] != prints[1]


def test_unigram_entropy() -> None:
    assert unigram_entropy(np.array([5, 5, 0, 5, 5])) == pytest.approx(np.log(4))
    assert unigram_entropy(np.array([3, 1])) == pytest.approx(-(0.75 * np.log(0.75) + 0.25 * np.log(0.25)))


def test_more_shards_than_open_files(tmp_path: Path) -> None:
    docs = documents(100)
    shards = ShardSet.open(write_dataset(tmp_path / "d", docs, docs[:5], shard_tokens=1))
    before = len(os.listdir("/proc/self/fd"))
    np.testing.assert_array_equal(np.concatenate(read_all(shards, "train")), np.concatenate(docs))
    assert len(shards.split("train").shards) == 100
    assert len(os.listdir("/proc/self/fd")) <= before + 64
    assert len(shards._indexes) <= 64


def test_an_error_while_writing_leaves_no_half_shard(tmp_path: Path) -> None:
    def fail() -> None:
        with ShardWriter(tmp_path, "train", VOCAB, shard_tokens=100, block_tokens=10) as writer:
            writer.write(np.arange(150), np.array([120, 30]))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train-00000.tar"]


def test_an_error_in_the_last_write_leaves_no_half_shard(tmp_path: Path) -> None:
    def fill_the_disk() -> None:
        with ShardWriter(tmp_path, "train", VOCAB, shard_tokens=10**6, block_tokens=10**5) as writer:
            writer.write(np.zeros(50_000, dtype=np.int64), np.array([50_000]))
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(OSError, match="File too large"):
            fill_the_disk()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------------- bad input


def rewrite(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def cut(path: Path, size: int) -> None:
    path.chmod(0o644)
    os.truncate(path, size)


@pytest.mark.parametrize(
    ("harm", "sentence"),
    [
        (lambda d: [f.unlink() for f in d.iterdir()] and d.rmdir(), "no dataset directory at .*data.path"),
        (lambda d: (d / MANIFEST_NAME).unlink(), "has no index.json"),
        (lambda d: (d / MANIFEST_NAME).write_text("{"), "manifest .* is damaged"),
        (lambda d: (d / MANIFEST_NAME).write_text("[]"), "manifest .* is damaged"),
        (lambda d: rewrite(d / MANIFEST_NAME, vocab_size=999), "manifest .* is damaged"),
        (lambda d: rewrite(d / MANIFEST_NAME, version=2), "format version 2, but this code reads version 1"),
        (lambda d: (d / "train-00003.tar").unlink(), "train-00003.tar: No such file"),
        (lambda d: cut(d / "train-00003.tar", 5120), "train-00003.tar has 5120 bytes, but the manifest says"),
        (lambda d: (d / TOKENIZER_NAME).unlink(), "cannot read .*tokenizer.model"),
        (lambda d: (d / TOKENIZER_NAME).write_text("other"), "is not the tokenizer that made the shards"),
    ],
)
def test_open_refuses(dataset: Path, harm, sentence: str) -> None:
    harm(dataset)
    with pytest.raises(UserError, match=sentence):
        ShardSet.open(dataset)


def block_table(dataset: Path, shard: int) -> list[dict[str, int]]:
    entry = read_manifest(dataset).splits["train"].shards[shard]
    return BlockIndex(entry, ShardFile(dataset / entry.name)).table


def test_flipped_byte_is_found_at_its_block_and_nowhere_else(dataset: Path) -> None:
    table = block_table(dataset, 1)
    flip_byte(dataset / "train-00001.tar", table[2]["offset"] + 77)
    shards = ShardSet.open(dataset)
    for _ in range(2):
        with pytest.raises(
            UserError, match=r"train-00001.tar is damaged: block 2 has CRC \w+ but was written with.*verify"
        ):
            shards.read("train", 1, 599, 2)
    shards.read("train", 1, 0, 600)
    shards.read("train", 0, 0, 1000)
    problems = verify(dataset)
    assert len(problems) == 2
    assert "SHA-256" in problems[0]
    assert problems[1].endswith("the tokens of block 2 are damaged")


def test_flipped_byte_in_document_ends_is_found_by_verify(dataset: Path) -> None:
    flip_byte(dataset / "train-00001.tar", block_table(dataset, 1)[3]["docends_offset"])
    assert verify(dataset)[1].endswith("the document ends of block 3 are damaged")


def test_flipped_byte_in_the_index(dataset: Path) -> None:
    entry = read_manifest(dataset).splits["train"].shards[1]
    flip_byte(dataset / entry.name, entry.index_offset + 10)
    with pytest.raises(UserError, match=r"the block index of shard .*train-00001.tar is damaged"):
        ShardSet.open(dataset).read("train", 1, 0, 10)
    assert "block index" in verify(dataset)[1]


def test_flipped_byte_in_a_tar_header_is_found_by_verify(dataset: Path) -> None:
    flip_byte(dataset / "valid-00000.tar", 0)
    assert len(verify(dataset)) == 1


def test_shard_that_shrinks_or_goes_after_opening(dataset: Path) -> None:
    shards = ShardSet.open(dataset)
    cut(dataset / "train-00001.tar", 1024)
    (dataset / "train-00002.tar").unlink()
    with pytest.raises(UserError, match=r"train-00001.tar ends at byte 1024, before byte"):
        shards.read("train", 1, 0, 10)
    with pytest.raises(UserError, match=r"cannot open shard .*train-00002.tar: No such file"):
        shards.read("train", 2, 0, 10)


def test_verify_of_a_whole_dataset_and_of_every_kind_of_loss(dataset: Path) -> None:
    assert verify(dataset) == []
    cut(dataset / "train-00001.tar", 1024)
    (dataset / "train-00002.tar").unlink()
    (dataset / TOKENIZER_NAME).unlink()
    assert [problem.split(":")[0].split("/")[-1][:15] for problem in verify(dataset)] == [
        "tokenizer.model",
        "train-00001.tar",
        "train-00002.tar",
    ]


def test_empty_split(tmp_path: Path) -> None:
    shards = ShardSet.open(write_dataset(tmp_path / "d", documents(20), []))
    with pytest.raises(UserError, match=r"the valid split of .* is empty.*--val-fraction"):
        shards.num_tokens("valid")
