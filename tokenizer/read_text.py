"""Which records are in these files? Shared by both commands.

A record is the raw form of one document: a line of .jsonl, a row of .parquet, a whole .txt file or the part of one
between separators. Reading records is cheap and done in one process; documents.py decodes and checks them, in
other processes if need be.
"""

from __future__ import annotations

import argparse
import contextlib
import glob
import gzip
import re
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from titans_pretrain.errors import UserError

FORMATS = ("txt", "jsonl", "parquet")
COMPRESSIONS = ("gz", "zst")
KNOWN = ".txt and .jsonl (each also .gz or .zst) and .parquet"
FORMAT_CHOICES = (*FORMATS, *(f"{text}.{packed}" for text in ("txt", "jsonl") for packed in COMPRESSIONS))
MAX_RECORD_BYTES = 256 << 20
_READ_BYTES = 4 << 20
_STDIN = "-"


class Source(NamedTuple):
    """One input: `path` ("-" is standard input), its format and compression ("" for none)."""

    path: str
    format: str
    compression: str


class Record(NamedTuple):
    """One document before decoding. `number` counts from 1: line, row, or part of a text file."""

    source: Source
    number: int
    payload: bytes | str | None
    """Bytes from txt and jsonl; from parquet the column's value."""

    @property
    def place(self) -> str:
        return f"{self.source.path}:{self.number}"


class Position(NamedTuple):
    """A place between records: behind `number` records of source number `source`, which are `offset` bytes of its text."""

    source: int = 0
    number: int = 0
    offset: int = 0


def add_input_options(parser: argparse.ArgumentParser) -> None:
    """The options that say what to read, the same in both commands."""
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help=f"files, quoted globs, folders (searched for {KNOWN}) or - for standard input",
    )
    parser.add_argument("--text-key", default="text", help="jsonl and parquet: the field with the text (default: text)")
    parser.add_argument(
        "--format", choices=FORMAT_CHOICES, help="of standard input and of files with another extension"
    )
    parser.add_argument(
        "--doc-sep",
        type=_unescape,
        default="",
        metavar="TEXT",
        help=r"txt: split files into documents at this text, e.g. '\n\n' (default: a file is one document)",
    )
    parser.add_argument(
        "--on-bad", choices=("skip", "raise"), default="skip", help="bad records: count, or stop (default: skip)"
    )
    parser.add_argument(
        "--max-bad",
        type=float,
        default=0.01,
        metavar="SHARE",
        help="stop above this share of bad records (default: 0.01)",
    )


def check_input_options(args: argparse.Namespace) -> None:
    """Refuse values of the options above that mean nothing.

    Raises:
        UserError: naming the option.
    """
    if not 0 <= args.max_bad <= 1:
        raise UserError(f"--max-bad must be a share between 0 and 1, not {args.max_bad:g}")
    if args.doc_sep and any(not name.startswith("txt") for name in (args.format or "txt",)):
        raise UserError(f"--doc-sep splits txt, but --format is {args.format}: drop one")


def _unescape(text: str) -> str:
    return text.replace("\\n", "\n").replace("\\r", "\r").replace("\\t", "\t").replace("\\f", "\f")


def find_sources(inputs: Iterable[str], format_: str | None) -> list[Source]:
    """The files that `inputs` name, each once, in the order given; globs and folders sorted.

    Raises:
        UserError: nothing there, or an extension that says nothing and no `format_`.
    """
    sources: dict[str, Source] = {}
    for item in inputs:
        if item == _STDIN:
            if not format_ or format_ == "parquet":
                raise UserError(
                    "standard input needs --format " + ", ".join(f for f in FORMAT_CHOICES if f != "parquet")
                )
            sources.setdefault(_STDIN, Source(_STDIN, *_split_format(format_)))
            continue
        path = Path(item)
        if path.is_dir():
            files = sorted(str(file) for file in path.rglob("*") if file.is_file() and _format_of(file.name))
            if not files:
                raise UserError(f"folder {item} holds no {KNOWN} file")
        elif path.is_file():
            files = [item]
        else:
            files = sorted(file for file in glob.glob(item, recursive=True) if Path(file).is_file())
            if not files:
                raise UserError(f"no file matches --input {item}")
        for file in files:
            found = _format_of(Path(file).name) or (_split_format(format_) if format_ else None)
            if not found:
                raise UserError(f"cannot tell the format of {file}: known are {KNOWN}; give --format for other names")
            sources.setdefault(str(Path(file).resolve()), Source(file, *found))
    return list(sources.values())


def _split_format(name: str) -> tuple[str, str]:
    text, _, packed = name.partition(".")
    return text, packed


def _format_of(name: str) -> tuple[str, str] | None:
    match = re.search(r"\.(txt|jsonl|parquet)(?:\.(gz|zst))?$", name.lower())
    return (match[1], match[2] or "") if match else None


def total_bytes(sources: Sequence[Source]) -> int | None:
    """Size of all sources on disk, bytes; None with standard input among them."""
    if any(source.path == _STDIN for source in sources):
        return None
    return sum(Path(source.path).stat().st_size for source in sources)


def read_records(
    sources: Sequence[Source], *, text_key: str, doc_sep: str = "", start: Position | None = None
) -> Iterator[tuple[Record, int]]:
    """Every record of every source in order, with the bytes on disk that were read since the record before.

    From `start` on, if given: quick in parquet and in files that are not compressed; what lies before it in a compressed
    file is unpacked again.

    Raises:
        UserError: a file cannot be read, is cut short or damaged, or has a record above MAX_RECORD_BYTES.
    """
    start = start or Position()
    for index, source in enumerate(sources[start.source :]):
        begin = start if index == 0 else Position()
        if source.format == "parquet":
            yield from _parquet_records(source, text_key, begin.number)
            continue
        separator = record_separator(source, doc_sep)
        if begin.number and not separator:
            continue  # the whole file was one record
        try:
            with contextlib.nullcontext(sys.stdin.buffer) if source.path == _STDIN else open(source.path, "rb") as raw:
                if begin.number and not source.compression:
                    raw.seek(begin.offset)
                    number, skip = begin.number, 0
                else:
                    number, skip = 0, begin.number
                position = begin.offset if number else 0
                for payload in _split(_blocks(raw, source), separator, source):
                    number += 1
                    now = raw.tell() if source.path != _STDIN else position + len(payload)
                    if number > skip:
                        yield Record(source, number, payload), now - position
                    position = now
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise UserError(
                f"{source.path} is cut short or damaged ({error}): fetch it again or leave it out"
            ) from error
        except OSError as error:
            raise UserError(f"cannot read {source.path}: {error.strerror}") from error


def record_separator(source: Source, doc_sep: str) -> bytes:
    """What stands between the records of a txt or jsonl source; nothing where a file is one record."""
    return b"\n" if source.format == "jsonl" else doc_sep.encode()


def _blocks(raw: BinaryIO, source: Source) -> Iterator[bytes]:
    if source.compression == "zst":
        return _zstd_blocks(raw)
    stream = gzip.GzipFile(fileobj=raw) if source.compression == "gz" else raw
    return iter(lambda: stream.read(_READ_BYTES), b"")


def _zstd_blocks(raw: BinaryIO) -> Iterator[bytes]:
    # Not zstandard's stream_reader, which takes a file cut short for its end.
    try:
        import zstandard
    except ImportError:
        raise UserError("reading .zst needs the package zstandard: pip install zstandard") from None
    frame, inside = zstandard.ZstdDecompressor().decompressobj(), False
    while data := raw.read(_READ_BYTES // 16):
        while data:
            inside = True
            try:
                yield frame.decompress(data)
            except zstandard.ZstdError as error:
                raise EOFError(str(error)) from error
            data = b""
            if frame.eof:
                data = frame.unused_data
                frame, inside = zstandard.ZstdDecompressor().decompressobj(), False
    if inside:
        raise EOFError("the last frame has no end")


def _split(blocks: Iterator[bytes], separator: bytes, source: Source) -> Iterator[bytes]:
    """The parts of a stream between separators; one part where `separator` is empty."""
    pending: list[bytes] = []
    size = 0
    for block in blocks:
        if separator:
            parts = (b"".join(pending) + block).split(separator)
            yield from parts[:-1]
            pending, size = [parts[-1]], len(parts[-1])
        else:
            pending.append(block)
            size += len(block)
        if size > MAX_RECORD_BYTES:
            way_out = "check that it is JSON lines" if source.format == "jsonl" else "split the text with --doc-sep"
            raise UserError(f"{source.path} has a record of more than {MAX_RECORD_BYTES >> 20} MiB: {way_out}")
    last = b"".join(pending)
    if last or not separator:
        yield last


def _parquet_records(source: Source, text_key: str, skip: int) -> Iterator[tuple[Record, int]]:
    if source.compression:
        raise UserError(
            f"{source.path}: parquet is compressed inside and must be read at any offset, so it cannot be read through "
            f"{source.compression}; unpack it first"
        )
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError("reading .parquet needs the package pyarrow: pip install pyarrow") from None
    try:
        with pyarrow.parquet.ParquetFile(source.path) as file:
            if text_key not in file.schema_arrow.names:
                raise UserError(
                    f"{source.path} has no column {text_key!r}, only {', '.join(file.schema_arrow.names)}: set --text-key"
                )
            rows, size, number = file.metadata.num_rows, Path(source.path).stat().st_size, 0
            groups = list(range(file.metadata.num_row_groups))
            while groups and number + file.metadata.row_group(groups[0]).num_rows <= skip:
                number += file.metadata.row_group(groups.pop(0)).num_rows
            for batch in file.iter_batches(batch_size=1024, row_groups=groups, columns=[text_key]):
                for value in batch.column(0).to_pylist():
                    if number >= skip:
                        yield Record(source, number + 1, value), size * (number + 1) // rows - size * number // rows
                    number += 1
    except OSError as error:
        raise UserError(f"cannot read {source.path}: {error.strerror or error}") from error
    except pyarrow.ArrowException as error:
        raise UserError(f"{source.path} is cut short or damaged ({error}): fetch it again or leave it out") from error
