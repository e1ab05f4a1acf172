"""Remote datasets: the same tokens from wherever they lie, each file brought once, whole or not at all."""

from __future__ import annotations

import errno
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.data.servers import FileServer, Upload, serve, serve_s3
from tests.data.test_shards import block_table, cut, read_all
from tests.data.tiny import documents, flip_byte, write_dataset
from titans_pretrain.data import fetch as fetch_module
from titans_pretrain.data import shards as shards_module
from titans_pretrain.data import stream as stream_module
from titans_pretrain.data import transfer as transfer_module
from titans_pretrain.data.cache import Cache
from titans_pretrain.data.damage import DamageError
from titans_pretrain.data.location import scheme_of, shown, url_of
from titans_pretrain.data.manifest import MANIFEST_NAME, TOKENIZER_NAME, read_manifest
from titans_pretrain.data.shards import ShardSet
from titans_pretrain.data.stream import BatchLoader, TokenStream
from titans_pretrain.data.verify import verify
from titans_pretrain.errors import UserError


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer_module, "FIRST_PAUSE", 0.002)
    monkeypatch.setattr(shards_module, "PATIENCE", 0.3)


@pytest.fixture
def server(dataset: Path) -> Iterator[FileServer]:
    with serve(dataset) as server:
        yield server


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache", 1 << 30)


@pytest.fixture(scope="module")
def bucket() -> Iterator[Upload]:
    with serve_s3() as upload:
        yield upload


@pytest.fixture
def s3(bucket: Upload, dataset: Path) -> str:
    return bucket(dataset)


def same_tokens(shards: ShardSet, dataset: Path) -> None:
    local = ShardSet.open(dataset)
    for split in ("train", "valid"):
        for mine, expected in zip(read_all(shards, split), read_all(local, split), strict=True):
            np.testing.assert_array_equal(mine, expected)


def files_in(cache: Cache) -> list[str]:
    """Names without hashes, of all but the folder's own lock."""
    return sorted(path.name[17:] for path in cache.directory.iterdir() if path.name != ".lock")


def everything(dataset: Path) -> list[str]:
    return sorted({path.name for path in dataset.iterdir()} - {MANIFEST_NAME})


# ------------------------------------------------------------------------------------------------ locations


def test_names_in_locations() -> None:
    assert url_of("http://host/set/", "a b.tar") == "http://host/set/a%20b.tar"
    assert url_of("https://host/set?sig=x%2F", "a.tar") == "https://host/set/a.tar?sig=x%2F"
    assert shown("https://host/set/a.tar?sig=x") == "https://host/set/a.tar"
    assert url_of("s3://bucket", "a.tar") == "s3://bucket/a.tar"
    assert url_of("pipe:cat ${DIR}/{name} | cat", "a b") == "pipe:cat ${DIR}/'a b' | cat"
    assert [scheme_of(text) for text in ("/a/b", "a", Path("a:b/c"), "S3://b", "pipe:x {name}")] == [
        "",
        "",
        "",
        "s3",
        "pipe",
    ]


@pytest.mark.parametrize(
    ("location", "sentence"),
    [
        ("gs://bucket/a", "starts with http://, https://, s3:// or pipe:"),
        ("s3:///a", "lacks the bucket"),
        ("http:///a", "lacks the host"),
        ("http:/host/a", "followed by two slashes"),
        ("pipe:cat x", "must hold {name}"),
        ("https://me:secret@host/a", r"^https://...@host/a: a password in a URL"),
    ],
)
def test_locations_that_cannot_be(location: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        ShardSet.open(location)


# ---------------------------------------------------------------------------------------------------- the same tokens


def test_http_gives_the_same_tokens_and_downloads_once(dataset: Path, server: FileServer, cache: Cache) -> None:
    same_tokens(ShardSet.open(server.url, cache), dataset)
    assert files_in(cache) == everything(dataset)
    same_tokens(ShardSet.open(server.url, cache), dataset)
    assert {name: server.count(name) for name in everything(dataset)} == dict.fromkeys(everything(dataset), 1)
    assert server.count(MANIFEST_NAME) == 2  # asked for at every start
    assert verify(server.url, cache) == []


def test_s3_gives_the_same_tokens(dataset: Path, s3: str, cache: Cache) -> None:
    same_tokens(ShardSet.open(s3, cache), dataset)
    assert files_in(cache) == everything(dataset)
    with pytest.raises(UserError, match=r"s3://bucket/none/index.json: NoSuchKey \(404\)"):
        ShardSet.open("s3://bucket/none", cache)
    with pytest.raises(UserError, match=r"s3://other/set/index.json: NoSuchBucket \(404\)"):
        ShardSet.open("s3://other/set", cache)


def test_s3_goes_on_where_a_body_broke_off(dataset: Path, s3: str, tmp_path: Path) -> None:
    name = "train-00001.tar"
    whole = (dataset / name).read_bytes()
    with open(tmp_path / "part", "w+b") as file:
        file.write(whole[:1000])
        assert transfer_module._attempt(f"{s3}/{name}", file, 1000, len(whole)) == len(whole)
        file.seek(0)
        assert file.read() == whole


def test_commands_give_the_same_tokens(dataset: Path, cache: Cache) -> None:
    same_tokens(ShardSet.open(f"pipe:cat {dataset}/{{name}}", cache), dataset)
    assert files_in(cache) == everything(dataset)


def test_two_datasets_with_files_of_one_name_do_not_mix(tmp_path: Path, dataset: Path, cache: Cache) -> None:
    other = write_dataset(tmp_path / "other", documents(280, seed=5), documents(20, seed=6))
    for folder in (dataset, other):
        same_tokens(ShardSet.open(f"pipe:cat {folder}/{{name}}", cache), folder)


def test_a_dataset_built_anew_at_the_same_place_is_noticed(tmp_path: Path, dataset: Path, cache: Cache) -> None:
    link = tmp_path / "link"
    link.symlink_to(dataset)
    same_tokens(ShardSet.open(f"pipe:cat {link}/{{name}}", cache), dataset)
    other = write_dataset(tmp_path / "other", documents(280, seed=5), documents(20, seed=6))
    link.unlink()
    link.symlink_to(other)
    same_tokens(ShardSet.open(f"pipe:cat {link}/{{name}}", cache), other)


# --------------------------------------------------------------------------------------------------- faults on the way


def test_a_truncated_body_is_continued(
    monkeypatch: pytest.MonkeyPatch, dataset: Path, server: FileServer, cache: Cache
) -> None:
    monkeypatch.setattr(transfer_module, "PIECE", 512)
    server.faults["train-00001.tar"] = [("cut", 700), ("status", 503), ("cut", 600)]
    same_tokens(ShardSet.open(server.url, cache), dataset)
    assert [start for name, start in server.requests if name == "train-00001.tar"] == [0, 700, 700, 1300]


def test_a_server_without_ranges_starts_over(dataset: Path, server: FileServer, cache: Cache) -> None:
    server.faults["train-00001.tar"] = [("cut", 700), ("whole", 0)]
    same_tokens(ShardSet.open(server.url, cache), dataset)


def test_a_body_that_never_comes_whole(dataset: Path, server: FileServer, cache: Cache) -> None:
    size = (dataset / "train-00001.tar").stat().st_size
    server.faults["train-00001.tar"] = [("cut", 0)] * 20
    shards = ShardSet.open(server.url, cache)
    with pytest.raises(
        DamageError, match=rf"shard train-00001.tar: {server.url}/train-00001.tar ended after 0 of {size} bytes"
    ):
        shards.read("train", 1, 0, 10)
    assert server.count("train-00001.tar") == transfer_module.TRIES
    with pytest.raises(DamageError, match="ended after 0"):  # the next row need not wait for all that again
        shards.read("train", 1, 0, 10)
    assert server.count("train-00001.tar") == transfer_module.TRIES
    assert files_in(cache) == [TOKENIZER_NAME]


def test_a_byte_flipped_on_the_way_is_fetched_again(dataset: Path, server: FileServer, cache: Cache) -> None:
    for name in ("train-00001.tar", TOKENIZER_NAME):
        server.faults[name] = [("flip", 3)]  # in a tar header: no CRC of ours covers it
    same_tokens(ShardSet.open(server.url, cache), dataset)
    assert server.count("train-00001.tar") == server.count(TOKENIZER_NAME) == 2


def test_a_manifest_damaged_on_the_way_is_fetched_again(dataset: Path, server: FileServer, cache: Cache) -> None:
    server.faults[MANIFEST_NAME] = [("flip", 100)]
    same_tokens(ShardSet.open(server.url, cache), dataset)
    server.faults[MANIFEST_NAME] = [("flip", 100)] * 2
    with pytest.raises(UserError, match=rf"the manifest {server.url}/index.json is damaged"):
        ShardSet.open(server.url, cache)


def flip_in_block(dataset: Path) -> None:
    flip_byte(dataset / "train-00001.tar", block_table(dataset, 1)[2]["offset"])


@pytest.mark.parametrize(
    ("harm", "sentence"),
    [
        (lambda d: cut(d / "train-00001.tar", 5120), r"/train-00001.tar has 5120 bytes, not \d+"),
        (flip_in_block, r"/train-00001.tar arrived twice with SHA-256 \w+, not \w+"),
        (lambda d: flip_byte(d / "train-00001.tar", 5), r"/train-00001.tar arrived twice with SHA-256 \w+, not \w+"),
        (lambda d: (d / "train-00001.tar").unlink(), r"/train-00001.tar: HTTP 404 Not Found"),
    ],
)
def test_damage_at_the_other_end(
    dataset: Path, server: FileServer, cache: Cache, harm: Callable[[Path], object], sentence: str
) -> None:
    shards = ShardSet.open(server.url, cache)
    harm(dataset)
    with pytest.raises(DamageError, match=r"cannot get shard train-00001.tar: http://127.*" + sentence) as caught:
        shards.read("train", 1, 0, 10)
    assert caught.value.shard == f"{server.url}/train-00001.tar"
    shards.read("train", 0, 0, 10)
    assert "train-00001.tar" not in files_in(cache)
    problems = verify(server.url, cache)
    assert len(problems) == 1
    assert "train-00001.tar" in problems[0]


def test_rows_of_a_shard_that_cannot_be_had_are_skipped_where_asked_for(
    dataset: Path, server: FileServer, cache: Cache
) -> None:
    (dataset / "train-00001.tar").unlink()
    stream = TokenStream(ShardSet.open(server.url, cache, skip_bad=True), "train", 16, seed=3)
    with BatchLoader(
        stream,
        batch_size=stream.num_sequences,
        micro_batch=0,
        data_rank=0,
        data_size=1,
        start=0,
        prefetch=1,
        skip_bad=True,
    ) as loader:
        ((tokens, labels, _),) = next(loader)
        bad = loader.bad
    expected = [number for number in range(stream.num_sequences) if stream.locate(number)[0] == 1]
    assert [entry.row for entry in bad] == expected
    assert len(expected) > 100
    assert all("HTTP 404" in entry.sentence and entry.shard.startswith(server.url) for entry in bad)
    assert not tokens[expected].any()
    assert (labels[expected] == -100).all()
    assert server.count("train-00001.tar") <= 2  # by the reader and by the thread ahead of it, not for every row


def test_tokenizer_or_manifest_missing(dataset: Path, server: FileServer, cache: Cache) -> None:
    (dataset / TOKENIZER_NAME).unlink()
    with pytest.raises(UserError, match=r"tokenizer that made the shards: http.*tokenizer.model: HTTP 404"):
        ShardSet.open(server.url, cache)
    (dataset / MANIFEST_NAME).unlink()
    with pytest.raises(
        UserError, match=r"cannot read the manifest of the dataset: http.*HTTP 404 Not Found; set data.path"
    ):
        ShardSet.open(server.url, cache)


def test_nobody_listens(cache: Cache) -> None:
    with pytest.raises(UserError, match=r"http://127.0.0.1:9/set/index.json: Connection refused"):
        ShardSet.open("http://127.0.0.1:9/set", cache)


def test_a_command_that_fails_after_part_of_its_output(dataset: Path, cache: Cache) -> None:
    command = f"f={{name}}; case $f in train-00001*) head -c 2048 {dataset}/$f; echo no more >&2; exit 3;; esac; "
    command += f"cat {dataset}/$f"
    shards = ShardSet.open(f"pipe:{command}", cache)
    with pytest.raises(
        DamageError, match=r"shard train-00001.tar: the command '.*' ended with exit status 3 \(no more\)"
    ):
        shards.read("train", 1, 0, 10)
    assert files_in(cache) == [TOKENIZER_NAME]
    shards.read("train", 0, 0, 10)


def test_a_command_that_fails_at_a_boundary_or_only_at_the_end(dataset: Path, cache: Cache, tmp_path: Path) -> None:
    """The whole file and then a failure is a failure; the second time it works."""
    flag = tmp_path / "flag"
    command = (
        f"cat {dataset}/{{name}}; case {{name}} in train-00001*) test -e {flag} || {{ touch {flag}; exit 3; }};; esac"
    )
    same_tokens(ShardSet.open(f"pipe:{command}", cache), dataset)
    assert flag.exists()


def test_a_command_that_is_not_there(cache: Cache) -> None:
    started = time.monotonic()
    with pytest.raises(UserError, match=r"ended with exit status 127 \(.*not found\)"):
        ShardSet.open("pipe:no-such-command {name}", cache)
    assert time.monotonic() - started < 2


# ------------------------------------------------------------------------------------------------------------ the cache


def test_a_copy_damaged_on_this_disk_is_fetched_again(dataset: Path, server: FileServer, cache: Cache) -> None:
    ShardSet.open(server.url, cache).read("train", 1, 0, 10)
    copy = next(cache.directory.glob("*-train-00001.tar"))
    flip_byte(copy, block_table(dataset, 1)[2]["offset"])
    same_tokens(ShardSet.open(server.url, cache), dataset)
    entry = read_manifest(dataset).splits["train"].shards[2]
    flip_byte(next(cache.directory.glob("*-train-00002.tar")), entry.index_offset + 3)
    cut(next(cache.directory.glob("*-train-00003.tar")), 100)
    flip_byte(next(cache.directory.glob("*-train-00004.tar")), 5)  # a header, which only a hash over all can see
    same_tokens(ShardSet.open(server.url, cache), dataset)
    assert verify(server.url, cache) == []
    counts = [server.count(f"train-0000{i}.tar") for i in range(6)]
    assert counts == [1, 2, 2, 2, 2, 1]


def test_the_bound_holds_and_the_least_recently_used_goes(dataset: Path, server: FileServer, tmp_path: Path) -> None:
    size = max(path.stat().st_size for path in dataset.glob("*.tar"))
    cache = Cache(tmp_path / "cache", 4 * size)
    shards = ShardSet.open(server.url, cache)
    for number in (0, 1, 2, 0, 3, 4):
        shards.read("train", number, 0, 10)
        shards.expect("train", [], [])  # lets go of it
        assert sum(path.stat().st_size for path in cache.directory.iterdir()) <= cache.limit
    assert [name for name in files_in(cache) if "train" in name] == [f"train-0000{i}.tar" for i in (0, 3, 4)]
    same_tokens(shards, dataset)


def test_a_file_in_use_stays(dataset: Path, server: FileServer, tmp_path: Path) -> None:
    sizes = [shard.bytes for shard in read_manifest(dataset).splits["train"].shards]
    cache = Cache(tmp_path / "cache", sizes[0] + sizes[1] + 1000)
    first, second = ShardSet.open(server.url, cache), ShardSet.open(server.url, cache)
    first.read("train", 0, 0, 10)
    first.read("train", 1, 0, 10)
    with pytest.raises(UserError, match=r"GiB in use and cannot take .* train-00002.tar: raise data.cache_gib"):
        second.read("train", 2, 0, 10)
    assert sum(name.startswith("train") for name in files_in(cache)) == 2
    first.expect("train", [1], [])
    second.read("train", 2, 0, 10)
    assert [name for name in files_in(cache) if "train" in name] == ["train-00001.tar", "train-00002.tar"]


def test_shards_of_the_next_window_come_ahead(
    monkeypatch: pytest.MonkeyPatch, dataset: Path, server: FileServer, cache: Cache
) -> None:
    monkeypatch.setattr(stream_module, "WINDOW_SHARDS", 2)
    shards = ShardSet.open(server.url, cache)
    stream = TokenStream(shards, "train", 16, seed=3)
    stream.announce(0)
    order = stream._order
    assert order is not None
    expected = {f"train-{number:05d}.tar" for number in order.shards_of(0) + order.shards_of(1)}
    assert len(expected) == 4
    deadline = time.monotonic() + 10
    while not expected <= set(files_in(cache)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert {name for name in files_in(cache) if "train" in name} == expected
    local = TokenStream(ShardSet.open(dataset), "train", 16, seed=3)
    for index in range(stream.num_sequences + 20):
        stream.announce(index)
        np.testing.assert_array_equal(stream.sample(index), local.sample(index))
    assert len(shards._open) <= 2
    assert all(server.count(f"train-0000{i}.tar") == 1 for i in range(7))


def test_the_thread_ahead_ends_by_itself_and_leaves_errors_to_the_reader(
    dataset: Path, server: FileServer, cache: Cache
) -> None:
    shards = ShardSet.open(server.url, cache)
    (dataset / "train-00001.tar").unlink()
    shards.expect("train", [1], [2])
    assert shards._remote is not None
    thread = shards._remote._thread
    assert thread is not None
    thread.join(timeout=10)
    assert not thread.is_alive()
    with pytest.raises(DamageError, match="404"):
        shards.read("train", 1, 0, 10)
    shards.read("train", 2, 0, 10)
    assert server.count("train-00002.tar") == 1


def test_disk_full(dataset: Path, server: FileServer, cache: Cache) -> None:
    shards = ShardSet.open(server.url, cache)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))
        with pytest.raises(
            UserError, match=r"train-00001.tar in the cache .*: File too large; .*data.cache_dir"
        ) as caught:
            shards.read("train", 1, 0, 10)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not isinstance(caught.value, DamageError)  # the data is sound: nothing to skip
    assert files_in(cache) == [TOKENIZER_NAME]
    same_tokens(shards, dataset)


def test_disk_full_on_a_small_file_system(dataset: Path, server: FileServer, tmp_path: Path) -> None:
    mount = tmp_path / "small"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "none", str(mount)], capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        cache = Cache(mount, 1 << 30)
        shards = ShardSet.open(server.url, cache)
        with pytest.raises(UserError, match=rf"{os.strerror(errno.ENOSPC)}; its disk has 0.00 GiB left"):
            [shards.read("train", number, 0, 10) for number in range(7)]
        assert not list(mount.glob("*.tmp.*"))
    finally:
        subprocess.run(["umount", "-l", str(mount)], check=True)


def test_cache_folder_that_cannot_be(server: FileServer, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"in the cache .*file/sub: Not a directory.*data.cache_dir"):
        ShardSet.open(server.url, Cache(tmp_path / "file" / "sub", 1 << 30))


def _read_in_process(url: str, directory: Path, start: float) -> None:
    time.sleep(max(0.0, start - time.time()))
    shards = ShardSet.open(url, Cache(directory, 1 << 30))
    stream = TokenStream(shards, "train", 16, seed=3)
    for index in range(60):
        stream.sample(index)


def test_ranks_of_a_node_fetch_a_shard_once(server: FileServer, cache: Cache) -> None:
    context = multiprocessing.get_context("fork")
    start = time.time() + 0.2
    ranks = [context.Process(target=_read_in_process, args=(server.url, cache.directory, start)) for _ in range(4)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(timeout=60)
    assert [rank.exitcode for rank in ranks] == [0] * 4
    assert [server.count(f"train-0000{i}.tar") for i in range(7)] == [1] * 7
    assert server.count(TOKENIZER_NAME) == 1


KILLED = """
import sys
from pathlib import Path
from titans_pretrain.data.cache import Cache
from titans_pretrain.data.shards import ShardSet
shards = ShardSet.open(sys.argv[1], Cache(Path(sys.argv[2]), 1 << 30))
shards.read("train", 1, 0, 10)
"""


def test_a_process_killed_during_a_download_leaves_a_usable_cache(dataset: Path, cache: Cache, tmp_path: Path) -> None:
    started, slow = tmp_path / "started", tmp_path / "slow"
    slow.touch()
    command = (
        f"case {{name}} in train-00001*) head -c 5000 {dataset}/{{name}}; if [ -e {slow} ]; then touch {started}; sleep 60; "
        f"fi; tail -c +5001 {dataset}/{{name}};; *) cat {dataset}/{{name}};; esac"
    )
    location = f"pipe:{command}"
    process = subprocess.Popen([sys.executable, "-c", KILLED, location, str(cache.directory)])
    deadline = time.monotonic() + 60
    while not started.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert list(cache.directory.glob("*train-00001.tar.tmp.*"))
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = files_in(cache)
    assert any("tmp" in name for name in left)
    assert any(name.endswith(".lock") for name in left)
    assert "train-00001.tar" not in left
    slow.unlink()
    same_tokens(ShardSet.open(location, cache), dataset)
    assert files_in(cache) == everything(dataset)  # and the remains are gone


def test_a_fetch_that_failed_is_tried_again_later(
    monkeypatch: pytest.MonkeyPatch, dataset: Path, server: FileServer, cache: Cache
) -> None:
    shards = ShardSet.open(server.url, cache)
    server.faults["train-00001.tar"] = [("status", 404)]
    with pytest.raises(DamageError, match="404"):
        shards.read("train", 1, 0, 10)
    with pytest.raises(DamageError, match="404"):
        shards.read("train", 1, 0, 10)
    monkeypatch.setattr(fetch_module, "FORGIVE", 0.0)
    same_tokens(shards, dataset)
