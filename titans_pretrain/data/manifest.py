"""What does a dataset directory say it holds? Reads and writes its `index.json`.

The manifest is written last, so a directory that has one is complete. It carries the SHA-256 of its own content: a
manifest that was edited or damaged is refused rather than believed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titans_pretrain.data.atomic import atomic_file
from titans_pretrain.errors import UserError

FORMAT_VERSION = 1
MANIFEST_NAME = "index.json"
TOKENIZER_NAME = "tokenizer.model"
SPLITS = ("train", "valid")
DTYPES = {"uint16": "<u2", "uint32": "<u4"}


@dataclass(frozen=True)
class ShardEntry:
    """One tar file, and where in it the block index lies."""

    name: str
    bytes: int
    sha256: str
    tokens: int
    docs: int
    """Entries of the document ends: in a packed dataset pieces of documents and runs of padding."""
    index_offset: int
    """Byte offset of the block index's content in the file."""
    index_bytes: int
    index_crc32: int


@dataclass(frozen=True)
class SplitEntry:
    """The shards of one split, in the order in which their text was read."""

    tokens: int
    """With the padding of a packed dataset."""
    docs: int
    text_bytes: int
    """UTF-8 bytes of the documents, for bits per byte."""
    shards: tuple[ShardEntry, ...]


@dataclass(frozen=True)
class Packing:
    """How documents lie in the rows of a packed dataset."""

    seq_len: int
    """Tokens per row. Rows lie one after another from a shard's first token on and never cross shards."""
    align: int
    """Documents start at multiples of it in a row."""
    pad: int
    """The token that fills gaps; no document starts with it."""


@dataclass(frozen=True)
class Manifest:
    """The content of `index.json`."""

    dtype: str
    """Of a token on disk: uint16 or uint32, little-endian."""
    vocab_size: int
    tokenizer_sha256: str
    bos_id: int
    """The tokenizer's beginning-of-document id, -1 where it has none. Whether documents start with it: options."""
    eos_id: int
    unigram_entropy: float
    """Of the train split, nats per token: the loss of a model that knows only how often each token occurs."""
    options: dict[str, Any]
    """How the shards were built."""
    splits: dict[str, SplitEntry]

    @property
    def packing(self) -> Packing | None:
        """None: documents follow one another without a gap, and sequences are cut anywhere."""
        packing = self.options.get("packing", {"kind": "concat"})
        if packing["kind"] == "concat":
            return None
        return Packing(packing["seq_len"], packing["align"], packing["pad"])

    def fingerprint(self) -> str:
        """Hex SHA-256 over everything that decides the token stream."""
        shards = {name: [shard.sha256 for shard in split.shards] for name, split in self.splits.items()}
        content = [FORMAT_VERSION, self.dtype, self.vocab_size, self.tokenizer_sha256, self.bos_id, self.eos_id, shards]
        # The same shards read as rows of another length are other sequences.
        return _digest([*content, *([dataclasses.astuple(self.packing)] if self.packing else [])])


def dtype_for(vocab_size: int) -> str:
    """The smallest dtype that holds every id."""
    return "uint16" if vocab_size <= 65536 else "uint32"


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write `index.json` in one piece.

    Raises:
        OSError: as the file system does.
    """
    content = {"version": FORMAT_VERSION, **dataclasses.asdict(manifest)}
    content = json.loads(json.dumps(content))
    with atomic_file(directory / MANIFEST_NAME) as file:
        file.write(json.dumps({**content, "checksum": _digest(content)}, indent=1).encode() + b"\n")


def read_manifest(directory: Path) -> Manifest:
    """Read and check `index.json`.

    Raises:
        UserError: no such directory, no manifest, damaged or of another format version.
    """
    path = directory / MANIFEST_NAME
    if not directory.is_dir():
        raise UserError(
            f"no dataset directory at {directory}: set data.path to one written by tokenizer/build_shards.py"
        )
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UserError(
            f"{directory} has no {MANIFEST_NAME}, so it is not a dataset or its build did not finish; "
            "build it with tokenizer/build_shards.py"
        ) from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    return parse_manifest(content, str(path))


def parse_manifest(text: bytes, path: str) -> Manifest:
    """Check the content of an `index.json`; `path` names it in messages.

    Raises:
        UserError: damaged or of another format version.
    """
    try:
        content = json.loads(text)
        version, checksum = content.pop("version"), content.pop("checksum")
    except (ValueError, KeyError, AttributeError, TypeError):
        raise UserError(f"the manifest {path} is damaged: restore it, or build the dataset again") from None
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path} is of format version {version}, but this code reads version {FORMAT_VERSION}: build the dataset again "
            "with tokenizer/build_shards.py"
        )
    if checksum != _digest({"version": version, **content}):
        raise UserError(
            f"the manifest {path} is damaged (its checksum differs): restore it, or build the dataset again"
        )
    splits = {
        name: SplitEntry(**{**split, "shards": tuple(ShardEntry(**shard) for shard in split["shards"])})
        for name, split in content.pop("splits").items()
    }
    return Manifest(**content, splits=splits)


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
