"""The tokenizer command: the options that matter show in the model, and mistakes get one sentence."""

from __future__ import annotations

import gzip
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece

from tests.tokenizer.conftest import prose
from tokenizer import train_tokenizer

ROOT = Path(__file__).parents[2]


def run(*arguments: object) -> None:
    train_tokenizer.main([str(argument) for argument in arguments])


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    with pytest.raises(SystemExit) as exit_:
        run(*arguments)
    assert exit_.value.code == 1
    sentence = capsys.readouterr().err.strip()
    assert sentence.startswith("error: ")
    assert "\n" not in sentence
    return sentence


def test_model_has_the_options(tokenizer: Path) -> None:
    model = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    assert model.vocab_size() == 600
    assert (model.unk_id(), model.bos_id(), model.eos_id(), model.pad_id()) == (0, 1, 2, -1)
    assert [model.id_to_piece(i) for i in (3, 258)] == ["<0x00>", "<0xFF>"]
    pieces = [model.id_to_piece(i) for i in range(259, 600)]
    assert not any(any(c.isdigit() for c in piece) and len(piece.strip("▁")) > 1 for piece in pieces)
    assert model.encode("a\nb", out_type=str)[1] == "<0x0A>"
    for text in [
        *prose(50, seed=5),
        "  x",
        "x  ",
        "\n",
        "ﬁ ²",
        "ｗｉｄｅ",
        "𝕏",
    ]:  # no normalisation: the same text back
        assert model.decode(model.encode(text)) == text


def test_report_and_reproducibility(
    tmp_path: Path, text_dir: Path, texts: list[str], tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "deep" / "tok.model"
    options = ("--vocab-size", 600, "--val-fraction", 0.1, "--max-sentences", 500)
    run("--input", text_dir, "--output", model, *options)
    first, report = model.read_bytes(), capsys.readouterr().out
    held_out = [text for text in texts if train_tokenizer.is_validation(text, 0.1)]
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    ratio = sum(len(t.encode()) for t in held_out) / sum(len(processor.encode(t)) for t in held_out)
    assert f"{ratio:.3f} bytes per token on {len(held_out)} documents held out" in report
    assert f"round trip: {len(held_out)} of {len(held_out)} of them" in report
    run(
        "--input",
        text_dir,
        "--output",
        model,
        "--vocab-size",
        600,
        "--val-fraction",
        0.1,
        "--max-sentences",
        500,
        "--overwrite",
    )
    assert model.read_bytes() == first != tokenizer.read_bytes()
    assert [path.name for path in model.parent.iterdir()] == ["tok.model"]


def test_held_out_documents_are_not_trained_on(tmp_path: Path) -> None:
    documents = [f"{c} {'qxz' if train_tokenizer.is_validation(c, 0.5) else 'abc'} {c}" for c in map(str, range(400))]
    kept = [d for d in documents if not train_tokenizer.is_validation(d, 0.5)]
    (tmp_path / "all.txt").write_text("\x1e".join(documents))
    (tmp_path / "kept.txt").write_text("\x1e".join(kept))
    for name, share in (("all", 0.5), ("kept", 0)):
        run(
            *("--input", tmp_path / f"{name}.txt", "--doc-sep", "\x1e", "--output", tmp_path / name),
            *("--vocab-size", 276, "--val-fraction", share),
        )
    assert (tmp_path / "all").read_bytes() == (tmp_path / "kept").read_bytes()


def test_lines_that_sentencepiece_would_drop_are_counted(
    tmp_path: Path, texts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    long = "word " * 14000
    assert len(long) > 65536
    (tmp_path / "a.txt").write_text("\n".join([*texts, long, "bl▅ck", "b▅", "kept " * 10000]))
    run("--input", tmp_path / "a.txt", "--output", tmp_path / "m", "--vocab-size", 500, "--val-fraction", 0)
    report = capsys.readouterr().out
    assert "skipped: 1 lines longer than 65536 bytes" in report
    assert "skipped: 2 lines with SentencePiece's reserved character" in report
    assert "none was held out at --val-fraction 0" in report


def test_mistakes(tmp_path: Path, text_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "m"
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(b"some text" * 1000)[:-8])
    base = ("--output", out, "--vocab-size", 600)

    sentence = refused(capsys, "--input", text_dir, "--output", out, "--vocab-size", 60000)
    assert "--vocab-size 60000 is more than this text allows, which is " in sentence
    largest = sentence.split("which is ")[1].split(":")[0]
    run("--input", text_dir, "--output", tmp_path / "largest", "--vocab-size", largest)
    assert "--vocab-size 100 cannot hold" in refused(capsys, "--input", text_dir, "--output", out, "--vocab-size", 100)
    assert "no file matches" in refused(capsys, "--input", tmp_path / "none.txt", *base)
    assert "no line to train on" in refused(capsys, "--input", empty, *base)
    assert "cut.txt.gz is cut short" in refused(capsys, "--input", tmp_path / "cut.txt.gz", *base)
    assert "--val-fraction" in refused(capsys, "--input", text_dir, *base, "--val-fraction", 1)
    assert "--character-coverage" in refused(capsys, "--input", text_dir, *base, "--character-coverage", 0)
    assert "cannot write" in refused(capsys, "--input", text_dir, "--output", empty / "m", "--vocab-size", 600)
    assert not out.exists()
    out.write_text("precious")
    assert "exists: choose another or add --overwrite" in refused(capsys, "--input", text_dir, *base)
    assert out.read_text() == "precious"


def test_as_a_command(tmp_path: Path, text_dir: Path, tokenizer: Path) -> None:
    command = [sys.executable, ROOT / "tokenizer" / "train_tokenizer.py", "--input", text_dir, "--vocab-size", "600"]
    done = subprocess.run([*command, "--output", tmp_path / "m"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "m").read_bytes() == tokenizer.read_bytes()
