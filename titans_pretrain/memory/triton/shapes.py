"""How a scan is cut up for the kernels: tiles, hidden slices, checkpoints and ranges. Pure arithmetic."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from titans_pretrain.memory.path import ScanInputs
from titans_pretrain.memory.state import MemoryOptions

TILE = 64
"""Tokens of a tile in chunks of 64 and more; a shorter chunk is one tile."""

MAX_HEAD_DIM = 128
TILE_CHUNKS = (16, 32, 64)
MAX_CHUNK = 4096

PARALLEL_CHUNK = 256
"""From this chunk length on the tiles of a chunk run at once and chunk follows chunk; in shorter ones tile follows tile."""

SCRATCH_BYTES = 1 << 30
"""What the scratch arrays of a range of tiles may take. Larger ranges give more programs at a time and fewer launches; at
1 GiB a range has over a thousand tiles at every shape we use."""


def padded(head_dim: int) -> int:
    """head_dim as a power of two."""
    return max(16, 1 << (head_dim - 1).bit_length())


def slice_of(head_dim: int, hidden: int) -> int:
    """Hidden channels worked on at a time: a [padded head_dim, slice] matrix in fp32 is at most 16 KiB."""
    return min(hidden, 64 if padded(head_dim) <= 64 else 32)


@dataclass(frozen=True)
class Shapes:
    """Everything the launches need to know beside the tensors."""

    batch: int
    length: int
    heads: int
    head_dim: int
    hidden: int
    chunk: int
    operand_bytes: int

    @staticmethod
    def of(inputs: ScanInputs, options: MemoryOptions) -> Shapes:
        batch, length, heads, head_dim = inputs.q.shape
        hidden = inputs.initial_weights[0].shape[-1]
        return Shapes(batch, length, heads, head_dim, hidden, options.chunk_size, inputs.q.element_size())

    @property
    def pairs(self) -> int:
        """(batch, head) pairs, n in the kernels."""
        return self.batch * self.heads

    @property
    def tile(self) -> int:
        return min(self.chunk, TILE)

    @property
    def tiles_per_chunk(self) -> int:
        return self.chunk // self.tile

    @property
    def parallel(self) -> bool:
        return self.chunk >= PARALLEL_CHUNK

    @property
    def block(self) -> int:
        """Elements of a slice that a program of the scans inside a chunk takes."""
        return min(self.matrix, 1024)

    @property
    def tiles(self) -> int:
        return -(-self.length // self.tile)

    @property
    def chunks(self) -> int:
        """Chunks that begin inside the sequence."""
        return -(-self.length // self.chunk)

    @property
    def width(self) -> int:
        """D in the kernels."""
        return padded(self.head_dim)

    @property
    def slice(self) -> int:
        """Hidden channels worked on at a time."""
        return slice_of(self.head_dim, self.hidden)

    @property
    def matrix(self) -> int:
        """Elements of a slice of one layer's weights."""
        return self.width * self.slice

    @property
    def slices(self) -> int:
        return self.hidden // self.slice

    @property
    def checkpoint_every(self) -> int:
        """Tiles between two saved states, whole chunks: about 2 * hidden tokens, so that the saved states are of the size of
        q, k, v and the output together, whatever the chunk."""
        return self.tiles_per_chunk * max(1, round(2 * self.hidden / self.chunk))

    @property
    def checkpoints(self) -> int:
        """Saved states; the first one, before token 0, is an input."""
        return (self.tiles - 1) // self.checkpoint_every

    @property
    def open_chunk(self) -> int | None:
        """The first tile of a chunk that is open at the end of the sequence."""
        return None if self.length % self.chunk == 0 else self.length // self.chunk * self.tiles_per_chunk

    def chunks_of(self, first: int, tiles: int) -> list[tuple[int, int]]:
        """(first tile, tiles) of each chunk of a range."""
        last, step = first + tiles, self.tiles_per_chunk
        return [(begin, min(step, last - begin)) for begin in range(first, last, step)]

    def ranges(self, backward: bool) -> Iterator[tuple[int, int]]:
        """(first tile, tiles) of runs that begin at a checkpoint and whose scratch arrays fit SCRATCH_BYTES, in order."""
        step = self.checkpoint_every
        step *= max(1, math.floor(SCRATCH_BYTES / self._bytes_per_tile(backward) / step))
        for first in range(0, self.tiles, step):
            yield first, min(step, self.tiles - first)

    def scratch_bytes(self, backward: bool) -> int:
        """What the scratch arrays of the largest range take; smaller arrays are left out."""
        return self._bytes_per_tile(backward) * max(tiles for _, tiles in self.ranges(backward))

    def _bytes_per_tile(self, backward: bool) -> int:
        matrix = self.width * self.hidden * self.operand_bytes
        rows = self.tile * self.hidden * self.operand_bytes
        return self.pairs * (8 * matrix + 8 * rows if backward else 4 * matrix)
