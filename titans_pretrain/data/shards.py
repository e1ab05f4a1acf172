"""Which tokens lie at a place in a dataset, and are they the ones that were written?

An opened dataset has had its manifest, tokenizer and, where it lies on this machine, file sizes checked. Each block is
checked against its CRC the first time any of its tokens is read, so damage is reported before a wrong token is served.
Shards of a remote dataset are read from the local cache, into which they come when they are first needed.
"""

from __future__ import annotations

import json
import os
import shlex
import threading
import time
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from titans_pretrain.config import DataConfig
from titans_pretrain.data.atomic import sha256_of
from titans_pretrain.data.cache import PATIENCE, Cache, HeldFile, NoRoomError
from titans_pretrain.data.damage import DamageError
from titans_pretrain.data.fetch import FORGIVE, RemoteFolder
from titans_pretrain.data.location import scheme_of
from titans_pretrain.data.manifest import (
    DTYPES,
    SPLITS,
    TOKENIZER_NAME,
    Manifest,
    ShardEntry,
    SplitEntry,
    read_manifest,
)
from titans_pretrain.errors import UserError

VERIFY_COMMAND = "python tokenizer/build_shards.py verify"
_OPEN_FILES = 64


class ShardSet:
    """A dataset opened for reading. Safe to read from several threads."""

    def __init__(self, path: Path | str, manifest: Manifest, remote: RemoteFolder | None = None):
        self.path = path
        """The folder, or the remote location."""
        self.manifest = manifest
        self.vocab_size = manifest.vocab_size
        self.tokenizer_sha256 = manifest.tokenizer_sha256
        self.bos_id = manifest.bos_id
        self.eos_id = manifest.eos_id
        self.unigram_entropy = manifest.unigram_entropy
        """Nats per token of the train split's unigram distribution."""
        self.fingerprint = manifest.fingerprint()
        """SHA-256 over what decides the token stream."""
        self._dtype = np.dtype(DTYPES[manifest.dtype])
        self._lock = threading.Lock()
        self._open: OrderedDict[str, ShardFile] = OrderedDict()
        self._indexes: dict[str, BlockIndex] = {}
        self._remote = remote
        self._tokenizer = remote.tokenizer(manifest) if remote else None
        self._fetched_again: dict[str, float] = {}

    @classmethod
    def open(cls, path: str | Path, cache: Cache | None = None, *, skip_bad: bool = False) -> ShardSet:
        """Open a dataset; reads no shard, but where it is a folder checks that each is there and has its full size.

        Args:
            path: a folder, or a remote location as location.py describes.
            cache: for a remote one; None: that of the default settings.
            skip_bad: missing and resized shards are left to whoever reads them.

        Raises:
            UserError: missing or damaged manifest, missing or resized shard, a tokenizer that is not the one that made
                the shards.
        """
        if scheme_of(path):
            remote = RemoteFolder(str(path), cache or Cache.of(DataConfig()))
            return cls(str(path), remote.manifest(), remote)
        directory = Path(path)
        manifest = read_manifest(directory)
        entries = [entry for split in manifest.splits.values() for entry in split.shards]
        problem = _tokenizer_problem(directory, manifest)
        for entry in [] if skip_bad else entries:
            problem = problem or _size_problem(directory / entry.name, entry)
        if problem:
            raise UserError(
                f"{problem}; restore the file or build the dataset again ({VERIFY_COMMAND} {directory} checks all)"
            )
        return cls(directory, manifest)

    @property
    def tokenizer_path(self) -> Path:
        """A local file."""
        return self._tokenizer.path if self._tokenizer else Path(self.path) / TOKENIZER_NAME

    def split(self, name: str) -> SplitEntry:
        """The manifest's entry of split "train" or "valid".

        Raises:
            UserError: the split holds no tokens.
        """
        assert name in SPLITS, name
        split = self.manifest.splits.get(name)
        if split is None or not split.tokens:
            raise UserError(
                f"the {name} split of {self.path} is empty: build the dataset again with another --val-fraction"
            )
        return split

    @property
    def is_remote(self) -> bool:
        return self._remote is not None

    def num_tokens(self, split: str) -> int:
        """Tokens in split "train" or "valid"."""
        return self.split(split).tokens

    def read(self, split: str, shard: int, start: int, count: int) -> np.ndarray:
        """Tokens `start` to `start + count` of shard number `shard`, in the dataset's dtype, [count].

        Raises:
            DamageError: the shard is missing, cut short or damaged where it is read.
            UserError: the cache of a remote dataset cannot be used.
        """
        entry = self.split(split).shards[shard]
        assert start >= 0
        assert start + count <= entry.tokens
        with self._lock:
            file = self._file(entry)
            try:
                return self._read(entry, file, start, count)
            except DamageError:
                if not self._may_fetch_again(entry):
                    raise
            return self._read(entry, self._file(entry), start, count)

    def expect(self, split: str, now: Sequence[int], later: Sequence[int]) -> None:
        """Say which shards are read from here on, in any order, and which after that, so that they can be fetched early and
        others of the split be let go. Free of cost for a local dataset."""
        if self._remote is None:
            return
        shards = self.split(split).shards
        with self._lock:
            kept = {shards[number].name for number in now}
            for name in [shard.name for shard in shards if shard.name in self._open and shard.name not in kept]:
                self._open.pop(name).close()
            wanted = [shards[number] for number in (*now, *later) if shards[number].name not in self._open]
        self._remote.expect(wanted)

    def _read(self, entry: ShardEntry, file: ShardFile, start: int, count: int) -> np.ndarray:
        tokens = np.empty(count, dtype=self._dtype)
        index = self._index(entry, file)
        first = int(np.searchsorted(index.starts, start, side="right")) - 1
        done = 0
        for block in range(first, len(index.starts)):
            if done == count:
                break
            if not index.checked[block]:
                self._check_block(file, index, block)
            skip = start + done - int(index.starts[block])
            here = min(count - done, int(index.tokens[block]) - skip)
            file.read_into(tokens[done : done + here], int(index.offsets[block]) + skip * self._dtype.itemsize)
            done += here
        return tokens

    def _file(self, entry: ShardEntry) -> ShardFile:
        if entry.name in self._open:
            self._open.move_to_end(entry.name)
        else:
            self._open[entry.name] = self._open_file(entry)
            if len(self._open) > _OPEN_FILES:
                self._open.popitem(last=False)[1].close()
        return self._open[entry.name]

    def _open_file(self, entry: ShardEntry) -> ShardFile:
        if self._remote is None:
            return ShardFile(Path(self.path) / entry.name)
        while True:
            try:
                held = self._remote.open(entry, patience=0.0 if self._open else PATIENCE)
                return ShardFile(self._remote.shown(entry.name), held, str(self.path))
            except NoRoomError:
                if not self._open:
                    raise
                self._open.popitem(last=False)[1].close()  # the cache is smaller than a window

    def _may_fetch_again(self, entry: ShardEntry) -> bool:
        """Drop a damaged copy of a remote shard, unless that was done a moment ago."""
        now = time.monotonic()
        if self._remote is None or now - self._fetched_again.get(entry.name, -FORGIVE) < FORGIVE:
            return False
        self._fetched_again[entry.name] = now
        self._open.pop(entry.name).close()
        self._indexes.pop(entry.name, None)
        self._remote.discard(entry)
        return True

    def _index(self, entry: ShardEntry, file: ShardFile) -> BlockIndex:
        if entry.name not in self._indexes:
            self._indexes[entry.name] = BlockIndex(entry, file)
        return self._indexes[entry.name]

    def _check_block(self, file: ShardFile, index: BlockIndex, block: int) -> None:
        content = np.empty(int(index.tokens[block]), dtype=self._dtype)
        file.read_into(content, int(index.offsets[block]))
        actual, expected = _crc32(content), index.table[block]["crc32"]
        if actual != expected:
            raise DamageError(
                f"shard {file.path} is damaged: block {block} has CRC {actual:08x} but was written with {expected:08x}; "
                f"{file.remedy}",
                str(file.path),
            )
        index.checked[block] = True


class ShardFile:
    """An open shard: reads at an offset into an array.

    Args:
        path: what messages call it; opened where `held` is None.
        held: a copy of it in the cache.
        dataset: the location that it is part of; "": the folder of `path`.
    """

    def __init__(self, path: Path | str, held: HeldFile | None = None, dataset: str = ""):
        self.path = path
        where = shlex.quote(dataset or str(Path(path).parent))
        self.remedy = f"restore the file or build the dataset again ({VERIFY_COMMAND} {where} checks all)"
        self._held = held
        try:
            self._descriptor = held.descriptor if held else os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self.size = os.fstat(self._descriptor).st_size
        except OSError as error:
            raise DamageError(f"cannot open shard {path}: {error.strerror}; {self.remedy}", str(path)) from error

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        if getattr(self, "_descriptor", -1) >= 0:
            if self._held:
                self._held.close()
            else:
                os.close(self._descriptor)
            self._descriptor = -1

    def read_into(self, array: np.ndarray, offset: int) -> None:
        """Fill contiguous `array` from byte `offset`.

        Raises:
            DamageError: the disk fails or the file ends early.
        """
        view = array.view(np.uint8).data
        done = 0
        while done < len(view):
            try:
                count = os.preadv(self._descriptor, [view[done:]], offset + done)
            except OSError as error:
                raise DamageError(
                    f"cannot read shard {self.path} at byte {offset + done}: {error.strerror}; {self.remedy}",
                    str(self.path),
                ) from error
            if count == 0:
                raise DamageError(
                    f"shard {self.path} ends at byte {self.size}, before byte {offset + len(view)}, where it has data by its "
                    f"index; {self.remedy}",
                    str(self.path),
                )
            done += count


class BlockIndex:
    """The block table of one shard, read from its `__index__` member.

    starts: int64 [blocks], the first token of each block counted from the shard's first.
    tokens, offsets: int64 [blocks], tokens in a block and the byte offset of the first.
    checked: bool [blocks], whether the CRC was found right.
    """

    def __init__(self, entry: ShardEntry, file: ShardFile):
        content = np.empty(entry.index_bytes, dtype=np.uint8)
        file.read_into(content, entry.index_offset)
        if _crc32(content) != entry.index_crc32:
            raise DamageError(
                f"the block index of shard {file.path} is damaged: CRC {_crc32(content):08x}, but the manifest says "
                f"{entry.index_crc32:08x}; {file.remedy}",
                str(file.path),
            )
        self.table: list[dict[str, int]] = json.loads(content.tobytes())["blocks"]
        self.tokens = np.array([block["tokens"] for block in self.table], dtype=np.int64)
        self.starts = np.cumsum(self.tokens) - self.tokens
        self.offsets = np.array([block["offset"] for block in self.table], dtype=np.int64)
        self.checked = np.zeros(len(self.table), dtype=bool)


def verify(path: str | Path, cache: Cache | None = None) -> list[str]:
    """Read every byte of a dataset and compare it with its checksums; costs one SHA-256 over the shards.

    A remote dataset comes through the cache, one shard at a time, which compares what it downloads.

    Args:
        cache: for a remote dataset; None: that of the default settings.

    Returns:
        One sentence per problem, empty when all is as written.

    Raises:
        UserError: the manifest itself cannot be used, or the cache not written.
    """
    if scheme_of(path):
        return list(_remote_problems(RemoteFolder(str(path), cache or Cache.of(DataConfig()))))
    directory = Path(path)
    manifest = read_manifest(directory)
    problems = [_tokenizer_problem(directory, manifest)]
    for split in manifest.splits.values():
        for entry in split.shards:
            problems += _shard_problems(directory / entry.name, manifest, entry)
    return [problem for problem in problems if problem]


def _remote_problems(remote: RemoteFolder) -> Iterator[str]:
    manifest = remote.manifest()
    try:
        remote.tokenizer(manifest).close()
    except UserError as error:
        yield str(error)
    for split in manifest.splits.values():
        for entry in split.shards:
            try:
                held = remote.open(entry)
                if sha256_of(held.path) != entry.sha256:  # the copy that was here
                    held.close()
                    remote.discard(entry)
                    held = remote.open(entry)
                held.close()
            except DamageError as error:
                yield str(error)


def _tokenizer_problem(directory: Path, manifest: Manifest) -> str | None:
    path = directory / TOKENIZER_NAME
    try:
        actual = sha256_of(path)
    except OSError as error:
        return f"cannot read {path}: {error.strerror}"
    if actual != manifest.tokenizer_sha256:
        return f"{path} is not the tokenizer that made the shards: SHA-256 {actual}, not {manifest.tokenizer_sha256}"
    return None


def _size_problem(path: Path, entry: ShardEntry) -> str | None:
    try:
        size = path.stat().st_size
    except OSError as error:
        return f"cannot read shard {path}: {error.strerror}"
    return f"shard {path} has {size} bytes, but the manifest says {entry.bytes}" if size != entry.bytes else None


def _shard_problems(path: Path, manifest: Manifest, entry: ShardEntry) -> Iterator[str]:
    """What is wrong with one shard: its size, or its SHA-256 and then the blocks that are to blame."""
    if problem := _size_problem(path, entry):
        yield problem
        return
    try:
        actual = sha256_of(path)
        if actual == entry.sha256:
            return
        yield f"shard {path} has SHA-256 {actual}, but the manifest says {entry.sha256}"
        file = ShardFile(path)
        for number, block in enumerate(BlockIndex(entry, file).table):
            for what, offset, count, dtype, expected in (
                ("tokens", block["offset"], block["tokens"], DTYPES[manifest.dtype], block["crc32"]),
                ("document ends", block["docends_offset"], block["docs"], "<u4", block["docends_crc32"]),
            ):
                content = np.empty(count, dtype=dtype)
                file.read_into(content, offset)
                if _crc32(content) != expected:
                    yield f"shard {path}: the {what} of block {number} are damaged"
    except OSError as error:
        yield f"cannot read shard {path}: {error.strerror}"
    except UserError as error:
        yield str(error)


def _crc32(array: np.ndarray) -> int:
    return zlib.crc32(array.view(np.uint8).data)
