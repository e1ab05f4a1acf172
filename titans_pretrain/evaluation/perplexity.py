"""How does the loss go on behind the training length? The mean token loss by position in a sequence, the state carried.

A sequence is read in pieces, and of a piece only sums by bucket are kept: memory does not grow with the length where the
model's state does not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice, pairwise
from typing import Any

import numpy as np
import torch

from titans_pretrain.errors import UserError
from titans_pretrain.evaluation.scoring import Model, token_losses

EDGES = (0.0, 0.25, 0.5, 0.75, 1.0, 2.0, 4.0, 8.0, 16.0)
"""Borders of the buckets, in training lengths."""


def bucket_places(train_length: int, multiple: int) -> list[int]:
    """EDGES in tokens up to `multiple` training lengths, which is the last even where it is none of them."""
    places = [round(edge * train_length) for edge in EDGES if edge < multiple] + [multiple * train_length]
    return sorted(set(places))


@torch.no_grad()
def perplexity_by_position(
    model: Model,
    rows: Iterable[np.ndarray],
    *,
    train_length: int,
    multiple: int,
    piece: int,
    batch: int,
    device: str | torch.device = "cpu",
    state_bytes: Callable[[Any], int] = lambda state: 0,
) -> dict[str, Any]:
    """Mean token loss of each bucket.

    Args:
        rows: int64 [multiple * train_length + 1] each: inputs are all but the last, labels all but the first.
        train_length: tokens of a training sequence.
        piece: tokens that run at once.
        batch: rows that run together.
        state_bytes: of a state, for the report.

    Returns:
        {"train_length", "multiple", "sequences", "buckets": [{"from", "to" (in training lengths), "tokens", "loss" (nats),
        "error" (standard error of the mean over sequences; None of one), "perplexity"}], "loss", "perplexity" (over all),
        "state_bytes": [{"at" (training lengths), "bytes" (of one row)}] from the training length on, "finite"}.
        A loss that is not finite is None. Up to the second entry of "state_bytes" a constant state may still fill up.

    Raises:
        UserError: there are no rows.
    """
    places = bucket_places(train_length, multiple)
    length = places[-1]
    means: list[np.ndarray] = []  # per row its mean loss in each bucket
    sizes: list[dict[str, Any]] = []
    for group in _batches(rows, batch):
        tokens = torch.from_numpy(np.stack(group))
        assert tokens.shape[1] == length + 1, tokens.shape
        sums = torch.zeros(len(group), len(places) - 1, dtype=torch.float64)
        state, sizes = None, []
        # Pieces are as long up to the training length as behind it, so that states compare.
        for start, stop in _pieces([0, *(place for place in places if place >= train_length)], piece):
            hidden, state = model.hidden(tokens[:, start:stop].to(device), state)
            losses, _ = token_losses(model, hidden, tokens[:, start + 1 : stop + 1].to(device))
            bucket = torch.from_numpy(np.searchsorted(places, np.arange(start, stop), side="right") - 1)
            sums.index_add_(1, bucket, losses.double().cpu())
            if stop in places and stop >= train_length:
                sizes.append({"at": stop / train_length, "bytes": state_bytes(state) // len(group)})
        means += list((sums / torch.tensor(places).diff()).numpy())
    if not means:
        raise UserError(f"there is no sequence of {length:,} tokens to measure; lower --multiple or give more text")
    return _report(np.stack(means), places, train_length, multiple, sizes)


def _report(
    means: np.ndarray, places: list[int], train_length: int, multiple: int, sizes: list[dict[str, Any]]
) -> dict[str, Any]:
    count = len(means)
    buckets = []
    for number, (start, stop) in enumerate(pairwise(places)):
        column = means[:, number]
        error = float(column.std(ddof=1) / math.sqrt(count)) if count > 1 else None
        buckets.append(
            {
                "from": start / train_length,
                "to": stop / train_length,
                "tokens": count * (stop - start),
                **_loss(float(column.mean())),
                "error": error if error is not None and math.isfinite(error) else None,
            }
        )
    over_all = float((means * np.diff(places)).sum() / (count * places[-1]))
    return {
        "train_length": train_length,
        "multiple": multiple,
        "sequences": count,
        "buckets": buckets,
        **_loss(over_all),
        "state_bytes": sizes,
        "finite": bool(np.isfinite(means).all()),
    }


def _loss(loss: float) -> dict[str, float | None]:
    finite = math.isfinite(loss)
    return {"loss": loss if finite else None, "perplexity": math.exp(min(loss, 700.0)) if finite else None}


def _pieces(places: Sequence[int], piece: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of every piece; none crosses one of `places`."""
    for first, last in pairwise(places):
        for start in range(first, last, piece):
            yield start, min(start + piece, last)


def _batches(rows: Iterable[np.ndarray], size: int) -> Iterator[list[np.ndarray]]:
    iterator = iter(rows)
    while group := list(islice(iterator, size)):
        yield group


def text_rows(ids: Sequence[int], length: int, most: int) -> list[np.ndarray]:
    """Token ids of one text -> its first `most` sequences of length + 1, each beginning with the last token before it.

    Raises:
        UserError: the text is too short for one.
    """
    if len(ids) < length + 1:
        raise UserError(
            f"the text has {len(ids):,} tokens, and a sequence of {length:,} needs {length + 1:,}; lower --multiple or give "
            "a longer --text"
        )
    tokens = np.asarray(ids, dtype=np.int64)
    count = min(most, (len(tokens) - 1) // length)
    return [tokens[i * length : (i + 1) * length + 1] for i in range(count)]
