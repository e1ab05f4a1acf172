"""What is done about a row that cannot be read: nothing is guessed, the order stays, and somebody is told.

With `data.on_bad=skip` such a row keeps its place and shape in the batch, and none of its labels counts.
"""

from __future__ import annotations

from typing import NamedTuple

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
