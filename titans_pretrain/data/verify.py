"""Is a dataset, byte for byte, what was written?"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from titans_pretrain.config import DataConfig
from titans_pretrain.data.atomic import sha256_of
from titans_pretrain.data.cache import Cache
from titans_pretrain.data.damage import DamageError
from titans_pretrain.data.fetch import RemoteFolder
from titans_pretrain.data.location import scheme_of
from titans_pretrain.data.manifest import DTYPES, TOKENIZER_NAME, Manifest, ShardEntry, read_manifest
from titans_pretrain.data.shard_file import BlockIndex, ShardFile, crc32
from titans_pretrain.errors import UserError


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
    problems = [tokenizer_problem(directory, manifest)]
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


def tokenizer_problem(directory: Path, manifest: Manifest) -> str | None:
    """What is wrong with a dataset's copy of its tokenizer."""
    path = directory / TOKENIZER_NAME
    try:
        actual = sha256_of(path)
    except OSError as error:
        return f"cannot read {path}: {error.strerror}"
    if actual != manifest.tokenizer_sha256:
        return f"{path} is not the tokenizer that made the shards: SHA-256 {actual}, not {manifest.tokenizer_sha256}"
    return None


def size_problem(path: Path, entry: ShardEntry) -> str | None:
    """What the file system says against a shard."""
    try:
        size = path.stat().st_size
    except OSError as error:
        return f"cannot read shard {path}: {error.strerror}"
    return f"shard {path} has {size} bytes, but the manifest says {entry.bytes}" if size != entry.bytes else None


def _shard_problems(path: Path, manifest: Manifest, entry: ShardEntry) -> Iterator[str]:
    """What is wrong with one shard: its size, or its SHA-256 and then the blocks that are to blame."""
    if problem := size_problem(path, entry):
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
                if crc32(content) != expected:
                    yield f"shard {path}: the {what} of block {number} are damaged"
    except OSError as error:
        yield f"cannot read shard {path}: {error.strerror}"
    except UserError as error:
        yield str(error)
