"""Datasets the training tests share: building one takes longer than some of the tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.train.tiny import make_dataset


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data") / "set")
