"""What is done about a row that cannot be read: nothing is guessed, the order stays, and somebody is told.

With `data.on_bad=skip` such a row keeps its place and shape in the batch, and none of its labels counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from titans_pretrain.errors import UserError

IGNORED = -100
"""The label of a position whose prediction does not count."""


class DamageError(UserError):
    """Tokens that are missing or not the ones that were written. `shard`: the file to blame, with its folder or URL."""

    def __init__(self, sentence: str, shard: str):
        super().__init__(sentence)
        self.shard = shard


class BadRow(NamedTuple):
    """A row that could not be read."""

    row: int
    """Counted in this rank's share of the step."""
    shard: str
    """The shard that is to blame, with its folder or URL."""
    sentence: str
    """What is wrong with it."""


def read_rows(
    sample: Callable[[int], np.ndarray], numbers: Sequence[int], length: int, skip_bad: bool
) -> tuple[np.ndarray, list[BadRow]]:
    """Sequences by number -> int64 [len(numbers), length], and which of them are bad: those are all zeros.

    Args:
        sample: number -> int64 [length].
        skip_bad: False: the first bad row raises.

    Raises:
        UserError: a sequence cannot be read.
    """
    rows = np.zeros((len(numbers), length), dtype=np.int64)
    bad = []
    for row, number in enumerate(numbers):
        try:
            rows[row] = sample(number)
        except DamageError as error:
            if not skip_bad:
                raise
            bad.append(BadRow(row, error.shard, str(error)))
    return rows, bad
