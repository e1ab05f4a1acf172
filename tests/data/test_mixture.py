"""Mixtures: the blend keeps its weights at every place, and the order is a function of one integer, whoever reads it."""

from __future__ import annotations

import hashlib
import json
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.tiny import documents, write_dataset
from titans_pretrain.config import config_from_dict
from titans_pretrain.data import blend
from titans_pretrain.data import stream as stream_module
from titans_pretrain.data.blend import PERIOD, Blend, quotas, table
from titans_pretrain.data.manifest import Manifest, Packing, ShardEntry, SplitEntry
from titans_pretrain.data.mixture import Mixture, Source, Sources, phase_starts
from titans_pretrain.data.shards import ShardSet
from titans_pretrain.data.stream import BatchLoader, TokenStream
from titans_pretrain.errors import UserError

SEQ_LEN = 16
WEIGHTS = (0.6, 0.3, 0.1)
PHASES = [(0, WEIGHTS), (1003, (0.1, 0.1, 0.8))]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("mixture")
    return [
        write_dataset(folder / name, documents(count, seed=seed), documents(20, seed=9))
        for seed, (name, count) in enumerate((("web", 280), ("code", 200), ("books", 90)))
    ]


def sources_of(folders: list[Path], max_epochs: float = 0.0) -> Sources:
    return Sources([Source(f.name, ShardSet.open(f), w, max_epochs) for f, w in zip(folders, WEIGHTS, strict=True)])


def mixture_of(folders: list[Path], max_epochs: float = 0.0, phases: list = PHASES) -> Mixture:  # type: ignore[type-arg]
    return Mixture(sources_of(folders, max_epochs), SEQ_LEN, 3, phases)


# ----------------------------------------------------------------------------------------------------------- blend


@settings(max_examples=12, deadline=None)
@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=5))
def test_every_source_is_within_a_sequence_of_its_share_and_gets_its_quota(weights: list[float]) -> None:
    counts = quotas(weights)
    assert sum(counts) == PERIOD
    np.testing.assert_allclose(np.array(counts) / PERIOD, np.array(weights) / sum(weights), atol=1 / PERIOD)
    drawn = table(counts)
    for source, count in enumerate(counts):
        ahead = np.cumsum(drawn == source) - count * np.arange(1, PERIOD + 1) / PERIOD
        assert ahead.max() < 1
        assert ahead.min() > -1.5
        assert ahead[-1] == 0


def test_table_never_changes() -> None:
    """Runs resume under later versions of this code: the numbers were written down once."""
    assert quotas(WEIGHTS) == (39321, 19661, 6554)
    drawn = table(quotas(WEIGHTS))
    assert drawn[:12].tolist() == [0, 1, 0, 2, 0, 1, 0, 0, 1, 0, 0, 1]
    assert hashlib.sha256(drawn.astype("<u2").tobytes()).hexdigest()[:16] == "d92212a74aed8c47"


def test_phases_carry_counts_over() -> None:
    mixed = Blend([(0, (1, 1, 0)), (70001, (0, 1, 3)), (70021, (1, 0, 0))])
    sources, numbers = mixed.places(np.arange(200_000))
    for source in range(3):
        assert numbers[sources == source].tolist() == list(range(int((sources == source).sum())))
    assert set(sources[70001:70021].tolist()) == {1, 2}
    for index in (0, 1, 69999, 70001, 70010, 70021, 199_999):
        assert mixed.counts(index).tolist() == np.bincount(sources[:index], minlength=3).tolist()
        assert mixed.place(index) == (sources[index], numbers[index])


def test_a_weight_too_small_is_refused() -> None:
    with pytest.raises(UserError, match=r"1e-06 among .* one in 65536 .*data.sources or data.phases"):
        quotas([1, 1e-6])
    assert quotas([1, 0]) == (PERIOD, 0)


# --------------------------------------------------------------------------------------------------------- mixture


def test_one_source_is_that_source(folders: list[Path]) -> None:
    shards = ShardSet.open(folders[0])
    alone = TokenStream(shards, "train", SEQ_LEN, seed=3)
    mixture = Mixture(Sources([Source("data", shards, 1.0, 0.0)]), SEQ_LEN, 3, [(0, (1.0,))])
    for index in (0, 5, 1000, 10**9):
        np.testing.assert_array_equal(mixture.sample(index), alone.sample(index))
    assert mixture.served(100) == {}


def test_sequences_are_the_sources_own_in_their_order_and_epochs_are_counted(folders: list[Path]) -> None:
    mixture = mixture_of(folders)
    next_of = [0, 0, 0]
    for index in range(3000):
        source, number = mixture.place(index)
        assert number == next_of[source]
        next_of[source] += 1
        if index % 97 == 0:
            np.testing.assert_array_equal(mixture.sample(index), mixture.streams[source].sample(number))
            assert mixture.locate(index) == (source, *mixture.streams[source].locate(number))
    books = mixture.streams[2]
    assert next_of[2] > books.num_sequences, "more than one epoch"
    served = mixture.served(3000)
    assert [served[f"tokens/{name}"] for name in ("web", "code", "books")] == [n * SEQ_LEN for n in next_of]
    assert served["epochs/books"] == next_of[2] / books.num_sequences


def test_too_many_epochs_are_refused_before_the_first(folders: list[Path]) -> None:
    books = mixture_of(folders).streams[2].num_sequences
    mixture = mixture_of(folders, max_epochs=2)
    mixture.check_epochs(1000)
    sentence = (
        rf"of source books, which is 2\.\d\d epochs of its {books} .*data.sources\[2\].max_epochs \(2\).*schedule"
    )
    with pytest.raises(UserError, match=sentence):
        mixture.check_epochs(1003 + 3 * books)


def test_sources_of_other_tokenizers_are_refused(folders: list[Path], tmp_path: Path) -> None:
    docs = documents(20)
    other = write_dataset(tmp_path / "other", docs, docs, tokenizer=b"another")
    with pytest.raises(UserError, match=r"web .* and other .*different tokenizers"):
        sources_of([folders[0], other, folders[2]])


def test_packed_and_other_sources_mix_as_rows(folders: list[Path], tmp_path: Path) -> None:
    docs = [np.concatenate([[5], d]) for d in documents(60, seed=4)]
    packed = write_dataset(tmp_path / "packed", docs, docs, packing=Packing(SEQ_LEN, 1, 2), shard_tokens=100 * SEQ_LEN)
    mixture = mixture_of([folders[0], packed, folders[2]])
    assert mixture.raw_dtype is None
    with loader(mixture) as batches:
        labels = torch_cat(next(batches), 1)
    whole = np.stack([mixture.row(i).labels for i in range(8)])
    np.testing.assert_array_equal(labels, whole)
    assert (whole == -100).any()


def torch_cat(step: list, field: int) -> np.ndarray:  # type: ignore[type-arg]
    return np.concatenate([part[field].numpy() for part in step])


def loader(mixture: Mixture, rank: int = 0, size: int = 1, start: int = 0, batch: int = 8) -> BatchLoader:
    return BatchLoader(
        mixture, batch_size=batch, micro_batch=0, data_rank=rank, data_size=size, start=start, prefetch=2
    )


def test_phase_starts_count_the_runs_tokens(folders: list[Path]) -> None:
    tree = {
        "data": {
            "sources": [{"path": str(f), "weight": w} for f, w in zip(folders, WEIGHTS, strict=True)],
            "phases": [{"tokens": 100, "weights": [1, 1, 1]}, {"tokens": 1000, "weights": [0, 0, 1]}],
            "seq_len": SEQ_LEN,
            "batch_tokens": SEQ_LEN,
        }
    }
    data, sources = config_from_dict(tree).data, sources_of(folders)
    assert [start for start, _ in phase_starts(data, sources, 0)] == [0, 7, 63]
    assert phase_starts(data, sources, 500) == [(0, (1, 1, 1)), (32, (0, 0, 1))]


# ------------------------------------------------------------------------------------------------- elastic, far, big


def test_order_is_the_same_on_any_number_of_ranks_with_restarts(folders: list[Path]) -> None:
    """The first 2,000 samples of three sources and a phase, restarted every 40 steps from fresh objects."""
    digests = {}
    for size in (1, 2, 3, 4, 8):
        digest, position = hashlib.sha256(), 0
        while position < 2000:
            ranks = [loader(mixture_of(folders), rank, size, position, batch=24) for rank in range(size)]
            for _ in range(40):
                step = np.concatenate([torch_cat(next(batches), 0) for batches in ranks])[: 2000 - position]
                digest.update(step.tobytes())
                position += len(step)
                if position == 2000:
                    break
            assert {batches.position for batches in ranks} == {-(-position // 24) * 24}
            for batches in ranks:
                batches.close()
        digests[size] = digest.hexdigest()
    assert set(digests.values()) == {"11839b9388701cc282a17a70703170d0d87dcde342f09339fa3326ac8d4e5c06"}, digests


def test_cold_resume_at_a_billion(folders: list[Path]) -> None:
    def resume() -> np.ndarray:
        blend._table_of.cache_clear()
        mixture = mixture_of(folders, phases=PHASES[:1])
        with loader(mixture, start=10**9) as batches:
            return torch_cat(next(batches), 0)

    seconds = []
    for _ in range(3):
        started = time.process_time()
        rows = resume()
        seconds.append(time.process_time() - started)
    mixture = mixture_of(folders, phases=PHASES[:1])
    np.testing.assert_array_equal(rows, [mixture.sample(10**9 + m)[:-1] for m in range(8)])
    assert min(seconds) < 0.1, seconds


def many_shards(count: int, tokens: int) -> ShardSet:
    """A dataset's manifest; its shards are nowhere, which locating does not need."""
    shards = tuple(ShardEntry(f"train-{i:05d}.tar", 1, "0" * 64, tokens + i % 7, 1, 0, 0, 0) for i in range(count))
    split = SplitEntry(sum(s.tokens for s in shards), count, 0, shards)
    return ShardSet(Path("nowhere"), Manifest("uint16", 1000, "0", 1, 2, 3.0, {}, {"train": split}))


def test_forty_thousand_shards_are_located_in_bounded_time_and_memory() -> None:
    """10.7 trillion tokens."""
    shards = many_shards(40_000, 1 << 28)
    tracemalloc.start()
    started = time.process_time()
    stream = TokenStream(shards, "train", 2048, seed=0)
    first = stream.locate(5 * 10**9)
    opened = time.process_time() - started
    started = time.process_time()
    for index in range(2000):
        stream.locate(index * 7_919_993)
    each = (time.process_time() - started) / 2000
    started = time.process_time()
    for epoch in range(5):
        stream.places(np.arange(512) + epoch * 10**9)
    together = (time.process_time() - started) / 5 / 512
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    print(
        f"first {1e3 * opened:.1f} ms, then {1e6 * each:.1f} us, in batches {1e6 * together:.2f} us; {peak / 1e6:.1f} MB"
    )
    assert first == stream.locate(5 * 10**9)
    assert opened < 0.5
    assert each < 1e-3
    assert peak < 10e6
    order = stream._order
    assert order is not None
    assert sorted(order._shards.tolist()) == list(range(40_000))


def test_what_decides_the_order_is_in_the_identity(folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    here = mixture_of(folders).identity(2000)
    assert json.loads(json.dumps(here)) == here
    assert len(here["phases"]) == 2
    assert len(mixture_of(folders).identity(1003)["phases"]) == 1  # what has not begun may still change
    others = [
        mixture_of(folders[::-1]).identity(2000),
        Mixture(sources_of(folders), SEQ_LEN, 4, PHASES).identity(2000),
        mixture_of(folders, phases=[(0, WEIGHTS), (1004, PHASES[1][1])]).identity(2000),
    ]
    monkeypatch.setattr(stream_module, "WINDOW_SHARDS", 8)
    others.append(mixture_of(folders).identity(2000))
    assert all(other != here for other in others)
