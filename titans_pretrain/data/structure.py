"""Do documents and rows lie in the shards as the manifest says? Checksums tell that bytes are as written; this, that what
was written is sound."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from titans_pretrain.data.shards import ShardSet


def structure_problems(shards: ShardSet) -> Iterator[str]:
    """Sentences about a dataset whose checksums are right; none where all is well.

    Raises:
        UserError: a shard cannot be read.
    """
    options, packing = shards.manifest.options, shards.manifest.packing
    for split, content in shards.manifest.splits.items():
        lengths: list[np.ndarray] = []
        padding = 0
        for number, entry in enumerate(content.shards):
            ends = shards.document_ends(split, number, 0, entry.tokens)
            begins = np.concatenate([[0], ends[:-1]])
            lengths.append(ends - begins)
            where = f"shard {shards.path}/{entry.name}"
            if len(ends) != entry.docs or ends[-1:].tolist() != [entry.tokens] or (ends <= begins).any():
                yield f"{where}: its document ends do not divide its {entry.tokens} tokens into {entry.docs} documents"
            elif packing:
                tokens = shards.read(split, number, 0, entry.tokens)
                filler = tokens[begins] == packing.pad
                padding += int((ends - begins)[filler].sum())
                row_ends = np.arange(packing.seq_len, entry.tokens + 1, packing.seq_len)
                if entry.tokens % packing.seq_len or not np.isin(row_ends, ends).all():
                    yield f"{where}: a document crosses a row of {packing.seq_len} tokens"
                if (begins[~filler] % packing.seq_len % packing.align).any():
                    yield f"{where}: a document does not start at a multiple of {packing.align} tokens in its row"
                if (tokens[np.repeat(filler, ends - begins)] != packing.pad).any():
                    yield f"{where}: a run of padding holds other tokens"
        if packing and padding != (said := options["padding_tokens"][split]):
            yield f"the {split} split holds {padding} tokens of padding, but the manifest says {said}"
        if not packing and "document_lengths" in options:
            counts = length_histogram(np.concatenate([*lengths, np.zeros(0, dtype=np.int64)])).tolist()
            if counts != options["document_lengths"][split]:
                yield f"the lengths of the {split} split's documents are not those that the manifest counts"


def length_histogram(lengths: np.ndarray) -> np.ndarray:
    """How many of `lengths` (int64 [n], each above 0) have 2^k <= length < 2^(k + 1), int64 [largest k + 1]."""
    return np.bincount(np.frexp(lengths.astype(np.float64))[1] - 1) if len(lengths) else np.zeros(0, dtype=np.int64)
