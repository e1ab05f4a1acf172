"""What is in a dataset, and is it as it was written? The commands `build_shards.py verify` and `build_shards.py inspect`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from titans_pretrain.data.manifest import SPLITS, Manifest
from titans_pretrain.errors import UserError
from tokenizer.encode import load_tokenizer


def verify_command(arguments: Sequence[str]) -> None:
    """`verify DIR`."""
    parser = argparse.ArgumentParser(prog="build_shards.py verify", description="Compare a dataset with its checksums.")
    parser.add_argument("directory", type=Path)
    directory = parser.parse_args(arguments).directory
    from titans_pretrain.data.shards import verify

    problems = verify(directory)
    for problem in problems:
        print(problem)
    if problems:
        raise UserError(
            f"{directory} has {len(problems)} problems: restore the files named above or build the dataset again"
        )
    print(f"{directory}: all files are as they were written")


def inspect_command(arguments: Sequence[str]) -> None:
    """`inspect DIR`."""
    parser = argparse.ArgumentParser(
        prog="build_shards.py inspect", description="Show a sequence of a dataset as text."
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument(
        "--sample", type=int, default=0, metavar="N", help="which sequence, in the order on disk (default: 0)"
    )
    parser.add_argument("--seq-len", type=int, default=256, metavar="N", help="tokens per sequence (default: 256)")
    args = parser.parse_args(arguments)
    from titans_pretrain.data.shards import ShardSet
    from titans_pretrain.data.stream import TokenStream

    shards = ShardSet.open(args.directory)
    stream = TokenStream(shards, args.split, args.seq_len, seed=0, shuffle=False)
    if not 0 <= args.sample < stream.num_sequences:
        raise UserError(f"--sample must lie between 0 and {stream.num_sequences - 1}, not {args.sample}")
    tokens = stream.sample(args.sample)
    tokenizer, _ = load_tokenizer(shards.tokenizer_path)
    print(
        f"{args.split} sequence {args.sample} of {stream.num_sequences}, {len(tokens)} tokens: {tokens[:12].tolist()} ..."
    )
    print(tokenizer.decode(tokens.tolist()))


def histogram_lines(manifest: Manifest) -> list[str]:
    """How long the documents are, one line per power of two; none for a dataset that an earlier version wrote."""
    counts = manifest.options.get("document_lengths", {})
    rows = max(map(len, counts.values()), default=0)
    if not rows:
        return []
    first = min(next((k for k, n in enumerate(of_split) if n), rows) for of_split in counts.values())
    lines = [f"{'tokens in a document':>23}  " + "  ".join(f"{split:>12}" for split in counts)]
    for k in range(first, rows):
        numbers = "  ".join(f"{of_split[k] if k < len(of_split) else 0:12d}" for of_split in counts.values())
        lines.append(f"{2**k:>10} to {2 ** (k + 1) - 1:>9}  {numbers}")
    return lines
