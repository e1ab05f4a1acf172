"""Damage: whatever byte changes or goes, it is noticed or harmless; a row that is skipped leaves all others where they are."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.data.test_shards import block_table, cut, read_all
from tests.data.tiny import documents, flip_byte, write_dataset
from titans_pretrain.data.damage import DamageError
from titans_pretrain.data.manifest import Packing
from titans_pretrain.data.mixture import Mixture, Source, Sources
from titans_pretrain.data.shards import ShardSet
from titans_pretrain.data.stream import BatchLoader, TokenStream
from titans_pretrain.data.verify import verify
from titans_pretrain.errors import UserError

SEQ_LEN = 16


def outcome(dataset: Path, expected: list[np.ndarray]) -> str:
    """What a reader of everything meets: "refused", or "harmless" if all tokens are as they were; anything else fails."""
    try:
        shards = ShardSet.open(dataset)
        tokens = [array for split in ("train", "valid") for array in read_all(shards, split)]
    except UserError as error:
        named = str(dataset) in str(error) and "\n" not in str(error)
        return "refused" if named else f"refused without a name: {error}"
    for mine, theirs in zip(tokens, expected, strict=True):
        np.testing.assert_array_equal(mine, theirs)
    return "harmless"


def found_by_verify(dataset: Path) -> bool:
    try:
        return bool(verify(dataset))
    except UserError:
        return True


@pytest.mark.parametrize(("kind", "trials"), [("flip", 200), ("cut", 50)])
def test_random_damage_is_noticed_or_harmless(tmp_path: Path, kind: str, trials: int) -> None:
    dataset = write_dataset(tmp_path / "d", documents(100), documents(20, seed=1))
    shards = ShardSet.open(dataset)
    expected = [array for split in ("train", "valid") for array in read_all(shards, split)]
    files = sorted(dataset.iterdir())
    rng = random.Random(0)
    outcomes: list[str] = []
    for _ in range(trials):
        file = rng.choices(files, weights=[path.stat().st_size for path in files])[0]
        original = file.read_bytes()
        file.chmod(0o644)
        if kind == "flip":
            content = bytearray(original)
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            file.write_bytes(content)
        else:
            cut(file, rng.randrange(len(original)))
        outcomes.append(outcome(dataset, expected))
        assert found_by_verify(dataset), file
        file.write_bytes(original)
    assert set(outcomes) <= {"refused", "harmless"}
    assert outcomes.count("refused") >= (40 if kind == "flip" else trials)
    assert outcome(dataset, expected) == "harmless"
    assert verify(dataset) == []


# ---------------------------------------------------------------------------------------------------------- skipping


def damage_block(dataset: Path) -> None:
    flip_byte(dataset / "train-00001.tar", block_table(dataset, 1)[2]["offset"] + 7)


FAULTS = {
    "payload byte": damage_block,
    "cut file": lambda d: cut(d / "train-00001.tar", 5120),
    "missing file": lambda d: (d / "train-00001.tar").unlink(),
    "empty file": lambda d: cut(d / "train-00001.tar", 0),
    "garbage": lambda d: (d / "train-00001.tar").write_bytes(b"x" * (d / "train-00001.tar").stat().st_size),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_skipped_row_keeps_its_place_and_no_other_changes(tmp_path: Path, dataset: Path, fault: str) -> None:
    sound = TokenStream(ShardSet.open(dataset), "train", SEQ_LEN, seed=3)
    broken = tmp_path / "broken"
    shutil.copytree(dataset, broken)
    (broken / "train-00001.tar").chmod(0o644)
    FAULTS[fault](broken)
    stream = TokenStream(ShardSet.open(broken, skip_bad=True), "train", SEQ_LEN, seed=3)
    lengths = dict(batch_size=8, micro_batch=4, data_rank=0, data_size=1, start=0, prefetch=2)
    bad = []
    with BatchLoader(stream, **lengths, skip_bad=True) as mine, BatchLoader(sound, **lengths) as theirs:
        for step in range(sound.num_sequences // 8):
            ours, right = next(mine), next(theirs)
            assert theirs.bad == []
            for row in range(8):
                (tokens, labels, _), (good_tokens, good_labels, _) = ours[row // 4], right[row // 4]
                if row in {entry.row for entry in mine.bad}:
                    assert (labels[row % 4] == -100).all()
                    assert (tokens[row % 4] == 0).all()
                else:
                    assert (labels[row % 4] == good_labels[row % 4]).all()
                    assert (tokens[row % 4] == good_tokens[row % 4]).all()
            for entry in mine.bad:
                assert entry.shard == str(broken / "train-00001.tar")
                assert "train-00001.tar" in entry.sentence
                bad.append(stream.locate(8 * step + entry.row))
            assert mine.position == theirs.position
    if fault == "payload byte":  # block 2 holds the tokens 600 to 899; a row reads 17
        assert {sequence for _, sequence in bad} == set(range(600 // 16, 900 // 16 + 1))
    else:
        assert {sequence for _, sequence in bad} >= set(range(100))
    assert {shard for shard, _ in bad} == {1}


@pytest.mark.parametrize(
    ("harm", "sentence"),
    [
        (
            damage_block,
            r"shard .*/train-00001.tar .*: block 2 has CRC \w{8} but was written with \w{8}; restore .*verify",
        ),
        (
            lambda d: cut(d / "train-00001.tar", 5120),
            r"train-00001.tar ends at byte 5120, before byte \d+.*; restore .*verify",
        ),
        (
            lambda d: (d / "train-00001.tar").unlink(),
            r"cannot open shard .*/train-00001.tar: No such file.*; restore .*verify",
        ),
    ],
)
def test_by_default_the_loader_stops_with_what_to_do(
    dataset: Path, harm: Callable[[Path], object], sentence: str
) -> None:
    shards = ShardSet.open(dataset)
    harm(dataset)
    stream = TokenStream(shards, "train", SEQ_LEN, seed=3)
    with (
        BatchLoader(
            stream, batch_size=stream.num_sequences, micro_batch=0, data_rank=0, data_size=1, start=0, prefetch=1
        ) as loader,
        pytest.raises(DamageError, match=sentence) as caught,
    ):
        next(loader)
    assert caught.value.shard == str(dataset / "train-00001.tar")


def test_other_mistakes_are_not_skipped(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only damage is: a full disk or a wrong setting must not be taken for it."""

    def fail(*_: object) -> None:
        raise UserError("the disk is full")

    shards = ShardSet.open(dataset)
    monkeypatch.setattr(shards, "_file", fail)
    stream = TokenStream(shards, "train", SEQ_LEN, seed=3)
    lengths = dict(batch_size=8, micro_batch=0, data_rank=0, data_size=1, start=0, prefetch=1)
    with BatchLoader(stream, **lengths, skip_bad=True) as loader, pytest.raises(UserError, match="the disk is full"):
        next(loader)


@pytest.mark.parametrize("part", ["offset", "docends_offset"])
def test_skipped_rows_of_a_packed_source_in_a_mixture(tmp_path: Path, part: str) -> None:
    """Rows that find themselves by document ends; a bad one starts no document, and the other source goes on."""
    docs = [doc[:60] for doc in documents(200)]
    folders = [
        write_dataset(
            tmp_path / "packed", docs, docs[:9], packing=Packing(64, 8, int(docs[0][-1])), shard_tokens=64 * 20
        ),
        write_dataset(
            tmp_path / "other", docs, docs[:9], packing=Packing(64, 4, int(docs[0][-1])), shard_tokens=64 * 20
        ),
    ]

    def loader(skip_bad: bool) -> BatchLoader:
        sources = [Source(path.name, ShardSet.open(path), 1.0, 0.0) for path in folders]
        mixture = Mixture(Sources(sources), 64, 3, [(0, [0.5, 0.5])])
        lengths = dict(batch_size=40, micro_batch=0, data_rank=0, data_size=1, start=0, prefetch=1)
        return BatchLoader(mixture, **lengths, document_starts=True, skip_bad=skip_bad)

    with loader(skip_bad=False) as sound:
        ((tokens, labels, starts),) = next(sound)
    for shard in range(2):
        place = block_table(folders[0], shard)[0][part]
        flip_byte(folders[0] / f"train-{shard:05d}.tar", place + 1)
    with loader(skip_bad=False) as strict, pytest.raises(DamageError, match=r"packed/train-0000\d.tar .*block 0"):
        next(strict)
    with loader(skip_bad=True) as lenient:
        ((some_tokens, some_labels, some_starts),) = next(lenient)
        bad = {entry.row for entry in lenient.bad}
    assert 0 < len(bad) < 20
    assert starts is not None
    assert some_starts is not None
    for row in range(40):
        if row in bad:
            assert not some_tokens[row].any()
            assert (some_labels[row] == -100).all()
            assert not some_starts[row].any()
        else:
            assert (some_tokens[row] == tokens[row]).all()
            assert (some_labels[row] == labels[row]).all()
            assert (some_starts[row] == starts[row]).all()
