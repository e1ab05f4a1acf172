"""Which tokens does a batch of records become? Runs in worker processes, so it imports nothing heavy."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import sentencepiece

from titans_pretrain.data.manifest import DTYPES, SPLITS, dtype_for
from titans_pretrain.errors import UserError
from tokenizer.documents import Tally, document_hash, is_validation, read_document
from tokenizer.read_text import Record

# Characters per piece inside one document. Whole documents of a megabyte encode four times slower; the tokens are the
# same, SentencePiece sees to that.
ENCODE_CHUNK = 4000


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
    """Documents of one split.

    tokens: uint16 or uint32 [sum of lengths], one document after another.
    lengths, text_bytes: int64 [docs], of each document.
    hashes: uint64 [docs, 2], of each document's text.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    text_bytes: np.ndarray
    hashes: np.ndarray


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


class Encoder:
    """A tokenizer with the options of a build; makes tokens of records."""

    def __init__(self, tokenizer: Path, options: EncodeOptions):
        self._processor, _ = load_tokenizer(tokenizer)
        self._options = options
        self._dtype = DTYPES[dtype_for(self._processor.vocab_size())]

    def encode_batch(self, records: list[Record]) -> EncodedBatch:
        options, tally = self._options, Tally()
        texts: dict[str, list[str]] = {split: [] for split in SPLITS}
        for record in records:
            text = read_document(record, options.text_key, options.min_chars, tally)
            if text is not None:
                texts["valid" if is_validation(text, options.val_fraction) else "train"].append(text)
        return EncodedBatch({split: self._encode_split(texts[split]) for split in SPLITS}, tally)

    def _encode_split(self, texts: list[str]) -> EncodedSplit:
        documents = [self.encode(text).astype(self._dtype) for text in texts]
        return EncodedSplit(
            tokens=np.concatenate([*documents, np.empty(0, dtype=self._dtype)]),
            lengths=np.array([len(document) for document in documents], dtype=np.int64),
            text_bytes=np.array([len(text.encode()) for text in texts], dtype=np.int64),
            hashes=np.frombuffer(b"".join(map(document_hash, texts)), dtype="<u8").reshape(-1, 2),
        )

    def encode(self, text: str) -> np.ndarray:
        """int32 [tokens], with the beginning and end ids that the options ask for."""
        return self._processor.parallel_encode_as_numpy(
            text, add_bos=self._options.bos, add_eos=self._options.eos, chunk_len=ENCODE_CHUNK, num_threads=1
        )
