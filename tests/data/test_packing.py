"""Packed rows: every token once, documents whole and where they belong, labels that never cross a border."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset

from tests.data.test_shards import block_table, cut
from tests.data.tiny import VOCAB, flip_byte, write_dataset
from titans_pretrain.data import packing as packing_module
from titans_pretrain.data.manifest import MANIFEST_NAME, Packing, _digest, read_manifest
from titans_pretrain.data.packed import IGNORED, Row
from titans_pretrain.data.packing import PackedWriter, best_fit
from titans_pretrain.data.shards import ShardSet
from titans_pretrain.data.stream import BatchLoader, TokenStream
from titans_pretrain.data.structure import structure_problems
from titans_pretrain.data.verify import verify
from titans_pretrain.data.writer import ShardWriter
from titans_pretrain.errors import UserError

BOS, EOS = 1, 2
SEQ_LEN = 64


def documents(count: int, seed: int = 0, longest: int = 200) -> list[np.ndarray]:
    """BOS, some tokens without BOS and EOS, EOS; the number of the document is written into its first tokens."""
    rng = np.random.default_rng(seed)
    docs = [rng.integers(3, VOCAB, size=rng.integers(4, longest)) for _ in range(count)]
    for number, doc in enumerate(docs):
        doc[0], doc[1], doc[2], doc[-1] = BOS, 3 + number // 900, 3 + number % 900, EOS
    return docs


def packed(path: Path, align: int, docs: list[np.ndarray], **options: int) -> ShardSet:
    return ShardSet.open(
        write_dataset(path, docs, docs[:9], shard_tokens=SEQ_LEN * 20, packing=Packing(SEQ_LEN, align, EOS), **options)
    )


def all_rows(shards: ShardSet, split: str = "train") -> list[Row]:
    stream = TokenStream(shards, split, SEQ_LEN, seed=0, shuffle=False)
    return [stream.row(index) for index in range(stream.num_sequences)]


def pieces(row: Row) -> list[np.ndarray]:
    """The documents of a row, by its labels and starts alone: a label says that the next token belongs to it."""
    found = []
    for start in np.flatnonzero(row.document_starts):
        end = start
        while row.labels[end] != IGNORED:
            assert row.labels[end] == row.tokens[end + 1]
            end += 1
        found.append(row.tokens[start : end + 1])
    return found


@pytest.mark.parametrize("align", [1, 8, 64])
def test_every_token_once_and_documents_whole(tmp_path: Path, align: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing_module, "_BUFFER_ROWS", 16)  # several buffers
    docs = documents(300)
    for number, length in enumerate((SEQ_LEN, SEQ_LEN + 1, 2 * SEQ_LEN, 2 * SEQ_LEN + 1, 3 * SEQ_LEN + 1, SEQ_LEN - 1)):
        docs[number] = np.array([BOS, 3, 3 + number, *[7] * (length - 4), EOS])
    shards = packed(tmp_path / "d", align, docs)
    assert all(entry.tokens % SEQ_LEN == 0 for entry in shards.split("train").shards)
    assert len(shards.split("train").shards) > 5

    starts: list[np.ndarray] = []
    rests: list[np.ndarray] = []
    total = 0
    for row in all_rows(shards):
        found = pieces(row)
        covered = np.zeros(SEQ_LEN, dtype=bool)
        for start, piece in zip(np.flatnonzero(row.document_starts), found, strict=True):
            assert start % align == 0
            covered[start : start + len(piece)] = True
            total += len(piece)
            (starts if piece[0] == BOS else rests).append(piece)
        assert (row.tokens[~covered] == EOS).all()
        assert (row.labels[~covered] == IGNORED).all()
        assert row.labels[-1] == IGNORED
        for piece in found:
            assert (piece[:-1] != EOS).all()  # nothing follows a document's end in its piece
            assert piece[-1] == EOS or len(piece) in (SEQ_LEN, SEQ_LEN - 1)
    assert total == sum(map(len, docs))

    # A document is one of the starts with rests that fit, each used once.
    rest_bytes: dict[bytes, int] = {}
    for rest in rests:
        rest_bytes[rest.tobytes()] = rest_bytes.get(rest.tobytes(), 0) + 1
    by_number = {(piece[1], piece[2]): piece for piece in starts}
    assert len(by_number) == len(starts) == len(docs)
    for doc in docs:
        place = len(by_number[doc[1], doc[2]])
        np.testing.assert_array_equal(doc[:place], by_number[doc[1], doc[2]])
        while place < len(doc):
            rest = doc[place : place + SEQ_LEN] if doc[place:].size != SEQ_LEN + 1 else doc[place : place + SEQ_LEN - 1]
            rest_bytes[rest.tobytes()] -= 1
            place += len(rest)
    assert not any(rest_bytes.values())


def test_reading_by_stock_webdataset(tmp_path: Path) -> None:
    shards = packed(tmp_path / "d", 8, documents(300))
    for number, entry in enumerate(shards.split("train").shards):
        samples = list(webdataset.WebDataset(str(shards.path / entry.name), shardshuffle=False).decode())
        tokens = np.concatenate([sample["tokens.npy"] for sample in samples])
        np.testing.assert_array_equal(tokens, shards.read("train", number, 0, entry.tokens))
        ends, base = [], 0
        for sample in samples:
            ends += (sample["docends.npy"].astype(np.int64) + base).tolist()
            base += len(sample["tokens.npy"])
        assert shards.document_ends("train", number, 0, entry.tokens).tolist() == ends
        for start in (130, ends[3]):
            expected = [end - start for end in ends if start < end <= start + 300]
            assert shards.document_ends("train", number, start, 300).tolist() == expected


def test_pieces_written_together_or_apart_are_the_same(tmp_path: Path) -> None:
    docs = documents(100)
    lengths = np.array([len(d) for d in docs])
    entries = []
    for name, groups in (("one", [slice(0, 100)]), ("many", [slice(i, i + 1) for i in range(100)])):
        writer = ShardWriter(tmp_path, name, VOCAB, shard_tokens=SEQ_LEN * 9, block_tokens=100)
        with writer, PackedWriter(writer, Packing(SEQ_LEN, 4, EOS)) as rows:
            for group in groups:
                rows.write(np.concatenate(docs[group]), lengths[group])
        entries.append([shard.sha256 for shard in writer.shards])
        np.testing.assert_array_equal(rows.token_counts, np.bincount(np.concatenate(docs), minlength=VOCAB))
        assert rows.padding == writer.num_tokens - lengths.sum()
        assert rows.cut_documents == (lengths > SEQ_LEN).sum()
    assert entries[0] == entries[1]


def test_best_fit() -> None:
    # Longest first: 6 | 5 | 4 joins 6 | 3 joins 5 | 2 joins 5 and 3 | rows numbered by their first piece.
    assert best_fit(np.array([2, 4, 3, 6, 5]), 10).tolist() == [0, 1, 0, 1, 0]
    assert best_fit(np.array([10, 10]), 10).tolist() == [0, 1]
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 101, size=3000)
    rows = best_fit(sizes, 100)
    held = np.bincount(rows, weights=sizes)
    assert held.max() <= 100
    assert len(held) <= 1.03 * sizes.sum() / 100 + 1
    assert np.unique(rows, return_index=True)[1].tolist() == sorted(np.unique(rows, return_index=True)[1].tolist())


def realistic_lengths(count: int) -> np.ndarray:
    """Web pages: log-normal, median about 450 tokens, mean about 900, some of many thousands."""
    return np.exp(np.random.default_rng(0).normal(6.1, 1.15, size=count)).astype(np.int64) + 8


@pytest.mark.parametrize(("align", "fill"), [(1, 0.998), (64, 0.955)])
def test_rows_are_full(tmp_path: Path, align: int, fill: float) -> None:
    lengths = realistic_lengths(5000)
    writer = ShardWriter(tmp_path, "train", VOCAB, shard_tokens=2**20, block_tokens=2**18)
    started = time.process_time()
    with writer, PackedWriter(writer, Packing(2048, align, EOS)) as rows:
        rows.write(np.full(lengths.sum(), 7, dtype=np.uint16), lengths)
    seconds = time.process_time() - started
    share = lengths.sum() / writer.num_tokens
    print(f"{share:.4%} full, {lengths.sum() / 1e6 / seconds:.1f} Mtok/s, {rows.cut_documents} of {len(lengths)} cut")
    assert share > fill


def test_order_of_rows_follows_the_text(tmp_path: Path) -> None:
    """Evaluation reads the first rows of the validation split, which must not be the longest documents."""
    shards = packed(tmp_path / "d", 1, documents(2000, longest=SEQ_LEN))
    firsts = [int(row.tokens[1] * 900 + row.tokens[2]) for row in all_rows(shards)]
    assert firsts == sorted(firsts)


def test_a_document_that_looks_like_padding(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "train", VOCAB, shard_tokens=SEQ_LEN, block_tokens=8)
    with (
        pytest.raises(UserError, match="begins with token 2, with which rows are padded"),
        writer,
        PackedWriter(writer, Packing(SEQ_LEN, 4, EOS)) as rows,
    ):
        rows.write(np.array([EOS, 5]), np.array([2]))
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------------- stream


def test_sequences_are_rows(tmp_path: Path) -> None:
    shards = packed(tmp_path / "d", 8, documents(300))
    stream = TokenStream(shards, "train", SEQ_LEN, seed=3)
    assert stream.num_sequences * SEQ_LEN == shards.num_tokens("train")
    epoch = sorted(stream.row(index).tokens.tobytes() for index in range(stream.num_sequences))
    assert epoch == sorted(row.tokens.tobytes() for row in all_rows(shards))
    whole = stream.row(5)
    parts = [stream.row(5, part, 4) for part in range(4)]
    for field in range(3):
        np.testing.assert_array_equal(np.concatenate([part[field] for part in parts]), whole[field])


def test_batches(tmp_path: Path) -> None:
    stream = TokenStream(packed(tmp_path / "d", 8, documents(300)), "train", SEQ_LEN, seed=3)
    options = dict(batch_size=8, micro_batch=2, data_rank=1, data_size=2, start=8, prefetch=1)
    with BatchLoader(stream, **options, document_starts=True) as with_starts, BatchLoader(stream, **options) as without:
        step, plain = next(with_starts), next(without)
    assert [batch.document_starts for batch in plain] == [None, None]
    for number, batch in enumerate(step):
        expected = [stream.row(12 + 2 * number + m) for m in range(2)]
        assert batch.document_starts is not None
        assert batch.document_starts.dtype == torch.bool
        for field, name in enumerate(batch._fields):
            np.testing.assert_array_equal(batch[field].numpy(), np.stack([row[field] for row in expected]), name)
        torch.testing.assert_close(plain[number].labels, batch.labels)


def test_another_row_length(tmp_path: Path) -> None:
    shards = packed(tmp_path / "d", 8, documents(300))
    sentence = (
        "packed in rows of 64 tokens, but data.seq_len asks the train split for sequences of 32: set data.seq_len to 64"
    )
    with pytest.raises(UserError, match=sentence):
        TokenStream(shards, "train", 32, seed=0)
    with pytest.raises(UserError, match=r"valid split .* 128: take 1 alone in eval.length_multiples"):
        TokenStream(shards, "valid", 128, seed=0)


def test_fingerprint_has_the_packing(tmp_path: Path) -> None:
    docs = [np.array([BOS, *[7] * 62, EOS])] * 20
    shards = packed(tmp_path / "d", 8, docs)
    again = packed(tmp_path / "e", 1, docs)
    assert [entry.sha256 for entry in shards.split("train").shards] == [e.sha256 for e in again.split("train").shards]
    assert shards.fingerprint != again.fingerprint


# ----------------------------------------------------------------------------------------------------------- damage


def test_damaged_document_ends(tmp_path: Path) -> None:
    shards = packed(tmp_path / "d", 8, documents(300))
    flip_byte(shards.path / "train-00001.tar", block_table(shards.path, 1)[2]["docends_offset"])
    with pytest.raises(UserError, match=r"train-00001.tar is damaged: the document ends of block 2 have CRC .*verify"):
        all_rows(shards)
    assert verify(shards.path)[1].endswith("the document ends of block 2 are damaged")


def change_options(path: Path, **options: object) -> ShardSet:
    content = json.loads((path / MANIFEST_NAME).read_text())
    del content["checksum"]
    content["options"].update(options)
    (path / MANIFEST_NAME).write_text(json.dumps({**content, "checksum": _digest(content)}))
    return ShardSet.open(path)


def test_verify_sees_rows_that_are_not_sound(tmp_path: Path) -> None:
    path = packed(tmp_path / "d", 8, documents(300)).path
    options = read_manifest(path).options
    assert list(structure_problems(ShardSet.open(path))) == []
    kind = {"kind": "bestfit", "seq_len": SEQ_LEN, "align": 8, "pad": EOS}
    for change, sentence in (
        ({"packing": {**kind, "align": 16}}, "does not start at a multiple of 16"),
        ({"packing": {**kind, "seq_len": 32}}, "a document crosses a row of 32 tokens"),
        ({"packing": {**kind, "pad": BOS}}, "a run of padding holds other tokens"),
        ({"padding_tokens": {"train": 5, "valid": 5}}, "but the manifest says 5"),
        ({"packing": {"kind": "concat"}, "document_lengths": {"train": [1], "valid": []}}, "the lengths of the train"),
    ):
        assert any(sentence in problem for problem in structure_problems(change_options(path, **change))), sentence
        change_options(path, **options)
    cut(path / "train-00001.tar", 1024)
    with pytest.raises(UserError, match=r"train-00001.tar has 1024 bytes"):
        ShardSet.open(path)
