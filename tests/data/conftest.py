from pathlib import Path

import pytest

from tests.data.tiny import documents, write_dataset


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """7 train shards of a little over 2000 tokens in blocks of 300, and one valid shard."""
    return write_dataset(tmp_path / "dataset", documents(280), documents(20, seed=1))
