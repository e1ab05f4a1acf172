"""Which source does sequence j of a mixture come from, and which of that source's own sequences is it?

Weights become quotas: how many of PERIOD consecutive sequences a source gets. A table says which of them; it is repeated
without end. Prefix counts of the table then give, for any j and without state, how often each source was drawn before.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from titans_pretrain.errors import UserError

PERIOD = 65536
"""Sequences after which the table repeats: weights are rounded to 1 / PERIOD."""


def quotas(weights: Sequence[float]) -> tuple[int, ...]:
    """How many of PERIOD sequences each source gets, by largest remainder; the sum is PERIOD.

    Raises:
        UserError: a weight above 0 is too small to get any.
    """
    exact = [Fraction(weight) for weight in weights]
    shares = [weight * PERIOD / sum(exact) for weight in exact]
    whole = [int(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda k: (whole[k] - shares[k], k))
    for k in by_remainder[: PERIOD - sum(whole)]:
        whole[k] += 1
    for weight, count in zip(weights, whole, strict=True):
        if weight and not count:
            raise UserError(
                f"a weight of {weight:g} among {[float(w) for w in weights]} is below half of one in {PERIOD} sequences, so "
                "that source would never be drawn: raise it in data.sources or data.phases, or set it to 0"
            )
    return tuple(whole)


def table(counts: Sequence[int]) -> np.ndarray:
    """The source of each of sum(counts) sequences, uint16: at each place the one that is furthest behind its share.

    Each source k appears counts[k] times, and at no place is it a whole sequence or more ahead of its share.
    """
    shared = math.gcd(*counts)  # the sequence then repeats itself inside the table
    steps = [count // shared for count in counts]
    period = sum(steps)
    behind = [0] * len(steps)
    drawn = []
    for _ in range(period):
        behind = list(map(operator.add, behind, steps))
        source = behind.index(max(behind))
        behind[source] -= period
        drawn.append(source)
    return np.tile(np.array(drawn, dtype=np.uint16), shared)


class Blend:
    """The sequence of sources. Pure: every answer is a function of the arguments.

    Args:
        phases: (first sequence, weight of each source) of each phase, by first sequence; the first starts at 0.
    """

    def __init__(self, phases: Sequence[tuple[int, Sequence[float]]]) -> None:
        assert phases[0][0] == 0
        self.starts = [start for start, _ in phases]
        self.quotas = [quotas(weights) for _, weights in phases]
        self._bases = [np.zeros(len(phases[0][1]), dtype=np.int64)]
        for phase, (start, end) in enumerate(zip(self.starts, self.starts[1:], strict=False)):
            self._bases.append(self._bases[-1] + self._table(phase).counts(end - start))

    def place(self, index: int) -> tuple[int, int]:
        """(source, number of the sequence in that source's own count) of sequence `index`."""
        sources, numbers = self.places(np.array([index]))
        return int(sources[0]), int(numbers[0])

    def places(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`place` of many: int64 [n] -> int64 [n], int64 [n]."""
        phases = np.searchsorted(self.starts, indices, side="right") - 1
        sources, numbers = np.empty_like(indices), np.empty_like(indices)
        for phase in np.unique(phases):
            mine = phases == phase
            found, before = self._table(int(phase)).places(indices[mine] - self.starts[phase])
            sources[mine], numbers[mine] = found, self._bases[phase][found] + before
        return sources, numbers

    def counts(self, index: int) -> np.ndarray:
        """How many of the sequences before `index` come from each source, int64 [sources]."""
        phase = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self._bases[phase] + self._table(phase).counts(index - self.starts[phase])

    def _table(self, phase: int) -> _Table:
        return _table_of(self.quotas[phase])


class _Table:
    """One period, and how often its source was drawn in it before each place."""

    def __init__(self, counts: tuple[int, ...]) -> None:
        self._counts = np.array(counts, dtype=np.int64)
        self._sources = table(counts)
        self._before = np.empty(PERIOD, dtype=np.int32)
        for source, count in enumerate(counts):
            self._before[self._sources == source] = np.arange(count)

    def places(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        periods, rest = np.divmod(indices, PERIOD)
        sources = self._sources[rest].astype(np.int64)
        return sources, periods * self._counts[sources] + self._before[rest]

    def counts(self, index: int) -> np.ndarray:
        periods, rest = divmod(index, PERIOD)
        return periods * self._counts + np.bincount(self._sources[:rest], minlength=len(self._counts))


@functools.lru_cache(maxsize=16)
def _table_of(counts: tuple[int, ...]) -> _Table:
    return _Table(counts)
