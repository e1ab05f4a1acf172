"""From text to a dataset: the right tokens in the right split, the same bytes for any number of workers, never a half one."""

from __future__ import annotations

import hashlib
import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import sentencepiece

from tests.tokenizer.conftest import prose
from titans_pretrain.data.manifest import read_manifest
from titans_pretrain.data.shards import ShardSet
from titans_pretrain.data.stream import TokenStream
from titans_pretrain.data.verify import verify
from titans_pretrain.data.writer import unigram_entropy
from tokenizer import build_shards, encode
from tokenizer.documents import is_validation

ROOT = Path(__file__).parents[2]
SHARE = 0.1


def build(tokenizer: Path, output: Path, *more: object, input_: Sequence[object]) -> None:
    arguments = ["--tokenizer", tokenizer, "--output", output, "--val-fraction", SHARE, "--workers", 1, *more]
    build_shards.main([*map(str, arguments), "--input", *map(str, input_)])


def refused(
    capsys: pytest.CaptureFixture[str], tokenizer: Path, output: Path, *more: object, input_: Sequence[object]
) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        build(tokenizer, output, *more, input_=input_)
    assert exit_.value.code == 1
    sentence = capsys.readouterr().err.strip()
    assert sentence.startswith("error: ")
    assert "\n" not in sentence
    return sentence


def files(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.iterdir())}


def documents_of(dataset: Path, split: str, tokenizer: Path) -> list[str]:
    """The text of every document, cut at the end-of-document ids."""
    shards = ShardSet.open(dataset)
    tokens = np.concatenate(
        [shards.read(split, i, 0, e.tokens) for i, e in enumerate(shards.split(split).shards)]
    ).tolist()
    model = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    documents, begin = [], 0
    for place, token in enumerate(tokens):
        if token == shards.eos_id:
            assert tokens[begin] == shards.bos_id
            documents.append(model.decode(tokens[begin + 1 : place]))
            begin = place + 1
    assert begin == len(tokens)
    return documents


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory, text_dir: Path, tokenizer: Path) -> Path:
    """The 200 documents in shards of 3000 tokens."""
    output = tmp_path_factory.mktemp("built") / "dataset"
    build(tokenizer, output, "--shard-tokens", 3000, "--block-tokens", 1000, input_=[text_dir])
    return output


def test_every_document_is_there_once_in_its_split(built: Path, tokenizer: Path, texts: list[str]) -> None:
    expected = {
        split: [t for t in texts if is_validation(t, SHARE) == (split == "valid")] for split in ("train", "valid")
    }
    assert documents_of(built, "train", tokenizer) == expected["train"]
    assert documents_of(built, "valid", tokenizer) == expected["valid"]
    assert not set(expected["train"]) & set(expected["valid"])


def test_manifest_says_what_is_there(built: Path, tokenizer: Path, texts: list[str]) -> None:
    manifest = read_manifest(built)
    shards = ShardSet.open(built)
    counts = np.zeros(600, dtype=np.int64)
    for number, entry in enumerate(manifest.splits["train"].shards):
        counts += np.bincount(shards.read("train", number, 0, entry.tokens), minlength=600)
    assert manifest.unigram_entropy == unigram_entropy(counts)
    assert 3 < manifest.unigram_entropy < np.log(600)
    assert (manifest.dtype, manifest.vocab_size, manifest.bos_id, manifest.eos_id) == ("uint16", 600, 1, 2)
    assert (
        manifest.tokenizer_sha256
        == files(built)["tokenizer.model"]
        == hashlib.sha256(tokenizer.read_bytes()).hexdigest()
    )
    assert sum(split.docs for split in manifest.splits.values()) == len(texts)
    assert sum(split.text_bytes for split in manifest.splits.values()) == sum(len(text.encode()) for text in texts)
    for split in manifest.splits.values():
        assert split.tokens == sum(shard.tokens for shard in split.shards)
        assert split.docs == sum(shard.docs for shard in split.shards)
        assert all(files(built)[shard.name] == shard.sha256 for shard in split.shards)
    assert manifest.options["val_fraction"] == SHARE
    assert 3 < len(manifest.splits["train"].shards) < 20  # of 200 files
    assert set(files(built)) == {"index.json", "tokenizer.model"} | {
        shard.name for split in manifest.splits.values() for shard in split.shards
    }
    assert verify(built) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_output_does_not_depend_on_workers_or_units(
    tmp_path: Path, built: Path, text_dir: Path, tokenizer: Path, workers: int
) -> None:
    more = ("--shard-tokens", 3000, "--block-tokens", 1000, "--workers", workers, "--unit-bytes", 5000)
    build(tokenizer, tmp_path / "d", *more, input_=[text_dir])
    assert files(tmp_path / "d") == files(built)


def test_long_documents_encode_as_in_one_piece(tokenizer: Path) -> None:
    text = "\n".join(prose(60, seed=3)) + " " * 5000 + "x" * 9000 + "1234567890" * 900
    assert len(text) > 10 * encode.ENCODE_CHUNK
    model = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    for bos, eos in ((True, True), (False, False)):
        encoder = encode.Encoder(tokenizer, encode.EncodeOptions("text", bos, eos, 0.1, 1))
        assert encoder.encode(text).tolist() == model.encode(text, add_bos=bos, add_eos=eos)


def test_without_bos_and_eos(tmp_path: Path, text_dir: Path, texts: list[str], tokenizer: Path) -> None:
    build(tokenizer, tmp_path / "d", "--no-bos", "--no-eos", input_=[text_dir])
    model = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    expected = [token for text in texts if not is_validation(text, SHARE) for token in model.encode(text)]
    shards = ShardSet.open(tmp_path / "d")
    assert shards.read("train", 0, 0, shards.num_tokens("train")).tolist() == expected


def test_bad_lines_are_counted_or_stop_the_build(
    tmp_path: Path, texts: list[str], tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [json.dumps({"text": text}) for text in texts]
    lines[3:3] = ["{broken", '{"text": 3}', '{"body": ""}', "", '{"text": " "}', '{"text": "a\\ud800b"}', "{broken"]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines))
    build(tokenizer, tmp_path / "d", "--max-bad", 0.1, input_=[path])
    report = capsys.readouterr().out.splitlines()
    assert report[:5] == [
        f"skipped: 2 not valid JSON (first at {path}:4)",
        f"skipped: 1 'text' is not a string (first at {path}:5)",
        f"skipped: 1 no key 'text' (first at {path}:6)",
        f"kept: 1 lone surrogate replaced (first at {path}:9)",
        f"left out: 1 without text (first at {path}:8)",
    ]
    kept = documents_of(tmp_path / "d", "train", tokenizer) + documents_of(tmp_path / "d", "valid", tokenizer)
    assert sorted(kept) == sorted([*texts, "a\ufffdb"])
    sentence = refused(capsys, tokenizer, tmp_path / "e", input_=[path])
    assert (
        f"4 of 206 records are bad, above --max-bad 0.01; most often (2): not valid JSON, first at {path}:4" in sentence
    )
    assert f"{path}:4: not valid JSON" in refused(capsys, tokenizer, tmp_path / "e", "--on-bad", "raise", input_=[path])
    assert [p.name for p in tmp_path.iterdir() if p != path] == ["d"]


def test_existing_output(
    tmp_path: Path, text_dir: Path, built: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "d"
    shutil.copytree(built, output)
    before = files(output)
    assert "not empty: choose another or add --overwrite" in refused(capsys, tokenizer, output, input_=[text_dir])
    (tmp_path / "empty.txt").touch()
    assert "no document with text" in refused(capsys, tokenizer, output, "--overwrite", input_=[tmp_path / "empty.txt"])
    assert files(output) == before
    build(tokenizer, output, "--overwrite", input_=[text_dir])
    assert files(output) != before
    assert verify(output) == []
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").touch()
    assert "not a dataset, so it is not replaced" in refused(
        capsys, tokenizer, precious, "--overwrite", input_=[text_dir]
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d", "empty.txt", "precious"]


def test_mistakes(tmp_path: Path, text_dir: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "d"
    one = text_dir / "000.txt"
    for share, split, change in ((0.000001, "valid", "raise"), (0.999999, "train", "lower")):
        sentence = refused(capsys, tokenizer, output, "--val-fraction", share, input_=[one])
        assert f"none of 1 documents fell into the {split} split at --val-fraction {share:g}: {change} it" in sentence
    assert "--val-fraction must lie between" in refused(capsys, tokenizer, output, "--val-fraction", 0, input_=[one])
    assert "--block-tokens (9) must not exceed" in refused(
        capsys, tokenizer, output, "--block-tokens", 9, "--shard-tokens", 8, input_=[one]
    )
    assert "--workers must be 1 or more" in refused(capsys, tokenizer, output, "--workers", 0, input_=[one])
    assert "--max-bad" in refused(capsys, tokenizer, output, "--max-bad", 2, input_=[one])
    assert "cannot read tokenizer" in refused(capsys, tmp_path / "none", output, input_=[one])
    assert "not a SentencePiece model" in refused(capsys, one, output, input_=[one])
    assert "is a file" in refused(capsys, tokenizer, one, input_=[one])
    assert "no file matches" in refused(capsys, tokenizer, output, input_=[tmp_path / "none"])
    assert list(tmp_path.iterdir()) == []


def test_tokenizer_without_bos(
    tmp_path: Path, text_dir: Path, texts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "nobos.model"
    with open(model, "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=file, vocab_size=400, model_type="bpe", byte_fallback=True, bos_id=-1,
            minloglevel=2,
        )  # fmt: skip
    assert "has no BOS token: use --no-bos" in refused(capsys, model, tmp_path / "d", input_=[text_dir])
    build(model, tmp_path / "d", "--no-bos", input_=[text_dir])
    assert ShardSet.open(tmp_path / "d").bos_id == -1


def test_verify_and_inspect(tmp_path: Path, built: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build_shards.main(["verify", str(built)])
    assert "all files are as they were written" in capsys.readouterr().out
    build_shards.main(["inspect", str(built), "--split", "valid", "--sample", "3", "--seq-len", "50"])
    tokens = TokenStream(ShardSet.open(built), "valid", 50, seed=0, shuffle=False).sample(3)
    shown = capsys.readouterr().out
    assert sentencepiece.SentencePieceProcessor(model_file=str(tokenizer)).decode(tokens.tolist()) in shown
    with pytest.raises(SystemExit):
        build_shards.main(["inspect", str(built), "--sample", "1000000"])
    assert "--sample must lie between 0 and" in capsys.readouterr().err

    harmed = tmp_path / "harmed"
    shutil.copytree(built, harmed)
    (harmed / "train-00000.tar").chmod(0o644)
    with open(harmed / "train-00000.tar", "r+b") as file:
        file.seek(4000)
        byte = file.read(1)
        file.seek(4000)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(SystemExit) as exit_:
        build_shards.main(["verify", str(harmed)])
    assert exit_.value.code == 1
    assert "train-00000.tar" in capsys.readouterr().out


def test_inspect_shows_documents_and_lengths(
    tmp_path: Path, built: Path, text_dir: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    histogram = [
        line for line in capsys_of(["inspect", built, "--sample", 2, "--seq-len", 600], capsys) if " to " in line
    ]
    manifest = read_manifest(built)
    assert sum(int(line.split()[3]) for line in histogram if line[0] != "-") == manifest.splits["train"].docs
    shards = ShardSet.open(built)
    ends = shards.document_ends("train", 0, 1200, 601)
    assert next(line for line in histogram if line[0] == "-").startswith(f"--- 0 to {ends[0]}: {ends[0]} tokens: [")
    assert f"--- {ends[-1]} to 601: {601 - ends[-1]} tokens, goes on: [{shards.bos_id}, " in "".join(histogram)

    packing = ("--packing", "bestfit", "--seq-len", 1024, "--align", 64)
    build(tokenizer, tmp_path / "d", *packing, input_=[text_dir])
    shown = capsys_of(["inspect", tmp_path / "d"], capsys)
    assert any(line.startswith("--- 0 to ") for line in shown)
    assert any(line.endswith(" to 1024: padding") for line in shown)
    capsys_of(["verify", tmp_path / "d"], capsys)
    with pytest.raises(SystemExit):
        build_shards.main(["inspect", str(tmp_path / "d"), "--seq-len", "512"])
    assert "packed in rows of 1024 tokens: drop --seq-len 512" in capsys.readouterr().err


def capsys_of(arguments: Sequence[object], capsys: pytest.CaptureFixture[str]) -> list[str]:
    capsys.readouterr()
    build_shards.main([*map(str, arguments)])
    return capsys.readouterr().out.splitlines()


def test_a_tree_of_parquet_files(tmp_path: Path, texts: list[str], built: Path, tokenizer: Path) -> None:
    """FineWeb-Edu's layout: data/CC-MAIN-2013-20/train-00000-of-00014.parquet, ..., with the text in `text`."""
    for number, dump in enumerate(("CC-MAIN-2013-20", "CC-MAIN-2013-48", "CC-MAIN-2024-10")):
        (tmp_path / "data" / dump).mkdir(parents=True)
        for part in range(2):
            some = texts[70 * number + 35 * part :][:35]
            table = pyarrow.table(
                {"text": some, "id": [f"<urn:uuid:{len(t)}>" for t in some], "score": [3.1] * len(some)}
            )
            pyarrow.parquet.write_table(table, tmp_path / "data" / dump / f"train-{part:05d}-of-00002.parquet")
    more = ("--shard-tokens", 3000, "--block-tokens", 1000, "--workers", 2)
    build(tokenizer, tmp_path / "d", *more, input_=[tmp_path / "data"])
    made = {name: digest for name, digest in files(tmp_path / "d").items() if name.endswith(".tar")}
    assert made == {name: digest for name, digest in files(built).items() if name.endswith(".tar")}


def test_packed_documents(tmp_path: Path, texts: list[str], text_dir: Path, tokenizer: Path) -> None:
    packing = ("--packing", "bestfit", "--seq-len", 1024, "--align", 32, "--shard-tokens", 9000, "--block-tokens", 700)
    for workers in (1, 2):
        build(
            tokenizer, tmp_path / f"{workers}", *packing, "--workers", workers, "--unit-bytes", 9000, input_=[text_dir]
        )
    assert files(tmp_path / "1") == files(tmp_path / "2")
    shards = ShardSet.open(tmp_path / "1")
    model = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    found = []
    for split in ("train", "valid"):
        stream = TokenStream(shards, split, 1024, seed=0, shuffle=False)
        for index in range(stream.num_sequences):
            row = stream.row(index)
            assert row.document_starts is not None
            for start in np.flatnonzero(row.document_starts):
                end = start + int(np.argmin(row.labels[start:] != -100))
                assert (row.tokens[start], row.tokens[end]) == (shards.bos_id, shards.eos_id)
                assert start % 32 == 0
                found.append(model.decode(row.tokens[start + 1 : end].tolist()))
    assert sorted(found) == sorted(texts)
    manifest = read_manifest(tmp_path / "1")
    assert manifest.unigram_entropy == pytest.approx(_entropy(tmp_path, text_dir, tokenizer), abs=1e-12)
    assert all(entry.tokens <= 9000 for entry in manifest.splits["train"].shards)


def _entropy(tmp_path: Path, text_dir: Path, tokenizer: Path) -> float:
    """Of the same documents without padding."""
    build(tokenizer, tmp_path / "concat", input_=[text_dir])
    return read_manifest(tmp_path / "concat").unigram_entropy


def test_mistakes_with_packing(
    tmp_path: Path, text_dir: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(*more: object) -> str:
        return refused(capsys, tokenizer, tmp_path / "d", *more, input_=[text_dir / "000.txt"])

    assert "--packing bestfit needs --seq-len" in told("--packing", "bestfit")
    assert "describe the rows of --packing bestfit" in told("--seq-len", 64)
    assert "describe the rows of --packing bestfit" in told("--align", 4)
    assert "--seq-len (64) must be 2 or more and a multiple of --align (48)" in told(
        *("--packing", "bestfit", "--seq-len", 64, "--align", 48)
    )
    assert "--seq-len (64) must not exceed --shard-tokens (50)" in told(
        *("--packing", "bestfit", "--seq-len", 64, "--shard-tokens", 50, "--block-tokens", 10)
    )
    assert "--unit-bytes must be 1 or more, not 0" in told("--unit-bytes", 0)
    assert list(tmp_path.iterdir()) == []


def test_as_a_command_from_standard_input(tmp_path: Path, built: Path, texts: list[str], tokenizer: Path) -> None:
    command = [
        *(
            sys.executable,
            ROOT / "tokenizer" / "build_shards.py",
            "--input",
            "-",
            "--format",
            "txt",
            "--doc-sep",
            "\\r\\t",
        ),
        *("--tokenizer", tokenizer, "--output", tmp_path / "d", "--val-fraction", SHARE, "--workers", 2),
        *("--shard-tokens", 3000, "--block-tokens", 1000),
    ]
    stdin = "\r\t".join(texts).encode()
    done = subprocess.run(list(map(str, command)), cwd=tmp_path, input=stdin, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"unigram entropy of train: " in done.stdout
    tars = {name: digest for name, digest in files(tmp_path / "d").items() if name.endswith(".tar")}
    assert tars == {name: digest for name, digest in files(built).items() if name.endswith(".tar")}


def test_full_disk(tmp_path: Path, text_dir: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A limit on file sizes stands for the full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
    try:
        sentence = refused(capsys, tokenizer, tmp_path / "d", input_=[text_dir])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sentence == f"error: cannot write {tmp_path / 'd'}: File too large"
    assert list(tmp_path.iterdir()) == []
