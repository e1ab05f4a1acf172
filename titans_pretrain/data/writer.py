"""How do documents of tokens become tar shards that stock webdataset reads?

A shard holds blocks of about a million tokens, each a webdataset sample of two members,

    000000000.docends.npy   uint32 [docs]: where documents end in this block (exclusive, counted from the block's start)
    000000000.tokens.npy    uint16 or uint32 [tokens]

and last a member `__index__`, which webdataset skips by its name: a JSON table of the blocks, {data offset, tokens,
crc32} for the reader in shards.py. Files depend on their content alone: written twice, they are the same bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import tarfile
import zlib
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
import webdataset

from titans_pretrain.data.atomic import atomic_file
from titans_pretrain.data.manifest import DTYPES, ShardEntry, dtype_for

INDEX_MEMBER = "__index__"


class ShardWriter:
    """Writes one split as `NAME-00000.tar`, `NAME-00001.tar`, ... A context manager; an error in it leaves no half shard.

    Documents may cross blocks but not shards: a shard ends with the first document that brings it to `shard_tokens`.

    Args:
        directory: existing folder.
        split: the NAME.
        vocab_size: ids are below it; decides the dtype.
        shard_tokens, block_tokens: tokens per shard (at least) and per block (exactly, but for the last of a shard).
    """

    def __init__(self, directory: Path, split: str, vocab_size: int, *, shard_tokens: int, block_tokens: int):
        self.split = split
        self.shards: list[ShardEntry] = []
        """Finished shards; complete after the context has ended."""
        self.token_counts = np.zeros(vocab_size, dtype=np.int64)
        """[vocab_size] how often each token was written."""
        self._directory = directory
        self._shard_tokens = shard_tokens
        self._block = np.empty(block_tokens, dtype=DTYPES[dtype_for(vocab_size)])
        self._block_fill = 0
        self._block_ends: list[np.ndarray] = []
        self._num_blocks = 0
        self._shard: _OpenShard | None = None

    @property
    def num_tokens(self) -> int:
        return int(self.token_counts.sum())

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._finish_shard()
        except BaseException as late:
            error = late
            raise
        finally:
            if error is not None and self._shard is not None:
                self._shard.abort(error)

    def write(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Append documents.

        Args:
            tokens: integers [sum of lengths], the documents one after another.
            lengths: int64 [docs], each above 0.
        """
        assert lengths.sum() == len(tokens)
        assert (lengths > 0).all()
        if len(tokens) == 0:
            return
        self.token_counts += np.bincount(tokens, minlength=len(self.token_counts))
        ends = np.cumsum(lengths)
        while len(ends):
            held = self._shard.tokens + self._block_fill if self._shard else 0
            last = int(np.searchsorted(ends, self._shard_tokens - held))
            full = last < len(ends)
            docs = last + 1 if full else len(ends)
            cut = int(ends[docs - 1])
            self._append(tokens[:cut], ends[:docs])
            tokens, ends = tokens[cut:], ends[docs:] - cut
            if full:
                self._finish_shard()

    def _append(self, tokens: np.ndarray, ends: np.ndarray) -> None:
        if self._shard is None:
            path = self._directory / f"{self.split}-{len(self.shards):05d}.tar"
            self._shard = _OpenShard(path)
        while len(tokens):
            count = min(len(self._block) - self._block_fill, len(tokens))
            self._block[self._block_fill : self._block_fill + count] = tokens[:count]
            docs = int(np.searchsorted(ends, count, side="right"))
            self._block_ends.append(ends[:docs] + self._block_fill)
            tokens, ends = tokens[count:], ends[docs:] - count
            self._block_fill += count
            if self._block_fill == len(self._block):
                self._finish_block()

    def _finish_block(self) -> None:
        assert self._shard is not None
        docends = np.concatenate(self._block_ends).astype("<u4")
        self._shard.add_block(f"{self._num_blocks:09d}", self._block[: self._block_fill], docends)
        self._num_blocks += 1
        self._block_fill = 0
        self._block_ends = []

    def _finish_shard(self) -> None:
        if self._shard is None:
            return
        if self._block_fill:
            self._finish_block()
        self.shards.append(self._shard.finish())
        self._shard = None


class _OpenShard:
    """A tar file being written, with the table of its blocks."""

    def __init__(self, path: Path):
        self.path = path
        self.tokens = 0
        self.docs = 0
        self.files = contextlib.ExitStack()
        self._file = _HashingFile(self.files.enter_context(atomic_file(path)))
        # An integer mtime: with the default, a float, every member costs an extra kilobyte of header and its time.
        self._tar = webdataset.TarWriter(self._file, encoder=False, mtime=0)
        self._blocks: list[dict[str, int]] = []

    def add_block(self, key: str, tokens: np.ndarray, docends: np.ndarray) -> None:
        members = {"docends.npy": _npy(docends), "tokens.npy": _npy(tokens)}
        start = self._tar.tarstream.offset
        self._tar.write({"__key__": key, **members})
        docends_member = start + tarfile.BLOCKSIZE
        tokens_member = docends_member + _padded(len(members["docends.npy"])) + tarfile.BLOCKSIZE
        assert self._tar.tarstream.offset == tokens_member + _padded(len(members["tokens.npy"]))
        self._blocks.append(
            {
                "tokens": len(tokens),
                "offset": tokens_member + len(members["tokens.npy"]) - tokens.nbytes,
                "crc32": zlib.crc32(tokens.tobytes()),
                "docs": len(docends),
                "docends_offset": docends_member + len(members["docends.npy"]) - docends.nbytes,
                "docends_crc32": zlib.crc32(docends.tobytes()),
            }
        )
        self.tokens += len(tokens)
        self.docs += len(docends)

    def abort(self, error: BaseException) -> None:
        """Leave no file. tarfile writes what it has buffered when it is collected, which must not fail loudly then."""
        self._file.discard = True
        self.files.__exit__(type(error), error, error.__traceback__)

    def finish(self) -> ShardEntry:
        index = json.dumps({"blocks": self._blocks}).encode()
        index_offset = self._tar.tarstream.offset + tarfile.BLOCKSIZE
        member = tarfile.TarInfo(INDEX_MEMBER)  # not through TarWriter.write, which would add an extension to the name
        member.size, member.mtime, member.mode = len(index), 0, 0o444
        self._tar.tarstream.addfile(member, io.BytesIO(index))
        self._tar.close()
        self.files.close()
        return ShardEntry(
            name=self.path.name,
            bytes=self._file.count,
            sha256=self._file.digest.hexdigest(),
            tokens=self.tokens,
            docs=self.docs,
            index_offset=index_offset,
            index_bytes=len(index),
            index_crc32=zlib.crc32(index),
        )


class _HashingFile:
    """Passes writes on, with their SHA-256 and count."""

    def __init__(self, file: BinaryIO):
        self.digest = hashlib.sha256()
        self.count = 0
        self.discard = False
        self._file = file

    def write(self, data: bytes) -> int:
        if self.discard:
            return len(data)
        self.digest.update(data)
        self.count += len(data)
        return self._file.write(data)


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version=(1, 0))
    return buffer.getvalue()


def _padded(size: int) -> int:
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def unigram_entropy(token_counts: np.ndarray) -> float:
    """Nats per token of the distribution that `token_counts` ([vocab_size], not all zero) describes."""
    share = token_counts[token_counts > 0] / token_counts.sum()
    return float(-(share * np.log(share)).sum())
