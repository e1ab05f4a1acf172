"""Which rows of a step are not trained on because their data is damaged, the same on every rank that has a part of them?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NoReturn

from titans_pretrain.data.damage import IGNORED, BadRow
from titans_pretrain.data.stream import MicroBatch
from titans_pretrain.parallel.grid import AgreedError, Grid

WAY_OUT = "restore the data, or raise data.max_bad to go on without it"


class MaskedRows:
    """The count of a run. `limit`: rows that may be masked, counted from the start of this process."""

    def __init__(self, limit: int):
        self.limit = limit
        self.by_shard: Counter[str] = Counter()
        """Rows by the shard that is to blame."""
        self._last = (-1, 0)

    @property
    def total(self) -> int:
        return self.by_shard.total()

    def of_step(self, step: int) -> int:
        """Rows masked in `step`, over all ranks."""
        return self._last[1] if self._last[0] == step else 0

    def agree(self, batch: Sequence[MicroBatch], bad: Sequence[BadRow], grid: Grid, step: int) -> list[str]:
        """Mask in `batch` what any rank that shares its rows found bad. Collective.

        A rank may well read its part of a row, or its copy of it, that another rank could not read.

        Returns:
            what to tell the user, one line per shard; the same on every rank.

        Raises:
            AgreedError: there are more such rows than the limit allows.
        """
        peers = grid.sequence.size * grid.tensor.size
        rows: dict[tuple[int, int], BadRow] = {}  # (data rank, row) -> what its first rank says
        for rank, found in enumerate(grid.gather_objects(list(bad))):
            for row in found:
                rows.setdefault((rank // peers, row.row), row)
        tokens, labels, starts = (
            [line for field in fields if field is not None for line in field] for fields in zip(*batch, strict=True)
        )
        for data_rank, number in rows:
            if data_rank == grid.data.rank:
                tokens[number].zero_()
                labels[number].fill_(IGNORED)
                if starts:
                    starts[number].zero_()

        here = Counter(row.shard for row in rows.values())
        sentences = {row.shard: row.sentence for row in reversed(list(rows.values()))}
        self.by_shard.update(here)
        self._last = (step, len(rows))
        if self.total > self.limit:
            shard = next(iter(here))
            raise AgreedError(
                f"{self.total} rows cannot be read by step {step}, above data.max_bad ({self.limit}): {self._shares()}; "
                f"{WAY_OUT}; of {shard}: {sentences[shard]}"
            )
        return [
            f"step {step}: {count} row{'s' if count > 1 else ''} masked for {shard}, {self.by_shard[shard]} so far "
            f"(data.max_bad {self.limit} in all): {sentences[shard]}"
            for shard, count in here.items()
        ]

    def stop_empty(self, step: int) -> NoReturn:
        """End the run on all ranks: there is nothing to train on in `step`.

        Raises:
            AgreedError: always.
        """
        raise AgreedError(
            f"every row of step {step} is masked, so there is nothing to train on ({self._shares()}): restore the data"
        )

    def summary(self) -> str:
        return f"{self.total} rows were masked since this start: {self._shares()}"

    def _shares(self) -> str:
        return ", ".join(f"{count} of {shard}" for shard, count in self.by_shard.most_common(5)) + (
            f" and {len(self.by_shard) - 5} more shards" if len(self.by_shard) > 5 else ""
        )
