from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.tiny import documents, write_dataset
from tests.inference.tiny import train_tokenizer
from titans_pretrain.data.tokenizer import Tokenizer


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """7 train shards of a little over 2000 tokens in blocks of 300, and one valid shard."""
    return write_dataset(tmp_path / "dataset", documents(280), documents(20, seed=1))


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def tokenizer(tokenizer_file: Path) -> Tokenizer:
    return Tokenizer(tokenizer_file)
