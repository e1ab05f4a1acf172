"""From text and a tokenizer to a dataset directory: python tokenizer/build_shards.py --input ... --tokenizer ... --output ...

Two steps run side by side: worker processes encode units of the input in any order (units.py, workers.py), this process
makes shards of them in theirs (assemble.py). A build that was killed goes on with the units it has. Also `verify DIR` (read
everything, compare with the checksums) and `inspect DIR` (show a training sequence as text).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sentencepiece import SentencePieceProcessor

if not __package__:  # started as a file: the packages lie beside its folder
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from titans_pretrain.data.atomic import atomic_directory
from titans_pretrain.data.manifest import (
    MANIFEST_NAME,
    SPLITS,
    TOKENIZER_NAME,
    Manifest,
    Packing,
    dtype_for,
    write_manifest,
)
from titans_pretrain.errors import UserError, exit_on_user_error
from tokenizer.documents import Tally
from tokenizer.encode import EncodeOptions, load_tokenizer
from tokenizer.inspect_shards import histogram_lines, inspect_command, verify_command
from tokenizer.progress import Progress
from tokenizer.read_text import Source, add_input_options, check_input_options, find_sources, total_bytes
from tokenizer.units import UnitStore, cut_units, unit_settings, units_left
from tokenizer.workers import StoppedError, encoded_units

if TYPE_CHECKING:
    from tokenizer.assemble import Assembly


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
    parser.add_argument(
        "--restart", action="store_true", help="begin anew where a build did not finish, instead of continuing it"
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
        "--dedup",
        choices=("none", "exact"),
        default="none",
        help="exact: of documents with the same text keep the first; up to 43 bytes of memory each (default: none)",
    )
    parser.add_argument(
        "--packing",
        choices=("concat", "bestfit"),
        default="concat",
        help="concat: documents follow one another and sequences are cut anywhere; bestfit: whole documents in rows of "
        "--seq-len tokens (default: concat)",
    )
    parser.add_argument(
        "--seq-len", type=int, metavar="N", help="bestfit: tokens per row, to be data.seq_len in training"
    )
    parser.add_argument(
        "--align",
        type=int,
        metavar="N",
        help="bestfit: documents start at multiples of N in a row; model.memory_chunk or a multiple of it where training "
        "sets data.reset_at_documents (default: 1)",
    )
    parser.add_argument(
        "--unit-bytes",
        type=int,
        default=8 << 20,
        metavar="N",
        help="text per unit of work, of which a killed build loses a few; the output does not depend on it (default: 8 Mi)",
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
    packing = _packing(args, tokenizer)
    sources = find_sources(args.input, args.format)
    _check_output(args.output, args.overwrite)
    try:
        with atomic_directory(args.output) as directory, _units(args, sources, tokenizer_sha256) as units:
            manifest, assembly = _write_dataset(args, sources, units, directory, tokenizer, tokenizer_sha256, packing)
        units.remove()
    except OSError as error:
        go_on = "; start the same command again to go on" if units_left(args.output) else ""
        raise UserError(f"cannot write {error.filename or args.output}: {error.strerror}{go_on}") from error
    _report(args.output, manifest, assembly, time.monotonic() - started)


@contextlib.contextmanager
def _units(args: argparse.Namespace, sources: list[Source], tokenizer_sha256: str) -> Iterator[UnitStore]:
    """The units of this build. They outlive an error that the same command, started again, need not meet again: a kill, a
    full disk. What lies in the input or the options it would meet again, so nothing is left then."""
    names = ("text_key", "bos", "eos", "val_fraction", "min_chars", "doc_sep", "unit_bytes")
    options = {f"--{name.replace('_', '-')}": getattr(args, name) for name in names}
    units = UnitStore(args.output, unit_settings(sources, tokenizer_sha256, options), restart=args.restart)
    try:
        yield units
    except BaseException as error:
        repeatable = isinstance(error, UserError) and not isinstance(error, StoppedError)
        if repeatable or not units.found():
            units.remove()
        raise


def _packing(args: argparse.Namespace, tokenizer: SentencePieceProcessor) -> Packing | None:
    if args.packing == "concat":
        if args.seq_len is not None or args.align is not None:
            raise UserError("--seq-len and --align describe the rows of --packing bestfit: add it, or drop them")
        return None
    align = 1 if args.align is None else args.align
    if args.seq_len is None:
        raise UserError("--packing bestfit needs --seq-len, the tokens per row: the data.seq_len of the training")
    if align < 1 or args.seq_len < 2 or args.seq_len % align:
        raise UserError(f"--seq-len ({args.seq_len}) must be 2 or more and a multiple of --align ({align})")
    if args.seq_len > args.shard_tokens:
        raise UserError(f"--seq-len ({args.seq_len}) must not exceed --shard-tokens ({args.shard_tokens})")
    return Packing(args.seq_len, align, tokenizer.eos_id() if tokenizer.eos_id() >= 0 else tokenizer.unk_id())


def _check_options(args: argparse.Namespace) -> None:
    for name in ("shard_tokens", "block_tokens", "workers", "min_chars", "unit_bytes"):
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
    units: UnitStore,
    directory: Path,
    tokenizer: SentencePieceProcessor,
    tokenizer_sha256: str,
    packing: Packing | None,
) -> tuple[Manifest, Assembly]:
    # Imported here because it brings in torch: worker processes run this file's imports but never this function.
    from tokenizer.assemble import AssembleOptions, Assembly

    vocab_size = tokenizer.vocab_size()
    shutil.copyfile(args.tokenizer, directory / TOKENIZER_NAME)
    options = EncodeOptions(args.text_key, args.bos, args.eos, args.val_fraction, args.min_chars)
    first, start = units.resume_at()
    if units.done:
        print(f"going on with {len(units.done)} units that an unfinished build left", flush=True)
    missing = cut_units(
        sources, text_key=args.text_key, doc_sep=args.doc_sep, unit_bytes=args.unit_bytes, first=first, start=start
    )
    encoding = encoded_units(
        missing, units.directory, units.done, workers=args.workers, tokenizer=args.tokenizer, options=options
    )
    how = AssembleOptions(args.shard_tokens, args.block_tokens, args.dedup == "exact", packing)
    with (
        contextlib.closing(Progress(total_bytes(sources))) as progress,
        encoding as encoded,
        Assembly(directory, vocab_size, how) as assembly,
    ):
        for number in itertools.chain(range(first), encoded):
            batch, consumed = units.load(number)
            tokens = assembly.add(batch)
            assembly.tally.check(args.on_bad, args.max_bad, final=False)
            progress.update(consumed, tokens)
        assembly.tally.check(args.on_bad, args.max_bad, final=True)
        for split, docs in assembly.docs.items():
            if not docs:
                raise UserError(_no_documents(split, sum(assembly.docs.values()), args, assembly.tally))
    manifest = Manifest(
        dtype=dtype_for(vocab_size),
        vocab_size=vocab_size,
        tokenizer_sha256=tokenizer_sha256,
        bos_id=tokenizer.bos_id(),
        eos_id=tokenizer.eos_id(),
        unigram_entropy=assembly.unigram_entropy(),
        options={
            "bos": args.bos,
            "eos": args.eos,
            "val_fraction": args.val_fraction,
            "min_chars": args.min_chars,
            "doc_sep": args.doc_sep,
            "text_key": args.text_key,
            "shard_tokens": args.shard_tokens,
            "block_tokens": args.block_tokens,
            "dedup": args.dedup,
            "packing": {"kind": args.packing, **(dataclasses.asdict(packing) if packing else {})},
            "padding_tokens": assembly.padding,
            "document_lengths": {split: lengths.tolist() for split, lengths in assembly.lengths.items()},
        },
        splits={split: assembly.split_entry(split) for split in SPLITS},
    )
    write_manifest(directory, manifest)
    return manifest, assembly


def _no_documents(split: str, found: int, args: argparse.Namespace, tally: Tally) -> str:
    if not found:
        reasons = "; ".join(tally.lines()) or "the files are empty"
        return f"no document with text in --input {' '.join(args.input)}: {reasons}"
    change = "raise" if split == "valid" else "lower"
    return (
        f"none of {found} documents fell into the {split} split at --val-fraction {args.val_fraction:g}: {change} it, or give "
        "more documents (--doc-sep splits text files)"
    )


def _report(output: Path, manifest: Manifest, assembly: Assembly, seconds: float) -> None:
    for line in assembly.tally.lines():
        print(line)
    for name, split in manifest.splits.items():
        size = sum(shard.bytes for shard in split.shards)
        text_tokens = split.tokens - assembly.padding[name]
        print(
            f"{name}: {split.tokens} tokens, {split.docs} documents, {split.text_bytes / text_tokens:.3f} bytes per token, "
            f"{len(split.shards)} shards, {size / 1e6:.1f} MB"
        )
        if manifest.packing:
            rows = split.tokens // manifest.packing.seq_len
            print(
                f"{name}: {rows} rows of {manifest.packing.seq_len}, {assembly.padding[name] / split.tokens:.2%} padding"
            )
    if manifest.packing:
        print(f"{assembly.cut_documents} documents were longer than a row and were cut")
    for line in histogram_lines(manifest):
        print(line)
    tokens = sum(split.tokens for split in manifest.splits.values())
    print(f"unigram entropy of train: {manifest.unigram_entropy:.4f} nats per token")
    print(f"wrote {output} in {seconds:.1f} s ({tokens / 1e6 / seconds:.2f} Mtoken/s)")


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
