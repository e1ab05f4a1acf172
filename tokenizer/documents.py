"""Which text does a record hold, is it usable, and which split does it go to?"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from titans_pretrain.errors import UserError
from tokenizer.read_text import Record

_SURROGATE = re.compile("[\ud800-\udfff]")


class BadRecordError(ValueError):
    """A record that holds no usable document; the text is the reason, the same for all records of its kind."""


def parse_document(record: Record, text_key: str) -> tuple[str, str | None]:
    """The text of a record, and what had to be repaired in it (None: nothing).

    Raises:
        BadRecordError: it has no text.
    """
    payload, repaired = record.payload, None
    if isinstance(payload, bytes):
        if record.number == 1:
            payload = payload.removeprefix(b"\xef\xbb\xbf")
        try:
            text = payload.decode()
        except UnicodeDecodeError:
            text, repaired = payload.decode(errors="replace"), "invalid UTF-8 replaced"
        if record.source.format == "jsonl":
            text = _json_text(text, text_key)
    elif isinstance(payload, str):
        text = payload
    else:
        raise BadRecordError(f"{text_key!r} is not a string")
    if not text.isascii() and _SURROGATE.search(text):
        text, repaired = _SURROGATE.sub("\ufffd", text), "lone surrogate replaced"
    return text, repaired


def _json_text(line: str, text_key: str) -> str:
    try:
        content = json.loads(line)
    except (ValueError, RecursionError):
        raise BadRecordError("not valid JSON") from None
    if not isinstance(content, dict):
        raise BadRecordError("not a JSON object")
    if text_key not in content:
        raise BadRecordError(f"no key {text_key!r}")
    if not isinstance(content[text_key], str):
        raise BadRecordError(f"{text_key!r} is not a string")
    return content[text_key]


def is_validation(document: str, fraction: float) -> bool:
    """Whether a document belongs to the validation split: decided by its text alone, so equal documents go together."""
    digest = hashlib.blake2b(document.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < fraction * 2**64


def document_hash(document: str) -> bytes:
    """16 bytes that only equal documents share."""
    return hashlib.blake2b(document.encode(), digest_size=16).digest()


@dataclass
class Tally:
    """What happened to the records: bad ones by reason, with the first places; adds up over batches."""

    documents: int = 0
    duplicates: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    repaired: Counter[str] = field(default_factory=Counter)
    empty: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    """The first place of each reason."""

    def content(self) -> dict[str, Any]:
        """For JSON. (dataclasses.asdict takes a Counter for a list of what to count.)"""
        return {
            name: getattr(self, name) for name in ("documents", "duplicates", "bad", "repaired", "empty", "examples")
        }

    @classmethod
    def of(cls, content: dict[str, Any]) -> Tally:
        """From `content`."""
        counters = {name: Counter(content[name]) for name in ("bad", "repaired", "empty")}
        return cls(content["documents"], content["duplicates"], **counters, examples=content["examples"])

    def add(self, other: Tally) -> None:
        self.documents += other.documents
        self.duplicates += other.duplicates
        self.bad += other.bad
        self.repaired += other.repaired
        self.empty += other.empty
        for reason, place in other.examples.items():
            self.examples.setdefault(reason, place)

    def check(self, on_bad: str, max_bad: float, *, final: bool) -> None:
        """Stop on too many bad records; before the end only once a thousand were seen, so that one early one is no 100 %.

        Raises:
            UserError: naming the reason, the first place and the option.
        """
        troubles = self.bad + self.repaired
        if on_bad == "raise" and troubles:
            place, reason = min((self.examples[reason], reason) for reason in troubles)
            raise UserError(f"{place}: {reason}; mend it, or use --on-bad skip")
        bad, seen = self.bad.total(), self.bad.total() + self.documents + self.empty.total()
        if bad > max_bad * (seen if final else max(seen, 1000)):
            reason, count = self.bad.most_common(1)[0]
            raise UserError(
                f"{bad} of {seen} records are bad, above --max-bad {max_bad:g}; most often ({count}): {reason}, first at "
                f"{self.examples[reason]}"
            )

    def lines(self) -> Iterator[str]:
        """One line per reason, for the end of a run."""
        for what, counts in (("skipped", self.bad), ("kept", self.repaired), ("left out", self.empty)):
            for reason, count in counts.most_common():
                yield f"{what}: {count} {reason} (first at {self.examples[reason]})"
        if self.duplicates:
            yield f"left out: {self.duplicates} with the same text as one before"


def read_document(record: Record, text_key: str, min_chars: int, tally: Tally) -> str | None:
    """The text of a record, or None with the reason counted."""
    if record.source.format == "jsonl" and isinstance(record.payload, bytes) and not record.payload.strip():
        return None  # a blank line between lines of JSON is no record
    try:
        text, repaired = parse_document(record, text_key)
    except BadRecordError as error:
        _count(tally, tally.bad, str(error), record)
        return None
    if repaired:
        _count(tally, tally.repaired, repaired, record)
    if not text or text.isspace():
        _count(tally, tally.empty, "without text", record)
        return None
    if len(text) < min_chars:
        _count(tally, tally.empty, f"shorter than --min-chars {min_chars}", record)
        return None
    tally.documents += 1
    return text


def _count(tally: Tally, counts: Counter[str], reason: str, record: Record) -> None:
    counts[reason] += 1
    tally.examples.setdefault(reason, record.place)
