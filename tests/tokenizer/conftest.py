"""Made-up prose in many documents, and a tokenizer trained on it by the real command."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tokenizer import train_tokenizer


def prose(count: int, seed: int = 0) -> list[str]:
    """Documents of some lines each, with the characters that make tokenizers stumble."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(300)]
    odd = ["  two  spaces ", "\ttab", "naïve café", "日本語", "🙂", "3.14159", "\x00", "<s>", "a\r"]
    documents = []
    for number in range(count):
        lines = [" ".join(rng.choices(words, k=rng.randint(3, 12))) for _ in range(rng.randint(2, 20))]
        lines.insert(1, rng.choice(odd))
        documents.append("\n".join([f"Document {number}", *lines, ""]))
    return documents


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return prose(200)


@pytest.fixture(scope="session")
def text_dir(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    """One .txt file per document."""
    directory = tmp_path_factory.mktemp("texts")
    for number, text in enumerate(texts):
        (directory / f"{number:03d}.txt").write_bytes(text.encode())
    return directory


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory, text_dir: Path) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tok.model"
    train_tokenizer.main(["--input", str(text_dir), "--output", str(path), "--vocab-size", "600"])
    return path
