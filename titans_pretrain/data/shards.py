"""Which tokens lie at a place in a dataset, and are they the ones that were written?

An opened dataset has had its manifest, tokenizer and, where it lies on this machine, file sizes checked. Each block is
checked against its CRC the first time any of its tokens is read, so damage is reported before a wrong token is served.
Shards of a remote dataset are read from the local cache, into which they come when they are first needed.
"""

from __future__ import annotations

import bisect
import functools
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from titans_pretrain.config import DataConfig
from titans_pretrain.data.cache import PATIENCE, Cache, NoRoomError
from titans_pretrain.data.damage import DamageError
from titans_pretrain.data.fetch import FORGIVE, RemoteFolder
from titans_pretrain.data.location import scheme_of, shown
from titans_pretrain.data.manifest import (
    DTYPES,
    SPLITS,
    TOKENIZER_NAME,
    Manifest,
    ShardEntry,
    SplitEntry,
    read_manifest,
)
from titans_pretrain.data.shard_file import VERIFY_COMMAND, BlockIndex, ShardFile, crc32
from titans_pretrain.data.verify import size_problem, tokenizer_problem
from titans_pretrain.errors import UserError

T = TypeVar("T")

_OPEN_FILES = 64
_KEPT_ENDS = 256
"""Blocks whose document ends stay in memory: 16 KB each at 500 tokens a document."""


class ShardSet:
    """A dataset opened for reading. Safe to read from several threads."""

    def __init__(self, path: Path | str, manifest: Manifest, remote: RemoteFolder | None = None):
        self.path = path
        """The folder, or the remote location as messages may show it."""
        self.manifest = manifest
        self.vocab_size = manifest.vocab_size
        self.tokenizer_sha256 = manifest.tokenizer_sha256
        self.bos_id = manifest.bos_id
        self.eos_id = manifest.eos_id
        self.unigram_entropy = manifest.unigram_entropy
        """Nats per token of the train split's unigram distribution."""
        self.fingerprint = manifest.fingerprint()
        """SHA-256 over what decides the token stream."""
        self.dtype = np.dtype(DTYPES[manifest.dtype])
        """Of a token on disk."""
        self._lock = threading.Lock()
        self._open: OrderedDict[str, ShardFile] = OrderedDict()
        self._indexes: dict[str, BlockIndex] = {}
        self._ends: OrderedDict[tuple[str, int], np.ndarray] = OrderedDict()
        self._closings = 0
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
            return cls(shown(str(path)), remote.manifest(), remote)
        directory = Path(path)
        manifest = read_manifest(directory)
        entries = [entry for split in manifest.splits.values() for entry in split.shards]
        problem = tokenizer_problem(directory, manifest)
        for entry in [] if skip_bad else entries:
            problem = problem or size_problem(directory / entry.name, entry)
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

    def has_tokens(self, split: str) -> bool:
        """Whether split "train" or "valid" holds any."""
        return split in self.manifest.splits and self.manifest.splits[split].tokens > 0

    def num_tokens(self, split: str) -> int:
        """Tokens in split "train" or "valid"."""
        return self.split(split).tokens

    def read(self, split: str, shard: int, start: int, count: int) -> np.ndarray:
        """Tokens `start` to `start + count` of shard number `shard`, in the dataset's dtype, [count].

        Raises:
            DamageError: the shard is missing, cut short or damaged where it is read.
            UserError: the cache of a remote dataset cannot be used.
        """
        tokens = np.empty(count, dtype=self.dtype)
        self.read_into(split, shard, start, tokens)
        return tokens

    def read_into(self, split: str, shard: int, start: int, tokens: np.ndarray) -> None:
        """`read` into a contiguous array of the dataset's dtype, as many as it holds."""
        self.read_rows(split, [shard], [start], [tokens])

    def read_rows(
        self, split: str, shards: Sequence[int], starts: Sequence[int], rows: Iterable[np.ndarray] | np.ndarray
    ) -> None:
        """`read_into` of many rows, faster than one by one: a row costs little more than its system call.

        Raises:
            DamageError, UserError: as `read`, for the first row that cannot be read; those after it have not been.
        """
        entries = self.split(split).shards
        itemsize = self.dtype.itemsize
        opened: dict[int, tuple[ShardFile, BlockIndex]] = {}
        with self._lock:
            closings = self._closings
            for row, shard, start in zip(rows, shards, starts, strict=True):
                if shard in opened:
                    file, index = opened[shard]
                    block = bisect.bisect_right(index.first_tokens, start) - 1
                    skip = start - index.first_tokens[block]
                    place = index.table[block]
                    if index.checked[block] and skip + len(row) <= place["tokens"]:
                        file.read_into(row, place["offset"] + skip * itemsize)
                        continue
                entry = entries[shard]
                assert 0 <= start <= entry.tokens - len(row)
                self._with_file(entry, functools.partial(self._read_blocks, start=start, tokens=row))
                if self._closings != closings:
                    closings = self._closings
                    opened.clear()
                opened[shard] = self._open[entry.name], self._indexes[entry.name]

    def expect(self, split: str, now: Sequence[int], later: Sequence[int]) -> None:
        """Say which shards are read from here on, in any order, and which after that, so that they can be fetched early and
        others of the split be let go. Free of cost for a local dataset."""
        if self._remote is None:
            return
        shards = self.split(split).shards
        with self._lock:
            kept = {shards[number].name for number in now}
            for name in [shard.name for shard in shards if shard.name in self._open and shard.name not in kept]:
                self._close(name)
            wanted = [shards[number] for number in (*now, *later) if shards[number].name not in self._open]
        self._remote.expect(wanted)

    def document_ends(self, split: str, shard: int, start: int, count: int) -> np.ndarray:
        """Where documents end in tokens `start` to `start + count` of a shard: each one's end (exclusive), counted from
        `start`, that lies in 1..count, int64 [docs]. In a packed dataset runs of padding count as documents.

        Raises:
            UserError: the shard is missing, cut short or damaged where it is read.
        """
        entry = self.split(split).shards[shard]
        assert 0 <= start < start + count <= entry.tokens
        with self._lock:
            found = self._with_file(entry, functools.partial(self._find_ends, start=start, count=count))
        return found[0] if len(found) == 1 else np.concatenate(found)

    def _with_file(self, entry: ShardEntry, read: Callable[[ShardFile, BlockIndex], T]) -> T:
        """`read` from an open shard. A damaged copy of a remote one is fetched again, once."""
        file = self._file(entry)
        try:
            return read(file, self._index(entry, file))
        except DamageError:
            if not self._may_fetch_again(entry):
                raise
        file = self._file(entry)
        return read(file, self._index(entry, file))

    def _read_blocks(self, file: ShardFile, index: BlockIndex, start: int, tokens: np.ndarray) -> None:
        """A stretch that may go over several blocks, of which some were never checked."""
        block = bisect.bisect_right(index.first_tokens, start) - 1
        skip = start - index.first_tokens[block]
        done = 0
        while done < len(tokens):
            if not index.checked[block]:
                self._check_block(file, index, block)
            place = index.table[block]
            here = min(len(tokens) - done, place["tokens"] - skip)
            file.read_into(tokens[done : done + here], place["offset"] + skip * self.dtype.itemsize)
            done += here
            block += 1
            skip = 0

    def _find_ends(self, file: ShardFile, index: BlockIndex, start: int, count: int) -> list[np.ndarray]:
        found = []
        for block in range(int(index.starts.searchsorted(start, side="right")) - 1, len(index.starts)):
            skip = start - int(index.starts[block])
            if skip + count <= 0:
                break
            ends = self._block_ends(file, index, block)
            first, last = ends.searchsorted((skip + 1, skip + count + 1))
            found.append(ends[first:last] - skip)
        return found

    def _block_ends(self, file: ShardFile, index: BlockIndex, block: int) -> np.ndarray:
        """int64 [docs], counted from the block's start."""
        key = (str(file.path), block)
        if key not in self._ends:
            content = np.empty(index.table[block]["docs"], dtype="<u4")
            file.read_into(content, index.table[block]["docends_offset"])
            actual, expected = crc32(content), index.table[block]["docends_crc32"]
            if actual != expected:
                raise DamageError(
                    f"shard {file.path} is damaged: the document ends of block {block} have CRC {actual:08x} but were "
                    f"written with {expected:08x}; {file.remedy}",
                    str(file.path),
                )
            self._ends[key] = content.astype(np.int64)
            if len(self._ends) > _KEPT_ENDS:
                self._ends.popitem(last=False)
        else:
            self._ends.move_to_end(key)
        return self._ends[key]

    def _file(self, entry: ShardEntry) -> ShardFile:
        if entry.name in self._open:
            self._open.move_to_end(entry.name)
        else:
            self._open[entry.name] = self._open_file(entry)
            if len(self._open) > _OPEN_FILES:
                self._close(next(iter(self._open)))
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
                self._close(next(iter(self._open)))  # the cache is smaller than a window

    def _close(self, name: str) -> None:
        self._open.pop(name).close()
        self._indexes.pop(name, None)  # else they would grow with the shards ever read
        self._closings += 1

    def _may_fetch_again(self, entry: ShardEntry) -> bool:
        """Drop a damaged copy of a remote shard, unless that was done a moment ago."""
        now = time.monotonic()
        if self._remote is None or now - self._fetched_again.get(entry.name, -FORGIVE) < FORGIVE:
            return False
        self._fetched_again[entry.name] = now
        for key in [key for key in self._ends if key[0] == str(self._open[entry.name].path)]:
            del self._ends[key]
        self._close(entry.name)
        self._remote.discard(entry)
        return True

    def _index(self, entry: ShardEntry, file: ShardFile) -> BlockIndex:
        if entry.name not in self._indexes:
            self._indexes[entry.name] = BlockIndex(entry, file)
        return self._indexes[entry.name]

    def _check_block(self, file: ShardFile, index: BlockIndex, block: int) -> None:
        content = np.empty(int(index.tokens[block]), dtype=self.dtype)
        file.read_into(content, int(index.offsets[block]))
        actual, expected = crc32(content), index.table[block]["crc32"]
        if actual != expected:
            raise DamageError(
                f"shard {file.path} is damaged: block {block} has CRC {actual:08x} but was written with {expected:08x}; "
                f"{file.remedy}",
                str(file.path),
            )
        index.checked[block] = True
