"""From text and a tokenizer to a dataset directory: python tokenizer/build_shards.py --input ... --tokenizer ... --output ...

Also `verify DIR` (read everything, compare with the checksums) and `inspect DIR` (show a training sequence as text).
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from sentencepiece import SentencePieceProcessor

if not __package__:  # started as a file: the packages lie beside its folder
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from titans_pretrain.data.atomic import atomic_directory
from titans_pretrain.data.manifest import (
    MANIFEST_NAME,
    SPLITS,
    TOKENIZER_NAME,
    Manifest,
    SplitEntry,
    dtype_for,
    write_manifest,
)
from titans_pretrain.errors import UserError, exit_on_user_error
from tokenizer.documents import Tally
from tokenizer.encode import (
    EncodedBatch,
    EncodeOptions,
    Encoder,
    batches,
    encode_in_worker,
    load_tokenizer,
    start_worker,
)
from tokenizer.progress import Progress
from tokenizer.read_text import (
    Record,
    Source,
    add_input_options,
    check_input_options,
    find_sources,
    read_records,
    total_bytes,
)


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="build_shards.py",
        description="Tokenise text into shards for training. Other commands: `build_shards.py verify DIR`, "
        "`build_shards.py inspect DIR`; their --help says more.",
    )
    add_input_options(parser)
    parser.add_argument("--tokenizer", required=True, type=Path, metavar="FILE", help="SentencePiece model")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="dataset directory to write")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the dataset in --output, once the new one is whole"
    )
    flag = argparse.BooleanOptionalAction
    parser.add_argument("--bos", action=flag, default=True, help="begin each document with the tokenizer's BOS")
    parser.add_argument("--eos", action=flag, default=True, help="end each document with the tokenizer's EOS")
    parser.add_argument(
        "--val-fraction",
        type=float,
        default=0.005,
        metavar="SHARE",
        help="share of documents held out for validation, chosen by a hash of their text (default: 0.005)",
    )
    parser.add_argument(
        "--min-chars", type=int, default=1, metavar="N", help="leave out shorter documents (default: 1)"
    )
    parser.add_argument(
        "--shard-tokens", type=int, default=128 << 20, metavar="N", help="tokens per shard (default: 128 Mi, 256 MiB)"
    )
    parser.add_argument(
        "--block-tokens", type=int, default=1 << 20, metavar="N", help="tokens per tar member (default: 1 Mi)"
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="tokenising processes; the output is the same for any number (default: the CPUs at hand)",
    )
    return parser


def build(arguments: Sequence[str]) -> None:
    """The default command.

    Raises:
        UserError: as the module's functions do; the output directory is then as it was before.
    """
    args = _build_parser().parse_args(arguments)
    _check_options(args)
    started = time.monotonic()
    tokenizer, tokenizer_sha256 = load_tokenizer(args.tokenizer)
    for name, wanted, token in (("bos", args.bos, tokenizer.bos_id()), ("eos", args.eos, tokenizer.eos_id())):
        if wanted and token < 0:
            raise UserError(
                f"tokenizer {args.tokenizer} has no {name.upper()} token: use --no-{name} or another tokenizer"
            )
    sources = find_sources(args.input, args.format)
    _check_output(args.output, args.overwrite)
    try:
        with atomic_directory(args.output) as directory:
            manifest, tally = _write_dataset(args, sources, directory, tokenizer, tokenizer_sha256)
    except OSError as error:
        raise UserError(f"cannot write {error.filename or args.output}: {error.strerror}") from error
    _report(args.output, manifest, tally, time.monotonic() - started)


def _check_options(args: argparse.Namespace) -> None:
    for name in ("shard_tokens", "block_tokens", "workers", "min_chars"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be 1 or more, not {getattr(args, name)}")
    if args.block_tokens > args.shard_tokens:
        raise UserError(f"--block-tokens ({args.block_tokens}) must not exceed --shard-tokens ({args.shard_tokens})")
    if not 0 < args.val_fraction < 1:
        raise UserError(f"--val-fraction must lie between 0 and 1, not {args.val_fraction:g}")
    check_input_options(args)


def _check_output(output: Path, overwrite: bool) -> None:
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output} is a file: name a folder")
    if output.is_dir() and any(output.iterdir()):
        if not overwrite:
            raise UserError(f"--output {output} is not empty: choose another or add --overwrite to replace it")
        if not (output / MANIFEST_NAME).is_file():
            raise UserError(f"--output {output} is not empty and not a dataset, so it is not replaced: choose another")


def _write_dataset(
    args: argparse.Namespace,
    sources: list[Source],
    directory: Path,
    tokenizer: SentencePieceProcessor,
    tokenizer_sha256: str,
) -> tuple[Manifest, Tally]:
    # Imported here because it brings in torch: worker processes run this file's imports but never this function.
    from titans_pretrain.data.writer import ShardWriter, unigram_entropy

    vocab_size = tokenizer.vocab_size()
    shutil.copyfile(args.tokenizer, directory / TOKENIZER_NAME)
    options = EncodeOptions(args.text_key, args.bos, args.eos, args.val_fraction, args.min_chars)
    tally = Tally()
    docs, text_bytes = dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS, 0)
    with contextlib.ExitStack() as stack:
        writers = {
            split: stack.enter_context(
                ShardWriter(
                    directory, split, vocab_size, shard_tokens=args.shard_tokens, block_tokens=args.block_tokens
                )
            )
            for split in SPLITS
        }
        progress = stack.enter_context(contextlib.closing(Progress(total_bytes(sources))))
        records = read_records(sources, text_key=args.text_key, doc_sep=args.doc_sep)
        for batch, consumed in _encoded(batches(records), args.workers, args.tokenizer, options):
            tally.add(batch.tally)
            tally.check(args.on_bad, args.max_bad, final=False)
            for split, encoded in batch.splits.items():
                writers[split].write(encoded.tokens, encoded.lengths)
                docs[split] += len(encoded.lengths)
                text_bytes[split] += encoded.text_bytes
            progress.update(consumed, sum(len(encoded.tokens) for encoded in batch.splits.values()))
        tally.check(args.on_bad, args.max_bad, final=True)
    for split in SPLITS:
        if not docs[split]:
            raise UserError(_no_documents(split, sum(docs.values()), args, tally))
    manifest = Manifest(
        dtype=dtype_for(vocab_size),
        vocab_size=vocab_size,
        tokenizer_sha256=tokenizer_sha256,
        bos_id=tokenizer.bos_id(),
        eos_id=tokenizer.eos_id(),
        unigram_entropy=unigram_entropy(writers["train"].token_counts),
        options={
            "bos": args.bos,
            "eos": args.eos,
            "val_fraction": args.val_fraction,
            "min_chars": args.min_chars,
            "doc_sep": args.doc_sep,
            "text_key": args.text_key,
            "shard_tokens": args.shard_tokens,
            "block_tokens": args.block_tokens,
        },
        splits={
            split: SplitEntry(writer.num_tokens, docs[split], text_bytes[split], tuple(writer.shards))
            for split, writer in writers.items()
        },
    )
    write_manifest(directory, manifest)
    return manifest, tally


def _no_documents(split: str, found: int, args: argparse.Namespace, tally: Tally) -> str:
    if not found:
        reasons = "; ".join(tally.lines()) or "the files are empty"
        return f"no document with text in --input {' '.join(args.input)}: {reasons}"
    change = "raise" if split == "valid" else "lower"
    return (
        f"none of {found} documents fell into the {split} split at --val-fraction {args.val_fraction:g}: {change} it, or give "
        "more documents (--doc-sep splits text files)"
    )


def _encoded(
    work: Iterator[tuple[list[Record], int]], workers: int, tokenizer: Path, options: EncodeOptions
) -> Iterator[tuple[EncodedBatch, int]]:
    """Encode batches in `workers` processes (1: in this one); results come in the order of the work."""
    if workers == 1:
        encoder = Encoder(tokenizer, options)
        for records, consumed in work:
            yield encoder.encode_batch(records), consumed
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=start_worker, initargs=(tokenizer, options)) as pool:
        waiting: deque[tuple[Future[EncodedBatch], int]] = deque()
        try:
            for records, consumed in work:
                waiting.append((pool.submit(encode_in_worker, records), consumed))
                if len(waiting) > 2 * workers:
                    future, consumed = waiting.popleft()
                    yield future.result(), consumed
            while waiting:
                future, consumed = waiting.popleft()
                yield future.result(), consumed
        except BrokenProcessPool:
            raise UserError(
                "a tokenising process was killed, most likely for lack of memory: lower --workers"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _report(output: Path, manifest: Manifest, tally: Tally, seconds: float) -> None:
    for line in tally.lines():
        print(line)
    for name, split in manifest.splits.items():
        size = sum(shard.bytes for shard in split.shards)
        print(
            f"{name}: {split.tokens} tokens, {split.docs} documents, {split.text_bytes / split.tokens:.3f} bytes per token, "
            f"{len(split.shards)} shards, {size / 1e6:.1f} MB"
        )
    tokens = sum(split.tokens for split in manifest.splits.values())
    print(f"unigram entropy of train: {manifest.unigram_entropy:.4f} nats per token")
    print(f"wrote {output} in {seconds:.1f} s ({tokens / 1e6 / seconds:.2f} Mtoken/s)")


def verify_command(arguments: Sequence[str]) -> None:
    """`verify DIR`."""
    parser = argparse.ArgumentParser(prog="build_shards.py verify", description="Compare a dataset with its checksums.")
    parser.add_argument("directory", help="or a remote location (docs/remote-data.md)")
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
    parser.add_argument("directory", help="or a remote location (docs/remote-data.md)")
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


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "build": build,
    "verify": verify_command,
    "inspect": inspect_command,
}


@exit_on_user_error
def main(arguments: Sequence[str] | None = None) -> None:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    name = arguments.pop(0) if arguments and arguments[0] in COMMANDS else "build"
    COMMANDS[name](arguments)


if __name__ == "__main__":
    main()
