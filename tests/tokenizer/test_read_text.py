"""Every format gives the same records; damaged files and bad records are named."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from titans_pretrain.errors import UserError
from tokenizer import read_text
from tokenizer.documents import Tally, is_validation, read_document
from tokenizer.read_text import Record, Source, find_sources, read_records, total_bytes

TEXTS = ["one\ntwo", "naïve 🙂", "x" * 5000, "last"]


def pack(content: bytes, compression: str) -> bytes:
    if compression == "gz":
        return gzip.compress(content)
    return zstandard.ZstdCompressor(write_checksum=True).compress(content) if compression == "zst" else content


def read(*inputs: Path | str, format_: str | None = None, text_key: str = "text", doc_sep: str = "") -> list[str]:
    tally = Tally()
    records = read_records(find_sources(map(str, inputs), format_), text_key=text_key, doc_sep=doc_sep)
    documents = [read_document(record, text_key, 1, tally) for record, _ in records]
    assert not tally.bad
    return [document for document in documents if document is not None]


@pytest.mark.parametrize("compression", ["", "gz", "zst"])
def test_txt_and_jsonl(tmp_path: Path, compression: str) -> None:
    end = f".{compression}" if compression else ""
    for number, text in enumerate(TEXTS):
        (tmp_path / f"{number}.txt{end}").write_bytes(pack(text.encode(), compression))
    lines = "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in TEXTS)
    (tmp_path / f"4.jsonl{end}").write_bytes(pack(lines.encode() + b"\n", compression))
    (tmp_path / "ignored.md").touch()
    assert read(tmp_path) == TEXTS + TEXTS
    assert read(tmp_path / f"*.jsonl{end}") == TEXTS
    (tmp_path / f"4.jsonl{end}").rename(tmp_path / "data")
    assert read(tmp_path / "data", format_=f"jsonl{end}") == TEXTS


def test_parquet(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"body": TEXTS, "n": range(4)}), tmp_path / "a.parquet", row_group_size=3)
    assert read(tmp_path / "a.parquet", text_key="body") == TEXTS
    with pytest.raises(UserError, match="no column 'text', only body, n: set --text-key"):
        read(tmp_path / "a.parquet")
    (tmp_path / "b.parquet.gz").touch()
    with pytest.raises(UserError, match="unpack it first"):
        read(tmp_path / "b.parquet.gz")
    (tmp_path / "c.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-20])
    with pytest.raises(UserError, match=r"c.parquet is cut short or damaged"):
        read(tmp_path / "c.parquet")


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    for format_, content in (("jsonl", lines), ("jsonl.zst", zstandard.compress(lines))):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
        assert read("-", format_=format_) == TEXTS
    for format_ in (None, "parquet"):
        with pytest.raises(UserError, match="standard input needs --format"):
            read("-", format_=format_)


@pytest.mark.parametrize("read_bytes", [1, 3, 7, 1 << 20])
def test_separator_anywhere_in_the_reads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, read_bytes: int) -> None:
    monkeypatch.setattr(read_text, "_READ_BYTES", read_bytes)
    (tmp_path / "a.txt").write_text("one\n\n\ntwo<e>\n\nthree\n\n")
    assert read(tmp_path / "a.txt", doc_sep="\n\n") == ["one", "\ntwo<e>", "three"]
    assert read(tmp_path / "a.txt", doc_sep="<e>") == ["one\n\n\ntwo", "\n\nthree\n\n"]


def test_inputs_are_found_once_in_order(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("b.txt", "a.txt", "sub/c.jsonl"):
        (tmp_path / name).write_text("x")
    sources = find_sources([f"{tmp_path}/b.*", str(tmp_path), str(tmp_path / "a.txt")], None)
    assert [Path(source.path).name for source in sources] == ["b.txt", "a.txt", "c.jsonl"]
    assert total_bytes(sources) == 3


def test_inputs_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no file matches --input .*nothing"):
        find_sources([str(tmp_path / "nothing*")], None)
    with pytest.raises(UserError, match=r"folder .* holds no \.txt and"):
        find_sources([str(tmp_path)], None)
    (tmp_path / "a.pdf").touch()
    with pytest.raises(UserError, match=r"cannot tell the format of .*a.pdf: known are"):
        find_sources([str(tmp_path / "a.pdf")], None)


@pytest.mark.parametrize("compression", ["gz", "zst"])
def test_compressed_file_cut_short_or_damaged(tmp_path: Path, compression: str) -> None:
    content = pack("".join(str(i**7) + "\n" for i in range(20000)).encode(), compression)
    path = tmp_path / f"a.txt.{compression}"
    harmed = [
        content[: len(content) // 2],
        content[:-3],
        content[:500] + b"\xff" * 40 + content[540:],
        b"no magic" * 10,
    ]
    for broken in harmed:
        path.write_bytes(broken)
        with pytest.raises(UserError, match=f"a.txt.{compression} is cut short or damaged"):
            read(path)
    path.write_bytes(content + content)  # two members are one file
    assert len(read(path, doc_sep="\n")) == 40000


def test_endless_record(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(read_text, "MAX_RECORD_BYTES", 1 << 20)
    monkeypatch.setattr(read_text, "_READ_BYTES", 1 << 16)
    (tmp_path / "a.jsonl").write_bytes(b"x" * (2 << 20))
    (tmp_path / "a.txt").write_bytes(b"x" * (2 << 20))
    with pytest.raises(UserError, match=r"a.jsonl has a record of more than 1 MiB: check that it is JSON lines"):
        read(tmp_path / "a.jsonl")
    with pytest.raises(UserError, match=r"a.txt has a record of more than 1 MiB: split the text with --doc-sep"):
        read(tmp_path / "a.txt")


def document(payload: bytes | str | None, format_: str = "jsonl", number: int = 2) -> tuple[str | None, Tally]:
    tally = Tally()
    text = read_document(Record(Source(f"f.{format_}", format_, ""), number, payload), "text", 3, tally)
    return text, tally


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (b"{", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"text": ' + b"1" * 5000 + b"}", "not valid JSON"),
        (b"3", "not a JSON object"),
        (b'{"body": "x"}', "no key 'text'"),
        (b'{"text": null}', "'text' is not a string"),
        (b'{"text": ["x"]}', "'text' is not a string"),
    ],
)
def test_bad_lines(payload: bytes, reason: str) -> None:
    text, tally = document(payload)
    assert text is None
    assert list(tally.lines()) == [f"skipped: 1 {reason} (first at f.jsonl:2)"]


@pytest.mark.parametrize(
    ("payload", "format_", "text", "line"),
    [
        (b"abc\xff", "txt", "abc\ufffd", "kept: 1 invalid UTF-8 replaced"),
        (b'{"text": "abc\\ud800"}', "jsonl", "abc\ufffd", "kept: 1 lone surrogate replaced"),
        (b'{"text": "abc\\ud83d\\ude42"}\r', "jsonl", "abc🙂", None),
        (b" \n", "txt", None, "left out: 1 without text"),
        (b"ab", "txt", None, "left out: 1 shorter than --min-chars 3"),
        (b"  \r", "jsonl", None, None),
        (None, "parquet", None, "skipped: 1 'text' is not a string"),
    ],
)
def test_repaired_and_left_out(payload: bytes | None, format_: str, text: str | None, line: str | None) -> None:
    found, tally = document(payload, format_)
    assert found == text
    assert list(tally.lines()) == ([f"{line} (first at f.{format_}:2)"] if line else [])


def test_byte_order_mark_only_at_the_start() -> None:
    assert document(b"\xef\xbb\xbfabc", "txt", number=1)[0] == "abc"
    assert document(b"\xef\xbb\xbfabc", "txt", number=2)[0] == "\ufeffabc"


def test_limits_on_bad_records() -> None:
    tally = Tally(documents=90)
    tally.bad["not valid JSON"] = 10
    tally.examples["not valid JSON"] = "f.jsonl:3"
    tally.check("skip", 0.1, final=True)
    tally.check("skip", 0.01, final=False)  # too early to tell
    with pytest.raises(
        UserError, match=r"10 of 100 records are bad, above --max-bad 0.09.*\(10\): not valid JSON, first at f"
    ):
        tally.check("skip", 0.09, final=True)
    with pytest.raises(UserError, match=r"f.jsonl:3: not valid JSON; mend it, or use --on-bad skip"):
        tally.check("raise", 1, final=False)


def test_validation_share_and_its_growth() -> None:
    chosen = {share: {i for i in range(4000) if is_validation(f"document {i}", share)} for share in (0.01, 0.1, 0.5)}
    for share, documents in chosen.items():
        assert abs(len(documents) - 4000 * share) < 4 * (4000 * share) ** 0.5
    assert chosen[0.01] < chosen[0.1] < chosen[0.5]
