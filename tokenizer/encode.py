"""Which tokens does a batch of records become? Runs in worker processes, so it imports nothing heavy."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import sentencepiece

from titans_pretrain.data.manifest import DTYPES, SPLITS, dtype_for
from titans_pretrain.errors import UserError
from tokenizer.documents import Tally, is_validation, read_document
from tokenizer.read_text import Record

# Characters per piece inside one document. Whole documents of a megabyte encode four times slower; the tokens are the
# same, SentencePiece sees to that.
ENCODE_CHUNK = 4000
_BATCH_BYTES = 1 << 20


@dataclass(frozen=True)
class EncodeOptions:
    """What decides the tokens of a document and its split."""

    text_key: str
    bos: bool
    eos: bool
    val_fraction: float
    min_chars: int


@dataclass
class EncodedSplit:
    """Documents of one split: tokens one after another, and each one's length (int64 [docs])."""

    tokens: np.ndarray
    lengths: np.ndarray
    text_bytes: int


@dataclass
class EncodedBatch:
    """What `encode_batch` returns; `splits` by split name."""

    splits: dict[str, EncodedSplit]
    tally: Tally = field(default_factory=Tally)


def load_tokenizer(path: Path) -> tuple[sentencepiece.SentencePieceProcessor, str]:
    """A SentencePiece model and the hex SHA-256 of its file.

    Raises:
        UserError: missing, or not a SentencePiece model.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read tokenizer {path}: {error.strerror}") from error
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=content)
    except RuntimeError:
        raise UserError(f"{path} is not a SentencePiece model: train one with tokenizer/train_tokenizer.py") from None
    return processor, hashlib.sha256(content).hexdigest()


def batches(records: Iterable[tuple[Record, int]]) -> Iterator[tuple[list[Record], int]]:
    """Records in groups of about a megabyte, with the bytes read for each group."""
    batch: list[Record] = []
    size = read = 0
    for record, consumed in records:
        batch.append(record)
        size += len(record.payload or "")
        read += consumed
        if size >= _BATCH_BYTES:
            yield batch, read
            batch, size, read = [], 0, 0
    if batch:
        yield batch, read


class Encoder:
    """A tokenizer with the options of a build; makes tokens of records."""

    def __init__(self, tokenizer: Path, options: EncodeOptions):
        self._processor, _ = load_tokenizer(tokenizer)
        self._options = options
        self._dtype = DTYPES[dtype_for(self._processor.vocab_size())]

    def encode_batch(self, records: list[Record]) -> EncodedBatch:
        options, tally = self._options, Tally()
        documents: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
        text_bytes = dict.fromkeys(SPLITS, 0)
        for record in records:
            text = read_document(record, options.text_key, options.min_chars, tally)
            if text is not None:
                split = "valid" if is_validation(text, options.val_fraction) else "train"
                documents[split].append(self.encode(text))
                text_bytes[split] += len(text.encode())
        return EncodedBatch({split: self._join(documents[split], text_bytes[split]) for split in SPLITS}, tally)

    def encode(self, text: str) -> np.ndarray:
        """int32 [tokens], with the beginning and end ids that the options ask for."""
        return self._processor.parallel_encode_as_numpy(
            text, add_bos=self._options.bos, add_eos=self._options.eos, chunk_len=ENCODE_CHUNK, num_threads=1
        )

    def _join(self, documents: list[np.ndarray], text_bytes: int) -> EncodedSplit:
        lengths = np.array([len(document) for document in documents], dtype=np.int64)
        tokens = np.concatenate(documents) if documents else np.empty(0)
        return EncodedSplit(tokens.astype(self._dtype), lengths, text_bytes)


_encoder: Encoder | None = None


def start_worker(tokenizer: Path, options: EncodeOptions) -> None:
    """Give this process its encoder; run once in every worker."""
    global _encoder
    _encoder = Encoder(tokenizer, options)


def encode_in_worker(records: list[Record]) -> EncodedBatch:
    assert _encoder is not None
    return _encoder.encode_batch(records)
