from __future__ import annotations

import pytest

from tests.inference.tiny import prose, train_tokenizer
from titans_pretrain.data.tokenizer import Tokenizer
from titans_pretrain.evaluation.haystack import Haystack, Words


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(train_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="session")
def words(tokenizer: Tokenizer) -> Words:
    return Words(tokenizer)


@pytest.fixture(scope="session")
def haystack(words: Words) -> Haystack:
    return Haystack(words, prose(200, seed=3), "the prose")
