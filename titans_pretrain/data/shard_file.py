"""How are bytes of one shard read, and where do its blocks lie?"""

from __future__ import annotations

import json
import os
import shlex
import zlib
from pathlib import Path

import numpy as np

from titans_pretrain.data.cache import HeldFile
from titans_pretrain.data.damage import DamageError
from titans_pretrain.data.manifest import ShardEntry

VERIFY_COMMAND = "python tokenizer/build_shards.py verify"


class ShardFile:
    """An open shard: reads at an offset into an array.

    Args:
        path: what messages call it; opened where `held` is None.
        held: a copy of it in the cache.
        dataset: the location that it is part of; "": the folder of `path`.
    """

    def __init__(self, path: Path | str, held: HeldFile | None = None, dataset: str = ""):
        self.path = path
        where = shlex.quote(dataset or str(Path(path).parent))
        self.remedy = f"restore the file or build the dataset again ({VERIFY_COMMAND} {where} checks all)"
        self._held = held
        try:
            self._descriptor = held.descriptor if held else os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self.size = os.fstat(self._descriptor).st_size
        except OSError as error:
            raise DamageError(f"cannot open shard {path}: {error.strerror}; {self.remedy}", str(path)) from error

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        if getattr(self, "_descriptor", -1) >= 0:
            if self._held:
                self._held.close()
            else:
                os.close(self._descriptor)
            self._descriptor = -1

    def read_into(self, array: np.ndarray, offset: int) -> None:
        """Fill contiguous `array` from byte `offset`.

        Raises:
            DamageError: the disk fails or the file ends early.
        """
        try:  # all at once is the rule, and this path is short for the sake of a row's few microseconds
            done = os.preadv(self._descriptor, (array.data,), offset)
        except OSError:
            done = 0
        if done == array.nbytes:
            return
        view = array.view(np.uint8).data
        while done < len(view):
            try:
                count = os.preadv(self._descriptor, [view[done:]], offset + done)
            except OSError as error:
                raise DamageError(
                    f"cannot read shard {self.path} at byte {offset + done}: {error.strerror}; {self.remedy}",
                    str(self.path),
                ) from error
            if count == 0:
                raise DamageError(
                    f"shard {self.path} ends at byte {self.size}, before byte {offset + len(view)}, where it has data by its "
                    f"index; {self.remedy}",
                    str(self.path),
                )
            done += count


class BlockIndex:
    """The block table of one shard, read from its `__index__` member.

    starts: int64 [blocks], the first token of each block counted from the shard's first.
    tokens, offsets: int64 [blocks], tokens in a block and the byte offset of the first.
    first_tokens: `starts` as a list, which is faster to search for one place.
    checked: whether the CRC of each block was found right.
    """

    def __init__(self, entry: ShardEntry, file: ShardFile):
        content = np.empty(entry.index_bytes, dtype=np.uint8)
        file.read_into(content, entry.index_offset)
        if crc32(content) != entry.index_crc32:
            raise DamageError(
                f"the block index of shard {file.path} is damaged: CRC {crc32(content):08x}, but the manifest says "
                f"{entry.index_crc32:08x}; {file.remedy}",
                str(file.path),
            )
        self.table: list[dict[str, int]] = json.loads(content.tobytes())["blocks"]
        self.tokens = np.array([block["tokens"] for block in self.table], dtype=np.int64)
        self.starts = np.cumsum(self.tokens) - self.tokens
        self.offsets = np.array([block["offset"] for block in self.table], dtype=np.int64)
        self.first_tokens: list[int] = self.starts.tolist()
        self.checked = [False] * len(self.table)


def crc32(array: np.ndarray) -> int:
    """Of a contiguous array's bytes."""
    return zlib.crc32(array.view(np.uint8).data)
