"""A dataset small enough to read whole, written by the real writer."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path

import numpy as np

from titans_pretrain.data.atomic import sha256_of
from titans_pretrain.data.manifest import TOKENIZER_NAME, Manifest, Packing, SplitEntry, dtype_for, write_manifest
from titans_pretrain.data.packing import PackedWriter
from titans_pretrain.data.writer import ShardWriter, unigram_entropy

VOCAB = 1000


def documents(count: int, seed: int = 0, vocab_size: int = VOCAB) -> list[np.ndarray]:
    """Documents of 1 to 99 random tokens."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab_size, size=rng.integers(1, 100)) for _ in range(count)]


def write_dataset(
    path: Path,
    train: list[np.ndarray],
    valid: list[np.ndarray],
    *,
    vocab_size: int = VOCAB,
    shard_tokens: int = 2000,
    block_tokens: int = 300,
    packing: Packing | None = None,
    tokenizer: bytes = b"stands for a tokenizer; the data package only compares its hash",
) -> Path:
    """With `packing`, documents must not start with packing.pad and shard_tokens be a multiple of packing.seq_len."""
    path.mkdir()
    (path / TOKENIZER_NAME).write_bytes(tokenizer)
    splits, padding = {}, {}
    for name, docs in (("train", train), ("valid", valid)):
        writer = ShardWriter(path, name, vocab_size, shard_tokens=shard_tokens, block_tokens=block_tokens)
        with writer, PackedWriter(writer, packing) if packing else contextlib.nullcontext(writer) as taker:
            for some in (docs[:7], docs[7:]):
                taker.write(
                    np.concatenate([*some, np.empty(0, dtype=np.int64)]),
                    np.array([len(d) for d in some], dtype=np.int64),
                )
        padding[name] = taker.padding if isinstance(taker, PackedWriter) else 0
        splits[name] = SplitEntry(writer.num_tokens, len(docs), 4 * writer.num_tokens, tuple(writer.shards))
        if name == "train":
            entropy = unigram_entropy(writer.token_counts)
    tokenizer_sha256 = sha256_of(path / TOKENIZER_NAME)
    options = (
        {"packing": {"kind": "bestfit", **dataclasses.asdict(packing)}, "padding_tokens": padding} if packing else {}
    )
    write_manifest(path, Manifest(dtype_for(vocab_size), vocab_size, tokenizer_sha256, 1, 2, entropy, options, splits))
    return path


def flip_byte(path: Path, offset: int) -> None:
    path.chmod(0o644)
    content = bytearray(path.read_bytes())
    content[offset] ^= 0x10
    path.write_bytes(content)
