"""Which tokens does step s of rank r train on?

Sequences are numbered 0, 1, 2, ... without end; the number is the whole state of the stream. Sequence j belongs to epoch
j // num_sequences, and an epoch visits every sequence of the split once, in an order of its own that is a pure function
of (seed, epoch, shards, seq_len): the shards are permuted, and the sequences of each window of WINDOW_SHARDS shards in
that order are permuted among themselves, so that only so many shards are read at a time. Ranks and batch sizes do not
enter: they only say who takes which numbers.
"""

from __future__ import annotations

import functools
import itertools
import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from titans_pretrain.data.damage import IGNORED, BadRow, DamageError
from titans_pretrain.data.packed import Row, check_row_length, read_row
from titans_pretrain.data.permutation import permutation_key, permute, permute_many
from titans_pretrain.data.shards import ShardSet
from titans_pretrain.errors import UserError

WINDOW_SHARDS = 16
"""Shards whose sequences are mixed: 2 billion tokens, 4 GiB, at the default shard size."""


LOCATED_AT_ONCE = 4096
"""Sequences a loader locates together, of several steps where a rank's share is smaller."""


class TokenStream:
    """The sequences of one split, by number.

    Args:
        shards: an opened dataset.
        split: "train" or "valid".
        seq_len: tokens a sequence predicts; of a packed dataset the length of its rows.
        seed: names the order.
        shuffle: False: the order on disk, in every epoch.

    Raises:
        UserError: the split is empty, or too short for one sequence, or packed in rows of another length.
    """

    def __init__(self, shards: ShardSet, split: str, seq_len: int, seed: int, shuffle: bool = True):
        self.shards = shards
        self.split = split
        self.seq_len = seq_len
        self.seed = seed
        self.shuffle = shuffle
        self.packing = shards.manifest.packing
        """The layout of a packed dataset's rows, which are then the sequences; None: sequences are cut anywhere."""
        tokens = [shard.tokens for shard in shards.split(split).shards]
        if self.packing:
            check_row_length(shards, self.packing, split, seq_len)
        # Sequences do not cross shards. Neighbours share one token, the last label of one and first input of the next,
        # but for packed rows, which share none.
        self._sequences = np.array(
            [(count if self.packing else count - 1) // seq_len for count in tokens], dtype=np.int64
        )
        self.num_sequences = int(self._sequences.sum())
        """Sequences per epoch."""
        if not self.num_sequences:
            where = f"its longest of {len(tokens)} shards" if len(tokens) > 1 else "it"
            way_out = "lower data.seq_len"
            if split == "valid":
                way_out += " or eval.length_multiples, or build the dataset with a larger --val-fraction"
            raise UserError(
                f"the {split} split of {shards.path} is too short for one sequence of data.seq_len {seq_len}: {where} has "
                f"{max(tokens)} tokens and {seq_len + 1} are needed; {way_out}"
            )
        self.raw_dtype = None if self.packing else shards.dtype
        """Of `read_into`; None where it does not apply."""
        self._order: _EpochOrder | None = None
        self._announced = (-1, -1)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What decides the order and content of the sequences, but for the seed and seq_len."""
        return {"dataset": self.shards.fingerprint, "shuffle_window": WINDOW_SHARDS}

    def sample(self, index: int, part: int = 0, parts: int = 1) -> np.ndarray:
        """Tokens of sequence `index` (>= 0, any epoch) of a dataset that is not packed, int64 [seq_len + 1]: inputs are all
        but the last, labels all but the first. With `parts` above 1 (a divisor of seq_len) only the part-th of so many
        equal slices is read, int64 [seq_len / parts + 1].

        Raises:
            UserError: the shard is damaged there.
        """
        assert not self.packing, "rows of a packed dataset have labels of their own: use row()"
        tokens = np.empty(self.seq_len // parts + 1, dtype=self.shards.dtype)
        self.read_into(index, tokens, part, parts)
        return tokens.astype(np.int64)

    def read_into(self, index: int, tokens: np.ndarray, part: int = 0, parts: int = 1) -> None:
        """`sample` into a contiguous array of `raw_dtype`, [seq_len / parts + 1].

        Raises:
            UserError: the shard is damaged there.
        """
        shard, sequence = self.locate(index)
        self.shards.read_into(self.split, shard, sequence * self.seq_len + part * (self.seq_len // parts), tokens)

    def row(self, index: int, part: int = 0, parts: int = 1) -> Row:
        """Sequence `index` (>= 0, any epoch), or the part-th of `parts` equal slices of it, as inputs and labels.

        Raises:
            UserError: the shard is damaged there.
        """
        if self.packing:
            row = read_row(self.shards, self.packing, self.split, *self.locate(index))
            return row.part(part, parts)
        tokens = self.sample(index, part=part, parts=parts)
        return Row(tokens[:-1], tokens[1:], None)

    def locate(self, index: int) -> tuple[int, int]:
        """(shard number, sequence number inside it) of sequence `index`."""
        if index < 0:
            raise ValueError(f"sequences are numbered from 0, not {index}")
        epoch, position = divmod(index, self.num_sequences)
        return self._epoch(epoch).locate(position)

    def places(self, indices: np.ndarray) -> np.ndarray:
        """`locate` of many at once, which is several times faster: int64 [n] -> int64 [n, 2]."""
        places = np.empty((len(indices), 2), dtype=np.int64)
        epochs, positions = np.divmod(indices, self.num_sequences)
        for epoch in np.unique(epochs).tolist():
            mine = epochs == epoch
            places[mine, 0], places[mine, 1] = self._epoch(epoch).locate_many(positions[mine])
        return places

    def read_places(
        self, places: np.ndarray, rows: Sequence[np.ndarray] | np.ndarray, part: int = 0, parts: int = 1
    ) -> None:
        """`read_into` of the sequences at `places`, each into its row.

        Raises:
            UserError: a shard is damaged there.
        """
        starts = places[:, 1] * self.seq_len + part * (self.seq_len // parts)
        self.shards.read_rows(self.split, places[:, 0].tolist(), starts.tolist(), rows)

    def announce(self, index: int) -> None:
        """Say that sequences are read from `index` on: a remote dataset then fetches the shards of its window of the order
        and of the next. Free of cost for a local one."""
        if not self.shards.is_remote:
            return
        epoch, position = divmod(index, self.num_sequences)
        order = self._epoch(epoch)
        window = order.window(position)
        if self._announced != (epoch, window):
            self._announced = (epoch, window)
            now, later = order.shards_of(window), order.shards_of(window + 1)
            if not later and self.shuffle:  # the last window: the next epoch has an order of its own
                later = _EpochOrder(self._sequences, self.seed, epoch + 1, True).shards_of(0)
            self.shards.expect(self.split, now, later)

    def _epoch(self, epoch: int) -> _EpochOrder:
        if not self.shuffle:
            epoch = 0
        order = self._order
        if order is None or order.epoch != epoch:
            order = self._order = _EpochOrder(self._sequences, self.seed, epoch, self.shuffle)
        return order


class _EpochOrder:
    """The order of one epoch. `sequences`: how many each shard holds. 16 bytes of memory a shard."""

    def __init__(self, sequences: np.ndarray, seed: int, epoch: int, shuffle: bool):
        self.epoch = epoch
        self._seed, self._shuffle = seed, shuffle
        shards = np.arange(len(sequences))
        self._shards = (
            permute_many(shards, len(sequences), permutation_key(seed, epoch, "shards")) if shuffle else shards
        )
        held = sequences[self._shards]
        ends = np.cumsum(held)
        self._starts = ends - held
        self._windows = np.append(self._starts[::WINDOW_SHARDS], ends[-1])
        self._window_key = functools.lru_cache(maxsize=4)(self._key)

    def _key(self, window: int) -> tuple[int, ...]:
        return permutation_key(self._seed, self.epoch, "sequences", window)

    def window(self, position: int) -> int:
        """Number of the window that holds `position`."""
        return int(self._windows.searchsorted(position, side="right")) - 1

    def shards_of(self, window: int) -> list[int]:
        """The shards of a window; none after the last."""
        shards: list[int] = self._shards[window * WINDOW_SHARDS : (window + 1) * WINDOW_SHARDS].tolist()
        return shards

    def locate(self, position: int) -> tuple[int, int]:
        if self._shuffle:
            window = self.window(position)
            first, end = int(self._windows[window]), int(self._windows[window + 1])
            position = first + permute(position - first, end - first, self._window_key(window))
        place = int(self._starts.searchsorted(position, side="right")) - 1
        return int(self._shards[place]), position - int(self._starts[place])

    def locate_many(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if self._shuffle:
            windows = self._windows.searchsorted(positions, side="right") - 1
            shuffled = np.empty_like(positions)
            for window in np.unique(windows).tolist():
                mine = windows == window
                first, end = int(self._windows[window]), int(self._windows[window + 1])
                shuffled[mine] = first + permute_many(positions[mine] - first, end - first, self._window_key(window))
            positions = shuffled
        places = self._starts.searchsorted(positions, side="right") - 1
        return self._shards[places], positions - self._starts[places]


class MicroBatch(NamedTuple):
    """int64 [rows, seq_len], or this rank's slice of the columns, each.

    labels[:, t] is the token after tokens[:, t], or -100 where none is predicted."""

    tokens: torch.Tensor
    labels: torch.Tensor
    document_starts: torch.Tensor | None = None
    """bool, where a document begins that knows nothing of those before it (data.reset_at_documents); None: nowhere."""


class Sequences(Protocol):
    """What a BatchLoader reads: a TokenStream, or a Mixture of several."""

    seq_len: int
    raw_dtype: np.dtype[Any] | None

    def places(self, indices: np.ndarray) -> np.ndarray: ...
    def read_places(
        self, places: np.ndarray, rows: Sequence[np.ndarray] | np.ndarray, part: int = 0, parts: int = 1
    ) -> None: ...
    def row(self, index: int, part: int = 0, parts: int = 1) -> Row: ...
    def announce(self, index: int) -> None: ...


class BatchLoader:
    """This rank's share of every optimizer step, read ahead by one thread. Iterates as long as batch_size does; close it
    when done.

    Args:
        stream: where sequences come from.
        batch_size: sequences per step over all ranks; an iterable gives the number of each step, from the first one on.
        micro_batch: sequences per MicroBatch; 0: the rank's share at once.
        data_rank, data_size: this rank among the data-parallel ones; it takes the sequences
            position + data_rank * batch_size / data_size + m for m in 0..batch_size / data_size - 1.
        sequence_rank, sequence_size: this rank among those that share a row; it reads the sequence_rank-th of
            sequence_size equal slices of each sequence.
        start: number of the first sequence of the first step.
        prefetch: steps read ahead.
        document_starts: whether micro-batches say where documents start; for packed datasets.
        skip_bad: a row that cannot be read becomes zeros with ignored labels and is told in `bad`; False: it raises.

    Raises:
        UserError: the batch does not divide. While iterating: whatever the stream raised, in this thread.
    """

    def __init__(
        self,
        stream: Sequences,
        *,
        batch_size: int | Iterable[int],
        micro_batch: int,
        data_rank: int,
        data_size: int,
        start: int,
        prefetch: int,
        sequence_rank: int = 0,
        sequence_size: int = 1,
        document_starts: bool = False,
        skip_bad: bool = False,
    ):
        if isinstance(batch_size, int):
            _check_divides(batch_size, data_size, micro_batch)
            batch_size = itertools.repeat(batch_size)
        assert 0 <= data_rank < data_size
        assert 0 <= sequence_rank < sequence_size
        assert stream.seq_len % sequence_size == 0
        assert stream.raw_dtype is None or not document_starts  # sources may be packed in different ways
        self.position = start
        """Number of the first sequence of the step that comes next."""
        self.bad: list[BadRow] = []
        """The rows of the last step that could not be read."""
        self._queue: queue.Queue[_Step | BaseException] = queue.Queue(maxsize=prefetch)
        self._stop = threading.Event()
        self._error: BaseException | None = None
        reader = _Reader(
            stream, data_rank, data_size, sequence_rank, sequence_size, micro_batch, document_starts, skip_bad
        )
        self._thread = threading.Thread(
            target=_read_ahead,
            args=(reader, start, iter(batch_size), self._queue, self._stop),
            name="batch-loader",
            daemon=True,
        )
        self._thread.start()

    def __iter__(self) -> BatchLoader:
        return self

    def __next__(self) -> list[MicroBatch]:
        if self._stop.is_set():
            raise ValueError("the loader is closed")
        if self._error is None:
            item = self._queue.get()
            if not isinstance(item, BaseException):
                self.position += item.size
                self.bad = item.bad
                return item.batch
            self._error = item
        raise self._error

    def close(self) -> None:
        """End the thread; may be called again."""
        self._stop.set()
        while self._thread.is_alive():
            # The thread may be waiting for room; after one more put it sees the flag.
            while not self._queue.empty():
                self._queue.get_nowait()
            self._thread.join(timeout=0.05)

    def __enter__(self) -> BatchLoader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _check_divides(batch_size: int, data_size: int, micro_batch: int) -> None:
    if batch_size % data_size or (micro_batch and batch_size // data_size % micro_batch):
        raise UserError(
            f"a batch of {batch_size} sequences does not divide over {data_size} data-parallel ranks and micro-batches of "
            f"{micro_batch}: change data.batch_tokens or data.micro_batch"
        )


class _Step(NamedTuple):
    size: int
    """Sequences over all ranks."""
    batch: list[MicroBatch]
    bad: list[BadRow]


class _Reader:
    """Reads one rank's share of a step."""

    def __init__(
        self,
        stream: Sequences,
        data_rank: int,
        data_size: int,
        sequence_rank: int,
        sequence_size: int,
        micro_batch: int,
        document_starts: bool,
        skip_bad: bool,
    ):
        self._stream = stream
        self._data_rank, self._data_size = data_rank, data_size
        self._slice = {"part": sequence_rank, "parts": sequence_size}
        self._length = stream.seq_len // sequence_size
        self._micro_batch = micro_batch
        self._document_starts = document_starts
        self._skip_bad = skip_bad

    def share(self, first: int, size: int) -> range:
        """The sequences of the step that starts at `first` which are this rank's."""
        _check_divides(size, self._data_size, self._micro_batch)
        rows = size // self._data_size
        return range(first + self._data_rank * rows, first + (self._data_rank + 1) * rows)

    def places(self, shares: list[range]) -> list[np.ndarray]:
        """Where the sequences of each share lie; nothing where they are read as rows, which find themselves."""
        if self._stream.raw_dtype is None:
            return [np.empty(0)] * len(shares)
        ends = np.cumsum([len(share) for share in shares])
        return np.split(self._stream.places(np.concatenate([np.arange(s.start, s.stop) for s in shares])), ends[:-1])

    def read(self, share: range, places: np.ndarray) -> tuple[list[MicroBatch], list[BadRow]]:
        self._stream.announce(share.start)
        bad: list[BadRow] = []
        try:
            fields = self._rows(share, places)
        except DamageError:
            if not self._skip_bad:
                raise
            fields, bad = self._sound_rows(share)
        parts = (torch.from_numpy(field).split(self._micro_batch or len(share)) for field in fields)
        return [MicroBatch(*part) for part in zip(*parts, strict=True)], bad

    def _rows(self, share: range, places: np.ndarray) -> tuple[np.ndarray, ...]:
        """Tokens, labels and, where asked for, document starts of all sequences, [len(share), length] each."""
        if self._stream.raw_dtype is not None:
            # Bytes from the disk into their row, then one pass each for inputs and labels.
            raw = np.empty((len(share), self._length + 1), dtype=self._stream.raw_dtype)
            self._stream.read_places(places, raw, **self._slice)
            return raw[:, :-1].astype(np.int64, order="C"), raw[:, 1:].astype(np.int64, order="C")
        rows = [self._stream.row(index, **self._slice) for index in share]
        used = tuple(zip(*rows, strict=True))[: 3 if self._document_starts else 2]
        return tuple(np.stack(field) for field in used)

    def _sound_rows(self, share: range) -> tuple[tuple[np.ndarray, ...], list[BadRow]]:
        """`_rows` where some are bad: those are zeros without labels."""
        shape = (len(share), self._length)
        fields: tuple[np.ndarray, ...] = (np.zeros(shape, dtype=np.int64), np.full(shape, IGNORED, dtype=np.int64))
        if self._document_starts:
            fields += (np.zeros(shape, dtype=bool),)
        bad = []
        for number, index in enumerate(share):
            try:
                row = self._stream.row(index, **self._slice)
            except DamageError as error:
                bad.append(BadRow(number, error.shard, str(error)))
                continue
            for field, value in zip(fields, row, strict=False):
                field[number] = value
        return fields, bad


def _read_ahead(
    reader: _Reader,
    first: int,
    sizes: Iterator[int],
    steps: queue.Queue[_Step | BaseException],
    stop: threading.Event,
) -> None:
    try:
        while not stop.is_set():
            coming: list[tuple[int, range]] = []
            while sum(len(share) for _, share in coming) < LOCATED_AT_ONCE:
                size = next(sizes, None)
                if size is None:
                    break
                coming.append((size, reader.share(first, size)))
                first += size
            if not coming:
                raise StopIteration
            places = reader.places([share for _, share in coming])
            for (size, share), found in zip(coming, places, strict=True):
                if stop.is_set():
                    break
                steps.put(_Step(size, *reader.read(share, found)))
    except BaseException as error:  # whatever it is, the consumer must not wait for ever
        steps.put(error)
