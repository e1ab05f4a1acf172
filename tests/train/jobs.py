"""What ranks run in these tests: functions for `run_distributed`."""

from __future__ import annotations

from typing import Any

from titans_pretrain.config import config_from_dict
from titans_pretrain.errors import UserError


def traced_train_job(*trees: dict[str, dict[str, Any]]) -> str | None:
    """`train_job` where model.compile stops short of making C++, which takes a minute."""
    from titans_pretrain.model import Titans

    Titans.compile_blocks.__defaults__ = ("aot_eager",)
    return train_job(*trees)


def train_job(*trees: dict[str, dict[str, Any]]) -> str | None:
    """Train by each config in turn, in one process -> the sentence of the first user error, or None."""
    from titans_pretrain.train.environment import find_environment, join
    from titans_pretrain.train.loop import train

    grid = join(find_environment(), "cpu")
    try:
        for tree in trees:
            train(config_from_dict(tree), grid)
    except UserError as error:
        return str(error)
    return None
