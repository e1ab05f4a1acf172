"""From text to a SentencePiece model: python tokenizer/train_tokenizer.py --input ... --output tok.model --vocab-size N

The options follow Mistral's first tokenizer: BPE with byte fallback (every text can be encoded), digits one by one, no
normalisation (decoding gives the text back), documents cut at newlines so that a newline is the byte token <0x0A>.
"""

from __future__ import annotations

import argparse
import io
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import sentencepiece

if not __package__:  # started as a file: the packages lie beside its folder
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from titans_pretrain.data.atomic import atomic_file
from titans_pretrain.errors import UserError, exit_on_user_error
from tokenizer.documents import Tally, is_validation, read_document
from tokenizer.encode import ENCODE_CHUNK
from tokenizer.read_text import add_input_options, find_sources, read_records

# SentencePiece drops longer lines with no more than a log message; its own limit of 4192 would drop most long prose.
MAX_LINE_BYTES = 65536
# SentencePiece's mark for the unknown token: it drops lines that hold it.
RESERVED = "\u2585"
MEASURED_BYTES = 16 << 20


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="train_tokenizer.py", description="Train a SentencePiece BPE tokenizer on text."
    )
    add_input_options(parser)
    parser.add_argument(
        "--output", required=True, type=Path, metavar="FILE", help="model file to write, e.g. tok.model"
    )
    parser.add_argument(
        "--vocab-size", required=True, type=int, metavar="N", help="tokens, with 3 special ones and 256 bytes"
    )
    parser.add_argument(
        "--max-sentences",
        type=int,
        default=2_000_000,
        metavar="N",
        help="train on this many lines, drawn at random; memory is about 4.5 bytes per character (default: 2000000, 0: all)",
    )
    parser.add_argument(
        "--character-coverage",
        type=float,
        default=0.99995,
        metavar="SHARE",
        help="share of the text's characters that get a token of their own; the rest is bytes (default: 0.99995)",
    )
    parser.add_argument(
        "--val-fraction",
        type=float,
        default=0.005,
        metavar="SHARE",
        help="documents held out of training to measure on, the same ones that build_shards.py holds out (default: 0.005)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing --output")
    return parser


class Lines:
    """The lines to train on, as an iterator that counts what it leaves out and keeps documents to measure on."""

    def __init__(self, args: argparse.Namespace):
        self.tally = Tally()
        self.skipped_long = self.skipped_reserved = 0
        self.held_out: list[str] = []
        self.seen: list[str] = []
        """The first training documents, measured on when none was held out."""
        self.error: BaseException | None = None
        """SentencePiece turns an error in its iterator into a RuntimeError of its own; this is the error itself."""
        self._args = args
        self._sources = find_sources(args.input, args.format)

    def __iter__(self) -> Iterator[str]:
        try:
            yield from self._lines()
        except (Exception, KeyboardInterrupt) as error:
            self.error = error
            raise

    def _lines(self) -> Iterator[str]:
        args, held_out_bytes, seen_bytes = self._args, 0, 0
        for record, _ in read_records(self._sources, text_key=args.text_key, doc_sep=args.doc_sep):
            document = read_document(record, args.text_key, 1, self.tally)
            self.tally.check(args.on_bad, args.max_bad, final=False)
            if document is None:
                continue
            if is_validation(document, args.val_fraction):
                if held_out_bytes < MEASURED_BYTES:
                    self.held_out.append(document)
                    held_out_bytes += len(document)
                continue
            if seen_bytes < MEASURED_BYTES // 16:
                self.seen.append(document)
                seen_bytes += len(document)
            for line in document.split("\n"):
                if len(line) * 4 > MAX_LINE_BYTES and len(line.encode()) > MAX_LINE_BYTES:
                    self.skipped_long += 1
                elif RESERVED in line:
                    self.skipped_reserved += 1
                elif line:
                    yield line
        self.tally.check(args.on_bad, args.max_bad, final=True)


def train(lines: Lines, args: argparse.Namespace) -> bytes:
    """The trained model, serialised.

    Raises:
        UserError: no text, or a vocabulary that the text cannot fill or that cannot hold its characters.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=args.vocab_size,
            byte_fallback=True,
            split_digits=True,
            character_coverage=args.character_coverage,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            add_dummy_prefix=True,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            max_sentence_length=MAX_LINE_BYTES,
            input_sentence_size=args.max_sentences,
            shuffle_input_sentence=True,
            num_threads=1,  # more do nothing for BPE
            minloglevel=2,
        )
    except RuntimeError as error:
        if lines.error is not None:
            raise lines.error from None
        raise UserError(_explain(str(error), args)) from error
    return model.getvalue()


def _explain(message: str, args: argparse.Namespace) -> str:
    if match := re.search(r"Vocabulary size too high .*<= (\d+)", message):
        return f"--vocab-size {args.vocab_size} is more than this text allows, which is {match[1]}: lower it or give more text"
    if match := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return (
            f"--vocab-size {args.vocab_size} cannot hold the special tokens, 256 bytes and the text's characters, which are "
            f"{match[1]}: raise it or lower --character-coverage"
        )
    if "sentences_.empty()" in message:
        return f"no line to train on in --input {' '.join(args.input)}: the text is empty, or all of it was held out or skipped"
    return f"SentencePiece could not train: {message}"


def measure(model: bytes, documents: Sequence[str]) -> tuple[float, int]:
    """(UTF-8 bytes per token, documents that decode to exactly their text) over `documents`."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    tokens = size = exact = 0
    for document in documents:
        ids = processor.parallel_encode_as_numpy(document, chunk_len=ENCODE_CHUNK, num_threads=1)
        tokens += len(ids)
        size += len(document.encode())
        exact += processor.decode(ids.tolist()) == document
    return size / tokens, exact


@exit_on_user_error
def main(arguments: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(arguments)
    for name in ("val_fraction", "max_bad"):
        if not 0 <= getattr(args, name) < 1:
            raise UserError(
                f"--{name.replace('_', '-')} must be a share from 0 to below 1, not {getattr(args, name):g}"
            )
    if not 0.9 <= args.character_coverage <= 1:
        raise UserError(f"--character-coverage must lie between 0.9 and 1, not {args.character_coverage:g}")
    if args.max_sentences < 0:
        raise UserError(f"--max-sentences must be 0 or more, not {args.max_sentences}")
    if args.output.exists() and not args.overwrite:
        raise UserError(f"--output {args.output} exists: choose another or add --overwrite to replace it")
    started = time.monotonic()
    lines = Lines(args)
    model = train(lines, args)
    try:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(args.output) as file:
            file.write(model)
    except OSError as error:
        raise UserError(f"cannot write {args.output}: {error.strerror}") from error

    for text in lines.tally.lines():
        print(text)
    if lines.skipped_long:
        print(f"skipped: {lines.skipped_long} lines longer than {MAX_LINE_BYTES} bytes")
    if lines.skipped_reserved:
        print(f"skipped: {lines.skipped_reserved} lines with SentencePiece's reserved character {RESERVED} (U+2585)")
    documents, what = lines.held_out, "held out"
    if not documents:
        documents, what = (
            lines.seen,
            f"of the training text (none was held out at --val-fraction {args.val_fraction:g})",
        )
    bytes_per_token, exact = measure(model, documents)
    print(f"{bytes_per_token:.3f} bytes per token on {len(documents)} documents {what}")
    print(f"round trip: {exact} of {len(documents)} of them decode to exactly their text")
    if any("\u2581" in document for document in documents):
        print("(U+2581 is SentencePiece's own mark for a space and decodes to one)")
    print(f"wrote {args.output}, {args.vocab_size} tokens, in {time.monotonic() - started:.1f} s")


if __name__ == "__main__":
    main()
