"""The stream: one integer is its state, its order a pure function of the seed, whoever reads it and from wherever."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.data.test_shards import block_table
from tests.data.tiny import documents, flip_byte, write_dataset
from titans_pretrain.data import stream as stream_module
from titans_pretrain.data.permutation import permutation_key, permute, permute_many
from titans_pretrain.data.shards import ShardSet
from titans_pretrain.data.stream import BatchLoader, MicroBatch, TokenStream
from titans_pretrain.errors import UserError

SEQ_LEN = 16


@pytest.fixture
def stream(dataset: Path) -> TokenStream:
    return TokenStream(ShardSet.open(dataset), "train", SEQ_LEN, seed=3)


def loader(
    stream: TokenStream,
    *,
    rank: int = 0,
    size: int = 1,
    start: int = 0,
    batch: int = 8,
    micro: int = 0,
    **sequence: int,
) -> BatchLoader:
    return BatchLoader(
        stream, batch_size=batch, micro_batch=micro, data_rank=rank, data_size=size, start=start, prefetch=2, **sequence
    )


def rows(step: list[MicroBatch]) -> np.ndarray:
    """[rows, seq_len + 1] of a step, checked to be inputs and labels one apart."""
    tokens, labels = (torch.cat(part).numpy() for part in zip(*(m[:2] for m in step), strict=True))
    assert all(m.document_starts is None for m in step)
    np.testing.assert_array_equal(tokens[:, 1:], labels[:, :-1])
    return np.concatenate([tokens, labels[:, -1:]], axis=1)


# ----------------------------------------------------------------------------------------------------- permutation


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 255, 1025])
def test_permutation_is_a_bijection(size: int) -> None:
    for seed in range(3):
        key = permutation_key(seed, "test")
        assert sorted(permute(i, size, key) for i in range(size)) == list(range(size))


@pytest.mark.parametrize("size", [1, 2, 3, 5, 1000, 1 << 20, 3 * 10**9])
def test_many_are_permuted_as_one_by_one(size: int) -> None:
    key = permutation_key(3, "test")
    indices = np.random.default_rng(0).integers(0, size, 200)
    assert permute_many(indices, size, key).tolist() == [permute(i, size, key) for i in indices.tolist()]
    assert permute_many(indices[:0], size, key).tolist() == []


def test_permutation_mixes() -> None:
    key = permutation_key(0, "test")
    image = np.array([permute(i, 10000, key) for i in range(10000)])
    assert abs(np.corrcoef(image[1:], image[:-1])[0, 1]) < 0.03
    cells = np.histogram2d(np.arange(10000), image, bins=12)[0]
    assert ((cells - 10000 / 144) ** 2 / (10000 / 144)).sum() / 121 < 1.5


def test_every_small_permutation_occurs_about_equally_often() -> None:
    counts: dict[tuple[int, ...], int] = {}
    for seed in range(2400):
        key = permutation_key(seed, "test")
        image = tuple(permute(i, 4, key) for i in range(4))
        counts[image] = counts.get(image, 0) + 1
    assert len(counts) == 24
    assert max(counts.values()) < 160


def test_order_never_changes() -> None:
    """Runs resume under later versions of this code and of its libraries: the numbers were written down once."""
    key = permutation_key(7, 0, "shards")
    assert key[:2] == (717838266, 256050494)
    assert [permute(i, 1000, key) for i in range(6)] == [923, 448, 573, 343, 654, 207]


# ---------------------------------------------------------------------------------------------------------- order


def test_every_epoch_visits_every_sequence_once(stream: TokenStream) -> None:
    count = stream.num_sequences
    expected = {
        (s, i) for s, e in enumerate(stream.shards.split("train").shards) for i in range((e.tokens - 1) // SEQ_LEN)
    }
    epochs = [[stream.locate(epoch * count + i) for i in range(count)] for epoch in range(3)]
    for epoch in epochs:
        assert len(epoch) == len(expected)
        assert set(epoch) == expected
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert epochs[0] != sorted(epochs[0])


def test_a_single_shard_too_has_another_order_in_every_epoch(dataset: Path) -> None:
    stream = TokenStream(ShardSet.open(dataset), "valid", SEQ_LEN, seed=3)
    count = stream.num_sequences
    epochs = {tuple(stream.locate(epoch * count + i) for i in range(count)) for epoch in range(5)}
    assert len(epochs) == 5
    assert len({frozenset(epoch) for epoch in epochs}) == 1


def test_samples_are_the_tokens_on_disk(stream: TokenStream) -> None:
    texts = [stream.shards.read("train", s, 0, e.tokens) for s, e in enumerate(stream.shards.split("train").shards)]
    for index in range(0, 2 * stream.num_sequences, 7):
        shard, sequence = stream.locate(index)
        tokens = stream.sample(index)
        assert tokens.dtype == np.int64
        np.testing.assert_array_equal(tokens, texts[shard][sequence * SEQ_LEN : (sequence + 1) * SEQ_LEN + 1])


def test_order_is_a_function_of_the_seed_alone(dataset: Path, stream: TokenStream) -> None:
    again = TokenStream(ShardSet.open(dataset), "train", SEQ_LEN, seed=3)
    other = TokenStream(ShardSet.open(dataset), "train", SEQ_LEN, seed=4)
    indices = [5, 10**6, 0, 3, stream.num_sequences, 10**6 + 1, 4]  # jumping about changes nothing
    here = {index: stream.locate(index) for index in indices}
    assert here == {index: again.locate(index) for index in sorted(indices)}
    assert [stream.locate(i) for i in range(20)] != [other.locate(i) for i in range(20)]


def test_without_shuffling_the_order_is_that_on_disk_in_every_epoch(dataset: Path) -> None:
    stream = TokenStream(ShardSet.open(dataset), "valid", SEQ_LEN, seed=0, shuffle=False)
    count = stream.num_sequences
    text = np.concatenate([stream.sample(i)[:-1] for i in range(count)])
    np.testing.assert_array_equal(text, np.concatenate(documents(20, seed=1))[: count * SEQ_LEN])
    np.testing.assert_array_equal(stream.sample(count + 1), stream.sample(1))


def test_only_a_window_of_shards_is_read_at_a_time(monkeypatch: pytest.MonkeyPatch, dataset: Path) -> None:
    monkeypatch.setattr(stream_module, "WINDOW_SHARDS", 2)
    stream = TokenStream(ShardSet.open(dataset), "train", SEQ_LEN, seed=3)
    shards = [stream.locate(i)[0] for i in range(stream.num_sequences)]
    order = [permute(i, 7, permutation_key(3, 0, "shards")) for i in range(7)]
    assert set(shards) == set(range(7))
    windows = [list(window) for _, window in itertools.groupby(shards, key=lambda s: order.index(s) // 2)]
    assert [len(set(window)) for window in windows] == [2, 2, 2, 1]
    assert windows[0] != sorted(windows[0])  # the two of a window are mixed
    assert windows[0] != sorted(windows[0], reverse=True)


def test_many_are_located_as_one_by_one(dataset: Path, stream: TokenStream) -> None:
    fresh = TokenStream(ShardSet.open(dataset), "train", SEQ_LEN, seed=3)
    count = stream.num_sequences
    indices = np.concatenate([np.arange(count - 20, count + 20), 10**6 + np.arange(50)])
    assert [tuple(place) for place in stream.places(indices).tolist()] == [fresh.locate(i) for i in indices.tolist()]


def test_far_ahead_is_as_quick_as_the_start(dataset: Path) -> None:
    started = time.monotonic()
    stream = TokenStream(ShardSet.open(dataset), "train", SEQ_LEN, seed=3)
    tokens = stream.sample(10**9)
    assert time.monotonic() - started < 1
    shard, sequence = stream.locate(10**9)
    np.testing.assert_array_equal(tokens, stream.shards.read("train", shard, sequence * SEQ_LEN, SEQ_LEN + 1))


def test_shards_too_short_for_a_sequence_are_passed_over(tmp_path: Path) -> None:
    docs = [np.full(n, n) for n in (40, 5, 40, 7, 3)]
    shards = ShardSet.open(write_dataset(tmp_path / "d", docs, docs[:1], shard_tokens=1))
    stream = TokenStream(shards, "train", SEQ_LEN, seed=0)
    assert stream.num_sequences == 4
    assert sorted(stream.locate(i) for i in range(4)) == [(0, 0), (0, 1), (2, 0), (2, 1)]


def test_split_too_short(dataset: Path) -> None:
    shards = ShardSet.open(dataset)
    tokens = shards.num_tokens("valid")
    assert TokenStream(shards, "valid", tokens - 1, seed=0).num_sequences == 1
    sentence = f"valid split .* too short .* data.seq_len {tokens}: it has {tokens} tokens and {tokens + 1} are needed"
    with pytest.raises(UserError, match=sentence):
        TokenStream(shards, "valid", tokens, seed=0)
    with pytest.raises(UserError, match=r"its longest of 7 shards has 20.. tokens.*lower data.seq_len$"):
        TokenStream(shards, "train", 5000, seed=0)


# ---------------------------------------------------------------------------------------------------------- loader


def test_steps_are_the_stream_in_order(stream: TokenStream) -> None:
    with loader(stream) as batches:
        for step in range(100):  # more than an epoch
            assert batches.position == 8 * step
            np.testing.assert_array_equal(rows(next(batches)), [stream.sample(8 * step + m) for m in range(8)])


def test_any_number_of_ranks_gives_the_same_global_order(stream: TokenStream) -> None:
    position = 0
    for size in (1, 2, 4, 8, 2):
        ranks = [loader(stream, rank=rank, size=size, start=position) for rank in range(size)]
        for _ in range(3):
            whole = np.concatenate([rows(next(batches)) for batches in ranks])
            np.testing.assert_array_equal(whole, [stream.sample(position + m) for m in range(8)])
            position += 8
        assert {batches.position for batches in ranks} == {position}
        for batches in ranks:
            batches.close()


def test_ranks_that_share_a_row_read_its_slices(stream: TokenStream) -> None:
    for size in (2, 4):
        with contextlib.ExitStack() as opened:
            ranks = [
                opened.enter_context(loader(stream, rank=1, size=2, sequence_rank=rank, sequence_size=size))
                for rank in range(size)
            ]
            slices = [rows(next(batches)) for batches in ranks]
        whole = np.array([stream.sample(4 + m) for m in range(4)])
        np.testing.assert_array_equal(np.concatenate([part[:, :-1] for part in slices], axis=1), whole[:, :-1])
        np.testing.assert_array_equal(np.concatenate([part[:, 1:] for part in slices], axis=1), whole[:, 1:])


def test_micro_batches_cut_the_share_in_order(stream: TokenStream) -> None:
    with loader(stream, rank=1, size=2, micro=2) as batches:
        step = next(batches)
    assert [part.tokens.shape for part in step] == [(2, SEQ_LEN)] * 2
    assert all(tensor.dtype == torch.int64 and tensor.is_contiguous() for part in step for tensor in part[:2])
    np.testing.assert_array_equal(rows(step), [stream.sample(4 + m) for m in range(4)])


def test_resume_equals_the_uninterrupted_stream(dataset: Path, stream: TokenStream) -> None:
    with loader(stream) as batches:
        uninterrupted = [rows(next(batches)) for _ in range(10)]
    with loader(stream) as batches:
        for _ in range(4):
            next(batches)
        position = batches.position
    fresh = TokenStream(ShardSet.open(dataset), "train", SEQ_LEN, seed=3)
    with loader(fresh, start=position) as batches:
        for step in range(4, 10):
            np.testing.assert_array_equal(rows(next(batches)), uninterrupted[step])


def test_batch_that_does_not_divide(stream: TokenStream) -> None:
    with pytest.raises(UserError, match="batch of 8 sequences does not divide over 3"):
        loader(stream, size=3)
    with pytest.raises(UserError, match="micro-batches of 3"):
        loader(stream, micro=3)


def test_thread_reads_only_so_far_ahead_and_ends(stream: TokenStream, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[np.ndarray] = []
    read_places = stream.read_places
    monkeypatch.setattr(
        stream, "read_places", lambda places, rows, **part: read.extend(rows) or read_places(places, rows, **part)
    )
    batches = loader(stream)
    next(batches)
    time.sleep(0.3)
    assert len(read) <= 8 * 4  # one handed out, two waiting, one in hand
    batches.close()
    batches.close()
    assert not any(thread.name == "batch-loader" for thread in threading.enumerate())
    with pytest.raises(ValueError, match="closed"):
        next(batches)


def test_damage_is_raised_in_the_consumer(dataset: Path) -> None:
    flip_byte(dataset / "train-00001.tar", block_table(dataset, 1)[2]["offset"])
    stream = TokenStream(ShardSet.open(dataset), "train", SEQ_LEN, seed=3)
    sentence = r"train-00001.tar is damaged: block 2"

    def read_an_epoch(batches: BatchLoader) -> None:
        for _ in range(stream.num_sequences // 8 + 1):
            next(batches)

    with loader(stream) as batches:
        with pytest.raises(UserError, match=sentence):
            read_an_epoch(batches)
        position = batches.position
        with pytest.raises(UserError, match=sentence):  # and does not wait for ever
            next(batches)
        assert batches.position == position
