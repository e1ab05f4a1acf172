"""What is in a dataset, and is it as it was written? The commands `build_shards.py verify` and `build_shards.py inspect`."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence

from titans_pretrain.data.manifest import SPLITS, Manifest
from titans_pretrain.errors import UserError
from tokenizer.encode import load_tokenizer


def verify_command(arguments: Sequence[str]) -> None:
    """`verify DIR`."""
    parser = argparse.ArgumentParser(
        prog="build_shards.py verify",
        description="Compare a dataset with its checksums, and see that documents and rows lie as its manifest says.",
    )
    parser.add_argument("directory", help="or a remote location (docs/remote-data.md)")
    directory = parser.parse_args(arguments).directory
    from titans_pretrain.data.shards import ShardSet
    from titans_pretrain.data.structure import structure_problems
    from titans_pretrain.data.verify import verify

    problems = verify(directory)
    if not problems:
        problems = list(structure_problems(ShardSet.open(directory)))
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
        prog="build_shards.py inspect",
        description="Show how a dataset was built, how long its documents are, and a sequence of it as text.",
    )
    parser.add_argument("directory", help="or a remote location (docs/remote-data.md)")
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument(
        "--sample", type=int, default=0, metavar="N", help="which sequence, in the order on disk (default: 0)"
    )
    parser.add_argument(
        "--seq-len",
        type=int,
        metavar="N",
        help="tokens per sequence (default: 256, or the rows of a packed dataset)",
    )
    args = parser.parse_args(arguments)
    from titans_pretrain.data.shards import ShardSet
    from titans_pretrain.data.stream import TokenStream

    shards = ShardSet.open(args.directory)
    packing = shards.manifest.packing
    if packing and args.seq_len not in (None, packing.seq_len):
        raise UserError(
            f"{args.directory} is packed in rows of {packing.seq_len} tokens: drop --seq-len {args.seq_len}"
        )
    seq_len = packing.seq_len if packing else 256 if args.seq_len is None else args.seq_len
    if seq_len < 1:
        raise UserError(f"--seq-len must be 1 or more, not {seq_len}")
    stream = TokenStream(shards, args.split, seq_len, seed=0, shuffle=False)
    if not 0 <= args.sample < stream.num_sequences:
        raise UserError(f"--sample must lie between 0 and {stream.num_sequences - 1}, not {args.sample}")
    tokenizer, _ = load_tokenizer(shards.tokenizer_path)
    shard, sequence = stream.locate(args.sample)
    tokens = stream.row(args.sample).tokens if packing else stream.sample(args.sample)
    ends = shards.document_ends(args.split, shard, sequence * seq_len, len(tokens)).tolist()
    print("built with " + ", ".join(f"{name} {value!r}" for name, value in _built_with(shards.manifest)))
    for line in histogram_lines(shards.manifest):
        print(line)
    print(
        f"{args.split} sequence {args.sample} of {stream.num_sequences}, {len(tokens)} tokens in {args.split} shard {shard}:"
    )
    for begin, end in itertools.pairwise([0, *ends, *([len(tokens)] if not ends or ends[-1] < len(tokens) else [])]):
        if packing and tokens[begin] == packing.pad:
            print(f"--- {begin} to {end}: padding")
            continue
        open_end = "" if end in ends else ", goes on"
        print(f"--- {begin} to {end}: {end - begin} tokens{open_end}: {_some(tokens[begin:end].tolist())}")
        print(tokenizer.decode(tokens[begin:end].tolist()))


def _built_with(manifest: Manifest) -> list[tuple[str, object]]:
    return [(name, value) for name, value in manifest.options.items() if name != "document_lengths"]


def _some(ids: list[int]) -> str:
    return f"[{', '.join(map(str, ids[:6]))}{', ...' if len(ids) > 6 else ''}]"


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
