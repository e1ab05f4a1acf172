"""A build that was killed goes on where it was, and its dataset is the same, byte for byte."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from tests.tokenizer.test_build_shards import ROOT, SHARE, build, files, refused
from titans_pretrain.data.verify import verify
from tokenizer.read_text import Position, find_sources, read_records
from tokenizer.units import cut_units

OPTIONS = ("--shard-tokens", 9000, "--block-tokens", 1000, "--unit-bytes", 1000, "--dedup", "exact")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> list[Path]:
    """The documents in files of every format, some of them twice."""
    directory = tmp_path_factory.mktemp("inputs")
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    (directory / "a.jsonl").write_text("".join(lines[:60]) + "\n{broken\n" + lines[60])
    (directory / "b.jsonl.gz").write_bytes(gzip.compress("".join(lines[50:110]).encode()))
    table = pyarrow.table({"text": [*texts[100:150], None, *texts[150:160]]})
    pyarrow.parquet.write_table(table, directory / "c.parquet", row_group_size=7)
    (directory / "d.txt").write_bytes("\r\t".join(texts[155:190]).encode())
    (directory / "e.txt").write_text(texts[190])
    return [directory]


def command(tokenizer: Path, output: Path, inputs: list[Path], *more: object) -> list[str]:
    line = [
        "--tokenizer",
        tokenizer,
        "--output",
        output,
        "--val-fraction",
        SHARE,
        "--max-bad",
        0.1,
        "--doc-sep",
        "\\r\\t",
    ]
    return list(map(str, [*line, *OPTIONS, *more, "--input", *inputs]))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path, inputs: list[Path]) -> Path:
    """The dataset of a build that nobody disturbed."""
    output = tmp_path_factory.mktemp("whole") / "d"
    build(tokenizer, output, *command(tokenizer, output, inputs)[4:], input_=inputs)
    return output


def test_records_from_any_position_on(inputs: list[Path]) -> None:
    sources = find_sources(map(str, inputs), None)
    options = dict(text_key="text", doc_sep="\r\t")
    records = [record for record, _ in read_records(sources, **options)]
    units = list(cut_units(sources, **options, unit_bytes=1, start=Position()))
    assert [record for unit in units for record in unit.records] == records
    assert len(units) > 150
    assert sum(unit.consumed for unit in units) == sum(Path(source.path).stat().st_size for source in sources)
    for unit in units[::7]:
        rest = list(read_records(sources, **options, start=unit.end))
        assert [record for record, _ in rest] == records[records.index(unit.records[-1]) + 1 :]
    again = list(cut_units(sources, **options, unit_bytes=5000, start=Position()))
    assert [r for unit in again for r in unit.records] == records
    third = list(cut_units(sources, **options, unit_bytes=5000, first=3, start=again[2].end))
    assert [unit._replace(consumed=0) for unit in third] == [unit._replace(consumed=0) for unit in again[3:]]


@pytest.mark.parametrize("packing", [(), ("--packing", "bestfit", "--seq-len", 64, "--align", 16)])
def test_killed_builds_go_on(
    tmp_path: Path, tokenizer: Path, inputs: list[Path], whole: Path, packing: tuple[object, ...]
) -> None:
    if packing:
        whole = tmp_path / "whole"
        build(tokenizer, whole, *command(tokenizer, whole, inputs, *packing)[4:], input_=inputs)
    output, store, partial = tmp_path / "d", tmp_path / ".d.units", tmp_path / ".d.partial"
    rng = random.Random(1)
    before: set[str] = set()
    kept = []
    kills = [(2, "unit-000003*"), (1, "unit-000040*"), (2, "train-00001.tar")]
    for workers, wait_for in kills[1:2] if packing else kills:
        line = command(tokenizer, output, inputs, *packing, "--workers", workers)
        process = subprocess.Popen([sys.executable, ROOT / "tokenizer" / "build_shards.py", *line])
        deadline = time.monotonic() + 60
        while not any(itertools.chain(store.glob(wait_for), partial.glob(wait_for))):
            assert process.poll() is None, "ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.02))
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        units = {path.name: path.stat().st_mtime_ns for path in store.glob("unit-*.npz")}
        assert before <= units.items(), "a unit was encoded again"
        before = set(units.items())
        kept.append(len(units))
        assert not output.exists()
    assert kept == sorted(kept)
    line = command(tokenizer, output, inputs, *packing, "--workers", 2)
    done = subprocess.run(
        [sys.executable, ROOT / "tokenizer" / "build_shards.py", *line], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith(f"going on with {kept[-1]} units")
    assert files(output) == files(whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == (["d", "whole"] if packing else ["d"])


def test_a_killed_worker_and_workers_of_a_killed_build(tmp_path: Path, tokenizer: Path, inputs: list[Path]) -> None:
    line = command(tokenizer, tmp_path / "d", inputs, "--workers", 2)
    store = tmp_path / ".d.units"

    def start(units: int) -> tuple[subprocess.Popen[bytes], list[int]]:
        """A build that has so many units, and its workers."""
        process = subprocess.Popen(
            [sys.executable, ROOT / "tokenizer" / "build_shards.py", *line], stderr=subprocess.PIPE
        )
        while len(list(store.glob("*.npz"))) < units:
            time.sleep(0.002)
        tasks = list(Path(f"/proc/{process.pid}/task").iterdir())
        children = [int(child) for task in tasks for child in (task / "children").read_text().split()]
        return process, [c for c in children if b"spawn_main" in Path(f"/proc/{c}/cmdline").read_bytes()]

    process, workers = start(1)
    os.kill(workers[0], signal.SIGKILL)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 1
    assert told.decode().strip() == (
        "error: a tokenising process was killed, most likely for lack of memory: lower --workers and start the command "
        "again; it goes on where it was"
    )
    kept = len(list(store.glob("*.npz")))
    assert kept
    assert [path.name for path in tmp_path.iterdir()] == [store.name]

    process, workers = start(kept + 1)
    assert workers
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 20
    while not all(_has_ended(worker) for worker in workers):
        assert time.monotonic() < deadline, "a worker outlives its build"
        time.sleep(0.05)


def _has_ended(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")")[-1].split()[0] == "Z"
    except OSError:
        return True


def leave_unfinished(output: Path, whole_line: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop a build as a full disk would, after its fifth unit."""
    from tokenizer import build_shards, workers

    save, count = workers.save_unit, itertools.count()

    def full(*args: object) -> None:
        if next(count) == 5:
            raise OSError(28, "No space left on device", str(output))
        save(*args)

    with monkeypatch.context() as patched:
        patched.setattr(workers, "save_unit", full)
        with pytest.raises(SystemExit):
            build_shards.main([*whole_line, "--workers", "1"])
    assert len(list(output.with_name(".d.units").glob("*.npz"))) == 5


def test_after_a_full_disk_and_what_a_changed_command_is_told(
    tmp_path: Path,
    tokenizer: Path,
    inputs: list[Path],
    whole: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "d"
    line = command(tokenizer, output, inputs)
    leave_unfinished(output, line, monkeypatch)
    sentence = capsys.readouterr().err.strip()
    assert sentence == f"error: cannot write {output}: No space left on device; start the same command again to go on"
    assert [path.name for path in tmp_path.iterdir()] == [".d.units"]

    def told(*more: object, tokenizer: Path = tokenizer, input_: list[Path] = inputs) -> str:
        sentence = refused(capsys, tokenizer, output, *line[4:-2], *more, input_=input_)
        assert "has a build that did not finish, but " in sentence
        assert sentence.endswith("repeat the earlier command to continue it, or add --restart to begin anew")
        assert [path.name for path in tmp_path.iterdir() if path.name[0] == "."] == [".d.units"]
        return sentence

    assert "it began with --min-chars 1, not 2: " in told("--min-chars", 2)
    assert "it began with --unit-bytes 1000, not 1001: " in told("--unit-bytes", 1001)
    other = tmp_path / "other.model"
    other.write_bytes(tokenizer.read_bytes() + b"\x1a\x00")
    assert "the content of --tokenizer has changed since" in told(tokenizer=other)
    extra = tmp_path / "z.txt"
    extra.write_text("more")
    assert f"input {extra} was not part of it" in told(input_=[*inputs, extra])
    assert "e.txt was part of it and is not any more" in told(input_=[inputs[0] / f"{n}*" for n in "abcd"])
    assert "the inputs were in another order" in told(input_=[inputs[0] / f"{n}*" for n in "bacde"])
    changed = inputs[0] / "e.txt"
    at = changed.stat().st_mtime_ns
    os.utime(changed, ns=(at, at + 1))
    assert f"input {changed} has changed since" in told()
    os.utime(changed, ns=(at, at))

    # What does not decide the units may change, and the damage of one is noticed.
    unit = tmp_path / ".d.units" / "unit-000002.npz"
    content = bytearray(unit.read_bytes())
    content[content.index(b"train.tokens.npy") + 200] ^= 1
    unit.write_bytes(content)
    assert "unit-000002.npz is damaged: add --restart" in refused(capsys, tokenizer, output, *line[4:-2], input_=inputs)
    leave_unfinished(output, line, monkeypatch)
    build(tokenizer, output, *line[4:-2], "--on-bad", "skip", "--workers", 2, input_=inputs)
    assert files(output) == files(whole)

    leave_unfinished(output, [*line, "--overwrite"], monkeypatch)
    capsys.readouterr()
    build(tokenizer, output, *line[4:-2], "--overwrite", "--restart", "--min-chars", 2, input_=inputs)
    assert "going on" not in capsys.readouterr().out
    assert files(output) != files(whole)
    assert verify(output) == []


def test_every_different_document_once(whole: Path, tokenizer: Path, texts: list[str]) -> None:
    from tests.tokenizer.test_build_shards import documents_of

    found = documents_of(whole, "train", tokenizer) + documents_of(whole, "valid", tokenizer)
    assert sorted(found) == sorted(texts[:191])


def test_seen_hashes_are_a_set() -> None:
    from tokenizer.duplicates import SeenHashes

    rng = np.random.default_rng(0)
    pool = rng.integers(0, 2**63, size=(15000, 2), dtype=np.uint64)
    pool[:50, 0] <<= np.uint64(32)  # some that want the same place
    pool[50:60, 0] = 5
    seen, reference = SeenHashes(), set()
    for size in (1, 0, 3000, 5, 20000, 20000):
        hashes = pool[rng.integers(0, len(pool), size)]
        expected = []
        for pair in hashes.tolist():
            expected.append((max(pair[0], 1), pair[1]) not in reference)
            reference.add((max(pair[0], 1), pair[1]))
        assert seen.add(hashes).tolist() == expected
        assert len(seen) == len(reference)
    seen = SeenHashes()
    for _ in range(40):
        assert seen.add(rng.integers(0, 2**63, size=(997, 2), dtype=np.uint64)).all()
        assert seen.nbytes <= max(16384, 43 * len(seen))
