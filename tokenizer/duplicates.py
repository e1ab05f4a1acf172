"""Was this document seen before? A hash table of 16-byte hashes in numpy: 21 to 43 bytes per different document."""

from __future__ import annotations

import numpy as np

_LOAD = 0.75


class SeenHashes:
    """A set that only grows, of hashes uint64 [2]."""

    def __init__(self) -> None:
        self._table = np.zeros((1024, 2), dtype=np.uint64)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def nbytes(self) -> int:
        return self._table.nbytes

    def add(self, hashes: np.ndarray) -> np.ndarray:
        """Add `hashes`, uint64 [n, 2], and say which were new, bool [n]; of equal ones among them the first is."""
        hashes = hashes.copy()
        hashes[:, 0] |= hashes[:, 0] == 0  # an empty place holds 0
        order = np.lexsort((hashes[:, 1], hashes[:, 0]))  # stable: equal hashes stay in their order
        ordered = hashes[order]
        first = np.ones(len(order), dtype=bool)
        first[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
        candidates = order[first]
        while self._count + len(candidates) > _LOAD * len(self._table):
            old = self._table[self._table[:, 0] != 0]
            self._table = np.zeros((2 * len(self._table), 2), dtype=np.uint64)
            self._place(old)
        new = np.zeros(len(hashes), dtype=bool)
        new[candidates] = self._place(hashes[candidates])
        self._count += int(new.sum())
        return new

    def _place(self, hashes: np.ndarray) -> np.ndarray:
        """Put hashes, all different, in their places; which were not there yet. Linear probing, all at once."""
        mask = np.uint64(len(self._table) - 1)
        slots, left = hashes[:, 0] & mask, np.arange(len(hashes))
        new = np.zeros(len(hashes), dtype=bool)
        while len(left):
            there = self._table[slots]
            free = there[:, 0] == 0
            mine = (there == hashes[left]).all(axis=1)
            self._table[slots[free]] = hashes[left[free]]  # of several that want one place one gets it ...
            won = free & (self._table[slots] == hashes[left]).all(axis=1)
            new[left[won]] = True
            more = ~mine & ~won  # ... and the others look further
            slots, left = (slots[more] + np.uint64(1)) & mask, left[more]
        return new
