"""Where documents begin in rows that hold several, and what follows from it for every layer, computed once a forward.

A row's beginning begins a document, said or not. Padding counts as the end of the document before it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from titans_pretrain.config import ModelConfig
from titans_pretrain.model.attention_scores import document_masks


class Documents(NamedTuple):
    """The documents of rows of t tokens. They begin at multiples of `grid` tokens, which cut a row into pieces."""

    grid: int
    places: Tensor
    """int64 [b, t]: how many tokens of its document are before each token."""
    starts: Tensor
    """bool [b, pieces]: the piece begins a document."""
    masks: tuple[Tensor, ...]
    """What queries see, for `attention_scores.window_attention` or `causal_attention`; empty where a segment or no attention
    at all keeps documents apart."""

    def first_of(self, x: Tensor) -> Tensor:
        """x [b, t, ...] -> [b, pieces, ...], the first token of each piece."""
        return x[:, :: self.grid]


def find_documents(starts: Tensor, config: ModelConfig, dtype: torch.dtype) -> Documents:
    """starts bool [b, t] -> the documents, with masks for scores in `dtype`.

    Raises:
        ValueError: a document begins beside the model's grid.
    """
    grid = config.document_grid
    positions = torch.arange(starts.shape[1], device=starts.device)
    if bool((starts & (positions % grid != 0)).any()):
        row, place = (starts & (positions % grid != 0)).nonzero()[0].tolist()
        raise ValueError(
            f"a document begins at token {place} of row {row}, which is not a multiple of {grid} ({config.document_grid_key})"
        )
    places = positions - (positions * starts).cummax(dim=1).values
    masks: tuple[Tensor, ...] = ()
    if config.has_attention and config.variant not in ("mac", "rmt"):
        window = None if config.variant == "transformer" else config.window
        masks = document_masks(places, window, config.num_persistent if config.has_memory else 0, dtype)
    return Documents(grid, places, places[:, ::grid] == 0, masks)


def extend_pieces(x: Tensor, earlier: Tensor | None, length: int, documents: Documents) -> Tensor:
    """x [b, t, c] -> [b, pieces, length + grid, c]: every piece, the last one filled up with zeros, after the `length`
    tokens before it. Before its first token a document sees `earlier`, [length, c], or zeros."""
    grid, pieces = documents.grid, documents.starts.shape[1]
    filled = F.pad(x, (0, 0, length, pieces * grid - x.shape[1]))
    windows = filled.unfold(1, length + grid, grid).mT
    if length == 0:
        return windows
    # Counted from `length` tokens before the document, where is each of the tokens before a piece?
    at = documents.first_of(documents.places)[..., None] + torch.arange(length, device=x.device)
    outside = (at < length)[..., None]
    before = windows[:, :, :length]
    if earlier is None:
        before = before.masked_fill(outside, 0.0)
    else:
        before = torch.where(outside, earlier[at.clamp(max=length - 1)], before)
    return torch.cat((before, windows[:, :, length:]), dim=2)
