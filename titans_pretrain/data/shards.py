"""Which tokens lie at a place in a dataset, and are they the ones that were written?

An opened dataset has had its manifest, file sizes and tokenizer checked. Each block is checked against its CRC the
first time any of its tokens is read, so damage is reported before a wrong token is served.
"""

from __future__ import annotations

import bisect
import json
import os
import threading
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from titans_pretrain.data.atomic import sha256_of
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
_KEPT_ENDS = 256
"""Blocks whose document ends stay in memory: 16 KB each at 500 tokens a document."""


class ShardSet:
    """A dataset directory opened for reading. Safe to read from several threads."""

    def __init__(self, path: Path, manifest: Manifest):
        self.path = path
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

    @classmethod
    def open(cls, path: str | Path) -> ShardSet:
        """Open a dataset; reads no shard, but checks that each is there and has its full size.

        Raises:
            UserError: missing or damaged manifest, missing or resized shard, a tokenizer that is not the one that made
                the shards.
        """
        directory = Path(path)
        manifest = read_manifest(directory)
        entries = [entry for split in manifest.splits.values() for entry in split.shards]
        problem = _tokenizer_problem(directory, manifest)
        for entry in entries:
            problem = problem or _size_problem(directory / entry.name, entry)
        if problem:
            raise UserError(
                f"{problem}; restore the file or build the dataset again ({VERIFY_COMMAND} {directory} checks all)"
            )
        return cls(directory, manifest)

    @property
    def tokenizer_path(self) -> Path:
        return self.path / TOKENIZER_NAME

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

    def has_tokens(self, split: str) -> bool:
        """Whether split "train" or "valid" holds any."""
        return split in self.manifest.splits and self.manifest.splits[split].tokens > 0

    def num_tokens(self, split: str) -> int:
        """Tokens in split "train" or "valid"."""
        return self.split(split).tokens

    def read(self, split: str, shard: int, start: int, count: int) -> np.ndarray:
        """Tokens `start` to `start + count` of shard number `shard`, in the dataset's dtype, [count].

        Raises:
            UserError: the shard is missing, cut short or damaged where it is read.
        """
        tokens = np.empty(count, dtype=self.dtype)
        self.read_into(split, shard, start, tokens)
        return tokens

    def read_into(self, split: str, shard: int, start: int, tokens: np.ndarray) -> None:
        """`read` into a contiguous array of the dataset's dtype, as many as it holds."""
        entry, count = self.split(split).shards[shard], len(tokens)
        assert start >= 0
        assert start + count <= entry.tokens
        with self._lock:
            file = self._file(entry)
            index = self._index(entry, file)
            block = bisect.bisect_right(index.first_tokens, start) - 1
            done = 0
            while done < count:
                if not index.checked[block]:
                    self._check_block(file, index, block)
                place = index.table[block]
                skip = start + done - index.first_tokens[block]
                here = min(count - done, place["tokens"] - skip)
                file.read_into(tokens[done : done + here], place["offset"] + skip * self.dtype.itemsize)
                done += here
                block += 1

    def document_ends(self, split: str, shard: int, start: int, count: int) -> np.ndarray:
        """Where documents end in tokens `start` to `start + count` of a shard: each one's end (exclusive), counted from
        `start`, that lies in 1..count, int64 [docs]. In a packed dataset runs of padding count as documents.

        Raises:
            UserError: the shard is missing, cut short or damaged where it is read.
        """
        entry = self.split(split).shards[shard]
        assert 0 <= start < start + count <= entry.tokens
        with self._lock:
            file = self._file(entry)
            index = self._index(entry, file)
            found = []
            for block in range(int(index.starts.searchsorted(start, side="right")) - 1, len(index.starts)):
                skip = start - int(index.starts[block])
                if skip + count <= 0:
                    break
                ends = self._block_ends(file, index, block)
                first, last = ends.searchsorted((skip + 1, skip + count + 1))
                found.append(ends[first:last] - skip)
        return found[0] if len(found) == 1 else np.concatenate(found)

    def _block_ends(self, file: ShardFile, index: BlockIndex, block: int) -> np.ndarray:
        """int64 [docs], counted from the block's start."""
        key = (str(file.path), block)
        if key not in self._ends:
            content = np.empty(index.table[block]["docs"], dtype="<u4")
            file.read_into(content, index.table[block]["docends_offset"])
            actual, expected = _crc32(content), index.table[block]["docends_crc32"]
            if actual != expected:
                raise UserError(
                    f"shard {file.path} is damaged: the document ends of block {block} have CRC {actual:08x} but were "
                    f"written with {expected:08x}; restore the file or build the dataset again ({VERIFY_COMMAND} "
                    f"{self.path} checks all)"
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
            self._open[entry.name] = ShardFile(self.path / entry.name)
            if len(self._open) > _OPEN_FILES:
                name, file = self._open.popitem(last=False)
                file.close()
                self._indexes.pop(name, None)  # else they would grow with the shards ever read
        return self._open[entry.name]

    def _index(self, entry: ShardEntry, file: ShardFile) -> BlockIndex:
        if entry.name not in self._indexes:
            self._indexes[entry.name] = BlockIndex(entry, file)
        return self._indexes[entry.name]

    def _check_block(self, file: ShardFile, index: BlockIndex, block: int) -> None:
        content = np.empty(int(index.tokens[block]), dtype=self.dtype)
        file.read_into(content, int(index.offsets[block]))
        actual, expected = _crc32(content), index.table[block]["crc32"]
        if actual != expected:
            raise UserError(
                f"shard {file.path} is damaged: block {block} has CRC {actual:08x} but was written with {expected:08x}; "
                f"restore the file or build the dataset again ({VERIFY_COMMAND} {self.path} checks all)"
            )
        index.checked[block] = True


class ShardFile:
    """An open shard: reads at an offset into an array."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise UserError(f"cannot open shard {path}: {error.strerror}") from error

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        if getattr(self, "_descriptor", -1) >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def read_into(self, array: np.ndarray, offset: int) -> None:
        """Fill contiguous `array` from byte `offset`.

        Raises:
            UserError: the disk fails or the file ends early.
        """
        view = array.view(np.uint8).data
        done = 0
        while done < len(view):
            try:
                count = os.preadv(self._descriptor, [view[done:]], offset + done)
            except OSError as error:
                raise UserError(f"cannot read shard {self.path} at byte {offset + done}: {error.strerror}") from error
            if count == 0:
                raise UserError(
                    f"shard {self.path} ends before byte {offset + len(view)}, where it has data by its index: "
                    "restore the file or build the dataset again"
                )
            done += count


class BlockIndex:
    """The block table of one shard, read from its `__index__` member.

    starts: int64 [blocks], the first token of each block counted from the shard's first.
    tokens, offsets: int64 [blocks], tokens in a block and the byte offset of the first.
    first_tokens: `starts` as a list, which is faster to search for one place.
    checked: whether the CRC of each block was found right.
    """

    def __init__(self, entry: ShardEntry, file: ShardFile):
        content = np.empty(entry.index_bytes, dtype=np.uint8)
        file.read_into(content, entry.index_offset)
        if _crc32(content) != entry.index_crc32:
            raise UserError(
                f"the block index of shard {file.path} is damaged: CRC {_crc32(content):08x}, but the manifest says "
                f"{entry.index_crc32:08x}; restore the file or build the dataset again ({VERIFY_COMMAND} {file.path.parent} "
                "checks all)"
            )
        self.table: list[dict[str, int]] = json.loads(content.tobytes())["blocks"]
        self.tokens = np.array([block["tokens"] for block in self.table], dtype=np.int64)
        self.starts = np.cumsum(self.tokens) - self.tokens
        self.offsets = np.array([block["offset"] for block in self.table], dtype=np.int64)
        self.first_tokens: list[int] = self.starts.tolist()
        self.checked = [False] * len(self.table)


def verify(path: str | Path) -> list[str]:
    """Read every byte of a dataset and compare it with its checksums; costs one SHA-256 over the shards.

    Returns:
        One sentence per problem, empty when all is as written.

    Raises:
        UserError: the manifest itself cannot be used.
    """
    directory = Path(path)
    manifest = read_manifest(directory)
    problems = [_tokenizer_problem(directory, manifest)]
    for split in manifest.splits.values():
        for entry in split.shards:
            problems += _shard_problems(directory / entry.name, manifest, entry)
    return [problem for problem in problems if problem]


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
