"""How many tokens does a CPU-second read? Our stream, a flat file of the same tokens, and stock webdataset, in one run.

python tools/benchmark_data.py [--data FOLDER] [--json FILE]

Every reader hands over batches of int64 inputs and labels, [rows, seq_len] each, of the same tokens, in this process; what
counts is time.process_time of all its threads. Each reads one epoch, --repeats times from freshly opened files; the best
counts, since another process can only cost time. Ours includes the CRC of every block, but for the mixture's, which is
opened once. The files are in the page cache,
for none of this is about disks. Without --data a dataset of random tokens is written to a temporary folder.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset

from titans_pretrain.data.manifest import TOKENIZER_NAME, Manifest, SplitEntry, write_manifest
from titans_pretrain.data.mixture import Mixture, Source, Sources
from titans_pretrain.data.shards import ShardSet
from titans_pretrain.data.stream import BatchLoader, Sequences, TokenStream
from titans_pretrain.data.writer import ShardWriter, unigram_entropy
from titans_pretrain.errors import UserError, exit_on_user_error

VOCAB_SIZE = 32000
Batches = Iterator[tuple[torch.Tensor, torch.Tensor]]


def make_dataset(folder: Path, tokens: int, shards: int) -> Path:
    """`tokens` random tokens in `shards` shards, documents of 500, blocks as build_shards.py makes them."""
    folder.mkdir()
    content = b"random tokens have no tokenizer"
    (folder / TOKENIZER_NAME).write_bytes(content)
    splits = {}
    for split, count in (("train", tokens), ("valid", 10_000)):
        generator = np.random.default_rng(count)
        per_shard = -(-count // shards)
        with ShardWriter(folder, split, VOCAB_SIZE, shard_tokens=per_shard, block_tokens=1 << 20) as writer:
            for _ in range(shards):
                lengths = np.diff(np.append(np.arange(0, per_shard, 500), per_shard))
                writer.write(generator.integers(0, VOCAB_SIZE, per_shard, dtype=np.uint16), lengths)
        splits[split] = SplitEntry(writer.num_tokens, 1, writer.num_tokens, tuple(writer.shards))
        entropy = unigram_entropy(writer.token_counts)
    digest = hashlib.sha256(content).hexdigest()
    write_manifest(folder, Manifest("uint16", VOCAB_SIZE, digest, 1, 2, entropy, {}, splits))
    return folder


def ours(stream: Sequences, sequences: int, rows: int) -> Batches:
    """Through the loader that training uses, its thread included."""
    sizes = [rows] * (sequences // rows)
    with BatchLoader(stream, batch_size=sizes, micro_batch=0, data_rank=0, data_size=1, start=0, prefetch=2) as batches:
        for (batch,) in batches:
            yield batch.tokens, batch.labels


def flat(path: Path, dtype: np.dtype[Any], seq_len: int, rows: int, order: np.random.Generator | None) -> Batches:
    """Rows of a numpy memmap, in sequence or by a permutation that is held in memory."""
    tokens = np.memmap(path, dtype=dtype, mode="r")
    count = (len(tokens) - 1) // seq_len
    places = np.arange(count) if order is None else order.permutation(count)
    for first in range(0, count - rows + 1, rows):
        starts = (places[first : first + rows] * seq_len).tolist()
        raw = np.stack([tokens[start : start + seq_len + 1] for start in starts])
        yield (
            torch.from_numpy(raw[:, :-1].astype(np.int64, order="C")),
            torch.from_numpy(raw[:, 1:].astype(np.int64, order="C")),
        )


def stock_webdataset(paths: list[str], seq_len: int, rows: int) -> Batches:
    """Its blocks, cut into rows one after another: it can neither jump nor resume."""
    need = rows * seq_len
    rest: list[np.ndarray] = []
    held = 0
    for sample in webdataset.WebDataset(paths, shardshuffle=False).decode():
        rest.append(sample["tokens.npy"])
        held += len(rest[-1])
        if held <= need:
            continue
        stretch = np.concatenate(rest)
        first = 0
        while first + need < held:
            raw = stretch[first : first + need + 1].astype(np.int64)
            yield torch.from_numpy(raw[:-1].reshape(rows, -1)), torch.from_numpy(raw[1:].reshape(rows, -1))
            first += need
        rest, held = [stretch[first:]], held - first


def measure(make: Callable[[], Batches], repeats: int) -> dict[str, float]:
    """Best of `repeats` epochs, in millions of tokens."""
    best: dict[str, float] = {}
    for _ in range(repeats):
        cpu, wall, tokens = time.process_time(), time.perf_counter(), 0
        for inputs, _labels in make():
            tokens += inputs.numel()
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        if not tokens:
            raise UserError("the dataset has fewer tokens than one batch: lower --rows or --seq-len")
        told = {
            "mtokens_per_cpu_second": tokens / cpu / 1e6,
            "mtokens_per_second": tokens / wall / 1e6,
            "tokens": tokens,
        }
        if not best or told["mtokens_per_cpu_second"] > best["mtokens_per_cpu_second"]:
            best = told
    return best


def benchmark(data: Path, scratch: Path, seq_len: int, rows: int, repeats: int) -> dict[str, dict[str, float]]:
    """Every reader over the train split at `data`."""
    shards = ShardSet.open(data)
    entries = shards.split("train").shards
    file = scratch / "flat.bin"
    with open(file, "wb") as out:
        for number, entry in enumerate(entries):
            shards.read("train", number, 0, entry.tokens).tofile(out)

    def stream(shuffle: bool) -> Batches:
        opened = TokenStream(ShardSet.open(data), "train", seq_len, seed=0, shuffle=shuffle)
        return ours(opened, opened.num_sequences, rows)

    # Opened once: three copies of the dataset would each check all its blocks to serve one epoch together.
    weights = (0.6, 0.3, 0.1)
    sources = Sources([Source(f"copy {w}", ShardSet.open(data), w, 0.0) for w in weights])
    mixed = Mixture(sources, seq_len, 0, [(0, weights)])

    readers: dict[str, Callable[[], Batches]] = {
        "ours, in sequence": lambda: stream(False),
        "ours, random rows": lambda: stream(True),
        "ours, mixture of 3": lambda: ours(mixed, mixed.streams[0].num_sequences, rows),
        "flat memmap, in sequence": lambda: flat(file, shards.dtype, seq_len, rows, None),
        "flat memmap, random rows": lambda: flat(file, shards.dtype, seq_len, rows, np.random.default_rng(0)),
        "stock webdataset": lambda: stock_webdataset([str(data / entry.name) for entry in entries], seq_len, rows),
    }
    return {name: measure(make, repeats) for name, make in readers.items()}


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="a dataset by build_shards.py, not packed")
    parser.add_argument(
        "--tokens", type=int, default=64 << 20, metavar="N", help="of the random dataset (default: 64 Mi)"
    )
    parser.add_argument("--shards", type=int, default=8, metavar="N", help="of the random dataset (default: 8)")
    parser.add_argument("--seq-len", type=int, default=2048, metavar="N", help="tokens a row (default: 2048)")
    parser.add_argument("--rows", type=int, default=64, metavar="N", help="rows a batch (default: 64)")
    parser.add_argument(
        "--repeats", type=int, default=3, metavar="N", help="epochs of each (default: 3, the best counts)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    args = parser.parse_args(argv)
    for name in ("tokens", "shards", "seq_len", "rows", "repeats"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be 1 or more, not {getattr(args, name)}")
    if args.data and ShardSet.open(args.data).manifest.packing:
        raise UserError(
            f"--data {args.data} is packed, but the other readers know no packed rows: give another dataset"
        )
    with tempfile.TemporaryDirectory() as scratch:
        data = args.data or make_dataset(Path(scratch) / "data", args.tokens, args.shards)
        results = benchmark(data, Path(scratch), args.seq_len, args.rows, args.repeats)
    print(f"{'M tokens':<26} per CPU-second   per second")
    for name, told in results.items():
        print(f"{name:<26} {told['mtokens_per_cpu_second']:>14.0f} {told['mtokens_per_second']:>12.0f}")
    if args.json:
        versions = {"python": platform.python_version(), "numpy": np.__version__, "webdataset": webdataset.__version__}
        settings = {"seq_len": args.seq_len, "rows": args.rows, "repeats": args.repeats}
        args.json.write_text(json.dumps({**settings, "readers": results, "versions": versions}, indent=1) + "\n")


if __name__ == "__main__":
    main()
